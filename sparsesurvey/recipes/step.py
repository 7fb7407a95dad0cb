"""STEP: dense until Adam knows the size of the gradients, then masks under that fixed size.

Lu et al. (2023), "STEP: learning N:M structured sparsity masks from scratch with precondition". Masked weights spoil Adam's
second moment v. In the first phase the layer is dense; it ends (AutoSwitch) when the change of v

    Z_t = mean |v_t - v_(t-1)|

on average over the last 1 / (1 - b2) steps is below eps, between 10 % and 50 % of the steps. In the second, v stays as it
is (``optim.AdamW`` has the update) and masks are learnt straight through.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from sparsesurvey.recipes.sr_ste import SRSTE
from sparsesurvey.recipes.ste import STE, changed, check_count, check_number

if TYPE_CHECKING:
    from sparsesurvey.linear import SparseLinear
    from sparsesurvey.structure import Pattern


@dataclass(frozen=True)
class STEP(SRSTE):
    """Dense with AdamW until the second moment is steady, then STE (or SR-STE, with ``decay``) with the moment frozen.

    Args:
        window: steps that Z is averaged over; 20 is 1 / (1 - b2) for the b2 of 0.95 that ``TrainConfig`` has.
        eps: what the average must be below; Adam's own 1e-8.
        earliest, latest: shares of the steps between which the first phase ends, 10 % and 50 % as published.

    The paper looks at all layers together, here each layer switches by itself. The published code's denominator in the second
    phase, sqrt(v) + eps^(3/4) without the bias correction, is not repeated: ours is the first phase's, sqrt(v / c) + eps, with
    c as it was. Only AdamW has a second moment; the first step with another optimizer is a ValueError.
    """

    decay: float = 0.0
    window: int = 20
    eps: float = 1e-8
    earliest: float = 0.1
    latest: float = 0.5

    table: ClassVar[dict[str, str]] = {
        **STE.table, "forward": "W, then W * m", "input gradient": "W, then W * m",
        "mask": "1; from when Adam's v is steady and frozen, each step, by |W|",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("window", self.window)
        check_number("eps", self.eps, 0)
        check_number("earliest", self.earliest, 0, 1)
        check_number("latest", self.latest, self.earliest, 1)

    def __str__(self) -> str:
        return f"step{changed(self)}"

    @classmethod
    def variants(cls) -> tuple[STEP, ...]:
        return cls(), cls(decay=2e-4)

    def start(self, weight: Tensor, structure: Pattern, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return weight, torch.ones_like(weight, dtype=torch.bool)

    def begin(self, layer: SparseLinear) -> None:
        device = layer.weight.device
        layer.register_buffer("variance", torch.zeros_like(layer.weight.detach()))
        layer.register_buffer("changes", torch.zeros(self.window, device=device))
        layer.register_buffer("switched", torch.zeros((), dtype=torch.int64, device=device))  # after which step; 0 = not yet

    def update(self, layer: SparseLinear, step: int, steps: int, state: dict[str, Any]) -> None:
        if layer.switched:
            return super().update(layer, step, steps, state)
        if "exp_avg_sq" not in state:
            raise ValueError(f"recipe {self} needs AdamW, whose second moment it freezes: optimizer must be 'adamw', got one "
                             f"that keeps {', '.join(sorted(state)) or 'nothing'}")
        now = state["exp_avg_sq"]
        layer.changes[step % self.window] = (now - layer.variance).abs().mean()
        layer.variance.copy_(now)
        steady = step > self.earliest * steps and layer.changes.sum() < self.eps * min(step, self.window)
        if steady or step >= max(1, int(self.latest * steps)):
            layer.switched.fill_(step)
            layer.mask.copy_(layer.structure.select(self.scores(layer.weight)))

    def freezes_variance(self, layer: SparseLinear) -> bool:
        return bool(layer.switched)
