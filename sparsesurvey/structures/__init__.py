"""One file per structure. Every concrete ``Structure`` in a module of this folder is found and re-exported here."""

import importlib
import inspect
import pkgutil

from sparsesurvey.structure import Structure


def all_structures() -> dict[str, type[Structure]]:
    """Every structure of the survey: ``{class name: class}``, discovered from the files of this folder."""
    found: dict[str, type[Structure]] = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for name, value in vars(module).items():
            concrete = inspect.isclass(value) and issubclass(value, Structure) and not inspect.isabstract(value)
            if concrete and value.__module__ == module.__name__:
                found[name] = value
    return found


globals().update(all_structures())
__all__ = ["all_structures", *sorted(all_structures())]
