"""Run the launches of CUDA kernels on a CPU, thread by thread: see emulated.h."""

import ctypes
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparsesurvey.kernels import cuda

HERE, SOURCES = Path(__file__).parent, Path(cuda.__file__).parent
MARK = -77.0  # what lies around a result, and must lie there still


@lru_cache
def library(folder: Path, stem: str, definitions: tuple[tuple[str, int], ...]) -> ctypes.CDLL:
    """A kernel's file as a library, with the few instructions that a CPU does not have from emulated_dense.h."""
    path = folder / ("_".join([stem, *(f"{name}{value}" for name, value in definitions)]) + ".so")
    command = ["g++", "-O1", "-std=c++20", "-shared", "-fPIC", "-Wno-unknown-pragmas", f"-I{SOURCES}", f"-I{HERE}", '-DEMULATED="emulated_dense.h"',
               *cuda.options(dict(definitions))[1:], str(HERE / f"emulated_{stem}.cpp"), "-o", str(path)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(path))


class Emulator:
    """Stands for ``cuda.launch``: the last tensor is the result; what was launched is in ``launches``."""

    def __init__(self, folder: Path):
        self.folder, self.late, self.launches = folder, False, []

    def __call__(self, file: str, name: str, definitions, programs: int, threads: int, shared: int, device, *arguments) -> None:
        arrays, numbers = [part for part in arguments if isinstance(part, Tensor)], [part for part in arguments if isinstance(part, int)]
        *given, y = arrays
        guarded = torch.full((y.numel() + 128,), MARK, dtype=y.dtype)
        places = (ctypes.c_void_p * len(arrays))(*(part.data_ptr() for part in (*given, guarded[64:])))
        sizes = (ctypes.c_longlong * len(arrays))(*(part.untyped_storage().nbytes() for part in arrays))
        made = library(self.folder, Path(file).stem, tuple(sorted(definitions.items())))
        made.launch(programs, shared, int(self.late), places, sizes, (ctypes.c_longlong * len(numbers))(*numbers))
        assert (guarded[:64] == MARK).all() and (guarded[-64:] == MARK).all(), "written outside of the result"
        assert not (guarded[64:-64] == MARK).any(), "not all of the result was written"
        y.copy_(guarded[64:-64].as_strided(y.shape, y.stride()))
        self.launches.append((file, dict(definitions), programs, threads, shared))


@pytest.fixture
def emulator(monkeypatch, tmp_path_factory) -> Emulator:
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    made = Emulator(tmp_path_factory.getbasetemp())
    monkeypatch.setattr(cuda, "launch", made)
    return made
