"""The same run on several processes of ``torchrun``: who this one is, and sums over all of them.

Alone, without torchrun, every function does nothing: there is no second code path.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn


def start(device: str) -> str:
    """Join the processes that torchrun started, if it did; the device of this one."""
    if "RANK" not in os.environ or dist.is_initialized():
        return device
    if torch.device(device).type == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return device


def world() -> tuple[int, int]:
    """The number of this process and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def first() -> bool:
    """Is this the process that writes?"""
    return world()[0] == 0


def wait() -> None:
    """Until all processes are here."""
    if world()[1] > 1:
        dist.barrier()


def total(*numbers: float, device: torch.device | str = "cpu") -> list[float]:
    """The sum of each number over all processes."""
    if world()[1] == 1:
        return list(numbers)
    tensor = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Every gradient becomes its mean over the processes, the same bits in each."""
    count = world()[1]
    if count == 1:
        return
    grads: list[Tensor] = [p.grad for p in parameters if p.grad is not None]
    pending = [dist.all_reduce(grad, async_op=True) for grad in grads]
    for work, grad in zip(pending, grads):
        work.wait()
        grad.div_(count)


def agreed(mine: bool) -> bool:
    """What the first process says: decisions by the clock must be the same in all."""
    if world()[1] == 1:
        return mine
    said = torch.tensor([mine], dtype=torch.int64, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.broadcast(said, 0)
    return bool(said.item())
