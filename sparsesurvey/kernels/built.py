"""Peers whose source is no part of ours and that have no package: shared libraries that the reader builds, called by ctypes.

Each has an environment variable that says where it is; the file that calls it says how to build it.
"""

import ctypes
import os
from typing import Any

import torch
from torch import Tensor

from sparsesurvey.structure import Unavailable

PLACE, NUMBER = ctypes.c_void_p, ctypes.c_int


def function(title: str, variable: str, names: dict[torch.dtype, str], arguments: list[Any], values: Tensor) -> Any:
    """The library's product for values of this dtype; Unavailable where it is not built or cannot multiply them."""
    path = os.environ.get(variable)
    if not path:
        raise Unavailable(f"needs {title}, built by you, and its path in {variable}")
    if values.dtype not in names:
        raise Unavailable(f"needs {' or '.join(str(dtype).removeprefix('torch.') for dtype in names)}, got {values.dtype}")
    require_gpu(values)
    try:
        found = getattr(ctypes.CDLL(path), names[values.dtype])
    except (OSError, AttributeError) as error:
        raise Unavailable(f"needs {title} in {variable}: {str(error).splitlines()[0]}") from None
    found.argtypes = arguments
    return found


def require_gpu(values: Tensor) -> None:
    if values.device.type != "cuda":
        raise Unavailable(f"needs a CUDA device, got an operand on {values.device}")
    have = torch.cuda.get_device_capability(values.device)
    if have < (8, 0):
        raise Unavailable(f"needs CUDA compute capability 8.0, got {have[0]}.{have[1]}")


def call(title: str, product: Any, *arguments: Tensor | int | None) -> None:
    """Call it, tensors by their addresses; what is not 0 is an error."""
    status = product(*(part.data_ptr() if isinstance(part, Tensor) else part for part in arguments))
    if status:
        raise RuntimeError(f"{title} returned the CUDA error {status}")


def stream(x: Tensor) -> int:
    """torch's current stream on this device."""
    return torch.cuda.current_stream(x.device).cuda_stream


def feature_rows(x: Tensor, step: int) -> Tensor:
    """``x.T``, contiguous, with zeros up to a multiple of ``step`` tokens; no copy of what is so already."""
    return torch.nn.functional.pad(x.T, (0, -len(x) % step)).contiguous() if len(x) % step else x.T.contiguous()
