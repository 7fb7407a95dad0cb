"""What every Triton launch needs to know of where it runs: may it, on how many processors, compiled or interpreted."""

import os
from functools import lru_cache
from zlib import crc32

import torch
from torch import Tensor

from sparsesurvey.structure import Unavailable

DTYPES = (torch.bfloat16, torch.float16)  # the interpreter takes float32 as well, which no tensor core multiplies exactly
SHARED = 232_448  # bytes of shared memory that a block may have on sm_90; the compiler does not refuse more


def interpreting() -> bool:
    """Does Triton run its kernels as Python (TRITON_INTERPRET=1)? Then a CPU can, slowly: tests do."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def require(values: Tensor, dtypes: tuple[torch.dtype, ...] = DTYPES, capability: tuple[int, int] = (8, 0)) -> None:
    """Raise Unavailable unless a Triton kernel can multiply these values where they are."""
    if values.dtype not in (*dtypes, *[torch.float32] * interpreting()):
        raise Unavailable(f"needs {' or '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)}, got {values.dtype}")
    if interpreting():
        return
    if values.device.type != "cuda":
        raise Unavailable(f"needs a CUDA device, got an operand on {values.device}")
    have = torch.cuda.get_device_capability(values.device)
    if have < capability:
        raise Unavailable(f"needs CUDA compute capability {capability[0]}.{capability[1]}, got {have[0]}.{have[1]}")


def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; a few where kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def bucket(tokens: int) -> int:
    """Tokens rounded up to a power of two: numbers of tokens that share a tuning."""
    return 1 << max(4, (tokens - 1).bit_length())


@lru_cache
def model(device: torch.device) -> int:
    """A number below 4096 for the name of a GPU."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return crc32(name.encode()) % 4096


def tuning(x: Tensor) -> int:
    """What a tuner keys on: a number for a ``bucket`` of tokens on one model of GPU, since Triton itself tells only generations apart.

    A multiple of 16, as all of them are: Triton compiles such numbers and others apart.
    """
    return 16 * (4096 * bucket(len(x)).bit_length() + model(x.device))


def divides_by_16_bytes(size: int, dtype: torch.dtype) -> bool:
    """Whether rows of so many numbers start at multiples of 16 bytes, as tensor descriptors want it."""
    return size * dtype.itemsize % 16 == 0
