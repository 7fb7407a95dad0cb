"""Opening and saving models as ordinary checkpoints of transformers, with masks beside the weights.

A saved model is a folder that ``AutoModelForCausalLM.from_pretrained`` reads like any other; ``masks.safetensors`` and
``pruning.json`` are extra. The folder appears whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparsesurvey.checkpoint import BadCheckpoint
from sparsesurvey.finished import FORMAT
from sparsesurvey.models import LayerReport, Report

MASKS, REPORT = "masks.safetensors", "pruning.json"


def open_model(name: str | Path, dtype: str | torch.dtype = "auto", device: str | torch.device = "cpu") -> nn.Module:
    """A causal language model by its folder, or by its name on the Hugging Face hub, in evaluation mode.

    ValueError if it is neither a folder with a model nor to be had from the hub, as without a network.
    """
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(str(name), dtype=dtype).to(device).eval()
    except Exception as error:  # no network, no such model, a damaged file: the packages below have an exception for each
        where = "is a folder but no whole model" if Path(name).is_dir() else "is no folder, and the hub did not give it"
        raise ValueError(f"model {str(name)!r} {where}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}; "
                         "allowed: a folder that save_pretrained wrote, or, with a network, a name like owner/model") from error


def masks(model: nn.Module, report: Report) -> dict[str, Tensor]:
    """The mask of each pruned layer by its full name: True where a weight is not zero."""
    return {layer.name: model.get_submodule(layer.name).weight.detach() != 0 for layer in report.layers}


def save(model: nn.Module, report: Report, folder: str | Path, tokenizer: Any = None) -> Path:
    """Write a pruned model, its masks, its report and, if given, its tokenizer (of transformers) to a new folder.

    Everything is written beside it first and then renamed: a kill leaves no half model. ValueError if it exists already.
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"folder must not exist yet, so that no model is overwritten: {folder} does")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        save_file({name: mask.cpu().contiguous() for name, mask in masks(model, report).items()}, temporary / MASKS)
        (temporary / REPORT).write_text(json.dumps({"format": FORMAT, **asdict(report)}, indent=1), encoding="utf-8")
        for path in temporary.iterdir():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def load(folder: str | Path, dtype: str | torch.dtype = "auto") -> tuple[nn.Module, dict[str, Tensor], Report]:
    """A model that ``save`` wrote, its masks and its report. BadCheckpoint if masks and weights do not fit each other."""
    folder = Path(folder)
    try:
        found = load_file(folder / MASKS)
        about = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        if about.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT!r}")
        layers = tuple(LayerReport(**{**layer, "shape": tuple(layer["shape"])}) for layer in about["layers"])
        report = Report(layers, tuple(about["excluded"]), about["tokens"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise BadCheckpoint(f"folder {folder} holds no pruned model that save wrote: {type(error).__name__}: {error}") from error
    model = open_model(folder, dtype)
    layers = dict(model.named_modules())
    for name, mask in found.items():
        weight = getattr(layers.get(name), "weight", None)
        if weight is None or weight.shape != mask.shape or weight.detach()[~mask].any():
            raise BadCheckpoint(f"folder {folder} is damaged: the mask of {name} does not fit its weight")
    return model, found, report
