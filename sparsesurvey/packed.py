"""A linear layer that holds the kept weights alone and multiplies with its structure's own kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sparsesurvey.linear import SparseLinear, StructuredLinear, sparse_layers
from sparsesurvey.structure import PRODUCTS, Pattern, Plan, Structure


class PackedProducts(torch.autograd.Function):
    """y = x @ W.T with gradients dx = dy @ W and dW = dy.T @ x in the layout of the values, each by a kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, layer: PackedLinear) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x, values)
        with torch.autocast(x.device.type, enabled=False):  # a plan computes in the dtype that it was made for
            return layer.plan("spmm", x.dtype)(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, values = ctx.saved_tensors
        dy = dy.to(x.dtype).contiguous()
        dx = ctx.layer.plan("spmmt", x.dtype)(dy) if ctx.needs_input_grad[0] else None
        grad = ctx.layer.plan("sddmm", x.dtype)(dy, x).to(values.dtype) if ctx.needs_input_grad[1] else None
        ctx.layer.forget_plans()
        return dx, grad, None


class PackedLinear(StructuredLinear):
    """``y = x @ W.T + bias`` where W is packed: no dense weight, no dense gradient, no dense optimizer state.

    The trained parameter is ``values``; the other tensors of the packed weight are buffers of their own names.

    Under autocast the values keep their dtype, and a copy in the lower one is multiplied.

    Args:
        layer: whose kept weights it takes over, and its bias.
        kernel: the name of one of the structure's kernels that has all three products ("gather", "triton", ...).

    Raises:
        ValueError: a recipe that changes the mask, or a kernel that has not all three products.
    """

    def __init__(self, layer: SparseLinear, kernel: str) -> None:
        super().__init__()
        self.out_features, self.in_features = layer.out_features, layer.in_features
        check_kernel(layer.structure, kernel)
        if not layer.recipe.fixed_mask:
            raise ValueError(f"kernel {kernel!r} needs a recipe whose mask never changes, such as Static(); got {layer.recipe}")
        self.structure, self.recipe, self.kernel = layer.structure, layer.recipe, kernel
        self._hold(*pack(layer.weight, layer.mask, layer.structure))
        self.register_parameter("bias", layer.bias)

    def _hold(self, packed: Any, values: Tensor) -> None:
        """Keep the packed weight: ``values`` as the parameter, its other tensors as buffers of their own names."""
        self.values = nn.Parameter(values)
        self._parts = [name for name, part in packed._asdict().items() if isinstance(part, Tensor) and name != "values"]
        for name in self._parts:
            self.register_buffer(name, getattr(packed, name))
        self._form = packed._replace(**dict.fromkeys(["values", *self._parts]))  # what is no tensor: shapes and such
        self._plans: tuple[Any, dict[str, Plan]] = (None, {})

    @property
    def parameter(self) -> nn.Parameter:
        return self.values

    @property
    def packed(self) -> Any:
        """The packed weight in the structure's format; its tensors are the layer's own."""
        parts = {name: getattr(self, name) for name in self._parts}
        return self._form._replace(values=self.values.detach(), **parts)

    def plan(self, product: str, dtype: torch.dtype) -> Plan:
        """The kernel of a product for the values as they are now, in ``dtype``.

        A plan may have copied them, so it is made again when a tensor of the packed weight was written to or moved.
        torch counts writes, but not those of its fused optimizers: hence no plan outlives a backward pass either.
        """
        held = [self.values, *(getattr(self, name) for name in self._parts)]
        state = dtype, *((part.data_ptr(), part._version) for part in held)
        if self._plans[0] != state:
            self._plans = (state, {})
        plans = self._plans[1]
        if product not in plans:
            packed = self.packed
            plans[product] = self.structure.kernels(product)[self.kernel](packed._replace(values=packed.values.to(dtype)))
        return plans[product]

    def forget_plans(self) -> None:
        """The values are about to change."""
        self._plans = (None, {})

    def product(self, x: Tensor) -> Tensor:
        return PackedProducts.apply(x, self.values, self)

    @torch.no_grad()
    def dense(self) -> Tensor:
        return self.structure.unpack(self.packed)

    @property
    def density(self) -> float:
        return self.values.numel() / (self.out_features * self.in_features)


def pack(weight: Tensor, mask: Tensor, structure: Pattern) -> tuple[Any, Tensor]:
    """The places of a mask ``[out, in]`` packed, and the weight's values in that layout.

    The mask is packed with the number of each place instead of its weight, so that a kept weight that happens to be zero
    is kept all the same.
    """
    number = torch.arange(1, weight.numel() + 1, dtype=torch.float64, device=weight.device).view(weight.shape)
    packed = structure.pack(number * mask)
    place = packed.values.long()  # 0 where the format stores padding
    flat = torch.cat([weight.new_zeros(1), weight.detach().flatten()])
    return packed, flat[place.flatten()].view(place.shape).contiguous()


def check_kernel(structure: Structure, kernel: str) -> None:
    """Raise ValueError unless the structure has a kernel of that name for all three products."""
    able = set.intersection(*(set(structure.kernels(product)) for product in PRODUCTS))
    if kernel not in able:
        raise ValueError(f"kernel must be one of {', '.join(sorted(able))}, which have all three products of {structure}; "
                         f"got {kernel!r}")


def pack_layers(model: nn.Module, kernel: str) -> nn.Module:
    """Replace, in place, the ``SparseLinear`` layers of a model by ``PackedLinear`` ones of the same weights; return it.

    Every layer is checked before any is replaced. ``linear.densify`` inverts it.

    Raises:
        ValueError: no such layer, a recipe that changes the mask, or a kernel that has not all three products.
    """
    layers = {name: layer for name, layer in sparse_layers(model).items() if isinstance(layer, SparseLinear)}
    if not layers:
        raise ValueError("model must have SparseLinear layers, which sparsify makes; it has none")
    for layer in layers.values():
        check_kernel(layer.structure, kernel)
    for name, layer in layers.items():
        model.set_submodule(name, PackedLinear(layer, kernel))
    return model
