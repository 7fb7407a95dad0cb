"""S-STE: a soft threshold, so that the sparse weight moves without jumps when the dense one does.

Hu et al. (2024), "S-STE: continuous pruning function for efficient 2:4 sparse pre-training". In each group of m

    S(w)_i = sign(w_i) * max(|w_i| - t, 0),    t = the (n + 1)-th largest magnitude of the group
    F(W) = b * S(W),                           b = <W, S(W)> / <S(W), S(W)> at the start, then fixed

>>> soft_threshold(torch.tensor([[0.1, 1.0, 1.0, 2.0]]), 2, 4)  # a tie: one weight is kept, not two
tensor([[0., 0., 0., 1.]])
>>> soft_threshold(torch.tensor([[-3.0, 1.0, 2.0, 0.5]]), 2, 4)
tensor([[-2.,  0.,  1.,  0.]])

A scale that follows the weights makes the masks flip more and more (their Figure 4), hence the fixed one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from sparsesurvey.recipe import Recipe
from sparsesurvey.recipes.fst import approximate, least_variance

if TYPE_CHECKING:
    from sparsesurvey.linear import SparseLinear
    from sparsesurvey.structure import Pattern


@dataclass(frozen=True)
class SSTE(Recipe):
    """F(W) = B(W) = b * S(W) for n:m along the inputs, straight through to W, with no decay and no dense phase.

    Two of three products have a 2:4 operand: dx sums over the outputs, along which S(W) is not 2:4. ``mask`` is where S(W)
    is not zero, at a tie fewer than n of m. The papers' FP8 is left out, and n:m other than 2:4 is ours.

    Args:
        mvue: dy in 2:4 along the tokens for the weight gradient, drawn without bias; the tokens of a step must then be a
            multiple of 4. exact: with the least variance (Chmiel et al. 2023) instead of the approximate draw, which the
            published training calls (see ``mvue``).
    """

    mvue: bool = True
    exact: bool = False

    table: ClassVar[dict[str, str]] = {
        "forward": "b S(W)", "input gradient": "b S(W)", "output gradient": "MVUE(dy)", "edit": "dW",
        "mask": "each step, where S(W) is not 0",
    }

    def __post_init__(self) -> None:
        if self.exact and not self.mvue:
            raise ValueError("exact must be False without mvue, got True")

    def __str__(self) -> str:
        return "s-ste" + ("" if not self.exact else ", exact mvue") if self.mvue else "s-ste, no mvue"

    @classmethod
    def variants(cls) -> tuple[SSTE, ...]:
        return cls(), cls(mvue=False), cls(exact=True)

    def check(self, structure: Pattern) -> None:
        groups(self, structure)

    def start(self, weight: Tensor, structure: Pattern, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return weight, soft_threshold(weight, structure.n, structure.m) != 0

    def begin(self, layer: SparseLinear) -> None:
        weight = layer.weight.detach()
        soft = self.soft(layer).detach()
        scale = (weight * soft).sum() / soft.square().sum()
        layer.register_buffer("scale", torch.where(scale.isfinite(), scale, 1.0))  # all zero: then so is S(W)

    def soft(self, layer: SparseLinear) -> Tensor:
        return soft_threshold(layer.weight, layer.structure.n, layer.structure.m)

    def forward_weight(self, layer: SparseLinear) -> Tensor:
        return layer.scale * self.soft(layer)

    def output_grad(self, layer: SparseLinear) -> Callable[[Tensor], Tensor] | None:
        return (least_variance if self.exact else approximate) if self.mvue else None

    def update(self, layer: SparseLinear, step: int, steps: int, state: dict[str, Any]) -> None:
        layer.mask.copy_(self.soft(layer) != 0)


def soft_threshold(weight: Tensor, n: int, m: int) -> Tensor:
    """S(W) ``[out, in]`` in groups of ``m`` along the inputs, of which at most ``n`` are not zero."""
    if n == m:
        return weight
    group = weight.reshape(len(weight), -1, m)
    size = group.abs()
    threshold = size.topk(n + 1, dim=-1).values[..., -1:]
    return (group.sign() * (size - threshold).clamp_min(0)).view(weight.shape)


def groups(recipe: Recipe, structure: Pattern) -> tuple[int, int]:
    """n and m of an n:m structure along the inputs; ValueError for any other, that names the recipe."""
    own = tuple(field.name for field in fields(structure))
    if own != ("n", "m", "axis") or structure.axis != "in":
        raise ValueError(f"recipe {recipe} needs n:m along the inputs, such as NM(2, 4), got {structure}")
    return structure.n, structure.m
