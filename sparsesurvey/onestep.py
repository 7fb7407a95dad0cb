"""One layer, one step, every recipe: which weights the three products see, what becomes of the gradient and of the mask."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.colors import ListedColormap
from torch import Tensor

from sparsesurvey import figures
from sparsesurvey.linear import SparseLinear
from sparsesurvey.recipe import Recipe
from sparsesurvey.recipes.static import Static

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sparsesurvey.structure import Pattern

COLUMNS = ("F(W)", "B(W)", "G(dy)", "dW, edited", "mask after")
HOOKS = {"forward": "F: y = x F'", "input gradient": "B: dx = dy B", "output gradient": "G: dW = G' x", "edit": "edit of dW",
         "mask": "mask update"}
OUT, STAYED, CAME, WENT = range(4)  # what became of a place of the mask
SHADES = ("#ffffff", "#555555", "#009E73", "#D55E00")


class Step(NamedTuple):
    """What a recipe made of one step; weights, gradient and mask ``[out, in]``, ``output_grad`` ``[tokens, out]``."""

    forward: Tensor
    backward: Tensor
    output_grad: Tensor
    edited: Tensor
    mask: Tensor
    before: Tensor  # the mask before the step


def example(shape: tuple[int, int] = (8, 8), tokens: int = 8, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A weight ``[out, in]``, activations ``[tokens, in]`` and gradients ``[tokens, out]``, normal."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*size, generator=generator) for size in (shape, (tokens, shape[1]), (tokens, shape[0])))


def one_step(structure: Pattern, recipe: Recipe, weight: Tensor, x: Tensor, dy: Tensor, rate: float = 0.05, step: int = 5,
             steps: int = 10) -> Step:
    """Step number ``step`` (from 0) of ``steps`` of a layer that starts with ``weight [out, in]``, by plain gradient descent.

    Whatever the recipe does at the start is done; what it would have done in the steps before is not.
    """
    layer = SparseLinear(weight, structure, recipe)
    layer.prepare(step, steps)
    before = layer.mask.clone()
    with torch.no_grad():
        forward, backward, gradient = recipe.forward_weight(layer), recipe.input_weight(layer), recipe.output_grad(layer)
        seen = dy if gradient is None else gradient(dy)
        layer.weight.grad = seen.T @ x
        state = {"exp_avg": 0.1 * layer.weight.grad, "exp_avg_sq": 0.05 * layer.weight.grad.square()}
        layer.edit_grad()
        edited = layer.weight.grad.clone()
        forward, backward = forward.clone(), (forward if backward is None else backward).clone()
        layer.weight.sub_(rate * edited)
        layer.rate = rate
    layer.update(step + 1, steps, state)
    return Step(forward, backward, seen, edited, layer.mask.clone(), before)


def draw(cases: Mapping[str, Step]) -> Figure:
    """A row a recipe: both weights, the gradient that dW is made of, dW as the optimizer sees it, and the mask after.

    Blue is negative, red positive, white zero; of the mask grey has stayed, green has come, orange has gone.
    """
    figure, axes = plt.subplots(len(cases), len(COLUMNS), figsize=(7.2, 0.4 + 1.02 * len(cases)), squeeze=False)
    for line, (name, done) in zip(axes, cases.items()):
        for ax, part in zip(line, (done.forward, done.backward, done.output_grad, done.edited)):
            _signed(ax, part)
        fate = torch.where(done.mask, torch.where(done.before, STAYED, CAME), torch.where(done.before, WENT, OUT))
        _plain(line[-1]).imshow(fate.numpy(), cmap=ListedColormap(SHADES), vmin=0, vmax=3, interpolation="nearest")
        line[0].set_ylabel(name.replace(", ", "\n"), rotation=0, ha="right", va="center", fontsize=8)
    for ax, title in zip(axes[0], COLUMNS):
        ax.set_title(title, fontsize=9, loc="center")
    return figure


def _signed(ax: Axes, part: Tensor) -> None:
    top = part.abs().max().item() or 1.0
    _plain(ax).imshow((part / top).sign().mul((part / top).abs().sqrt()).numpy(), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")


def _plain(ax: Axes) -> Axes:
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
    for side in ax.spines.values():
        side.set(visible=True, color="#bbbbbb", linewidth=0.5)
    return ax


# What a recipe says of itself is its ``table``; these two say nothing, because their code is that of most recorded runs.
PLAIN = {"forward": "W", "input gradient": "F", "output gradient": "dy", "edit": "dW", "mask": "none"}
FIXED = {"forward": "W * m", "input gradient": "W * m", "output gradient": "dy", "edit": "dW * m", "mask": "never"}


def hooks(kinds: Iterable[type[Recipe]]) -> pd.DataFrame:
    """The table of what each recipe makes of the three products, in its own words."""
    lines = {"dense" if kind is Recipe else kind.__name__: {**PLAIN, **(FIXED if kind is Static else getattr(kind, "table", {}))}
             for kind in kinds}
    return pd.DataFrame(lines).T.rename(columns=HOOKS)
