"""One update of a mask that grows, looked at: what a recipe drops and what it grows."""

from __future__ import annotations

from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor

from sparsesurvey import figures
from sparsesurvey.linear import SparseLinear
from sparsesurvey.recipes.growing import RigL
from sparsesurvey.structure import Pattern, Shape

DROPPED, GROWN = "#D55E00", "#111111"


class Update(NamedTuple):
    before: Tensor  # masks [out, in]
    dropped: Tensor
    grown: Tensor
    after: Tensor


def one_update(structure: Pattern, recipe: RigL, shape: Shape = (32, 32), number: int = 1, updates: int = 10, seed: int = 0) -> Update:
    """Update ``number`` of ``updates`` of a layer whose weight and gradients are Gaussian, each step's gradient a new one.

    Without an optimizer: the weights stay as they are, so that what is small stays small.
    """
    if not isinstance(recipe, RigL):
        raise ValueError(f"recipe must be one that drops and grows, such as RigL() or SET(), got {recipe!r}")
    if not 1 <= number <= updates:
        raise ValueError(f"number must be from 1 to {updates}, got {number!r}")
    generator = torch.Generator().manual_seed(seed)
    layer = SparseLinear(torch.randn(shape, generator=generator), structure, recipe, seed=seed)
    steps = round(updates * recipe.every / max(recipe.until, 1e-9))
    for step in range(1, number * recipe.every + 1):
        before = layer.mask.clone()
        layer.prepare(step - 1, steps)
        layer.weight.grad = torch.randn(shape, generator=generator)
        layer.edit_grad()
        layer.update(step, steps, {})
    return Update(before, before & ~layer.mask, layer.mask & ~before, layer.mask.clone())


def draw_update(structure: Pattern, update: Update) -> Figure:
    """Before, what goes, what comes, after; units of weights in the structure's colour."""
    figure, axes = plt.subplots(1, 4, figsize=(8.6, 2.5))
    tint = figures.colour(str(structure))
    stays = update.before & ~update.dropped
    views = [("before", update.before, None, None), ("dropped", stays, update.dropped, DROPPED),
             ("grown", stays, update.grown, GROWN), ("after", update.after, None, None)]
    for ax, (title, kept, marked, mark) in zip(axes, views):
        image = np.where(kept.numpy(), 1, 0)
        if marked is not None:
            image = np.where(marked.numpy(), 2, image)
            title = f"{title}: {int(marked.sum())} weights"
        faint = (*plt.matplotlib.colors.to_rgb(tint), 0.3 if marked is not None else 1.0)
        ax.imshow(image, cmap=ListedColormap(["white", faint, mark or tint]), vmin=0, vmax=2, interpolation="nearest")
        ax.set(xticks=[], yticks=[], title=title)
        ax.grid(False)
        for spine in ax.spines.values():
            spine.set(visible=True, color="#999999", linewidth=0.6)
    axes[0].set(xlabel="in", ylabel="out")
    return figure
