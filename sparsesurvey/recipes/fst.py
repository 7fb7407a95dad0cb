"""FST: transposable 2:4 weights, refreshed now and then, decay of what is masked, and 2:4 gradients for dW."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from sparsesurvey.mvue import mvue24, mvue24_approximate
from sparsesurvey.recipe import Recipe
from sparsesurvey.recipes.ste import changed, check_count, check_number

if TYPE_CHECKING:
    from sparsesurvey.linear import SparseLinear
    from sparsesurvey.structure import Pattern


@dataclass(frozen=True)
class FST(Recipe):
    """Fully sparse training (Hu et al. 2024): F(W) = B(W) = W * m, dW = MVUE(dy.T) @ x + decay (1 - m) * W.

    The mask m is transposable, chosen by magnitude of the dense weight every ``every`` optimizer steps, from the first on. All three
    products then have a 2:4 operand: half of the arithmetic of dense training. The decay is added to the gradient, so that
    Adam normalises it; it pulls what is masked towards zero and so keeps the mask from flipping.

    Args:
        every: 40 in the published code.
        decay: 6e-5 for GPT-2 of 124M and 774M parameters, 2e-4 for 350M and 1558M; the paper finds it in the
            warm-up, by the rate at which masks flip.
        mvue: prune dy.T 2:4 along the tokens, unbiased, for dW; the tokens of a step must then be a multiple of 4.
        exact: by the estimate of least variance (Chmiel et al. 2023) instead of the approximate one, which the published
            training calls (see ``mvue``).

    Any transposable n:m will do; the gradient stays 2:4. The last sixth of the steps is dense in the paper:
    ``DenseLast(FST())``. Published, the decay is added after the gradient is clipped; here before, with the rest of it.
    """

    every: int = 40
    decay: float = 6e-5
    mvue: bool = True
    exact: bool = False

    table: ClassVar[dict[str, str]] = {
        "forward": "W * m", "input gradient": "W * m", "output gradient": "MVUE(dy)", "edit": "dW + λ (1 - m) * W",
        "mask": "every k steps, transposable n:m by |w|",
    }

    def __post_init__(self) -> None:
        check_count("every", self.every)
        check_number("decay", self.decay, 0)
        for name in ("mvue", "exact"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.exact and not self.mvue:
            raise ValueError("exact must be False without mvue, got True")

    def __str__(self) -> str:
        kind = ", no mvue" if not self.mvue else ", exact mvue" if self.exact else ""
        return f"fst{changed(self, 'mvue', 'exact')}{kind}"

    @classmethod
    def variants(cls) -> tuple[FST, ...]:
        return cls(), cls(every=2, decay=2e-4, exact=True), cls(mvue=False)

    def check(self, structure: Pattern) -> None:
        if not transposable(structure):
            raise ValueError(f"recipe {self} needs masks that are n:m along both axes, such as Transposable(2, 4); "
                             f"got {structure}")

    def start(self, weight: Tensor, structure: Pattern, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return weight, structure.mask(weight.abs())

    def forward_weight(self, layer: SparseLinear) -> Tensor:
        return layer.weight * layer.mask

    def output_grad(self, layer: SparseLinear) -> Callable[[Tensor], Tensor] | None:
        return (least_variance if self.exact else approximate) if self.mvue else None

    def edit_grad(self, layer: SparseLinear, grad: Tensor) -> Tensor:
        return grad.add_(layer.weight * ~layer.mask, alpha=self.decay)

    def update(self, layer: SparseLinear, step: int, steps: int, state: dict[str, Any]) -> None:
        if step % self.every == 0:
            layer.mask.copy_(layer.structure.select(layer.weight.abs()))


@lru_cache
def transposable(structure: Pattern) -> bool:
    """Is it n:m, and is the transpose of one of its masks one of its masks?"""
    if not (hasattr(structure, "n") and hasattr(structure, "m")) or len(set(structure.tile)) > 1:
        return False
    size = 4 * structure.tile[0]
    mask = structure.mask(torch.rand(size, size, generator=torch.Generator().manual_seed(0)))
    return structure.holds(mask.T)


def approximate(dy: Tensor) -> Tensor:
    """``dy [tokens, out]`` with at most two of every four tokens of an output, unbiased; see ``mvue24_approximate``."""
    return _along_tokens(mvue24_approximate, dy)


def least_variance(dy: Tensor) -> Tensor:
    """The same by ``mvue24``."""
    return _along_tokens(mvue24, dy)


def _along_tokens(estimate: Callable[[Tensor], Tensor], dy: Tensor) -> Tensor:
    """The estimate of ``dy.T``; what is not finite makes its own place so, and the loss tells of it."""
    if len(dy) % 4:
        raise ValueError(f"tokens of a step must be a multiple of 4, whose gradients are pruned 2:4; got {len(dy)}")
    return estimate(torch.nan_to_num(dy, nan=0.0, posinf=0.0, neginf=0.0).T.contiguous()).T + 0 * dy
