"""The finished layers of a pruning run on disk, so that one that was killed goes on where it stopped.

``run.json`` says which run a folder belongs to; each finished layer is one checkpoint, whole or absent. A layer counts as
finished with its decoder block: a block is calibrated as a whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsesurvey import checkpoint
from sparsesurvey.checkpoint import BadCheckpoint

FORMAT = "sparsesurvey pruning 1"
RUN = "run.json"


class Finished:
    """The folder of one run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.key = folder, ""

    def open(self, model: nn.Module, settings: dict[str, Any]) -> list[str]:
        """Names of the layers that are finished, of blocks that are. BadCheckpoint if the folder is of another run.

        ``settings`` holds ``batches`` and ``layers``, a description of each by name; ``model`` is as it was before the run.
        """
        about = {"format": FORMAT, **settings, "batches": _sum(settings["batches"]), "weights": _sum(model.state_dict().values())}
        self.key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / RUN
        if path.exists():
            _check(path, about)
        elif any(self.folder.iterdir()):
            raise BadCheckpoint(f"folder {self.folder} must be empty, or hold {RUN} of this run; it holds other files")
        else:
            write_json(path, about)
        done: list[str] = []
        for names in _blocks(settings["layers"]):
            if not all(self.file(name).is_file() for name in names):
                break
            done += names
        return done

    def file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def save(self, name: str, weight: Tensor, about: dict[str, Any]) -> None:
        checkpoint.save(self.file(name), {"weight": weight}, {"run": self.key, "layer": about})

    def load(self, name: str) -> tuple[Tensor, dict[str, Any]]:
        """The new weight of a layer, and what was said of it."""
        tensors, about = checkpoint.load(self.file(name))
        if about.get("run") != self.key:
            raise BadCheckpoint(f"checkpoint {self.file(name)} is of another run; allowed: an empty folder, or one of this run")
        return tensors["weight"], about["layer"]


def block_of(name: str) -> str:
    """The decoder block that a layer is in: its name up to the first number.

    >>> block_of("model.layers.11.mlp.up_proj"), block_of("mlp.up_proj")
    ('model.layers.11', '')
    """
    found = re.match(r"(.*?\.\d+)\.", name)
    return found[1] if found else ""


def write_json(path: Path, data: object) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(data, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _blocks(names: Iterable[str]) -> Iterable[list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(block_of(name), []).append(name)
    return found.values()


def _check(path: Path, about: dict[str, Any]) -> None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        differs = sorted(key for key in found.keys() | about.keys() if found.get(key) != about.get(key))
    except (ValueError, AttributeError) as error:
        raise BadCheckpoint(f"{path} is damaged: {error}; delete the folder to start anew") from error
    if differs:
        raise BadCheckpoint(f"folder {path.parent} is of another run: its {', '.join(differs)} differ; allowed: an empty folder, "
                            "or this run started again with the dense model")


def _sum(tensors: Iterable[Tensor]) -> str:
    """A checksum over shapes, types and contents."""
    total = 0
    for tensor in tensors:
        tensor = tensor.detach().cpu().contiguous()
        total = zlib.crc32(f"{tensor.dtype} {list(tensor.shape)}".encode(), total)
        total = zlib.crc32(tensor.flatten().view(torch.uint8).numpy(), total)
    return f"{total:08x}"
