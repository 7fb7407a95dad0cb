"""All structures beside each other at equal density: what they keep, what they store, what they permit.

Structures are handed in as the classes that ``structures.all_structures()`` finds, so that a new one is here at once.
"""

from collections.abc import Iterable, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from sparsesurvey import figures
from sparsesurvey.linear import MLP
from sparsesurvey.pruning import density, retention
from sparsesurvey.roofline import Roofline
from sparsesurvey.structure import PRODUCTS, Shape, Structure

NEAR = 0.03  # of a density, relatively: what still counts as equal
DIRECTIONS = {"spmm": "forward", "spmmt": "input gradient", "sddmm": "weight gradient"}


def fits(structure: Structure, shape: Shape) -> bool:
    """Whether the structure divides a weight ``[out, in]`` of this shape and keeps some of it."""
    try:
        return structure.nnz(shape) > 0
    except ValueError:
        return False


def at_density(kinds: Mapping[str, type[Structure]], share: float, shape: Shape) -> list[Structure]:
    """The variants of every kind that store ``share`` of a weight ``[out, in]`` of this shape, within 3 %.

    Those that do not divide the shape are left out, so that nobody is compared at a density that he has not.

    >>> from sparsesurvey.structures.nm import NM
    >>> [str(item) for item in at_density({"NM": NM}, 0.25, (64, 64))][:2]
    ['1:4', '2:8']
    """
    found = [item for kind in kinds.values() for item in kind.variants()]
    return [item for item in found if fits(item, shape) and abs(density(item, shape) - share) <= NEAR * share]


def mlp_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a model's gated MLPs by their full names, each ``[out, in]``."""
    return {name: part.weight.detach() for name, part in model.named_modules()
            if isinstance(part, nn.Linear) and name.rpartition(".")[2] in MLP}


def keeps(structures: Iterable[Structure], weights: Mapping[str, Sequence[Tensor]]) -> pd.DataFrame:
    """One line a structure and kind of weights: magnitude and energy kept, and the share of the best choice's energy.

    ``weights`` maps a kind to the weights that are averaged over; the structure must divide each.
    """
    structures, lines = list(structures), []
    for kind, members in weights.items():
        tables = [retention(weight, structures).set_index("structure") for weight in members]
        mean = sum(table.astype(float) for table in tables) / len(tables)
        lines.append(mean.assign(weights=kind).reset_index())
    return pd.concat(lines, ignore_index=True)


def stores(structures: Iterable[Structure], shape: Shape, itemsize: int = 2) -> pd.DataFrame:
    """One line a structure: bits per position of a weight ``[out, in]`` for the values and for all else that is stored.

    ``least`` is the entropy bound on telling the kept positions, NaN where a structure states none; ``over`` is what the
    whole takes against the values and that bound.
    """
    size, lines = shape[0] * shape[1], []
    for item in structures:
        values, index = item.value_bits(shape, itemsize) / size, item.index_bits(shape) / size
        least = item.facts().positions
        least = float("nan") if least is None else least
        lines.append({"structure": str(item), "density": density(item, shape), "values": values, "index": index,
                      "least": least, "total": values + index, "over": (values + index) / (values + least)})
    return pd.DataFrame(lines).set_index("structure").rename_axis(None)


def permits(structures: Iterable[Structure], shape: Shape, tokens: int, roofline: Roofline, itemsize: int = 2) -> pd.DataFrame:
    """One line a structure: the roofline bound on the speed-up over dense of each of the three products, and of all three."""
    lines = {}
    for item in structures:
        gains = {DIRECTIONS[name]: roofline.over_dense(item, shape, tokens, itemsize, product=name) for name in PRODUCTS}
        lines[str(item)] = {**gains, "training step": len(gains) / sum(1 / gain for gain in gains.values())}
    return pd.DataFrame.from_dict(lines, orient="index")


def draw_kept(frame: pd.DataFrame, column: str = "share of best", ax: Axes | None = None) -> Axes:
    """A line a structure, the one that keeps most of the first kind of weights on top; a marker a kind of weights."""
    kinds = list(dict.fromkeys(frame["weights"]))
    wide = frame.pivot_table(index="structure", columns="weights", values=column, sort=False)[kinds]
    wide = wide.sort_values(kinds[0], ascending=False, kind="stable")
    ax = ax or plt.figure(figsize=(7.4, 0.9 + 0.235 * len(wide))).add_subplot()
    place = np.arange(len(wide))
    ax.hlines(place, wide.min(axis=1), wide.max(axis=1), color=[figures.colour(name) for name in wide.index], alpha=0.45, linewidth=2)
    for kind, marker in zip(kinds, figures.MARKERS):
        ax.scatter(wide[kind], place, marker=marker, s=32, color=[figures.colour(name) for name in wide.index],
                   edgecolor="white", linewidth=0.5, zorder=3)
    handles = [plt.Line2D([], [], color="#333333", marker=marker, linestyle="", label=kind) for kind, marker in zip(kinds, figures.MARKERS)]
    ax.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(kinds), fontsize=8)
    ax.set(yticks=place, yticklabels=wide.index, ylim=(len(wide) - 0.4, -0.6), xlim=(min(0.99, 0.98 * float(wide.min().min())), 1.01),
           xlabel="energy kept, as a share of the best unstructured choice at equal density")
    ax.tick_params(axis="y", labelsize=8)
    return ax


def draw_stored(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """A bar a structure: values solid, index hatched; the tick is the values and the entropy bound on the positions."""
    frame = frame.sort_values("total")
    ax = ax or plt.figure(figsize=(7.4, 0.9 + 0.235 * len(frame))).add_subplot()
    tints = [figures.colour(name) for name in frame.index]
    place = np.arange(len(frame))
    ax.barh(place, frame["values"], color=tints, height=0.74)
    bars = ax.barh(place, frame["index"], left=frame["values"], color=tints, alpha=0.45, hatch="////", edgecolor="white", height=0.74)
    least = frame["values"] + frame["least"]
    ax.vlines(least, place - 0.42, place + 0.42, color="black", linewidth=1.5)
    ax.bar_label(bars, [f"{total:.2f}" for total in frame["total"]], padding=3, fontsize=8)
    ax.set(yticks=place, yticklabels=frame.index, ylim=(len(frame) - 0.4, -0.6), xlim=(0, 1.12 * frame["total"].max()),
           xlabel="bits per position: values solid, index hatched; tick: values and the entropy of their places")
    ax.tick_params(axis="y", labelsize=8)
    ax.grid(axis="y", visible=False)
    return ax


def draw_permitted(frame: pd.DataFrame, roofline: Roofline) -> Figure:
    """A line a structure, a marker for each of the three products."""
    frame = frame.sort_values("training step", ascending=False, kind="stable")
    figure, ax = plt.subplots(figsize=(7.4, 1.0 + 0.235 * len(frame)))
    place, columns = np.arange(len(frame)), list(DIRECTIONS.values())
    tints = [figures.colour(name) for name in frame.index]
    ax.hlines(place, frame[columns].min(axis=1), frame[columns].max(axis=1), color=tints, alpha=0.45, linewidth=2)
    for number, (column, marker) in enumerate(zip(columns, figures.MARKERS)):
        ax.scatter(frame[column], place, marker=marker, s=60 - 20 * number, color=tints, edgecolor="white", linewidth=0.5,
                   zorder=3 + number)
    handles = [plt.Line2D([], [], color="#333333", marker=marker, linestyle="", label=column)
               for column, marker in zip(columns, figures.MARKERS)]
    ax.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, fontsize=8)
    ax.axvline(1, color=figures.COLOURS["dense"], linewidth=1, linestyle=":")
    ax.set(yticks=place, yticklabels=frame.index, ylim=(len(frame) - 0.4, -0.6),
           xlabel=f"bound on the speed-up over dense, not a measurement\n{roofline.source}")
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda ratio, _: f"{ratio:g}" if ratio >= 1 else f"1/{1 / ratio:g}")
    ax.tick_params(axis="y", labelsize=8)
    ax.xaxis.label.set_fontsize(8)
    return figure
