"""The hash of measured code follows imports, ignores prose and other structures, and is the same on every Python."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from sparsesurvey import source
from sparsesurvey.measure import code_of

PLAIN = '''import os
from sparsesurvey.base import thing
KERNEL = """
line  

  # no comment
"""
def f(x):
    return f"{x!r:#^9}" + "#"
'''
PROSE = '''"""Docs.

More."""
import os  # why

from sparsesurvey.base import thing
KERNEL = """
line  

  # no comment
"""


# A remark, é.
def f(x):
    "é"; "more"
    # Another.

    return f"{x!r:#^9}" + "#"   # end é
"""After."""
'''


def test_prose_is_no_code():
    assert source.code_text(PROSE).replace("    ;\n", "") == source.code_text(PLAIN)
    assert "line  \n\n  # no comment" in source.code_text(PROSE)
    assert source.code_text(PLAIN) != source.code_text(PLAIN.replace("line", "lime"))
    assert source.code_text(PLAIN) != source.code_text(PLAIN.replace("line  \n\n", "line  \n"))


@pytest.fixture
def package(tmp_path):
    """A package of two structures over one base, found dynamically as ours are."""
    root = tmp_path / "sparsesurvey"
    (root / "structures").mkdir(parents=True)
    (root / "__init__.py").write_text('__version__ = "1"\n')
    (root / "base.py").write_text("def thing():\n    from sparsesurvey import deep\n    return deep.VALUE\n")
    (root / "deep.py").write_text("VALUE = 1\n")
    (root / "structures" / "__init__.py").write_text("import importlib, pkgutil\n")
    (root / "structures" / "a.py").write_text("from sparsesurvey.base import thing\n\nA = 1\n")
    (root / "structures" / "b.py").write_text("from ..base import thing\nfrom .a import A\n")
    return root


def edit(path: Path, text: str) -> None:
    path.write_text(text)
    os.utime(path, ns=(time.time_ns(), time.time_ns()))


def test_code_follows_imports_and_ignores_prose(package):
    a = lambda: code_of("sparsesurvey.structures.a", package)
    b = lambda: code_of("sparsesurvey.structures.b", package)
    first, second = a(), b()
    assert len(first) == 12 and first != second
    edit(package / "structures" / "a.py", '"""Docs."""\n\nfrom sparsesurvey.base import thing  # why\n\n\nA = 1\n')
    assert (a(), b()) == (first, second)
    edit(package / "structures" / "b.py", "from ..base import thing\nfrom .a import A\nB = 2\n")
    assert a() == first and b() != second  # another structure's code does not count
    edit(package / "structures" / "__init__.py", "import importlib\n")
    assert a() == first
    edit(package / "deep.py", "VALUE = 2\n")  # imported two files away and inside a function
    assert a() != first
    edit(package / "deep.py", "# one\nVALUE = 1\n")
    assert a() == first
    both = code_of("sparsesurvey.structures.a,sparsesurvey.structures.b", package)
    assert both == code_of("sparsesurvey.structures.b,sparsesurvey.structures.a", package)


def test_imports_for_type_checkers_alone_do_not_count(package):
    text = ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from sparsesurvey import deep\n"
            "else:\n    from sparsesurvey import other\n")
    (package / "other.py").write_text("A = 1\n")
    edit(package / "typed.py", text)
    first = code_of("sparsesurvey.typed", package)
    edit(package / "deep.py", "VALUE = 2\n")
    assert code_of("sparsesurvey.typed", package) == first
    edit(package / "other.py", "A = 2\n")
    assert code_of("sparsesurvey.typed", package) != first


def test_device_code_counts_for_a_gpu_only(package):
    """What a CPU measured stays what it was when a kernel changes that only a GPU runs."""
    (package / "kernels").mkdir()
    (package / "kernels" / "__init__.py").write_text("")
    (package / "kernels" / "c.py").write_text("C = 1\n")
    (package / "structures" / "c.py").write_text("def spmm_triton():\n    from sparsesurvey.kernels import c\n    return c.C\n")
    both = lambda: [code_of("sparsesurvey.structures.c", package, device) for device in ("cpu", "cuda")]
    cpu, gpu = both()
    assert code_of("sparsesurvey.structures.c", package) == cpu != gpu
    edit(package / "kernels" / "c.py", "C = 2\n")
    assert both()[0] == cpu and both()[1] != gpu
    a = [code_of("sparsesurvey.structures.a", package, device) for device in ("cpu", "cuda")]
    assert a[0] == a[1], "a structure without device code has one hash"
    named = code_of("sparsesurvey.kernels.c", package)
    edit(package / "kernels" / "c.py", "C = 3\n")
    assert code_of("sparsesurvey.kernels.c", package) != named, "what is named counts always"


def test_code_of_a_structure_here_knows_no_other(tmp_path):
    root = tmp_path / "sparsesurvey"
    shutil.copytree(source.PACKAGE, root, ignore=shutil.ignore_patterns("__pycache__", "recorded"))
    before = code_of("sparsesurvey.structures.dense", root)
    assert before == code_of("sparsesurvey.structures.dense")
    edit(root / "structures" / "nm.py", "BROKEN = 1\n")
    assert code_of("sparsesurvey.structures.dense", root) == before
    edit(root / "structure.py", (root / "structure.py").read_text() + "\nNEW = 1\n")
    assert code_of("sparsesurvey.structures.dense", root) != before


@pytest.mark.parametrize("name", ["sparsesurvey.nothing", "sparsesurvey.recorded", "math", "nowhere.at.all"])
def test_code_of_what_has_no_file(name):
    with pytest.raises(ValueError, match=name):
        code_of(name)


@pytest.mark.parametrize("name", ["", "a b", "a,,b", "sparsesurvey/nm.py", None])
def test_code_of_no_module(name):
    with pytest.raises(ValueError, match="dotted modules"):
        code_of(name)


def test_code_of_a_module_outside_of_the_package():
    assert code_of(__name__) != code_of("sparsesurvey.structure")


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_every_python_finds_the_same_code(version):
    python = shutil.which(f"python{version}")
    if python is None:
        pytest.skip(f"no python{version} here")
    script = ("import importlib.util as u, sys; spec = u.spec_from_file_location('source', sys.argv[1]);"
              "m = u.module_from_spec(spec); spec.loader.exec_module(m); print(m.code_of(sys.argv[2]))")
    modules = ",".join(sorted(
        ".".join(("sparsesurvey", *path.relative_to(source.PACKAGE).with_suffix("").parts))
        for path in source.PACKAGE.rglob("*.py") if path.name != "__init__.py"))
    done = subprocess.run([python, "-c", script, source.__file__, modules], capture_output=True, text=True)
    if done.returncode and f"{version}" in done.stderr and "not found" in done.stderr:
        pytest.skip(f"python{version} is only a name here")
    assert done.stdout.strip() == code_of(modules), done.stderr


def test_cuda_sources_that_a_kernel_names_count(package):
    (package / "kernels").mkdir()
    (package / "kernels" / "__init__.py").write_text("")
    (package / "kernels" / "c.py").write_text('FILE = "c.cu"\n')
    (package / "kernels" / "c.cu").write_text("int one;\n")
    (package / "kernels" / "other.cu").write_text("int one;\n")
    (package / "structures" / "c.py").write_text("def spmm_cuda():\n    from sparsesurvey.kernels import c\n    return c.FILE\n")
    gpu, cpu = (code_of("sparsesurvey.structures.c", package, device) for device in ("cuda:0", "cpu"))
    edit(package / "kernels" / "other.cu", "int two;\n")
    assert code_of("sparsesurvey.structures.c", package, "cuda:0") == gpu
    edit(package / "kernels" / "c.cu", "int two;\n")
    assert code_of("sparsesurvey.structures.c", package, "cuda:0") != gpu
    assert code_of("sparsesurvey.structures.c", package, "cpu") == cpu
