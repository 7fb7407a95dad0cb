"""2:4 weights and V:N:M activations: every product of the MLP has one sparse operand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from sparsesurvey.recipe import Recipe
from sparsesurvey.recipes.s_ste import soft_threshold
from sparsesurvey.recipes.ste import changed, check_number

if TYPE_CHECKING:
    from sparsesurvey.linear import SparseLinear
    from sparsesurvey.structure import Pattern


@dataclass(frozen=True)
class VenomActivations(Recipe):
    """2:4 weights, and V:N:M activations before the last projection of an MLP (Madhyastha et al. 2026).

    The structure is the one of the activations, such as ``VNM(16, 2, 8)``: of ``x [tokens, in]`` of the last projection, V
    adjacent tokens share 4 of every m neurons, and each keeps N of these. What is masked has no gradient either, so that the
    products before it have a sparse gradient. The weights are N:4 where a product has no sparse activation, by the soft
    threshold of ``SSTE`` with the scale of the start::

                        y                      dx                    dW
        gate, up        x @ soft(W).T          dy @ W, dy sparse     dy.T @ x, dy sparse
        last            sparse x @ W.T         dy @ soft_out(W)      dy.T @ sparse x

    with ``soft_out`` in groups along the outputs. The first ``warmup`` of the steps are dense; so are the last ones in the
    paper: ``DenseLast(VenomActivations())``.

    Our reading, of the abstract and of notes on the paper: which operand is sparse in which product, a selection of
    activations by magnitude, and the gate beside their squared ReLU. Left out: the routing of tokens to groups of neurons,
    which makes adjacent tokens alike. Activations that are mostly zero lose little: build the model with
    ``hidden_act="relu2"``. Which neurons a token keeps depends on its V - 1 neighbours, later ones too, so that a prediction
    is not quite blind to what it predicts. ``densify`` cannot keep what the activations do.

    Args:
        warmup: 1000 dense steps of 60 000.
        last: the name of the layers whose activations are pruned; all others have 2:4 weights in the forward product.
    """

    warmup: float = 1 / 60
    last: str = "down_proj"

    ends: ClassVar[str] = "sparse in part"
    plain: ClassVar[bool] = False
    table: ClassVar[dict[str, str]] = {
        "forward": "soft(W) for gate and up; W, and x V:N:M, for down",
        "input gradient": "W for gate and up; soft_out(W) for down",
        "output gradient": "dy, V:N:M for gate and up", "edit": "dW", "mask": "each step; of x for each batch",
    }

    def __post_init__(self) -> None:
        check_number("warmup", self.warmup, 0, 1)
        if not isinstance(self.last, str) or not self.last:
            raise ValueError(f"last must be the name of a layer, such as 'down_proj', got {self.last!r}")

    def __str__(self) -> str:
        return f"venom activations{changed(self)}"

    @classmethod
    def variants(cls) -> tuple[VenomActivations, ...]:
        return cls(), cls(warmup=0.0)

    def check(self, structure: Pattern) -> None:
        inner = getattr(structure, "inner", None)
        if not all(hasattr(structure, name) for name in ("v", "n", "m")) or getattr(inner, "axis", None) != "in":
            raise ValueError(f"recipe {self} needs V:N:M, such as VNM(16, 2, 8), for the activations; got {structure}")

    def start(self, weight: Tensor, structure: Pattern, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        inner = structure.inner
        inner.check_shape(weight.shape)
        inner.check_shape(weight.T.shape)
        return weight, torch.ones_like(weight, dtype=torch.bool)

    def begin(self, layer: SparseLinear) -> None:
        weight, soft = layer.weight.detach(), self.soft(layer).detach()
        scale = (weight * soft).sum() / soft.square().sum()
        layer.register_buffer("scale", torch.where(scale.isfinite(), scale, 1.0))  # all zero: then so is soft(W)
        layer.register_buffer("is_sparse", torch.zeros((), dtype=torch.bool, device=weight.device))
        layer.sparse = False  # the same for Python

    def prepare(self, layer: SparseLinear, step: int, steps: int) -> None:
        layer.sparse = step >= self.warmup * steps
        layer.is_sparse.fill_(layer.sparse)

    def is_last(self, layer: SparseLinear) -> bool:
        return layer.name.rpartition(".")[2] == self.last

    def soft(self, layer: SparseLinear) -> Tensor:
        """The soft weight ``[out, in]`` in groups along the axis that its product sums over: outputs, for the last one's dx."""
        n, m = layer.structure.inner.n, layer.structure.inner.m
        if self.is_last(layer):
            return soft_threshold(layer.weight.T.contiguous(), n, m).T
        return soft_threshold(layer.weight, n, m)

    def forward_weight(self, layer: SparseLinear) -> Tensor:
        return layer.scale * self.soft(layer) if layer.sparse and not self.is_last(layer) else layer.weight

    def input_weight(self, layer: SparseLinear) -> Tensor | None:
        if not layer.sparse:
            return None
        return layer.scale * self.soft(layer) if self.is_last(layer) else layer.weight

    def inputs(self, layer: SparseLinear, x: Tensor) -> Tensor:
        return x * activation_mask(layer.structure, x) if layer.sparse and self.is_last(layer) else x

    def update(self, layer: SparseLinear, step: int, steps: int, state: dict[str, Any]) -> None:
        if not self.is_last(layer) and step >= self.warmup * steps:
            layer.mask.copy_(self.soft(layer) != 0)

    def dense(self, layer: SparseLinear) -> Tensor:
        sparse = layer.weight if self.is_last(layer) else layer.scale * self.soft(layer)
        return torch.where(layer.is_sparse, sparse, layer.weight)


@torch.no_grad()
def activation_mask(structure: Pattern, x: Tensor) -> Tensor:
    """Which of ``x [tokens, in]`` are kept, by magnitude: tokens are to ``structure`` what outputs are in a weight.

    If V does not divide the tokens, the last ones are a shorter tile.
    """
    short = -len(x) % structure.v
    return structure.select(functional.pad(x.abs(), (0, 0, 0, short)))[:len(x)]
