"""Methods that move weights, looked at: SparseGPT's sweep in pictures, and what each part of a method is worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.colors import LinearSegmentedColormap
from torch import Tensor

from sparsesurvey import figures
from sparsesurvey.models import Method, is_pruner
from sparsesurvey.reconstruction import output_error, refit
from sparsesurvey.sparsegpt import Sweep, columns_at_a_time, sweep

if TYPE_CHECKING:
    from collections.abc import Iterable

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sparsesurvey.structure import Pattern

COMPENSATION = "#009E73"


def draw(done: Sweep, moments: Sequence[int], corner: tuple[int, int] = (24, 64)) -> Figure:
    """A corner of the layer after so many inputs: above the weights, darker = larger, below how far they have moved."""
    out, inn = corner
    figure, axes = plt.subplots(2, len(moments), figsize=(2.4 * len(moments), 2.6), squeeze=False, sharex=True, sharey=True)
    dense = done.after(0)[:out, :inn]
    top = dense.abs().quantile(0.98)
    maps = [LinearSegmentedColormap.from_list(name, ["#ffffff", colour]) for name, colour in
            (("size", figures.COLOURS["dense"]), ("moved", COMPENSATION))]
    for column, moment in enumerate(moments):
        now = done.after(moment)[:out, :inn]
        pruned = ~done.mask[:out, :inn] & (torch.arange(inn) < moment)
        moved = (now - dense).abs().masked_fill(pruned, 0)
        for ax, image, shades in zip(axes[:, column], (now.abs().masked_fill(pruned, 0), moved), maps):
            ax.imshow((image / top).clamp(max=1).sqrt().numpy(), cmap=shades, vmin=0, vmax=1, interpolation="nearest",
                      aspect="auto")
            ax.axvline(moment - 0.5, color=figures.COLOURS["V:N:M"], linewidth=1.2)
            ax.set(xticks=[], yticks=[])
            ax.grid(False)
        axes[0, column].set_title(f"after {moment} inputs" if moment else "dense")
    axes[0, 0].set_ylabel("weights")
    axes[1, 0].set_ylabel("moved by")
    figure.supxlabel("inputs of the layer, from the first to the last; white before the line = pruned", fontsize=9)
    return figure


def course(weight: Tensor, inputs: object, structure: Pattern, others: Mapping[str, Tensor] | None = None, points: int = 33,
           ax: Axes | None = None) -> Axes:
    """The output error after each input of the sweep, with and without moving what is kept, and of ``others`` (masks)."""
    done = sweep(weight, structure, inputs)
    moments = torch.linspace(0, weight.shape[1], points).round().int().unique().tolist()
    before = lambda mask, moment: weight * (mask | (torch.arange(weight.shape[1]) >= moment))
    lines = {"SparseGPT": [output_error(weight, done.after(moment), inputs) for moment in moments]}
    for name, mask in {"its mask, nothing moved": done.mask, **(others or {})}.items():
        lines[name] = [output_error(weight, before(mask, moment), inputs) for moment in moments]
    ax = ax or plt.figure(figsize=(7.2, 3.2)).add_subplot()
    for (name, values), shade, style in zip(lines.items(), ("V:N:M", "dense", "unstructured", "N:M"), ("-", "--", ":", "-.")):
        ax.plot(moments, values, style, color=figures.COLOURS[shade], label=name)
    ax.set(xlabel="inputs done", ylabel="output energy lost", xlim=(0, weight.shape[1]), ylim=(0, None))
    ax.legend()
    return ax


def parts(weight: Tensor, inputs: object, structure: Pattern, methods: Mapping[str, Method]) -> pd.DataFrame:
    """The output error of each score or pruner: by its mask alone, as it is, and with the best values on its mask."""
    lines = {}
    for name, method in methods.items():
        if is_pruner(method):
            moved, mask = method(weight, structure, inputs)
        else:
            mask = structure.mask(method(weight, inputs))
            moved = weight * mask
        tried = weight * mask, moved, refit(weight, mask, inputs)
        lines[name] = [output_error(weight, one, inputs) for one in tried]
    return pd.DataFrame(lines, ["mask alone", "as it is", "least squares on its mask"]).T.round(4)


def choices(structures: Iterable[Pattern], shape: tuple[int, int], weight: Tensor, inputs: object) -> pd.DataFrame:
    """How many inputs SparseGPT chooses for at a time in a layer, and the error of its mask alone and with what it moves."""
    lines = {}
    for structure in structures:
        done = sweep(weight, structure, inputs)
        width = columns_at_a_time(structure, shape)
        numbers = [float(done.mask.double().mean()), output_error(weight, weight * done.mask, inputs),
                   output_error(weight, done.weight, inputs)]
        lines[str(structure)] = [f"{width} inputs" if width < shape[1] else "all, once", *(round(one, 4) for one in numbers)]
    return pd.DataFrame(lines, ["chosen at a time", "density", "its mask alone", "SparseGPT"]).T
