"""What a machine can do at most, as three small runs: copy memory, multiply dense matrices, call the smallest kernel.

Apart from ``benchmark`` so that the hash of what was calibrated changes only when a probe does.
"""

from collections.abc import Callable
from pathlib import Path

import torch

Run = Callable[[], object]


def copy_run(size: int, device: torch.device) -> tuple[Run, int]:
    """Copy one buffer of ``size`` bytes to another, and the bytes moved: each is read once and written once."""
    source = torch.ones(size // 4, dtype=torch.float32, device=device)  # written: memory really stands behind it
    target = torch.zeros_like(source).add_(1)
    return lambda: target.copy_(source), 2 * source.numel() * 4


def matmul_run(side: int, dtype: torch.dtype, device: torch.device) -> tuple[Run, int]:
    """Multiply two square matrices of random numbers, and the FLOP: a GPU multiplies zeros faster, and cooler."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(side, side, generator=generator).to(device, dtype) for _ in range(2))
    target = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=target), 2 * side**3


def launch_run(device: torch.device) -> tuple[Run, int]:
    """Add to one number, 1 FLOP: on a CPU the time torch takes to get there, on a GPU that of launch after launch."""
    number = torch.zeros(1, device=device)
    return lambda: number.add_(1), 1


def last_cache_bytes(device: torch.device) -> int:
    """Bytes of the largest cache before memory; 0 where the system does not tell."""
    if device.type == "cuda":
        return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
    units, sizes = {"K": 2**10, "M": 2**20, "G": 2**30}, [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text.rstrip("KMG")) * units.get(text[-1:], 1))
    return max(sizes)
