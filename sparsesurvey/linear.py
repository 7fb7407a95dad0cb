"""A linear layer under a structure: its three products, as masked dense ones.

``packed`` has the layer that holds the kept weights alone and multiplies with a structure's own kernels.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsesurvey.recipe import Recipe

if TYPE_CHECKING:  # a structure is handed over: its file's changes do not make the rows of a masked run stale
    from sparsesurvey.structure import Pattern, Structure

MLP = ("gate_proj", "up_proj", "down_proj")
SEED = 0x5EED  # not 0: a weight drawn from 0 as well would be correlated with its mask


class ThreeProducts(torch.autograd.Function):
    """y = x @ F.T with gradients dx = dy @ B and dW = G(dy).T @ x, straight through to the weight that F came from.

    ``x [tokens, in]``, ``weight``, ``forward`` and ``backward`` ``[out, in]``; ``backward`` None is ``forward``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, forward: Tensor, backward: Tensor | None,
                output_grad: Callable[[Tensor], Tensor] | None) -> Tensor:
        ctx.output_grad, ctx.dtype = output_grad, weight.dtype
        ctx.save_for_backward(x, forward if backward is None else backward)
        return x @ forward.T

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        grad = None
        if ctx.needs_input_grad[1]:
            grad = ((dy if ctx.output_grad is None else ctx.output_grad(dy)).T @ x).to(ctx.dtype)
        return dx, grad, None, None, None


class StructuredLinear(nn.Module):
    """What layers under a structure have in common: ``y = x @ weight.T + bias`` for ``x [..., in]``.

    A subclass has ``structure``, ``recipe``, ``kernel``, ``in_features``, ``out_features`` and ``bias``, its trained numbers
    in ``parameter``, and says in ``product`` how ``x [tokens, in]`` is multiplied.
    """

    structure: Structure
    recipe: Recipe
    kernel: str
    in_features: int
    out_features: int
    bias: nn.Parameter | None

    @property
    def parameter(self) -> nn.Parameter:
        """What is trained instead of a dense weight."""
        raise NotImplementedError

    def product(self, x: Tensor) -> Tensor:
        """``x [tokens, in]`` to ``[tokens, out]``; autograd looks."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """The weight ``[out, in]`` of the plain linear layer that does what this one does, zeros and all."""
        raise NotImplementedError

    @property
    def density(self) -> float:
        """Kept fraction of the weights, counted."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y = self.product(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def prepare(self, step: int, steps: int) -> None:
        """Before optimizer step ``step`` of ``steps``, from 0; see ``Recipe``."""

    def penalty(self) -> Tensor | None:
        """What the recipe adds to the loss."""

    def edit_grad(self) -> None:
        """Between the backward pass of the whole batch and the optimizer's step."""

    def update(self, step: int, steps: int, state: dict[str, Any]) -> None:
        """After optimizer step ``step`` of ``steps``, from 1; ``state`` is the optimizer's of ``parameter``."""

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.structure}, {self.recipe}, kernel={self.kernel!r}"


class SparseLinear(StructuredLinear):
    """The layer as masked dense products: slow, and exact for every structure and recipe.

    It holds a dense ``weight [out, in]`` and a boolean ``mask``.

    Args:
        weight: ``[out, in]``, the weight to start from; the recipe chooses what is kept of it.
        generator: where a random mask comes from, on the CPU; by default always the same.
        seed: of what the recipe draws while it trains. name: the layer's full name in its model, for recipes that care.

    Raises:
        ValueError: a weight that the structure does not divide, or a structure that the recipe cannot serve.
    """

    kernel = "masked"

    def __init__(self, weight: Tensor, structure: Pattern, recipe: Recipe = Recipe(), bias: Tensor | None = None,
                 generator: torch.Generator | None = None, seed: int = SEED, name: str = "") -> None:
        super().__init__()
        _check_weight(weight)
        self.out_features, self.in_features = structure.check_shape(weight.shape)
        recipe.check(structure)
        self.structure, self.recipe, self.seed, self.name = structure, recipe, seed, name
        self.rate = 0.0  # the learning rate of the step, told by whoever trains
        generator = torch.Generator().manual_seed(SEED) if generator is None else generator
        weight, mask = recipe.start(weight.detach().clone(), structure, generator)
        self.weight = nn.Parameter(weight.contiguous())
        self.register_buffer("mask", mask)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().clone()))
        recipe.begin(self)

    @property
    def parameter(self) -> nn.Parameter:
        return self.weight

    def product(self, x: Tensor) -> Tensor:
        recipe = self.recipe
        seen = recipe.inputs(self, x)
        with torch.no_grad():
            forward, backward = recipe.forward_weight(self), recipe.input_weight(self)
            forward = forward.to(x.dtype).detach()  # torch.compile refuses the weight itself, handed over twice
            backward = None if backward is None else backward.to(x.dtype).detach()
        y = ThreeProducts.apply(seen, self.weight, forward, backward, recipe.output_grad(self))
        beside = recipe.beside(self, x)
        return y if beside is None else y + beside

    @torch.no_grad()
    def dense(self) -> Tensor:
        return self.recipe.dense(self)

    @property
    def density(self) -> float:
        return self.mask.double().mean().item()

    def generator(self, step: int) -> torch.Generator:
        """Where a recipe draws from after step ``step``: on the CPU, the same on every device and in every process."""
        return torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {step}".encode()))

    @torch.no_grad()
    def prepare(self, step: int, steps: int) -> None:
        self.recipe.prepare(self, step, steps)

    def penalty(self) -> Tensor | None:
        return self.recipe.penalty(self)

    @torch.no_grad()
    def edit_grad(self) -> None:
        if self.weight.grad is not None:
            self.weight.grad = self.recipe.edit_grad(self, self.weight.grad)

    @torch.no_grad()
    def update(self, step: int, steps: int, state: dict[str, Any]) -> None:
        self.recipe.update(self, step, steps, state)


def _check_weight(weight: Tensor) -> None:
    if weight.dim() != 2 or not weight.is_floating_point() or not weight.isfinite().all():
        raise ValueError(f"weight must be a matrix [out, in] of finite floating-point numbers, got {weight.dtype} "
                         f"{tuple(weight.shape)} with {int((~weight.isfinite()).sum())} that are not finite")


def linear_layers(model: nn.Module, modules: Iterable[str]) -> dict[str, nn.Linear]:
    """The linear layers named in ``modules``, by their full name; ValueError if there is none."""
    modules = tuple(modules)
    chosen = {name: part for name, part in model.named_modules()
              if isinstance(part, nn.Linear) and name.rpartition(".")[2] in modules}
    if not chosen:
        raise ValueError(f"modules must name linear layers of the model, got {', '.join(modules)}: it has none such")
    return chosen


def sparsify(model: nn.Module, structure: Pattern, recipe: Recipe = Recipe(), modules: Iterable[str] = MLP,
             seed: int = 0) -> nn.Module:
    """Replace, in place, the linear layers named ``modules`` by ``SparseLinear`` ones; return the model.

    A layer's random mask depends on ``seed`` and its name only. Every layer is checked before any is replaced.

    Raises:
        ValueError: a layer that the structure does not divide, a structure that the recipe cannot serve, or no linear
            layer of such a name.
    """
    chosen = linear_layers(model, modules)
    for name, part in chosen.items():
        try:
            structure.check_shape(part.weight.shape)
        except ValueError as error:
            raise ValueError(f"{name} cannot be made sparse: {error}") from error
    recipe.check(structure)
    for name, part in chosen.items():
        number = zlib.crc32(f"{seed} {name}".encode())
        generator = torch.Generator().manual_seed(number)
        model.set_submodule(name, SparseLinear(part.weight, structure, recipe, part.bias, generator, number, name))
    return model


def densify(model: nn.Module) -> nn.Module:
    """Invert ``sparsify``, in place: plain linear layers with the weights that the sparse ones multiply with."""
    for name, layer in sparse_layers(model).items():
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(layer.dense().detach().clone())
        plain.bias = layer.bias
        model.set_submodule(name, plain)
    return model


def sparse_layers(model: nn.Module) -> dict[str, StructuredLinear]:
    """The layers under a structure of a model by their full name."""
    return {name: part for name, part in model.named_modules() if isinstance(part, StructuredLinear)}


def densities(model: nn.Module) -> dict[str, float]:
    """Achieved density, counted, of each layer under a structure by its full name."""
    return {name: layer.density for name, layer in sparse_layers(model).items()}
