"""What a sparsity structure is: a family of matrices, the storage that fits it, and what a product with it costs.

Every tensor here follows one convention: ``weight`` is ``[out, in]``, activations ``x`` are ``[tokens, in]`` and the
layer computes ``y = x @ weight.T`` with ``y`` ``[tokens, out]``. A mask is boolean, True = kept. Scores: higher = keep.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, prod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

Shape = tuple[int, int]
Plan = Callable[..., Tensor]

PRODUCTS = {
    "spmm": "y = x @ W.T, the forward product",
    "spmmt": "dx = dy @ W, the input gradient",
    "sddmm": "dW = dy.T @ x at the stored weights only, the weight gradient",
}


class Unavailable(RuntimeError):
    """A kernel cannot run here; the message says what it needs. Never replaced by a dense product in silence."""


@dataclass(frozen=True)
class Cost:
    """What one product must do at least: arithmetic, weight bytes (values and indices) and activation bytes."""

    flops: int
    weight_bytes: int
    io_bytes: int

    @property
    def bytes(self) -> int:
        return self.weight_bytes + self.io_bytes

    @property
    def intensity(self) -> float:
        """Arithmetic intensity in FLOP per byte."""
        return self.flops / self.bytes

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """The roofline bound (Williams et al. 2009): no implementation on such a machine can be faster."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


class Facts(NamedTuple):
    """What a structure's author knows of it beside its definition, for bounds and for the explorer's words.

    ``verdict`` in a few words, ``hardware`` in a few sentences: can tensor cores use the structure?
    ``arithmetic``: share of a dense product's arithmetic that tensor cores with 2:4 support must still do in the forward
    product; None if not known. It is for a bound; what is only an estimate is told in ``hardware``, in words.
    ``input_grad``, ``weight_grad``: the same for the two products of the backward pass; None where they are as the
    forward one. 2:4 is for one operand, along the axis that is summed over, so that it helps neither of them unless
    the structure sees to it. ``positions``: bits a
    weight that any code of the kept positions needs on average; None if not known. ``kept``, ``column``, ``pruned``:
    why a weight stayed, or went with its whole tile column, or went alone, with places in braces that the front end
    fills in (see ``explain`` in explorer.js).
    """

    verdict: str
    hardware: str
    arithmetic: float | None = None
    positions: float | None = None
    kept: str = "tile ({tile_row}, {tile_col}): {kept} of {size} kept"
    column: str = ""
    pruned: str = "tile ({tile_row}, {tile_col}): {kept} of {size} kept"
    input_grad: float | None = None
    weight_grad: float | None = None

    def share(self, product: str = "spmm") -> float | None:
        """The arithmetic that is left of one of ``PRODUCTS``, or None if not known."""
        own = {"spmm": None, "spmmt": self.input_grad, "sddmm": self.weight_grad}[product]
        return self.arithmetic if own is None else own


@dataclass(frozen=True)
class Structure(ABC):
    """A family of matrices with a storage format.

    A structure is a frozen dataclass whose defaults make a useful instance: it is hashable, its ``repr`` is the
    constructor call that made it and its ``str`` is the field's notation, which is also the key of its records.
    Its parameters fix its density. Subclasses give ``tile``, ``pack``, ``unpack``, ``nnz`` and ``index_bits``, and
    their products as methods named ``spmm_*``, ``spmmt_*`` and ``sddmm_*`` (see ``PRODUCTS``), each of which takes
    a packed operand and returns a plan: ``run = structure.spmm_gather(packed); y = run(x)``. Making the plan does
    the layout; running it takes any number of tokens, returns a new tensor and is not recorded by autograd.

    A structure that is no ``Pattern`` has no mask: any finite weight can be packed, and what comes back, ``project``,
    is the member that ``pack`` chose to stand for it. Where a member can be told from its entries (``exact``), packing
    it again gives it back up to rounding.
    """

    exact: ClassVar[bool] = True

    @classmethod
    def variants(cls) -> tuple[Structure, ...]:
        """Instances that the contract tests, the explorer and the scoreboard look at; the default one first."""
        return (cls(),)

    @property
    def tile(self) -> Shape:
        """A weight's shape must be a multiple of this ``(out, in)``."""
        return (1, 1)

    def check_shape(self, shape: Shape) -> Shape:
        """Return ``shape`` as two ints, or raise ValueError if this structure does not divide it."""
        if len(shape) != 2 or min(shape) < 1:
            raise ValueError(f"shape must be (out, in) with positive sizes, got {tuple(shape)}")
        for axis, size, step in zip(("out", "in"), shape, self.tile):
            if size % step:
                raise ValueError(f"{self} needs a shape whose {axis} is a multiple of {step}, got {tuple(shape)}")
        return int(shape[0]), int(shape[1])

    @abstractmethod
    def pack(self, weight: Tensor) -> Any:
        """Weight ``[out, in]`` to a NamedTuple of tensors, ``values`` first; a Pattern raises ValueError if it is no member.

        A field may be a packed operand itself, of an inner structure; its ``values`` are then those of the whole.
        """

    @abstractmethod
    def unpack(self, packed: Any) -> Tensor:
        """The weight ``[out, in]`` that was packed, exactly; ValueError if ``packed`` is corrupt."""

    def project(self, weight: Tensor) -> Tensor:
        """The member ``[out, in]`` that stands for any finite weight: what is kept of it, or its approximation."""
        return self.unpack(self.pack(weight))

    def forward_weight(self, packed: Any) -> Tensor:
        """The weight ``[out, in]`` of the forward product: ``unpack(packed)``, unless the two directions are pruned apart."""
        return self.unpack(packed)

    def backward_weight(self, packed: Any) -> Tensor:
        """The weight ``[out, in]`` of the input gradient: ``unpack(packed)``, unless the two directions are pruned apart."""
        return self.unpack(packed)

    @abstractmethod
    def nnz(self, shape: Shape) -> int:
        """How many weights are stored for a weight of this shape: always so many, zeros among them if need be."""

    @abstractmethod
    def index_bits(self, shape: Shape) -> int:
        """Bits of everything that is stored beside the values: indices, pointers, masks, padding."""

    def value_bits(self, shape: Shape, itemsize: int = 2) -> int:
        """Bits of the stored weights where one of the layer's numbers has ``itemsize`` bytes."""
        return 8 * itemsize * self.nnz(shape)

    def cost(self, shape: Shape, tokens: int, itemsize: int = 2) -> Cost:
        """The least that ``y = x @ W.T`` must do: 2 FLOP per token and stored weight, each byte moved once."""
        out, inn = self.check_shape(shape)
        weight_bytes = ceil(self.value_bits((out, inn), itemsize) / 8) + ceil(self.index_bits((out, inn)) / 8)
        return Cost(2 * tokens * self.nnz((out, inn)), weight_bytes, tokens * (out + inn) * itemsize)

    def facts(self) -> Facts:
        """What hardware can make of this structure, and how a reader is told why a weight is kept."""
        return Facts("not known", f"Nothing is on record here of how hardware multiplies {self}: bounds assume that all "
                     "arithmetic saved is time saved.")

    def kernels(self, product: str = "spmm") -> dict[str, Callable[[Any], Plan]]:
        """Every kernel of this structure for one of ``PRODUCTS``, by name: ``{"reference": ..., "gather": ...}``.

        A kernel that only calls a library bears the library's name (``torch_csr``, ``scipy_bsr``, ``cusparselt``).
        """
        if product not in PRODUCTS:
            raise ValueError(f"product must be one of {', '.join(PRODUCTS)}, got {product!r}")
        prefix = product + "_"
        return {name[len(prefix):]: getattr(self, name) for name in dir(type(self)) if name.startswith(prefix)}

    def spmm_reference(self, packed: Any) -> Plan:
        """Forward product through the unpacked weight: slow, obviously right."""
        weight = self.forward_weight(packed).detach()
        return lambda x: check_activations("x", x, weight.shape[1], weight) @ weight.T

    def spmmt_reference(self, packed: Any) -> Plan:
        """Input gradient ``dy @ W`` through the unpacked weight."""
        weight = self.backward_weight(packed).detach()
        return lambda dy: check_activations("dy", dy, weight.shape[0], weight) @ weight

    def sddmm_reference(self, packed: Any) -> Plan:
        """Gradient of the stored values, in their layout: autograd through ``unpack``, from the dense gradient."""
        values = packed.values.detach()
        unpacked = lambda values: self.unpack(packed._replace(values=values))
        shape = unpacked(values).shape

        def run(dy: Tensor, x: Tensor) -> Tensor:
            dy, x = check_pair(dy, x, shape, values)
            with torch.enable_grad():
                return torch.autograd.functional.vjp(unpacked, values, dy.T @ x)[1]

        return run


@dataclass(frozen=True)
class Pattern(Structure):
    """A structure given by where its zeros may be."""

    @property
    @abstractmethod
    def density(self) -> float:
        """Kept fraction of the weights, 1 - sparsity."""

    @abstractmethod
    def holds(self, mask: Tensor) -> bool:
        """The definition: does a boolean ``[out, in]`` mask keep only what this structure may keep?"""

    @abstractmethod
    def select(self, scores: Tensor) -> Tensor:
        """``mask`` without its checks, for scores that are known to be fit: nothing here waits for a device."""

    def mask(self, scores: Tensor) -> Tensor:
        """Choose what to keep: finite ``[out, in]`` scores to a boolean mask for which ``holds`` is true, by ``select``."""
        return self.select(self.check_scores(scores))

    def project(self, weight: Tensor) -> Tensor:
        """What of the weight is kept by magnitude, zeros elsewhere."""
        check_weight(weight)
        return weight * self.mask(weight.abs())

    def nnz(self, shape: Shape) -> int:
        return round(self.density * prod(self.check_shape(shape)))

    def stored(self, weight: Tensor) -> Tensor:
        """Mask of what ``pack`` stores: the non-zeros of a member and, up to ``nnz`` of them, zeros that fit."""
        self.check_member(weight)
        kept = weight != 0
        return kept if int(kept.count_nonzero()) == self.nnz(weight.shape) else self.mask(kept.float())

    def sddmm_reference(self, packed: Any) -> Plan:
        """Weight gradient at the stored weights, in the layout of ``packed.values``, from the dense gradient."""
        values = packed.values
        number = torch.arange(1, values.numel() + 1, dtype=torch.float64, device=values.device)
        place = self.unpack(packed._replace(values=number.view_as(values)))  # [out, in], 0 where nothing is stored
        stored = place > 0
        order = place[stored].long() - 1

        def run(dy: Tensor, x: Tensor) -> Tensor:
            dy, x = check_pair(dy, x, place.shape, values)
            gradient = dy.new_zeros(values.numel())  # padding that stands nowhere has none
            gradient[order] = (dy.T @ x)[stored]
            return gradient.view(values.shape)

        return run

    def check_member(self, weight: Tensor) -> Tensor:
        """Return the finite float weight ``[out, in]``, or raise ValueError where it breaks the pattern."""
        check_weight(weight)
        if not self.holds(weight != 0):
            raise ValueError(f"weight is not {self}: apply a mask of this structure before packing it")
        return weight

    def check_scores(self, scores: Tensor) -> Tensor:
        """Return finite float scores ``[out, in]`` of a shape that this structure divides, or raise ValueError."""
        check_weight(scores, "scores")
        self.check_shape(scores.shape)
        return scores

    def check_mask(self, mask: Tensor) -> Tensor:
        """Return a boolean mask ``[out, in]`` of a shape that this structure divides, or raise ValueError."""
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 2:
            raise ValueError(f"mask must be a boolean matrix [out, in], got {describe(mask)}")
        self.check_shape(mask.shape)
        return mask


def describe(thing: object) -> str:
    """What a wrong argument was, for an error message."""
    return f"{thing.dtype} {list(thing.shape)}" if isinstance(thing, Tensor) else f"{type(thing).__name__} {thing!r}"


def check_int(name: str, value: int, low: int, high: int | None = None) -> None:
    """Raise ValueError unless ``value`` is an int with ``low <= value <= high``."""
    allowed = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


def check_density(density: float, name: str = "density") -> None:
    """Raise ValueError unless ``0 < density <= 1``."""
    if isinstance(density, bool) or not isinstance(density, (int, float)) or not 0 < density <= 1:
        raise ValueError(f"{name} must be a number above 0 and at most 1 (the kept fraction), got {density!r}")


def check_weight(weight: Tensor, name: str = "weight") -> None:
    """Raise ValueError unless ``weight`` is a finite floating-point matrix."""
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise ValueError(f"{name} must be a matrix [out, in], got {describe(weight)}")
    if not weight.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {weight.dtype}")
    if weight.numel() and not torch.stack(weight.aminmax()).isfinite().all():  # the extremes: one pass, NaN wins
        bad = int((~weight.isfinite()).sum())
        raise ValueError(f"{name} must be finite, got {bad} NaN or infinite of {weight.numel()} entries")


def check_activations(name: str, x: Tensor, features: int, like: Tensor) -> Tensor:
    """Return ``x`` ``[tokens, features]`` of the weight's dtype and device, detached, or raise ValueError."""
    fits = isinstance(x, Tensor) and x.dim() == 2 and x.shape[1] == features
    if not fits or x.dtype != like.dtype or x.device != like.device:
        got = f"{describe(x)} on {x.device}" if isinstance(x, Tensor) else describe(x)
        raise ValueError(f"{name} must be {like.dtype} [tokens, {features}] on {like.device}, got {got}")
    return x.detach()


def check_pair(dy: Tensor, x: Tensor, shape: Shape, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``dy`` ``[tokens, out]`` and ``x`` ``[tokens, in]`` of one number of tokens, or raise ValueError."""
    dy, x = check_activations("dy", dy, shape[0], like), check_activations("x", x, shape[1], like)
    if len(dy) != len(x):
        raise ValueError(f"dy and x must have the same number of tokens, got {len(dy)} and {len(x)}")
    return dy, x


def check_part(name: str, part: Tensor, dtype: torch.dtype | None, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless a tensor of a packed operand has this dtype (None: any float) and shape."""
    right = isinstance(part, Tensor) and tuple(part.shape) == tuple(shape)
    if not right or (part.dtype != dtype if dtype else not part.is_floating_point()):
        raise ValueError(f"packed.{name} must be {dtype or 'floating point'} {list(shape)}, got {describe(part)}")


def check_order(name: str, index: Tensor, high: int) -> None:
    """Raise ValueError unless the last axis of ``index`` rises strictly from at least 0 to below ``high``."""
    outside = index.numel() and (int(index.min()) < 0 or int(index.max()) >= high)
    if outside or (index[..., 1:] <= index[..., :-1]).any():
        raise ValueError(f"packed.{name} must rise strictly and stay from 0 to {high - 1}")


def stored_bytes(packed: NamedTuple) -> int:
    """Bytes of the tensors of a packed operand; the values of an operand inside it are its own and count once."""
    inner = [part._replace(values=None) for part in packed if hasattr(part, "_replace")]
    return sum(map(stored_bytes, inner)) + sum(part.nbytes for part in packed if isinstance(part, Tensor))
