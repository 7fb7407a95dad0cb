"""pyproject.toml, environment.yml, constraints.txt and package-lock.json say the same."""

import json
import re
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
EXTRAS = PROJECT["optional-dependencies"]
WANTED = [Requirement(text) for text in sorted({*PROJECT["dependencies"], *EXTRAS["book"], *EXTRAS["test"]})]
CONSTRAINTS = (ROOT / "constraints.txt").read_text(encoding="utf-8")
PINS = {
    canonicalize_name(name): Version(number)
    for name, number in (line.split("==") for line in CONSTRAINTS.splitlines() if line and not line.startswith("#"))
}


def pip_part() -> list[str]:
    return next(entry["pip"] for entry in ENVIRONMENT["dependencies"] if isinstance(entry, dict))


def test_environment_is_python_pip_and_the_requirements_of_pyproject():
    assert set(ENVIRONMENT) == {"name", "channels", "dependencies"}
    from_conda = [entry for entry in ENVIRONMENT["dependencies"] if isinstance(entry, str)]
    assert from_conda == [f"python{PROJECT['requires-python']}", "pip"]
    parsed = [Requirement(text) for text in pip_part()]
    assert sorted(map(str, parsed)) == sorted(map(str, WANTED))


@pytest.mark.parametrize("requirement", WANTED, ids=str)
def test_the_constraints_pin_what_is_asked_for(requirement):
    assert PINS[canonicalize_name(requirement.name)] in requirement.specifier


def test_the_constraints_are_plain_pins_that_any_machine_can_install():
    for line in CONSTRAINTS.splitlines():
        assert line.startswith("#") or re.fullmatch(r"[\w.-]+==[\w.]+", line), line
    assert not [name for name in PINS if name.startswith(("nvidia-", "cuda-", "cupy")) or name == "triton"]
    assert "sparsesurvey" not in PINS


@pytest.mark.parametrize("requirement", WANTED, ids=str)
def test_what_is_installed_satisfies_pyproject(requirement):
    assert requirement.specifier.contains(version(requirement.name), prereleases=True)


def test_python_is_new_enough():
    assert sys.version_info >= (3, 11)
    assert PROJECT["requires-python"] == ">=3.11"


def test_jupyter_book_is_version_1():
    assert version("jupyter-book").startswith("1."), "version 2 ignores _config.yml and exits with 0"


def test_front_end_files_are_pinned_without_a_registry():
    wanted = json.loads((ROOT / "package.json").read_text(encoding="utf-8"))["dependencies"]
    lock = json.loads((ROOT / "package-lock.json").read_text(encoding="utf-8"))["packages"]
    assert lock[""]["dependencies"] == wanted
    for name, number in wanted.items():
        assert lock[f"node_modules/{name}"]["version"] == number
    for path, entry in lock.items():
        assert "resolved" not in entry
        assert not path or entry["integrity"].startswith("sha512-")


def test_the_widget_code_of_the_page_is_that_of_the_wheel():
    """The anywidget of npm runs on the page, the one of PyPI in JupyterLab."""
    wanted = json.loads((ROOT / "package.json").read_text(encoding="utf-8"))["dependencies"]
    assert Version(wanted["anywidget"]) == PINS["anywidget"]


def test_the_licence_is_apache_2():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "Version 2.0, January 2004" in text and len(text) == 11358
    assert PROJECT["license"] == "Apache-2.0"
