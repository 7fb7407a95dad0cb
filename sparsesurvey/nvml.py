"""Energy of an NVIDIA GPU, from the counter that its driver keeps, through the C library that comes with the driver."""

import ctypes
from collections.abc import Callable
from functools import lru_cache
from time import perf_counter
from typing import Any

import torch

BATCH = 32  # calls between two looks at the clock


@lru_cache(maxsize=1)
def _library() -> Any:
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
        return None if library.nvmlInit_v2() else library
    except (OSError, AttributeError):
        return None


def spent(device: torch.device) -> float | None:
    """Joules that the GPU has used since its driver was loaded; None where nobody counts them."""
    library = _library() if device.type == "cuda" else None
    if library is None:
        return None
    try:
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
        handle, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()
        if library.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(handle)):
            return None
        failed = library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules))
    except AttributeError:  # a torch without the UUID, a driver without the counter
        return None
    return None if failed else millijoules.value / 1e3


def energy(run: Callable[[], object], device: torch.device, seconds: float = 1.0) -> float | None:
    """Joules of one call, the mean over about so many seconds of calls; None where the GPU does not count.

    The counter is that of the whole board, memory and idle power included, and moves every 20 to 100 ms.
    """
    if spent(device) is None:
        return None
    run()
    torch.cuda.synchronize(device)
    before, start, calls = spent(device), perf_counter(), 0
    while not calls or perf_counter() - start < seconds:
        for _ in range(BATCH):
            run()
        calls += BATCH
        torch.cuda.synchronize(device)
    after = spent(device)
    return None if before is None or after is None or after <= before else (after - before) / calls
