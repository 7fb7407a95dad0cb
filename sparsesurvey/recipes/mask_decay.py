"""Mask decay: what the mask leaves out fades from 1 to 0 while the model trains.

Kao et al. (2022), "Training recipe for N:M structured sparsity with decaying pruning mask", called MDGF in Bambhaniya et al.
(2024), "Progressive gradient flow": after a dense warm-up

    F(W) = W * (m + (1 - m) * D(t)),    D(t) = max(0, 1 - c t)  or  D(t) = exp(-c t)

with the mask m of ``|W|`` chosen anew in each step and the gradient straight through; at the end m is binary.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from sparsesurvey.recipe import Recipe
from sparsesurvey.recipes.ste import changed, check_number

if TYPE_CHECKING:
    from sparsesurvey.linear import SparseLinear
    from sparsesurvey.structure import Pattern

FORMS = ("linear", "exponential")


@dataclass(frozen=True)
class MaskDecay(Recipe):
    """F(W) = W where the mask keeps, W D(t) elsewhere, with D from 1 down to exactly 0.

    Args:
        form: "linear" falls to 0 at the start of the last phase, "exponential" as exp(-``rate`` p) with p from 0 to 1, and
            is cut to 0 then.
        warmup: share of the steps before the decay, dense. tune: share of the steps after it, with the mask alone.
        rate: of the exponential form.

    The papers give c per step; that D reaches its end where the last phase begins, whatever the number of steps, is our
    reading, as are the shares of a tenth (the published program has 0 for both unless told otherwise) and ``rate``.
    """

    form: str = "linear"
    warmup: float = 0.1
    tune: float = 0.1
    rate: float = 5.0

    table: ClassVar[dict[str, str]] = {
        "forward": "W * (m + D (1 - m))", "input gradient": "W * (m + D (1 - m))", "output gradient": "dy", "edit": "dW",
        "mask": "each step, by |W|; D from 1 to 0",
    }

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, got {self.form!r}")
        check_phases(self.warmup, self.tune)
        check_number("rate", self.rate, 0)

    def __str__(self) -> str:
        return f"mask decay {self.form}{changed(self, 'form')}"

    @classmethod
    def variants(cls) -> tuple[MaskDecay, ...]:
        return cls(), cls("exponential")

    def value(self, step: int, steps: int) -> float:
        """D before step ``step``, from 0, of ``steps``."""
        done = progress(step, steps, self.warmup, self.tune)
        if done >= 1:
            return 0.0
        return 1 - done if self.form == "linear" else exp(-self.rate * done)

    def start(self, weight: Tensor, structure: Pattern, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return weight, structure.mask(weight.abs())

    def begin(self, layer: SparseLinear) -> None:
        layer.register_buffer("decay", torch.ones((), device=layer.weight.device))

    def prepare(self, layer: SparseLinear, step: int, steps: int) -> None:
        layer.decay.fill_(self.value(step, steps))

    def forward_weight(self, layer: SparseLinear) -> Tensor:
        return torch.where(layer.mask, layer.weight, layer.weight * layer.decay)

    def update(self, layer: SparseLinear, step: int, steps: int, state: dict[str, Any]) -> None:
        layer.mask.copy_(layer.structure.select(layer.weight.abs()))


def progress(step: int, steps: int, warmup: float, tune: float) -> float:
    """How far the phase between the first, of a share ``warmup``, and the last, of a share ``tune``, is done: 0 to 1.

    >>> [progress(step, 10, 0.2, 0.3) for step in (0, 2, 7, 10)]
    [0.0, 0.0, 1.0, 1.0]
    """
    first, last = warmup * steps, (1 - tune) * steps
    if step >= last - 1e-9 * steps:
        return 1.0
    return min(1.0, max(0.0, (step - first) / (last - first)))


def check_phases(warmup: float, tune: float) -> None:
    """Raise ValueError unless the shares of the first and the last phase leave something between them."""
    check_number("warmup", warmup, 0, 1)
    check_number("tune", tune, 0, 1)
    if warmup + tune >= 1:
        raise ValueError(f"warmup + tune must be below 1, the share of all steps, got {warmup} + {tune}")
