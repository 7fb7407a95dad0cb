"""A linear layer under a structure without a mask: its parameters are what the structure stores, such as two factors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sparsesurvey.linear import MLP, StructuredLinear, linear_layers
from sparsesurvey.packed import PackedLinear, check_kernel
from sparsesurvey.recipes.static import Static
from sparsesurvey.structure import Pattern, Structure, check_weight


class FactoredLinear(PackedLinear):
    """``y = x @ W.T + bias`` where W is what ``structure`` unpacks from ``values``, the parameter.

    All three products are the structure's own: there is no dense weight and no dense gradient (``kernel="reference"``
    makes both for a moment). Everything else that is packed, such as the places of a sparse part, is a buffer and stays
    as it was. The values are multiplied in their own dtype, under autocast in its own.

    Args:
        weight: ``[out, in]``, the weight to start from; the layer starts with the member that stands for it, scaled to
            the same Frobenius norm, so that inputs of one variance have outputs of the variance that the dense layer
            gives. What a structure packs of a scaled weight must be what it packs of the weight, scaled.

    Raises:
        ValueError: a weight that the structure does not divide, a structure that cannot be trained by the values that
            it stores, or a kernel that has not all three products.
    """

    def __init__(self, weight: Tensor, structure: Structure, bias: Tensor | None = None, kernel: str = "reference") -> None:
        StructuredLinear.__init__(self)  # a PackedLinear to whoever trains, checkpoints or densifies; made otherwise
        check_weight(weight)
        self.out_features, self.in_features = structure.check_shape(weight.shape)
        _check_structure(structure, kernel)
        self.structure, self.recipe, self.kernel = structure, Static(), kernel
        packed = start(weight.detach(), structure)
        self._hold(packed, packed.values.clone())
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().clone()))

    def product(self, x: Tensor) -> Tensor:
        return super().product(x.to(self.values.dtype)).to(x.dtype)


def start(weight: Tensor, structure: Structure) -> Any:
    """What a layer starts with: ``weight [out, in]`` packed, after a scaling that gives the member the weight's norm."""
    packed = structure.pack(weight)
    if not packed.values.is_floating_point():
        raise ValueError(f"structure must store floating-point values to be trained, but {structure} stores {packed.values.dtype}")
    near = structure.unpack(packed).double().norm()
    return structure.pack((weight * (weight.double().norm() / near)).to(weight.dtype)) if near else packed


def _check_structure(structure: Structure, kernel: str) -> None:
    """Raise ValueError unless the structure is trained by its values, with one of its kernels."""
    kind = type(structure)
    if isinstance(structure, Pattern):
        raise ValueError(f"structure must be one without a mask, got {structure}: SparseLinear trains it")
    if kind.forward_weight is not Structure.forward_weight or kind.backward_weight is not Structure.backward_weight:
        raise ValueError(f"structure must have one weight for both directions, but {structure} prunes them apart: that needs "
                         "a recipe with two masks, which there is none of yet")
    check_kernel(structure, kernel)


def factorise(model: nn.Module, structure: Structure, modules: Iterable[str] = MLP, kernel: str = "reference") -> nn.Module:
    """Replace, in place, the linear layers named ``modules`` by ``FactoredLinear`` ones; return the model.

    Nothing is random: each layer starts from the weight that it has. ``linear.densify`` inverts it, ``linear.densities``
    counts it. Every layer is checked before any is replaced.

    Raises:
        ValueError: a layer that the structure does not divide, a structure or kernel that cannot train, or no linear
            layer of such a name.
    """
    made = {}
    for name, part in linear_layers(model, modules).items():
        try:
            made[name] = FactoredLinear(part.weight, structure, part.bias, kernel)
        except ValueError as error:
            raise ValueError(f"{name} cannot be factored: {error}") from error
    for name, layer in made.items():
        model.set_submodule(name, layer)
    return model
