"""SR-STE: straight through, and what the mask leaves out decays.

Zhou et al. (2021), "Learning N:M fine-grained structured sparse neural networks from scratch": with m the mask of the step,

    W <- W - rate * (g + decay * (1 - m) * W)

for plain SGD, which their code obtains by adding the decay to the gradient. For Adam that is not the same: it divides the
decay by the size of the gradient as well. Hu et al. (2024, FST) compare both and add it to the gradient, with
``decay`` 6e-5 or 2e-4 by the model's size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from sparsesurvey.recipes.ste import STE, changed, check_number

if TYPE_CHECKING:
    from sparsesurvey.linear import SparseLinear

PLACES = ("gradient", "weight")


@dataclass(frozen=True)
class SRSTE(STE):
    """STE with ``decay * (1 - m) * W``, on the gradient before the optimizer sees it, or on the weight.

    Args:
        decay: 2e-4 is that of Zhou et al. (2021).
        on: "gradient" adds it to the gradient of the whole batch, before clipping, as the published code does; "weight"
            takes it off the weight after the step, times the learning rate, as AdamW does with weight decay. Whether
            Zhou et al. mean one or the other makes no difference for their SGD.
        freeze: 1, as published: the mask moves in every step to the end.
    """

    freeze: float = 1.0
    decay: float = 2e-4
    on: str = "gradient"

    table: ClassVar[dict[str, str]] = {
        **STE.table, "edit": "dW + λ (1 - m) * W", "mask": "each step, by |W|",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("decay", self.decay, 0)
        if self.on not in PLACES:
            raise ValueError(f"on must be one of {', '.join(PLACES)}, got {self.on!r}")

    def __str__(self) -> str:
        return f"sr-ste{changed(self)}"

    @classmethod
    def variants(cls) -> tuple[SRSTE, ...]:
        return cls(), cls(on="weight"), cls(decay=6e-5, every=40)

    def edit_grad(self, layer: SparseLinear, grad: Tensor) -> Tensor:
        return decayed(layer, grad, self.decay) if self.on == "gradient" else grad

    def update(self, layer: SparseLinear, step: int, steps: int, state: dict[str, Any]) -> None:
        if self.on == "weight":
            layer.weight.sub_(layer.weight.masked_fill(layer.mask, 0), alpha=layer.rate * self.decay)
        super().update(layer, step, steps, state)


def decayed(layer: SparseLinear, grad: Tensor, decay: float) -> Tensor:
    """``grad + decay * (1 - m) * W``, in place."""
    return grad.add_(layer.weight.masked_fill(layer.mask, 0), alpha=decay) if decay else grad
