"""Compile a Triton kernel for a GPU that is not there, and read what the assembler made of it."""

import ctypes
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

os.environ.setdefault("TRITON_CACHE_DIR", str(Path(__file__).parent.parent / "_build/triton"))  # not in somebody's home
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class Code(NamedTuple):
    """What the machine code of a kernel uses, and how often it has each instruction."""

    registers: int
    shared: int  # bytes a block
    spilt: int  # bytes of stack and local memory a thread
    instructions: dict[str, int]  # by full name, as HGMMA.64x128x16.F32.BF16

    def count(self, prefix: str) -> int:
        return sum(number for name, number in self.instructions.items() if name.startswith(prefix))


def compiled(kernel, signature: dict[str, str], constants: dict[str, object], capability: int = 90, **options) -> Code:
    """``kernel`` (a ``@triton.jit`` function) for one signature: type by argument, the constants' values by name.

    Pointers and widths are taken to be multiples of 16, as Triton finds those of aligned tensors to be.
    """
    types = {**signature, **dict.fromkeys(constants, "constexpr")}
    names = [name for name in kernel.arg_names if name in types]
    assert names == kernel.arg_names, f"missing: {set(kernel.arg_names) - set(names)}"
    round_ones = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if types[name].startswith("*") or name.endswith("_width")}
    source = ASTSource(fn=kernel, signature={name: types[name] for name in names}, constexprs=constants, attrs=round_ones)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return read(made.asm["cubin"], made.metadata.shared)


def find_nvrtc() -> Path | None:
    """The library that compiles CUDA, if a wheel has brought it (those of torch for GPUs do)."""
    return next(iter(sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/**/libnvrtc.so.*"), reverse=True)), None)


def can_compile_cuda() -> bool:
    return bool(shutil.which("nvcc") or find_nvrtc())


def cuda_compiled(source: Path, options: tuple[str, ...], shared: int, architecture: str = "sm_90a") -> Code:
    """A CUDA file with one kernel, which is given ``shared`` bytes at its launch."""
    if not shutil.which("nvcc"):
        return read(by_nvrtc(source.read_bytes(), (*options, f"--gpu-architecture={architecture}")), shared)
    target = scratch() / f"{source.stem}{abs(hash((options, architecture)))}.cubin"
    subprocess.run(["nvcc", "-cubin", f"-arch={architecture}", *options, source, "-o", target], check=True, capture_output=True)
    return read(target.read_bytes(), shared)


def by_nvrtc(source: bytes, options: tuple[str, ...]) -> bytes:
    nvrtc = ctypes.CDLL(str(find_nvrtc()))
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"kernel.cu", 0, None, None)
    given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    if nvrtc.nvrtcCompileProgram(program, len(options), given):
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(log.value.decode())
    nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    cubin = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetCUBIN(program, cubin)
    return cubin.raw


def read(cubin: bytes, shared: int) -> Code:
    """Registers, spills and instructions of the only kernel in a cubin."""
    usage = disassembled("cuobjdump", "-res-usage", cubin)
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    listing = disassembled("nvdisasm", "-c", cubin)
    counts: dict[str, int] = {}
    for name in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_.x]+)", listing):
        counts[name] = counts.get(name, 0) + 1
    return Code(found["REG"], shared, found["STACK"] + found["LOCAL"], counts)


def disassembled(tool: str, flag: str, cubin: bytes) -> str:
    path = scratch() / f"{abs(hash(cubin))}.cubin"
    path.write_bytes(cubin)
    return subprocess.run([TOOLS / tool, flag, path], capture_output=True, text=True, check=True).stdout


@lru_cache
def scratch() -> Path:
    return Path(tempfile.mkdtemp(prefix="cubins"))
