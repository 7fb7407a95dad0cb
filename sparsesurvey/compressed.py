"""A linear layer whose 2:4 weights are compressed anew in every step, on the device, for sparse tensor cores.

``packed`` holds the kept weights alone, which takes a mask that never changes. Here the weight stays dense, for the recipe to
move the mask: as ``SparseLinear``, but cuSPARSELt multiplies what the recipe makes of it, wherever that is 2:4 along the axis
that a product sums over. The weight gradient's product stays dense.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, autograd, nn

from sparsesurvey.kernels import semi_structured
from sparsesurvey.linear import SparseLinear, sparse_layers
from sparsesurvey.operators import OPERATORS, define
from sparsesurvey.recipe import Recipe
from sparsesurvey.recipes.bdwp import BDWP
from sparsesurvey.recipes.fst import FST, transposable
from sparsesurvey.recipes.s_ste import SSTE
from sparsesurvey.recipes.slope import SLoPe
from sparsesurvey.recipes.sr_ste import SRSTE
from sparsesurvey.recipes.static import Static
from sparsesurvey.recipes.ste import STE
from sparsesurvey.structure import Structure
from sparsesurvey.structures.nm import NM, most_of_4
from sparsesurvey.structures.transposable import Transposable

KERNEL = "cusparselt"
RECIPES = (Static, STE, SRSTE, SSTE, SLoPe, BDWP, FST)  # those of no dense phase: what they multiply with always has the zeros

define("two_of_four(Tensor x, Tensor weight) -> Tensor",  # looked up when it is called
       lambda x, weight: semi_structured.fresh_product(x, weight), lambda x, weight: x.new_empty(x.shape[0], weight.shape[0]))


class CompressedProducts(autograd.Function):
    """``linear.ThreeProducts`` with a weight ``forward [out, in]`` that is 2:4 in its rows; ``both``: B is in its columns."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, forward: Tensor, backward: Tensor | None,
                output_grad: Callable[[Tensor], Tensor] | None, both: bool) -> Tensor:
        ctx.output_grad, ctx.dtype, ctx.both = output_grad, weight.dtype, both
        ctx.save_for_backward(x, forward if backward is None else backward)
        return OPERATORS.two_of_four(x, forward)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx = grad = None
        if ctx.needs_input_grad[0]:
            dx = OPERATORS.two_of_four(dy, weight.T.contiguous()) if ctx.both else dy @ weight
        if ctx.needs_input_grad[1]:
            grad = ((dy if ctx.output_grad is None else ctx.output_grad(dy)).T @ x).to(ctx.dtype)
        return dx, grad, None, None, None, None


class CompressedLinear(SparseLinear):
    """``SparseLinear`` by cuSPARSELt; made of one by ``compress_layers``. It runs on a GPU, in bfloat16 or float16 alone."""

    kernel = KERNEL
    both: bool  # is what the input gradient is multiplied with 2:4 as well?

    def product(self, x: Tensor) -> Tensor:
        recipe = self.recipe
        seen = recipe.inputs(self, x)
        with torch.no_grad():
            forward, backward = recipe.forward_weight(self), recipe.input_weight(self)
            forward = forward.to(x.dtype).detach()
            backward = None if backward is None else backward.to(x.dtype).detach()
        y = CompressedProducts.apply(seen, self.weight, forward, backward, recipe.output_grad(self), self.both)
        beside = recipe.beside(self, x)
        return y if beside is None else y + beside


def can_compress(structure: Structure, recipe: Recipe) -> bool:
    """Is what the recipe multiplies forward at most 2 of 4 along the inputs in every step?"""
    along = isinstance(structure, NM) and structure.axis == "in" or isinstance(structure, Transposable)
    return along and type(recipe) in RECIPES and most_of_4(structure.n, structure.m) <= 2


def in_columns(structure: Structure, recipe: Recipe) -> bool:
    """Is what the input gradient is multiplied with at most 2 of 4 along the outputs too?"""
    return transposable(structure) or type(recipe) in (BDWP, SLoPe)


def compress_layers(model: nn.Module) -> nn.Module:
    """Turn, in place, the ``SparseLinear`` layers of a model into ``CompressedLinear`` ones; return it.

    Weights, masks and what recipes remember stay the same tensors. Every layer is checked before any is turned.

    Raises:
        ValueError: no such layer, or a structure and recipe that are not 2:4 all the time.
    """
    layers = [layer for layer in sparse_layers(model).values() if type(layer) is SparseLinear]
    if not layers:
        raise ValueError("model must have SparseLinear layers, which sparsify makes; it has none")
    for layer in layers:
        if not can_compress(layer.structure, layer.recipe):
            raise ValueError(f"kernel {KERNEL!r} needs at most 2 of every 4 weights along the inputs in every step, of one of the recipes "
                             f"{', '.join(kind.__name__ for kind in RECIPES)}; got {layer.structure} by {layer.recipe}")
    for layer in layers:
        layer.__class__, layer.both = CompressedLinear, in_columns(layer.structure, layer.recipe)
    return model
