"""Where to compute: a device by its name, checked to be there."""

import re

import torch


def check_device(device: str | torch.device) -> torch.device:
    """``"cpu"``, ``"cuda"`` or ``"cuda:0"`` as a torch device; ValueError for any other and for a GPU not present."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", str(device)):
        raise ValueError(f"device must be cpu, cuda or cuda:<number>, got {device!r}")
    where = torch.device(device)
    count = torch.cuda.device_count() if where.type == "cuda" and torch.cuda.is_available() else 0
    if where.type == "cuda" and count == 0:
        raise ValueError(f"device is {device!r}, but torch {torch.__version__} sees no GPU here; allowed: cpu")
    if where.index is not None and where.type == "cuda" and where.index >= count:
        raise ValueError(f"device is {device!r}, but this machine has {count} GPU(s), counted from cuda:0")
    return where
