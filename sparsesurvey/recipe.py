"""What a recipe is: how to train under a structure. Small hooks around the three products of a layer, dense by default.

For a layer y = x @ W.T with gradient dy, a recipe may change which weight each product sees, and what becomes of the
gradient and of the mask::

    forward         y  = x  @ F(W).T        F = forward_weight
    input gradient  dx = dy @ B(W)          B = input_weight
    weight gradient dW = G(dy).T @ x        G = output_grad, straight through to W
    before a step   the gradient of the whole batch, changed: edit_grad
    after a step    a new mask, or the old one enforced: update

A new recipe is one small class, in a file of its own in ``recipes``, that overrides what it changes. A recipe has no
state: what it must remember per layer are buffers (or parameters) of the layer, made by ``begin``, so that a checkpoint
holds them. What depends on the time alone, such as which phase it is, is set by ``prepare``, before every step and when a
run is resumed; training is told its length by ``steps``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

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

    @classmethod
    def variants(cls) -> tuple[Recipe, ...]:
        """Instances that the contract tests and the chapters look at; the default one first."""
        return (cls(),)

    @property
    def fixed_mask(self) -> bool:
        """Does the mask never change? Only then can a layer hold the kept weights alone."""
        return False

    def check(self, structure: Pattern) -> None:
        """Raise ValueError, with the reason, where this recipe cannot serve ``structure``."""

    def start(self, weight: Tensor, structure: Pattern, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The weight ``[out, in]`` to begin with, and its mask. ``generator`` is on the CPU."""
        return weight, torch.ones_like(weight, dtype=torch.bool)

    def begin(self, layer: SparseLinear) -> None:
        """Once, when the layer is made: register what it must remember. ``layer.weight`` and ``layer.mask`` are there."""

    def lr_multiplier(self, structure: Pattern) -> float:
        """Factor on the learning rate of the layers under ``structure``."""
        return 1.0

    def prepare(self, layer: SparseLinear, step: int, steps: int) -> None:
        """Before optimizer step ``step`` (from 0) of ``steps``, and at the end with ``step == steps``.

        What is set here must follow from the time and the layer's own buffers, so that a resumed run has it as well.
        """

    def forward_weight(self, layer: SparseLinear) -> Tensor:
        """F(W): what the forward product multiplies with. Autograd does not look."""
        return layer.weight

    def input_weight(self, layer: SparseLinear) -> Tensor | None:
        """B(W): what the input gradient is multiplied with; ``None`` where it is F(W), which is then not computed twice."""
        return None

    def output_grad(self, layer: SparseLinear) -> Callable[[Tensor], Tensor] | None:
        """G, a function of ``dy [tokens, out]`` (of a module, so that it can be compiled); ``None`` where it is dy."""
        return None

    def inputs(self, layer: SparseLinear, x: Tensor) -> Tensor:
        """What the product sees of the activations ``x [tokens, in]``; autograd looks."""
        return x

    def beside(self, layer: SparseLinear, x: Tensor) -> Tensor | None:
        """What is added to the product ``[tokens, out]``, such as an adapter's; autograd looks."""
        return None

    def penalty(self, layer: SparseLinear) -> Tensor | None:
        """A number that is added to the loss; autograd looks."""
        return None

    def edit_grad(self, layer: SparseLinear, grad: Tensor) -> Tensor:
        """Change of the weight gradient ``[out, in]`` of the whole batch before the optimizer sees it; may be in place."""
        return grad

    def update(self, layer: SparseLinear, step: int, steps: int, state: dict[str, Any]) -> None:
        """After optimizer step ``step`` (the first is 1) of ``steps``: change ``layer.mask`` or ``layer.weight`` in place.

        ``state`` is what the optimizer keeps of ``layer.weight`` ("exp_avg", "exp_avg_sq", "momentum_buffer"), to be
        changed in place as well; ``layer.rate`` is the learning rate that the step had.
        """

    def dense(self, layer: SparseLinear) -> Tensor:
        """The weight ``[out, in]`` of the plain linear layer that does what this one does now."""
        return self.forward_weight(layer)

    def freezes_variance(self, layer: SparseLinear) -> bool:
        """Shall AdamW stop to follow the second moment of the layer's gradient?"""
        return False


def spelled(recipe: Recipe) -> str:
    """The constructor call that makes the recipe, the same in every process: functions by their names.

    >>> spelled(Recipe())
    'Recipe()'
    """
    values = {field.name: getattr(recipe, field.name) for field in fields(recipe)}
    say = lambda value: spelled(value) if isinstance(value, Recipe) else getattr(value, "__name__", None) or repr(value)
    return f"{type(recipe).__name__}({', '.join(f'{name}={say(value)}' for name, value in values.items())})"
