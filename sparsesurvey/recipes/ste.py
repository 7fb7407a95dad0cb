"""STE: the mask follows the weights, and the gradient reaches all of them, kept or not.

The straight-through estimator of Bengio et al. (2013), for masks: the forward product and the input gradient see the masked
weight, the weight gradient goes to the dense one as if there were no mask. JaxPruner (Lee et al. 2023) chooses the mask
anew in every step, Hu et al. (2024, FST) in every 40th.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from sparsesurvey.recipe import Recipe, Score

if TYPE_CHECKING:
    from sparsesurvey.linear import SparseLinear
    from sparsesurvey.structure import Pattern


@dataclass(frozen=True)
class STE(Recipe):
    """F(W) = W * m with m what the structure keeps of ``|W|`` after every ``every``-th step; dW goes to all of W.

    Args:
        every: steps between two choices of the mask; a mask is chosen before the first step as well.
        freeze: share of the steps after which the mask stays as it is. The last tenth is our choice: in it the kept weights
            settle, without the jumps of a mask that still moves. 1 is as published, the mask moves to the end.
        score: what is ranked instead of ``|W|``, a function of the weight (and ``None``, for what a layer saw).
    """

    every: int = 1
    freeze: float = 0.9
    score: Score | None = None

    table: ClassVar[dict[str, str]] = {
        "forward": "W * m", "input gradient": "W * m", "output gradient": "dy", "edit": "dW",
        "mask": "every k steps, by |W|",
    }

    def __post_init__(self) -> None:
        check_count("every", self.every)
        check_number("freeze", self.freeze, 0, 1)

    def __str__(self) -> str:
        return f"ste{changed(self)}"

    @classmethod
    def variants(cls) -> tuple[STE, ...]:
        return cls(), cls(every=10)

    def scores(self, weight: Tensor) -> Tensor:
        return weight.abs() if self.score is None else self.score(weight, None)

    def start(self, weight: Tensor, structure: Pattern, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return weight, structure.mask(self.scores(weight))

    def forward_weight(self, layer: SparseLinear) -> Tensor:
        return layer.weight * layer.mask

    def update(self, layer: SparseLinear, step: int, steps: int, state: dict[str, Any]) -> None:
        if step % self.every == 0 and step <= self.freeze * steps:
            layer.mask.copy_(layer.structure.select(self.scores(layer.weight)))


def changed(recipe: Recipe, *shown: str) -> str:
    """The constants of a recipe that are not the default ones, in words: ", every 10"; ``shown`` stand elsewhere.

    >>> changed(STE(every=10, freeze=1.0)), changed(STE())
    (', every 10, freeze 1', '')
    """
    values = {field.name: (getattr(recipe, field.name), field.default) for field in fields(recipe) if field.name not in shown}
    say = lambda value: f"{value:g}" if isinstance(value, float) else str(getattr(value, "__name__", value))
    return "".join(f", {name} {say(value)}" for name, (value, default) in values.items() if value != default)


def check_count(name: str, value: int) -> None:
    """Raise ValueError unless ``value`` is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def check_number(name: str, value: float, low: float, high: float = float("inf")) -> None:
    """Raise ValueError unless ``low <= value <= high``, and it is finite."""
    fits = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    if not fits or value == float("inf"):
        allowed = f"a number of at least {low:g}" if high == float("inf") else f"a number from {low:g} to {high:g}"
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
