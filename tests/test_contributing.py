"""What CONTRIBUTING.md says is enough to add a structure: one file, found and checked with no other change."""

import os
import re
import shutil
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from sparsesurvey.linear import SparseLinear
from sparsesurvey.onestep import HOOKS
from sparsesurvey.recipe import Recipe
from sparsesurvey.structures import NM

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_the_example_passes_every_contract_test(tmp_path):
    code, _ = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.S)
    (name,) = re.findall(r"`sparsesurvey/structures/(\w+)\.py`: definition", GUIDE)
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "sparsesurvey", tmp_path / "sparsesurvey", ignore=skip)
    (tmp_path / "tests").mkdir()
    for test in ("test_contract.py", "test_layers.py"):
        shutil.copy(ROOT / "tests" / test, tmp_path / "tests")
    path = tmp_path / "sparsesurvey" / "structures" / f"{name}.py"
    path.write_text(code, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--doctest-modules", "tests", str(path)]
    done = subprocess.run([*command, "-k", name], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-3000:]
    found = re.search(r"(\d+) passed", done.stdout)
    assert found and int(found[1]) > 60, done.stdout[-500:]


def test_every_file_that_the_guides_name_is_there():
    for guide in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / guide).read_text(encoding="utf-8")
        paths = r"`((?:sparsesurvey|tests|book|notebooks)/[\w./-]+\.\w+|[\w-]+\.(?:toml|yml|txt|json))`"
        named = set(re.findall(paths, text))
        missing = {name for name in named if not (ROOT / name).exists() and "columns" not in name}
        assert not missing, guide


def test_the_example_of_the_readme_runs():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S)
    found: dict = {}
    exec(textwrap.dedent(code), found)
    assert found["y"].shape == (32, 8)


def test_the_recipe_of_the_guide_trains():
    _, code = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.S)
    found = {"dataclass": dataclass, "ClassVar": ClassVar, "Recipe": Recipe, "__name__": __name__}
    exec(textwrap.dedent(code), found)
    (recipe,) = (kind() for kind in found.values() if isinstance(kind, type) and issubclass(kind, Recipe) and kind is not Recipe)
    layer = SparseLinear(torch.randn(8, 16, generator=torch.Generator().manual_seed(0)), NM(2, 4), recipe)
    with torch.no_grad():
        layer.weight.copy_(layer.weight.flip(1))
    before = layer.mask.clone()
    layer.update(9, 20, {})
    assert torch.equal(layer.mask, before)
    layer.update(10, 20, {})
    assert torch.equal(layer.mask, NM(2, 4).mask(layer.weight.detach().abs())) and not torch.equal(layer.mask, before)
    assert set(recipe.table) == set(HOOKS) and str(recipe) == "every tenth"
