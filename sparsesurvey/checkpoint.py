"""Checkpoints: one safetensors file that holds the tensors and, as JSON in its header, everything else.

One file is one atomic rename: there is no moment in which weights and step, or model and optimizer, are of different
ages, and a run killed at any byte leaves the last whole checkpoint. A checksum finds bits that changed later.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

FORMAT = "sparsesurvey checkpoint 1"


class BadCheckpoint(ValueError):
    """A checkpoint is damaged, or belongs to another run; the message says what was found and what is allowed."""


def save(path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Write atomically and durably: under another name, synced to the disk, then renamed."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {"format": FORMAT, "about": json.dumps(about), "checksum": _checksum(tensors)}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, metadata=header)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    if hasattr(os, "O_DIRECTORY"):  # the new name must reach the disk as well
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def load(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, on the CPU, and everything else. BadCheckpoint if the file is not whole; FileNotFoundError if absent."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    allowed = "allowed: a file written by sparsesurvey.train; delete it to start anew"
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
        about = json.loads(header.get("about", "null"))
    except (SafetensorError, ValueError) as error:
        raise BadCheckpoint(f"checkpoint {path} is damaged: {error}; {allowed}") from error
    if header.get("format") != FORMAT or not isinstance(about, dict):
        raise BadCheckpoint(f"checkpoint {path} has the format {header.get('format')!r}, not {FORMAT!r}; {allowed}")
    if header.get("checksum") != _checksum(tensors):
        raise BadCheckpoint(f"checkpoint {path} is damaged: its tensors changed after it was written; {allowed}")
    return tensors, about


def _checksum(tensors: dict[str, Tensor]) -> str:
    total = 0
    for name in sorted(tensors):
        total = zlib.crc32(name.encode(), total)
        total = zlib.crc32(tensors[name].flatten().view(torch.uint8).numpy(), total)
    return f"{total:08x}"


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters (tied ones once) and saved buffers, masks among them, by name with ``model.`` before it."""
    saved = model.state_dict(keep_vars=True)
    owned = dict(model.named_parameters())  # names a tied parameter once
    return {f"model.{name}": tensor for name, tensor in saved.items()
            if not isinstance(tensor, nn.Parameter) or name in owned}


def load_model(path: str | Path, model: nn.Module) -> dict[str, Any]:
    """Put the weights and masks of a checkpoint into ``model``; returns what else the checkpoint says."""
    tensors, about = load(path)
    copy_tensors(path, model_tensors(model), {k: v for k, v in tensors.items() if k.startswith("model.")})
    return about


@torch.no_grad()
def copy_tensors(path: str | Path, into: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Copy by name, after checking that names, shapes and types agree; BadCheckpoint names the first that does not."""
    for name in sorted(into.keys() | found.keys()):
        here, there = (f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" if t is not None else "nothing"
                       for t in (into.get(name), found.get(name)))
        if here != there:
            raise BadCheckpoint(f"checkpoint {path} is of another model: it has {there} for {name}, not {here}")
    for name, tensor in into.items():
        tensor.copy_(found[name])
