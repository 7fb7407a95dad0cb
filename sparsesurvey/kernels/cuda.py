"""CUDA kernels of this folder through CuPy: NVRTC compiles them where they are first used, CuPy keeps what it made."""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from sparsesurvey.structure import Unavailable

HERE = Path(__file__).parent


def options(definitions: Mapping[str, int]) -> tuple[str, ...]:
    """Options of the compiler, the same wherever a kernel is compiled."""
    return "-std=c++17", *(f"-D{name}={value}" for name, value in sorted(definitions.items()))


def require_cupy() -> None:
    """Raise Unavailable without CuPy."""
    try:
        import cupy  # noqa: F401
    except ImportError:
        raise Unavailable("needs cupy") from None


def shared_bytes(device: torch.device) -> int:
    """Bytes of shared memory that one block of threads may have on this GPU."""
    import cupy

    return cupy.cuda.Device(number(device)).attributes["MaxSharedMemoryPerBlockOptin"]


def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def number(device: torch.device) -> int:
    """The number of a CUDA device, the current one's if it has none."""
    return torch.cuda.current_device() if device.index is None else device.index


@lru_cache(maxsize=None)
def kernel(file: str, name: str, definitions: tuple[tuple[str, int], ...], shared: int, device: int) -> Any:
    """CuPy's function for one kernel of a file, on one device, ready to be given so many bytes of shared memory."""
    import cupy

    with cupy.cuda.Device(device):
        module = cupy.RawModule(code=(HERE / file).read_text(encoding="utf-8"), options=options(dict(definitions)))
        function = module.get_function(name)
        function.max_dynamic_shared_size_bytes = shared
    return function


def launch(file: str, name: str, definitions: Mapping[str, int], programs: int, threads: int, shared: int,
           device: torch.device, *arguments: torch.Tensor | int) -> None:
    """Run a kernel on the device's current stream of torch; tensors go by their addresses, integers as 64 bits."""
    import cupy

    index = number(device)
    function = kernel(file, name, tuple(sorted(definitions.items())), shared, index)
    plain = tuple(part.data_ptr() if isinstance(part, torch.Tensor) else part for part in arguments)
    with cupy.cuda.Device(index), cupy.cuda.ExternalStream(torch.cuda.current_stream(device).cuda_stream):
        function((programs,), (threads,), plain, shared_mem=shared)
