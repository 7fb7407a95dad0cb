"""Dense last: a sparse recipe for most of the steps, then the dense layer.

Hu et al. (2024, FST) end the sparse phase after 250 000 of 300 000 steps; sparse pre-training with dense fine-tuning
(Thangarasa et al. 2023) is the same with a static mask, and Madhyastha et al. (2026) end dense as well. The model at the end
is dense: only its training was cheaper. Report the loss before the switch, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from sparsesurvey.recipe import Recipe
from sparsesurvey.recipes.sr_ste import SRSTE
from sparsesurvey.recipes.ste import check_number

if TYPE_CHECKING:
    from sparsesurvey.linear import SparseLinear
    from sparsesurvey.structure import Pattern


@dataclass(frozen=True)
class DenseLast(Recipe):
    """``recipe`` for the first ``round(sparse * steps)`` steps, then F = B = W, G and what it does to x off, no mask.

    The inner recipe's time is the sparse phase: its masks are final, and its decay done, where that ends. What it adds beside
    the product stays, as do its learning rate and a second moment that it froze. ``sparse`` 5/6 is that of Hu et al. (2024).
    """

    recipe: Recipe = SRSTE()
    sparse: float = 5 / 6

    ends: ClassVar[str] = "dense"
    table: ClassVar[dict[str, str]] = {
        "forward": "the recipe's, then W", "input gradient": "the recipe's, then W",
        "output gradient": "the recipe's, then dy", "edit": "the recipe's, then dW", "mask": "the recipe's, then 1",
    }

    def __post_init__(self) -> None:
        if not isinstance(self.recipe, Recipe) or isinstance(self.recipe, DenseLast):
            raise ValueError(f"recipe must be a recipe that does not end dense, got {self.recipe!r}")
        if type(self.recipe).inputs is not Recipe.inputs and getattr(self.recipe, "plain", True):
            raise ValueError(f"recipe must leave the order of x alone, whose dense layer is not W, got {self.recipe}")
        check_number("sparse", self.sparse, 0, 1)
        if not self.sparse:
            raise ValueError("sparse must be a share of the steps above 0; without a sparse phase take Recipe()")

    def __str__(self) -> str:
        share = "" if self.sparse == DenseLast.sparse else f" after {100 * self.sparse:g}%"
        return f"{self.recipe}, dense last{share}"

    @classmethod
    def variants(cls) -> tuple[DenseLast, ...]:
        return (cls(),)

    def switch(self, steps: int) -> int:
        """Steps of the sparse phase."""
        return round(self.sparse * steps)

    def check(self, structure: Pattern) -> None:
        self.recipe.check(structure)

    def start(self, weight: Tensor, structure: Pattern, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return self.recipe.start(weight, structure, generator)

    def begin(self, layer: SparseLinear) -> None:
        self.recipe.begin(layer)
        layer.register_buffer("is_dense", torch.zeros((), dtype=torch.bool, device=layer.weight.device))
        layer.ended = False  # the same for Python: G is a function or none

    def lr_multiplier(self, structure: Pattern) -> float:
        return self.recipe.lr_multiplier(structure)

    def prepare(self, layer: SparseLinear, step: int, steps: int) -> None:
        switch = self.switch(steps)
        self.recipe.prepare(layer, min(step, switch), switch)
        layer.ended = switch <= step and switch < steps
        layer.is_dense.fill_(layer.ended)

    def forward_weight(self, layer: SparseLinear) -> Tensor:
        return torch.where(layer.is_dense, layer.weight, self.recipe.forward_weight(layer))

    def input_weight(self, layer: SparseLinear) -> Tensor | None:
        weight = self.recipe.input_weight(layer)
        return None if weight is None else torch.where(layer.is_dense, layer.weight, weight)

    def output_grad(self, layer: SparseLinear) -> Callable[[Tensor], Tensor] | None:
        return None if layer.ended else self.recipe.output_grad(layer)

    def inputs(self, layer: SparseLinear, x: Tensor) -> Tensor:
        seen = self.recipe.inputs(layer, x)
        return x if seen is x else torch.where(layer.is_dense, x, seen)

    def beside(self, layer: SparseLinear, x: Tensor) -> Tensor | None:
        return self.recipe.beside(layer, x)

    def penalty(self, layer: SparseLinear) -> Tensor | None:
        return None if layer.ended else self.recipe.penalty(layer)

    def edit_grad(self, layer: SparseLinear, grad: Tensor) -> Tensor:
        return grad if layer.ended else self.recipe.edit_grad(layer, grad)

    def update(self, layer: SparseLinear, step: int, steps: int, state: dict[str, Any]) -> None:
        switch = self.switch(steps)
        if step <= switch:
            self.recipe.update(layer, step, switch, state)
        if switch <= step and switch < steps:
            layer.mask.fill_(True)

    def dense(self, layer: SparseLinear) -> Tensor:
        """With what the recipe adds beside the product."""
        whole, alone = self.recipe.dense(layer), layer.weight
        if type(self.recipe).beside is not Recipe.beside:
            alone = alone + (whole - self.recipe.forward_weight(layer))
        return torch.where(layer.is_dense, alone, whole)

    def freezes_variance(self, layer: SparseLinear) -> bool:
        return self.recipe.freezes_variance(layer)
