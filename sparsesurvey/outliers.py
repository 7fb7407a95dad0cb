"""Outlier channels put into a model that has none, without changing what it computes.

Large language models have a few input channels whose activations are tens of times as large as the others' (Dettmers et
al. 2022). Here some are made: a channel of the norm before the MLP is multiplied, and the columns of ``gate_proj`` and
``up_proj`` that read it are divided by the same number.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from math import isfinite

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.axes import Axes
from torch import nn

from sparsesurvey.calibration import Inputs
from sparsesurvey.data import Language
from sparsesurvey.figures import COLOURS
from sparsesurvey.scoring import Cases, increases
from sparsesurvey.structure import check_int

NORM, MLP = "post_attention_layernorm", "mlp"


@torch.no_grad()
def add_outliers(model: nn.Module, channels: int = 4, factor: float = 30.0, seed: int = 0) -> nn.Module:
    """A copy of ``model`` with ``channels`` outlier channels before each MLP, ``factor`` times as large as they were.

    Its function is the same, up to rounding. The channels are drawn at random, others in each block.

    Raises:
        ValueError: a model whose blocks are not those of Mistral, Llama and Qwen2; channels, factor out of range.
    """
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not isfinite(factor) or factor <= 0:
        raise ValueError(f"factor must be a finite number above 0, got {factor!r}")
    model = deepcopy(model)
    blocks = [part for part in model.modules() if hasattr(part, NORM) and hasattr(getattr(part, MLP, None), "gate_proj")]
    if not blocks:
        raise ValueError(f"model must have blocks with {NORM} before a gated MLP, got a {type(model).__name__}")
    generator = torch.Generator().manual_seed(seed)
    for block in blocks:
        norm, readers = getattr(block, NORM), (block.mlp.gate_proj.weight, block.mlp.up_proj.weight)
        check_int("channels", channels, 0, len(norm.weight))
        chosen = torch.randperm(len(norm.weight), generator=generator)[:channels].to(norm.weight.device)
        before = norm(torch.ones_like(norm.weight))
        norm.weight[chosen] *= factor
        before[chosen] *= factor
        if not torch.allclose(norm(torch.ones_like(norm.weight)), before, rtol=1e-3):
            raise ValueError(f"model must have norms that multiply by their weight, {type(norm).__name__} does not")
        for reader in readers:
            reader[:, chosen] /= factor
    return model


def ratio(inputs: Inputs) -> float:
    """The largest channel's norm over the median one's."""
    return float(inputs.norms().max() / inputs.norms().median())


def sweep(model: nn.Module, language: Language, cases: Cases, batches: Iterable[Tensor],
          factors: Sequence[float] = (1, 3, 10, 30, 100), channels: int = 4, **options: int) -> pd.DataFrame:
    """Increase of the loss by case (line) and by the factor that outliers were made with (column); see ``increases``."""
    batches = list(batches)
    return pd.DataFrame({factor: increases(add_outliers(model, channels, factor), language, cases, batches, **options)
                         for factor in factors})


def draw_sweep(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """A table of ``sweep``: one line a case."""
    ax = ax or plt.figure().add_subplot()
    tints = (*(COLOURS[name] for name in ("unstructured", "N:M", "block", "V:N:M", "TW", "balanced")), "#333333")
    for number, (name, losses) in enumerate(table.iterrows()):
        ax.plot(table.columns, losses, marker="osD^vPX"[number % 7], color=tints[number % 7], label=name)
    ax.set(xlabel="factor of the outlier channels", ylabel="increase of the loss, nats/token", ylim=(0, None))
    ax.set_xscale("log")
    ax.set_xticks(list(table.columns), [f"{factor:g}" for factor in table.columns])
    ax.minorticks_off()
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return ax


def draw_norms(seen: Mapping[str, Inputs], ax: Axes | None = None) -> Axes:
    """Norms of the input channels over their median, in falling order, one line each."""
    ax = ax or plt.figure(figsize=(7.2, 2.8)).add_subplot()
    for (name, inputs), tint in zip(seen.items(), (COLOURS["dense"], COLOURS["V:N:M"], COLOURS["unstructured"])):
        norms = inputs.norms().sort(descending=True).values / inputs.norms().median()
        ax.plot(range(1, len(norms) + 1), norms.numpy(), marker=".", color=tint, label=name)
    ax.set(xlabel="input channel, the largest first", ylabel="norm over the median")
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(lambda size, _: f"{size:g}")
    ax.legend(fontsize=8)
    return ax
