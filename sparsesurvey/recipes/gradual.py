"""Gradual magnitude pruning: the density falls along a cubic curve, and what is pruned stays away.

Zhu and Gupta (2017), "To prune, or not to prune": between the shares ``after`` and ``until`` of the training, every so many
steps, the weights of least magnitude go until the sparsity is

    s(p) = s_f + (s_i - s_f) * (1 - p)^3,    p from 0 to 1,  s_i = 0

>>> [round(density_at(0.25, p), 3) for p in (0.0, 0.5, 1.0)]
[1.0, 0.344, 0.25]
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from math import ceil
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from sparsesurvey.recipe import Recipe
from sparsesurvey.recipes.ste import changed, check_count, check_number

if TYPE_CHECKING:
    from sparsesurvey.linear import SparseLinear
    from sparsesurvey.structure import Pattern


@dataclass(frozen=True)
class Gradual(Recipe):
    """F(W) = W * m, dW * m; m is what the structure, at the density of the time, keeps of ``|W|``.

    For every structure with a density to set, up to 1. For n:m, whose density is a ratio of small numbers,
    ``StructureDecay`` is the same idea.

    Args:
        every: steps between two prunings. after, until: shares of the steps at which pruning begins and ends.

    A quarter and three quarters are those of JaxPruner for T5 (Lee et al. 2023), which prunes every 1000 steps; Zhu and
    Gupta every 100 to 1000, of longer trainings than ours. A pruned weight is set to zero and has no gradient, as in
    JaxPruner; Zhu and Gupta keep its value behind the mask.
    """

    every: int = 10
    after: float = 0.25
    until: float = 0.75

    table: ClassVar[dict[str, str]] = {
        "forward": "W * m", "input gradient": "W * m", "output gradient": "dy", "edit": "dW * m",
        "mask": "every k steps, by |W|; the density falls along a cubic curve",
    }

    def __post_init__(self) -> None:
        check_count("every", self.every)
        check_number("after", self.after, 0, 1)
        check_number("until", self.until, 0, 1)
        if self.after > self.until:
            raise ValueError(f"after must be at most until, {self.until}, got {self.after}")

    def __str__(self) -> str:
        return f"gradual{changed(self)}"

    def check(self, structure: Pattern) -> None:
        if not can_be_dense(structure):
            raise ValueError(f"recipe {self} needs a structure with a density to set, up to 1, such as Unstructured(0.1) or "
                             f"Block(32, 32, 0.1), got {structure}")

    def forward_weight(self, layer: SparseLinear) -> Tensor:
        return layer.weight * layer.mask

    def edit_grad(self, layer: SparseLinear, grad: Tensor) -> Tensor:
        return grad.mul_(layer.mask)

    def update(self, layer: SparseLinear, step: int, steps: int, state: dict[str, Any]) -> None:
        first, last = self.after * steps, max(1, ceil(self.until * steps))
        if step == last:
            layer.mask.copy_(layer.structure.select(layer.weight.abs()))
        elif first <= step < last and step % self.every == 0:
            density = density_at(layer.structure.density, (step - first) / (last - first))
            layer.mask.copy_(replace(layer.structure, density=density).select(layer.weight.abs()))
        layer.weight.mul_(layer.mask)


def can_be_dense(structure: Pattern) -> bool:
    """Has the structure a density that may be anything from its own up to 1?"""
    if "density" not in {field.name for field in fields(structure)}:
        return False
    try:
        replace(structure, density=1.0)
    except ValueError:
        return False
    return True


def density_at(final: float, done: float) -> float:
    """Density when a share ``done``, from 0 to 1, of the pruning is over."""
    return 1 - (1 - final) * (1 - (1 - done) ** 3)
