"""A linear layer under a structure: its three products, as masked dense ones or with the structure's own kernels."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sparsesurvey.recipes import Recipe

if TYPE_CHECKING:  # a structure is handed over: its file's changes do not make the rows of a masked run stale
    from sparsesurvey.structure import Pattern, Plan

PRODUCTS = ("spmm", "spmmt", "sddmm")
MLP = ("gate_proj", "up_proj", "down_proj")
SEED = 0x5EED  # not 0: a weight drawn from 0 as well would be correlated with its mask


class ThreeProducts(torch.autograd.Function):
    """y = x @ W.T with gradients dx = dy @ W and dW = dy.T @ x, each as the layer computes it.

    ``parameter`` is ``layer.weight`` or ``layer.values``; it is handed over for autograd to see what dW belongs to.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, parameter: Tensor, layer: SparseLinear) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x, parameter)
        return layer.spmm(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, parameter = ctx.saved_tensors
        dy = dy.contiguous()
        dx = ctx.layer.spmmt(dy) if ctx.needs_input_grad[0] else None
        grad = ctx.layer.sddmm(dy, x).to(parameter.dtype) if ctx.needs_input_grad[1] else None
        ctx.layer.forget_plans()
        return dx, grad, None


class SparseLinear(nn.Module):
    """``y = x @ weight.T + bias`` with a weight of a structure.

    ``kernel="masked"`` holds the dense ``weight [out, in]`` and a boolean ``mask``, and multiplies densely: slow, and
    exact for every structure and recipe. The name of one of the structure's kernels ("gather", "reference", ...)
    holds the packed ``values`` alone: no dense weight, no dense gradient, no dense optimizer state. It needs a recipe
    whose mask never changes.

    Args:
        weight: ``[out, in]``, the weight to start from; the recipe chooses what is kept of it.
        generator: where a random mask comes from, on the CPU; by default always the same.

    Raises:
        ValueError: a weight that the structure does not divide, or a kernel that has not all three products or does
            not go with the recipe.
    """

    def __init__(self, weight: Tensor, structure: Pattern, recipe: Recipe = Recipe(), bias: Tensor | None = None,
                 kernel: str = "masked", generator: torch.Generator | None = None) -> None:
        super().__init__()
        _check_weight(weight)
        self.out_features, self.in_features = structure.check_shape(weight.shape)
        self.structure, self.recipe, self.kernel = structure, recipe, kernel
        _check_kernel(structure, recipe, kernel)
        generator = torch.Generator().manual_seed(SEED) if generator is None else generator
        weight, mask = recipe.start(weight.detach().clone(), structure, generator)
        if kernel == "masked":
            self.weight = nn.Parameter(weight.contiguous())
            self.register_buffer("mask", mask)
        else:
            self._hold(structure, weight, mask)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().clone()))

    def _hold(self, structure: Pattern, weight: Tensor, mask: Tensor) -> None:
        """Keep the packed weight: ``values`` as the parameter, its other tensors as buffers of their own names.

        The mask is packed with the number of each place instead of its weight, so that a kept weight that happens to
        be zero is kept all the same.
        """
        number = torch.arange(1, weight.numel() + 1, dtype=torch.float64, device=weight.device).view(weight.shape)
        packed = structure.pack(number * mask)
        place = packed.values.long()  # 0 where the format stores padding
        flat = torch.cat([weight.new_zeros(1), weight.flatten()])
        self.values = nn.Parameter(flat[place.flatten()].view(place.shape).contiguous())
        self._parts = [name for name, part in packed._asdict().items() if isinstance(part, Tensor) and name != "values"]
        for name in self._parts:
            self.register_buffer(name, getattr(packed, name))
        self._form = packed._replace(**dict.fromkeys(["values", *self._parts]))  # what is no tensor: shapes and such
        self._plans: tuple[Any, dict[str, Plan]] = (None, {})

    @property
    def packed(self) -> Any:
        """The packed weight in the structure's format; its tensors are the layer's own. Not for a masked layer."""
        parts = {name: getattr(self, name) for name in self._parts}
        return self._form._replace(values=self.values.detach(), **parts)

    def _plan(self, product: str) -> Plan:
        """The kernel of a product for the values as they are now.

        A plan may have copied them, so it is made again when a tensor of the packed weight was written to or moved.
        torch counts writes, but not those of its fused optimizers: hence no plan outlives a backward pass either.
        """
        held = [self.values, *(getattr(self, name) for name in self._parts)]
        state = tuple((part.data_ptr(), part._version) for part in held)
        if self._plans[0] != state:
            self._plans = (state, {})
        plans = self._plans[1]
        if product not in plans:
            plans[product] = self.structure.kernels(product)[self.kernel](self.packed)
        return plans[product]

    def forget_plans(self) -> None:
        """The values are about to change."""
        if self.kernel != "masked":
            self._plans = (None, {})

    def spmm(self, x: Tensor) -> Tensor:
        """``x [tokens, in]`` to ``[tokens, out]``."""
        if self.kernel == "masked":
            return x @ self.recipe.forward_weight(self).to(x.dtype).T
        return self._plan("spmm")(x)

    def spmmt(self, dy: Tensor) -> Tensor:
        """``dy [tokens, out]`` to the input gradient ``[tokens, in]``."""
        if self.kernel == "masked":
            return dy @ self.recipe.input_weight(self).to(dy.dtype)
        return self._plan("spmmt")(dy)

    def sddmm(self, dy: Tensor, x: Tensor) -> Tensor:
        """Gradient of the parameter: ``[out, in]`` if masked, else in the layout of ``values``."""
        if self.kernel == "masked":
            return self.recipe.edit_grad(self, self.recipe.output_grad(self, dy).T @ x)
        return self._plan("sddmm")(dy, x)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        parameter = self.weight if self.kernel == "masked" else self.values
        y = ThreeProducts.apply(x.reshape(-1, self.in_features), parameter, self).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @torch.no_grad()
    def dense(self) -> Tensor:
        """The weight ``[out, in]`` that the forward product multiplies with, zeros and all."""
        return self.recipe.forward_weight(self) if self.kernel == "masked" else self.structure.unpack(self.packed)

    @property
    def density(self) -> float:
        """Kept fraction of the weights, counted."""
        if self.kernel == "masked":
            return self.mask.double().mean().item()
        return self.values.numel() / (self.out_features * self.in_features)

    @torch.no_grad()
    def update_mask(self, step: int) -> None:
        """What the recipe does after optimizer step ``step``; packed weights cannot leave their pattern."""
        if self.kernel == "masked":
            self.recipe.update_mask(self, step)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.structure}, {self.recipe}, kernel={self.kernel!r}"


def _check_weight(weight: Tensor) -> None:
    if weight.dim() != 2 or not weight.is_floating_point() or not weight.isfinite().all():
        raise ValueError(f"weight must be a matrix [out, in] of finite floating-point numbers, got {weight.dtype} "
                         f"{tuple(weight.shape)} with {int((~weight.isfinite()).sum())} that are not finite")


def _check_kernel(structure: Pattern, recipe: Recipe, kernel: str) -> None:
    """Raise ValueError unless ``kernel`` is "masked" or has all three products and goes with the recipe."""
    if kernel == "masked":
        return
    able = set.intersection(*(set(structure.kernels(product)) for product in PRODUCTS))
    if kernel not in able:
        raise ValueError(f"kernel must be masked or one of {', '.join(sorted(able))}, which have all three products "
                         f"of {structure}; got {kernel!r}")
    if not recipe.fixed_mask:
        raise ValueError(f"kernel {kernel!r} needs a recipe whose mask never changes, such as Static(); got {recipe}")


def sparsify(model: nn.Module, structure: Pattern, recipe: Recipe = Recipe(), modules: Iterable[str] = MLP,
             kernel: str = "masked", seed: int = 0) -> nn.Module:
    """Replace, in place, the linear layers named ``modules`` by ``SparseLinear`` ones; return the model.

    A layer's random mask depends on ``seed`` and its name only. Every layer is checked before any is replaced.

    Raises:
        ValueError: a layer that the structure does not divide, or no linear layer of such a name.
    """
    modules = tuple(modules)
    chosen = {name: part for name, part in model.named_modules()
              if isinstance(part, nn.Linear) and name.rpartition(".")[2] in modules}
    if not chosen:
        raise ValueError(f"modules must name linear layers of the model, got {', '.join(modules)}: it has none such")
    for name, part in chosen.items():
        try:
            structure.check_shape(part.weight.shape)
        except ValueError as error:
            raise ValueError(f"{name} cannot be made sparse: {error}") from error
    for name, part in chosen.items():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        model.set_submodule(name, SparseLinear(part.weight, structure, recipe, part.bias, kernel, generator))
    return model


def densify(model: nn.Module) -> nn.Module:
    """Invert ``sparsify``, in place: plain linear layers with the weights that the sparse ones multiply with."""
    for name, layer in sparse_layers(model).items():
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(layer.dense().detach().clone())
        plain.bias = layer.bias
        model.set_submodule(name, plain)
    return model


def sparse_layers(model: nn.Module) -> dict[str, SparseLinear]:
    """The sparse layers of a model by their full name."""
    return {name: part for name, part in model.named_modules() if isinstance(part, SparseLinear)}


def densities(model: nn.Module) -> dict[str, float]:
    """Achieved density, counted, of each sparse layer by its full name."""
    return {name: layer.density for name, layer in sparse_layers(model).items()}
