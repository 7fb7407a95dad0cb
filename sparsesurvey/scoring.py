"""Scores side by side: what each keeps of a layer, what the layer's outputs lose, and what a whole model loses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.colors import LinearSegmentedColormap
from torch import Tensor, nn

from sparsesurvey import figures
from sparsesurvey.calibration import Inputs
from sparsesurvey.data import Language, windows
from sparsesurvey.models import Method, Plan, prune_model
from sparsesurvey.reconstruction import output_error
from sparsesurvey.scores import dass, e_sparse, magnitude, ria, wanda
from sparsesurvey.structure import Structure
from sparsesurvey.train import evaluate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sparsesurvey.structure import Pattern

FIVE = {"magnitude": magnitude, "Wanda": wanda, "E-Sparse": e_sparse, "RIA": ria, "DaSS": dass}
Cases = Mapping[str, tuple[Structure | Plan, Method]]


def draw(weight: Tensor, inputs: Inputs, structure: Pattern, scores: Mapping[str, Method] = FIVE,
         corner: tuple[int, int] = (16, 16)) -> Figure:
    """Above, each score in a corner of the layer, by rank, darker = higher; below, what the structure keeps by it."""
    out, inn = corner
    figure, axes = plt.subplots(2, len(scores), figsize=(1.62 * len(scores), 3.7), squeeze=False)
    shades = LinearSegmentedColormap.from_list("score", ["#ffffff", figures.COLOURS["dense"]])
    for (name, score), (above, below) in zip(scores.items(), axes.T):
        found = score(weight, inputs)
        mask = structure.mask(found)[:out, :inn]
        rank = found[:out, :inn].flatten().argsort().argsort().view(out, inn)
        above.imshow(rank.numpy(), cmap=shades, interpolation="nearest")
        above.set(xticks=[], yticks=[], title=name)
        above.grid(False)
        figures.pattern(structure, mask, None, below).set(title="", xlabel="", ylabel="")
    axes[0, 0].set_ylabel("score")
    axes[1, 0].set_ylabel(f"kept, {structure}")
    return figure


def errors(layers: Mapping[str, tuple[Tensor, Inputs]], structure: Pattern, scores: Mapping[str, Method] = FIVE) -> pd.DataFrame:
    """Share of the outputs' energy that each score loses on each layer ``(weight, inputs with a gram)``."""
    return pd.DataFrame({layer: {name: output_error(weight, weight * structure.mask(score(weight, inputs)), inputs)
                                 for name, score in scores.items()} for layer, (weight, inputs) in layers.items()}).round(4)


def agreement(weight: Tensor, inputs: Inputs, structure: Pattern, scores: Mapping[str, Method] = FIVE) -> pd.DataFrame:
    """Of what one score keeps, the share that the other keeps, too."""
    masks = {name: structure.mask(score(weight, inputs)) for name, score in scores.items()}
    return pd.DataFrame({one: {other: float((masks[one] & masks[other]).sum() / masks[other].sum()) for other in masks}
                         for one in masks}).round(3)


def increases(model: nn.Module, language: Language, cases: Cases, batches: Iterable[Tensor], count: int = 128,
              seq: int = 64) -> dict[str, float]:
    """Loss of the pruned model above that of ``model`` itself, nats a token, on ``count`` windows of validation text.

    Args:
        cases: ``{name: (structure, method)}``, as for ``models.prune_model``; each prunes a copy.
    """
    batches, text = list(batches), windows(language.valid, count, seq)
    dense, found = evaluate(model, *text), {}
    for name, (structure, method) in cases.items():
        pruned = deepcopy(model)
        prune_model(pruned, structure, method, batches, progress=False)
        found[name] = evaluate(pruned, *text) - dense
    return found
