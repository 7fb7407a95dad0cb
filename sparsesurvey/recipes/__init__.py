"""Recipes, one file each; whatever stands in this folder is found."""

from importlib import import_module
from pkgutil import iter_modules

from sparsesurvey.recipe import Recipe, Score


def all_recipes() -> dict[str, type[Recipe]]:
    """Every recipe of this package by the name of its class, dense first, the rest by name."""
    modules = [import_module(f"{__name__}.{info.name}") for info in iter_modules(__path__)]
    found = {kind.__name__: kind for module in modules for kind in vars(module).values()
             if isinstance(kind, type) and issubclass(kind, Recipe) and kind.__module__ == module.__name__
             and not kind.__name__.startswith("_")}
    return {"Recipe": Recipe, **dict(sorted(found.items()))}


globals().update(all_recipes())
__all__ = ["Recipe", "Score", "all_recipes", *all_recipes()]
