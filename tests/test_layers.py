"""Who may import whom, read from the sources: the floor plan of the library, enforced."""

import ast
import sys
from pathlib import Path

import pytest

import sparsesurvey

LIBRARY = Path(sparsesurvey.__file__).parent
MODULES = sorted(LIBRARY.rglob("*.py"))
NAMES = {path: ".".join(path.relative_to(LIBRARY.parent).with_suffix("").parts).removesuffix(".__init__")
         for path in MODULES}
LAZY = {"scipy", "triton", "cupy", "cupyx", "stk"}  # a structure works without them, except for the kernels that need them
HANDED = {"scores", "comparing", "pruning", "recipe", "benchmark", "experiments", "linear", "packed", "train", "calibration", "figures",
          "widgets", "scoreboard", "selection", "gated", "gpu", "mlp", "operators", "plans"}  # are handed structures


def imports(path: Path) -> list[tuple[str, bool]]:
    """Every module that a file imports, and whether it does so when it is imported itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {id(node) for function in ast.walk(tree) if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
              for node in ast.walk(function)}
    found = []
    for node in ast.walk(tree):
        at_once = id(node) not in inside
        if isinstance(node, ast.Import):
            found += [(alias.name, at_once) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import: write the module's full name"
            found.append((node.module, at_once))
            parts = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [(part, at_once) for part in parts if part in NAMES.values()]
    return found


def ours(path: Path) -> set[str]:
    return {name for name, _ in imports(path) if name.split(".")[0] == "sparsesurvey"}


def others(path: Path) -> set[str]:
    tops = {name.split(".")[0] for name, _ in imports(path)}
    return tops - {"sparsesurvey"} - set(sys.stdlib_module_names)


def below(folder: str) -> list[Path]:
    return [path for path in MODULES if path.parent == LIBRARY / folder]


@pytest.mark.parametrize("path", below("structures") + below("kernels"), ids=NAMES.get)
def test_structures_and_kernels_know_structure_py_only(path):
    allowed = {"sparsesurvey.structure", "sparsesurvey.packing", "sparsesurvey.structures", "sparsesurvey.kernels"}
    strange = {name for name in ours(path) if ".".join(name.split(".")[:2]) not in allowed}
    assert not strange, f"{NAMES[path]} may import structure.py and other structures, not {strange}"
    beside = {"numpy"} if path.parent.name == "kernels" else set()  # the interpreter of Triton is written in it
    assert others(path) <= {"torch", *LAZY, *beside}


@pytest.mark.parametrize("path", below("structures"), ids=NAMES.get)
def test_what_may_be_missing_is_imported_when_it_is_needed(path):
    early = {name for name, at_once in imports(path) if at_once and name.split(".")[0] in LAZY}
    assert not early, f"{NAMES[path]} must import {early} inside of the kernel that needs it"


def test_structure_py_stands_alone():
    path = LIBRARY / "structure.py"
    assert not ours(path) and others(path) == {"torch"}


@pytest.mark.parametrize("path", [path for path in MODULES if path.stem in HANDED], ids=NAMES.get)
def test_structures_are_handed_over(path):
    named = {name for name in ours(path) if name.startswith(("sparsesurvey.structures", "sparsesurvey.kernels"))}
    assert not named, f"{NAMES[path]} is handed structures, it must not import {named}"


@pytest.mark.parametrize("path", MODULES, ids=NAMES.get)
def test_the_library_does_not_know_the_book(path):
    assert not others(path) & {"notebooks", "book", "tests", "sparsesurvey_tests", "conftest"}


def test_no_module_imports_itself_in_a_circle():
    """Among the imports that run at once; annotations' imports under TYPE_CHECKING do not count."""
    graph = {name: {part for part, at_once in imports(path) if at_once and part in NAMES.values() and part != name}
             - typing_only(path) - {"sparsesurvey"} for path, name in NAMES.items()}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way[way.index(name):], name))
        if name not in done:
            for part in graph[name]:
                visit(part, (*way, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def typing_only(path: Path) -> set[str]:
    """Modules imported under ``if TYPE_CHECKING`` only."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            found |= {part.module for part in ast.walk(node) if isinstance(part, ast.ImportFrom)}
    return found


def test_the_layers_are_where_the_test_looks():
    """A renamed module must not escape the rules."""
    assert below("structures") and {"scores", "linear", "figures"} <= {path.stem for path in MODULES}
