"""Recipes: how to train under a structure. Five hooks around the three products of a layer, dense by default.

For a layer y = x @ W.T with gradient dy, a recipe may change which weight each product sees, and what becomes of the
gradient and of the mask::

    forward         y  = x  @ F(W).T        F = forward_weight
    input gradient  dx = dy @ B(W)          B = input_weight
    weight gradient dW = G(dy).T @ x        G = output_grad, then edit_grad
    after a step    a new mask, or the old one enforced: update_mask

A new recipe is one small class that overrides what it changes. A recipe has no state: what it must remember per layer
are buffers of the layer, which the hooks are handed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sparsesurvey.linear import SparseLinear
    from sparsesurvey.structure import Pattern

Score = Callable[[Tensor, object], Tensor]


@dataclass(frozen=True)
class Recipe:
    """Dense training: every hook leaves things as they are, and the mask keeps everything."""

    def __str__(self) -> str:
        return "dense"

    @property
    def fixed_mask(self) -> bool:
        """Does the mask never change? Only then can a layer hold the kept weights alone."""
        return False

    def start(self, weight: Tensor, structure: Pattern, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The weight ``[out, in]`` to begin with, and its mask. ``generator`` is on the CPU."""
        return weight, torch.ones_like(weight, dtype=torch.bool)

    def lr_multiplier(self, structure: Pattern) -> float:
        """Factor on the learning rate of the layers under ``structure``."""
        return 1.0

    def forward_weight(self, layer: SparseLinear) -> Tensor:
        """F(W): what the forward product multiplies with."""
        return layer.weight

    def input_weight(self, layer: SparseLinear) -> Tensor:
        """B(W): what the input gradient is multiplied with."""
        return self.forward_weight(layer)

    def output_grad(self, layer: SparseLinear, dy: Tensor) -> Tensor:
        """G(dy): what of ``dy [tokens, out]`` makes the weight gradient."""
        return dy

    def edit_grad(self, layer: SparseLinear, grad: Tensor) -> Tensor:
        """Change of the weight gradient ``[out, in]`` before the optimizer sees it."""
        return grad

    def update_mask(self, layer: SparseLinear, step: int) -> None:
        """After optimizer step ``step`` (the first is 1): change ``layer.mask`` or ``layer.weight`` in place."""


@dataclass(frozen=True)
class Static(Recipe):
    """A mask chosen once, before training: F(W) = W * m, dW * m, and nothing outside the mask ever lives.

    Without a score the mask is random (the structure chooses from uniform scores) and the kept weights are scaled by
    density ** -0.5, so that the layer's output has the variance that the dense one has. With one, ``Static(magnitude)``
    say, the mask is what the structure keeps of the given weights, which stay as they are.

    ``scale_lr`` divides the learning rate of the sparse layers by the density. Together with the scaled start this is
    the parametrisation of Dey et al. (2024, SuPar): with it the best learning rate does not depend on the density,
    without it one rate for all structures favours the dense one.
    """

    score: Score | None = None
    rescale: bool = True
    scale_lr: bool = False

    def __str__(self) -> str:
        chosen = "" if self.score is None else f" {getattr(self.score, '__name__', 'score')}"
        plain = "" if self.rescale or self.score is not None else ", start not rescaled"
        return f"static{chosen}{plain}{', lr / density' if self.scale_lr else ''}"

    @property
    def fixed_mask(self) -> bool:
        return True

    def start(self, weight: Tensor, structure: Pattern, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        if self.score is not None:
            mask = structure.mask(self.score(weight, None))
            return weight * mask, mask
        scores = torch.rand(weight.shape, generator=generator, dtype=torch.float64).to(weight.device)
        mask = structure.mask(scores)
        return weight * mask * (structure.density**-0.5 if self.rescale else 1.0), mask

    def lr_multiplier(self, structure: Pattern) -> float:
        return 1 / structure.density if self.scale_lr else 1.0

    def forward_weight(self, layer: SparseLinear) -> Tensor:
        return layer.weight * layer.mask

    def edit_grad(self, layer: SparseLinear, grad: Tensor) -> Tensor:
        return grad * layer.mask

    def update_mask(self, layer: SparseLinear, step: int) -> None:
        """Weight decay and AdamW leave a zero at zero; Muon's orthogonalised update is dense and must be cut back."""
        layer.weight.mul_(layer.mask)
