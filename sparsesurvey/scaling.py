"""What sparsity costs as models grow: the law of Frantar et al. (2024), fitted anew to their open measurements.

With N weights kept, in millions, sparsity S and D steps in hundreds of thousands (65 536 tokens each)

    L(S, N, D) = (a (1 - S)^b + c) N^-d + e D^-f + g    nats per token

``T5`` are coefficients of ours, a fit to the 48 validation losses of encoder-decoder T5 models on C4 that the authors published
(github.com/google-research/jaxpruner, projects/bigsparse/t5-data.csv, Apache-2.0), by the robust loss of their notebook on
logarithms. It is off by 0.54 % on average and 1.6 % at most. The measurements have sparsities 0, 50, 75 and 87.5 % of all linear
weights, 1.3 to 85 million of them kept, and 250 000 to a million steps, pruned gradually by magnitude.

>>> [round(T5.penalty(sparsity, 113.0), 3) for sparsity in (0.5, 0.75, 0.875)]
[0.02, 0.1, 0.22]
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from sparsesurvey import figures, mistral
from sparsesurvey.records import Measurement
from sparsesurvey.structure import Pattern
from sparsesurvey.tables import gaps

KEPT = (1.3, 85.0)  # millions of kept weights, in the measurements
SPARSEST = 0.875
STEPS = 10.0  # a million, the longest


class Law(NamedTuple):
    """The law's seven numbers; ``kept`` and ``size`` are millions of weights, ``steps`` hundreds of thousands."""

    a: float
    b: float
    c: float
    d: float
    e: float
    f: float
    g: float

    def loss(self, sparsity: float, kept: float, steps: float = STEPS) -> float:
        """Nats per token of a model with ``kept`` weights left of ``kept / (1 - sparsity)``."""
        _check(sparsity, kept=kept, steps=steps)
        return (self.a * (1 - sparsity)**self.b + self.c) * kept**-self.d + self.e * steps**-self.f + self.g

    def penalty(self, sparsity: float, size: float) -> float:
        """Nats per token above the dense model of the same ``size``, before pruning; the steps do not matter."""
        return self.loss(sparsity, size * (1 - sparsity)) - self.loss(0.0, size)

    def gain(self, sparsity: float, kept: float) -> float:
        """Nats per token below the dense model with as many weights as the sparse one keeps."""
        return self.loss(0.0, kept) - self.loss(sparsity, kept)

    def worth(self, sparsity: float) -> float:
        """How many weights of a dense model one kept weight is worth: the same at every size, in this law."""
        _check(sparsity)
        return ((self.a + self.c) / (self.a * (1 - sparsity)**self.b + self.c))**(1 / self.d)


T5 = Law(a=0.436, b=1.345, c=1.695, d=0.232, e=0.418, f=0.385, g=0.830)


def _check(sparsity: float, **positive: float) -> None:
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be a number of at least 0 and below 1, got {sparsity!r}")
    for name, value in positive.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} must be a number above 0, got {value!r}")


def penalties(sizes: Iterable[float], sparsities: Sequence[float], law: Law = T5) -> pd.DataFrame:
    """``Law.penalty`` of dense sizes in millions (rows) by sparsity of all linear weights (columns)."""
    lines = {f"{size:g}M": {f"{100 * s:g}%": law.penalty(s, size) for s in sparsities} for size in sizes}
    return pd.DataFrame(lines).T.rename_axis("dense size")


def equal_kept(sparsities: Iterable[float], kept: float = 113.0, law: Law = T5) -> pd.DataFrame:
    """One line a sparsity, all with ``kept`` million weights: the loss below dense, what a weight is worth, the size before."""
    return pd.DataFrame([{"sparsity": f"{100 * s:g}%", "below dense, nats": law.gain(s, kept), "a weight is worth": law.worth(s),
                          "weights before, millions": kept / (1 - s)} for s in sparsities]).set_index("sparsity").rename_axis(None)


def share_of_mlp(model: str) -> float:
    """The MLP's share of the weights of all linear layers of a decoder, head and embedding not counted."""
    size = mistral.parameters(mistral.config(model))
    mlp = size["gate_proj"] + size["up_proj"] + size["down_proj"]
    return mlp / (mlp + size["attention"])


def linear_weights(model: str) -> float:
    """Millions of weights in the linear layers of a decoder, head and embedding not counted."""
    size = mistral.parameters(mistral.config(model))
    return sum(size[part] for part in ("attention", "gate_proj", "up_proj", "down_proj")) / 1e6


def beside(rows: Iterable[Measurement], structures: Iterable[Pattern], law: Law = T5) -> pd.DataFrame:
    """Gaps to dense of recorded runs beside what the law says of a model of that size: a line a model, structure and recipe.

    ``rows`` are validation losses per token or byte of any number of models, each with a dense run; ``structures`` those whose
    density is wanted, others are left out. "sparsity" is of all linear weights where the MLP alone is sparse. Both gaps are
    shares of the dense loss: our bytes and their tokens have different nats.
    """
    rows, density = list(rows), {str(structure): structure.density for structure in structures}
    lines = []
    for model in dict.fromkeys(row.at["model"] for row in rows):
        table = gaps(row for row in rows if row.at["model"] == model).set_index("structure")
        size = linear_weights(model)
        for name, line in table.iterrows():
            structure = name.partition(", ")[0]
            if structure not in density:
                continue
            sparsity = share_of_mlp(model) * (1 - density[structure])
            lines.append({"model": model, "structure": name, "seeds": line.seeds, "sparsity": sparsity,
                          "gap": line.gap, "gap, share of dense": line.gap / table.loss["dense"],
                          "law, share of dense": law.penalty(sparsity, size) / law.loss(0.0, size), "resolved": line.resolved})
    columns = ["model", "structure", "seeds", "sparsity", "gap", "gap, share of dense", "law, share of dense", "resolved"]
    return pd.DataFrame(lines, columns=columns)


def draw(sizes: Sequence[float], table: pd.DataFrame | None = None, law: Law = T5) -> Figure:
    """The penalty as a share of the dense loss against sparsity, a line a dense size in millions, with the gaps of ``beside``
    as dots; and what a kept weight is worth. Dotted where there were no measurements.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.2, 3.4), width_ratios=(1.6, 1))
    sparsities = np.linspace(0, 0.95, 96)
    tints = plt.cm.viridis(np.linspace(0.15, 0.85, len(sizes)))
    for size, tint in zip(sizes, tints):
        dense = law.loss(0.0, size)
        shares = np.array([law.penalty(s, size) / dense for s in sparsities])
        kept = size * (1 - sparsities)
        known = (sparsities <= SPARSEST) & (KEPT[0] <= kept) & (kept <= KEPT[1])
        left.plot(sparsities, shares, ":", color=tint, linewidth=1.2)
        left.plot(sparsities, np.where(known, shares, np.nan), color=tint, linewidth=2, label=f"law, {size:g}M")
    left.set(xlabel="sparsity of all linear weights", ylabel="above dense, share of its loss")
    if table is not None:
        for model, marker in zip(table["model"].unique(), figures.MARKERS):
            mine = table[table["model"] == model]
            left.scatter(mine["sparsity"], mine["gap, share of dense"], marker=marker, facecolors="none",
                         edgecolors=[figures.colour(name) for name in mine["structure"]], label=f"ours, {model}", zorder=3)
    left.legend(fontsize=8)
    known = sparsities <= SPARSEST
    worth = [law.worth(s) for s in sparsities]
    right.plot(sparsities, worth, ":", color=figures.COLOURS["unstructured"])
    right.plot(sparsities[known], np.array(worth)[known], color=figures.COLOURS["unstructured"], linewidth=2)
    right.set(xlabel="sparsity", ylabel="dense weights that a kept one is worth")
    return figure
