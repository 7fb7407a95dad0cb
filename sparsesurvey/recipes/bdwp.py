"""BDWP: one weight, pruned twice in every step, along the inputs for the forward product and along the outputs for dx."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from sparsesurvey.recipe import Recipe
from sparsesurvey.recipes.s_ste import groups

if TYPE_CHECKING:
    from sparsesurvey.linear import SparseLinear
    from sparsesurvey.structure import Pattern


@dataclass(frozen=True)
class BDWP(Recipe):
    """Bidirectional weight pruning (Fang et al. 2023): F(W) = W * m_in, B(W) = W * m_out, dW straight through and dense.

    ``m_in`` keeps the n largest of every m inputs of an output, ``m_out`` the n largest of every m outputs of an input,
    each of the same dense weight and each anew after every step. Both products that see the weight are n:m, the one for
    dW is dense: (2 n / m + 1) / 3 of the arithmetic of dense training. dx is not the gradient of the forward product, so
    that training follows no loss exactly.

    No constant is to be chosen. No code is public, and the abstract is what we read of the paper: that pruning is by
    magnitude, that it is done in every step and that no decay is added are inferred.
    """

    table: ClassVar[dict[str, str]] = {
        "forward": "W * m_in", "input gradient": "W * m_out", "output gradient": "dy", "edit": "dW",
        "mask": "both each step, n:m along inputs and along outputs by |w|",
    }

    def __str__(self) -> str:
        return "bdwp"

    def check(self, structure: Pattern) -> None:
        groups(self, structure)

    def start(self, weight: Tensor, structure: Pattern, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        across(structure).check_shape(weight.shape)
        return weight, structure.mask(weight.abs())

    def begin(self, layer: SparseLinear) -> None:
        layer.register_buffer("back_mask", across(layer.structure).mask(layer.weight.detach().abs()))

    def forward_weight(self, layer: SparseLinear) -> Tensor:
        return layer.weight * layer.mask

    def input_weight(self, layer: SparseLinear) -> Tensor:
        return layer.weight * layer.back_mask

    def update(self, layer: SparseLinear, step: int, steps: int, state: dict[str, Any]) -> None:
        size = layer.weight.abs()
        layer.mask.copy_(layer.structure.select(size))
        layer.back_mask.copy_(across(layer.structure).select(size))


def across(structure: Pattern) -> Pattern:
    """The same n:m with groups along the outputs."""
    return replace(structure, axis="out")
