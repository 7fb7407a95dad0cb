"""SLoPe: a static n:m mask, pruned once more for the input gradient, and low-rank adapters that come late."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from sparsesurvey.recipe import Recipe, Score
from sparsesurvey.recipes.bdwp import across
from sparsesurvey.recipes.s_ste import groups
from sparsesurvey.recipes.static import Static
from sparsesurvey.recipes.ste import changed, check_number

if TYPE_CHECKING:
    from sparsesurvey.linear import SparseLinear
    from sparsesurvey.structure import Pattern


@dataclass(frozen=True)
class SLoPe(Recipe):
    """Double-pruned and lazily adapted (Mozaffari et al. 2025): F(W) = W * m, B(W) = F(W) * m', y = x F(W).T + x L R / r.

    ``m`` is n:m along the inputs and never changes, as in ``Static``; ``m'`` keeps the n largest of every m outputs of
    F(W), chosen anew in every step. Its extra zeros make dx another one than the forward product's. The adapters L
    ``[in, r]``, normal, and R ``[r, out]``, zero, join after the share ``lazy`` of the steps; the weight trains on beside
    them. That the adapters are divided by r, and how they start, is from the published code.

    Args:
        rank: r as a share of the layer's smaller side, at least 1. 2.1 %, 16 of 768, is the paper's for GPT-2 small.
        lazy: the adapters live in the last 1 %.
        score: chooses ``m``; by default at random, as the paper says. The published code takes the largest of the fresh
            weights: ``SLoPe(score=magnitude)``.
    """

    rank: float = 0.021
    lazy: float = 0.99
    score: Score | None = None

    ends: ClassVar[str] = "adapted"
    table: ClassVar[dict[str, str]] = {
        "forward": "W * m, and + x L R / r at the end", "input gradient": "W * m * m'", "output gradient": "dy",
        "edit": "dW * m", "mask": "m never; m' each step, n:m along outputs by |w|",
    }

    def __post_init__(self) -> None:
        check_number("rank", self.rank, 0, 1)
        check_number("lazy", self.lazy, 0, 1)

    def __str__(self) -> str:
        return f"slope{changed(self)}"

    @classmethod
    def variants(cls) -> tuple[SLoPe, ...]:
        return cls(), cls(rank=0.0625, lazy=0.5)

    def check(self, structure: Pattern) -> None:
        groups(self, structure)

    def start(self, weight: Tensor, structure: Pattern, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        across(structure).check_shape(weight.shape)
        return Static(self.score).start(weight, structure, generator)

    def begin(self, layer: SparseLinear) -> None:
        layer.register_buffer("back_mask", across(layer.structure).mask(layer.weight.detach().abs()))
        rank = max(1, round(self.rank * min(layer.weight.shape)))
        left = torch.randn(layer.in_features, rank, generator=layer.generator(0)).to(layer.weight)
        layer.adapter_left = nn.Parameter(left, requires_grad=False)
        layer.adapter_right = nn.Parameter(layer.weight.new_zeros(rank, layer.out_features), requires_grad=False)

    def prepare(self, layer: SparseLinear, step: int, steps: int) -> None:
        alive = step >= self.lazy * steps
        layer.adapter_left.requires_grad_(alive)
        layer.adapter_right.requires_grad_(alive)

    def forward_weight(self, layer: SparseLinear) -> Tensor:
        return layer.weight * layer.mask

    def input_weight(self, layer: SparseLinear) -> Tensor:
        return layer.weight * layer.back_mask

    def beside(self, layer: SparseLinear, x: Tensor) -> Tensor | None:
        if not layer.adapter_left.requires_grad:
            return None
        return x @ layer.adapter_left @ layer.adapter_right / layer.adapter_left.shape[1]

    def edit_grad(self, layer: SparseLinear, grad: Tensor) -> Tensor:
        return grad.mul_(layer.mask)

    def update(self, layer: SparseLinear, step: int, steps: int, state: dict[str, Any]) -> None:
        layer.weight.mul_(layer.mask)
        layer.back_mask.copy_(across(layer.structure).select(layer.weight.abs()))

    def dense(self, layer: SparseLinear) -> Tensor:
        """With the adapters, which are zero until they live."""
        return self.forward_weight(layer) + (layer.adapter_left @ layer.adapter_right).T / layer.adapter_left.shape[1]
