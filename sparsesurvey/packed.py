"""A linear layer that holds the kept weights alone and multiplies with its structure's own kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsesurvey.linear import SparseLinear, StructuredLinear, sparse_layers
from sparsesurvey.operators import KINDS, OPERATORS, kind, parts
from sparsesurvey.structure import PRODUCTS, Pattern, Structure


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
        self.kind = kind(self.structure, self.kernel, packed)  # its number among the operators' kinds of weights
        self._names = []
        for name, part in parts(packed):
            self._names.append(name)
            self.register_buffer(name, part)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "kind": KINDS[self.kind].form}  # numbers are those of this process

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "kind": kind(state["structure"], state["kernel"], state["kind"])})

    @property
    def parameter(self) -> nn.Parameter:
        return self.values

    @property
    def places(self) -> list[Tensor]:
        """Every tensor of the packed weight but the values."""
        return [getattr(self, name) for name in self._names]

    @property
    def packed(self) -> Any:
        """The packed weight in the structure's format; its tensors are the layer's own."""
        return self.operand(self.values.detach())

    def operand(self, values: Tensor) -> Any:
        """The packed weight with other values in its places."""
        return KINDS[self.kind].operand(values, self.places)

    def product(self, x: Tensor) -> Tensor:
        return OPERATORS.spmm(x, self.values, self.places, self.kind, self.out_features)

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
    if not has_all_three(structure, kernel):
        able = (name for name in structure.kernels(next(iter(PRODUCTS))) if has_all_three(structure, name))
        raise ValueError(f"kernel must be one of {', '.join(sorted(able))}, which have all three products of {structure}; "
                         f"got {kernel!r}")


def has_all_three(structure: Structure, kernel: str) -> bool:
    return all(kernel in structure.kernels(product) for product in PRODUCTS)


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
