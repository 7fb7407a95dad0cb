"""The notebooks in git: stripped, thin, in the table of contents, and with the parameters that the driver passes."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import execute
import nbformat
import pytest
import yaml
from chapters import chapters, pages

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PARAMETERS = {"device": "cpu", "preset": "default", "threads": 1, "record": ""}
LONGEST = 12  # lines of a code cell
ABSOLUTE = re.compile(r"""["'\s(](/(home|root|work|mnt|Users|content)/|[A-Z]:\\)""")
LOOPS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.For, ast.AsyncFor, ast.While)

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path: Path) -> list:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def without_magics(source: str) -> str:
    return "\n".join(line for line in source.splitlines() if not line.lstrip().startswith(("%", "!", "?")))


def test_all_are_stripped():
    names = [str(path.relative_to(ROOT)) for path in NOTEBOOKS]
    done = subprocess.run([sys.executable, "-m", "nbstripout", "--verify", *names], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"run: nbstripout on what it names: {done.stdout}"


@each
def test_is_a_valid_notebook_for_the_plain_python_kernel(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata.get("sparsesurvey", {})) <= {"after", "alone"}


@each
def test_has_one_title_and_starts_with_it(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown"]
    assert re.match(r"# \S", cells[0].source)
    prose = re.sub(r"```.*?```", "", "\n\n".join(cell.source for cell in cells), flags=re.S)
    assert len(re.findall(r"^# ", prose, flags=re.M)) == 1


@each
def test_has_one_parameters_cell_with_the_parameters_that_the_driver_passes(path):
    """``record``, the folder for rows that are to be shipped, only where rows are measured."""
    tagged = [cell for cell in code_cells(path) if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    assert {"record": "", **execute.defaults(path)} == PARAMETERS


@each
def test_is_in_the_table_of_contents(path):
    assert f"notebooks/{path.stem}" in pages(ROOT)


@each
def test_is_thin(path):
    """Calls of a few lines: what needs a loop or a definition belongs in the library, where it is tested."""
    for cell in code_cells(path):
        lines = [line for line in cell.source.splitlines() if line.strip() and not line.lstrip().startswith("#")]
        assert len(lines) <= LONGEST, cell.source
        found = [node for node in ast.walk(ast.parse(without_magics(cell.source))) if isinstance(node, LOOPS)]
        assert not found, cell.source


@each
def test_names_no_place_of_one_machine(path):
    for cell in nbformat.read(path, as_version=4).cells:
        assert not ABSOLUTE.search(f" {cell.source}"), cell.source


def test_every_chapter_of_the_contents_is_here():
    found = {chapter.source for chapter in chapters(ROOT)}
    assert found == set(NOTEBOOKS)


def test_every_structure_has_a_chapter():
    """``nm.py``, ``nm.ipynb`` and the page ``nm`` share one stem; the dense baseline is the chapter on the MLP."""
    structures = {path.stem for path in (ROOT / "sparsesurvey" / "structures").glob("[a-z]*.py")}
    if not (ROOT / "notebooks" / "scoreboard.ipynb").is_file():
        pytest.skip("the last chapter, the scoreboard, is not written yet")
    assert structures <= {path.stem for path in NOTEBOOKS}


def test_no_executed_notebook_is_in_git():
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    assert "_build/" in ignored and "book/_assets/vendor/" in ignored and "node_modules/" in ignored


def test_plain_jupyter_book_executes_the_notebooks_itself():
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    assert config["execute"]["execute_notebooks"] == "force"
    assert {".venv", "node_modules", "_build", "**/_assets"} <= set(config["exclude_patterns"])
    assert "sphinx_thebe" not in config["sphinx"]["config"]["extensions"]
