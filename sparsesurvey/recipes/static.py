"""Static: a mask that is chosen once, before training, and never changes.

Random masks with rescaled start and learning rate: Dey et al. (2024), "Sparse maximal update parameterization" (SuPar).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsesurvey.recipe import Recipe, Score

if TYPE_CHECKING:
    from sparsesurvey.linear import SparseLinear
    from sparsesurvey.structure import Pattern


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

    @classmethod
    def variants(cls) -> tuple[Static, ...]:
        return cls(), cls(scale_lr=True)

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
        return grad.mul_(layer.mask)

    def update(self, layer: SparseLinear, step: int, steps: int, state: dict[str, Any]) -> None:
        """Weight decay and AdamW leave a zero at zero; Muon's orthogonalised update is dense and must be cut back."""
        layer.weight.mul_(layer.mask)
