"""What a sparsity structure is: a family of matrices, the storage that fits it, and what a product with it costs.

Every tensor here follows one convention: ``weight`` is ``[out, in]``, activations ``x`` are ``[tokens, in]`` and the
layer computes ``y = x @ weight.T`` with ``y`` ``[tokens, out]``. A mask is boolean, True = kept. Scores: higher = keep.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import Any, NamedTuple

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


@dataclass(frozen=True)
class Structure(ABC):
    """A family of matrices with a storage format.

    A structure is a frozen dataclass whose defaults make a useful instance: it is hashable, its ``repr`` is the
    constructor call that made it and its ``str`` is the field's notation, which is also the key of its records.
    Its parameters fix its density. Subclasses give ``tile``, ``pack``, ``unpack``, ``nnz`` and ``index_bits``, and
    their products as methods named ``spmm_*``, ``spmmt_*`` and ``sddmm_*`` (see ``PRODUCTS``), each of which takes
    a packed operand and returns a plan: ``run = structure.spmm_gather(packed); y = run(x)``.
    """

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
        """Weight ``[out, in]`` to a NamedTuple of tensors, ``values`` first; ValueError if it is no member."""

    @abstractmethod
    def unpack(self, packed: Any) -> Tensor:
        """The weight ``[out, in]`` that was packed, exactly."""

    @abstractmethod
    def nnz(self, shape: Shape) -> int:
        """How many weights are stored for a weight of this shape."""

    @abstractmethod
    def index_bits(self, shape: Shape) -> int:
        """Bits of everything that is stored beside the values: indices, pointers, masks, padding."""

    def cost(self, shape: Shape, tokens: int, itemsize: int = 2) -> Cost:
        """The least that ``y = x @ W.T`` must do: 2 FLOP per token and stored weight, each byte moved once."""
        out, inn = self.check_shape(shape)
        stored = self.nnz((out, inn))
        weight_bytes = stored * itemsize + ceil(self.index_bits((out, inn)) / 8)
        return Cost(2 * tokens * stored, weight_bytes, tokens * (out + inn) * itemsize)

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
        weight = self.unpack(packed)
        return lambda x: x @ weight.T

    def spmmt_reference(self, packed: Any) -> Plan:
        """Input gradient ``dy @ W`` through the unpacked weight."""
        weight = self.unpack(packed)
        return lambda dy: dy @ weight

    def sddmm_reference(self, packed: Any) -> Plan:
        """Weight gradient at the stored weights, in the layout of ``packed.values``, from the dense gradient."""
        values = packed.values
        number = torch.arange(1, values.numel() + 1, dtype=torch.float64, device=values.device)
        place = self.unpack(packed._replace(values=number.view_as(values)))  # [out, in], 0 where nothing is stored
        stored = place > 0
        order = place[stored].long() - 1

        def run(dy: Tensor, x: Tensor) -> Tensor:
            gradient = torch.zeros(values.numel(), dtype=dy.dtype, device=dy.device)
            gradient[order] = (dy.T @ x)[stored]
            return gradient.view(values.shape)

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
    def mask(self, scores: Tensor) -> Tensor:
        """Choose what to keep: finite ``[out, in]`` scores to a boolean mask for which ``holds`` is true."""

    def nnz(self, shape: Shape) -> int:
        return round(self.density * shape[0] * shape[1])

    def check_member(self, weight: Tensor) -> Tensor:
        """Return the finite float weight ``[out, in]``, or raise ValueError where it breaks the pattern."""
        check_weight(weight)
        self.check_shape(weight.shape)
        if not self.holds(weight != 0):
            raise ValueError(f"weight is not {self}: apply a mask of this structure before packing it")
        return weight

    def check_scores(self, scores: Tensor) -> Tensor:
        """Return finite float scores ``[out, in]`` of a shape that this structure divides, or raise ValueError."""
        check_weight(scores, "scores")
        self.check_shape(scores.shape)
        return scores


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
        got = f"shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"{name} must be a matrix [out, in], got {got}")
    if not weight.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {weight.dtype}")
    if not weight.isfinite().all():
        bad = int((~weight.isfinite()).sum())
        raise ValueError(f"{name} must be finite, got {bad} NaN or infinite of {weight.numel()} entries")


def tiles(matrix: Tensor, rows: int, cols: int) -> Tensor:
    """View ``[out, in]`` as ``[out/rows, in/cols, rows, cols]``, one tile per leading index."""
    out, inn = matrix.shape
    return matrix.view(out // rows, rows, inn // cols, cols).transpose(1, 2)


def top(scores: Tensor, keep: int) -> Tensor:
    """Boolean mask of the ``keep`` highest of the last axis, exactly ``keep`` even among ties."""
    chosen = scores.topk(keep, dim=-1, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, chosen, True)


def bits_for(choices: int) -> int:
    """Bits that tell ``choices`` things apart."""
    return (choices - 1).bit_length()


def pack_bits(codes: Tensor, width: int) -> Tensor:
    """Codes ``[rows, n]`` below ``2**width`` to bytes ``[rows, ceil(n * width / 8)]``, lowest bit first."""
    shifts = torch.arange(width, device=codes.device)
    bits = ((codes.long().unsqueeze(-1) >> shifts) & 1).flatten(1)
    bits = torch.nn.functional.pad(bits, (0, -bits.shape[1] % 8)).view(codes.shape[0], -1, 8)
    return (bits << torch.arange(8, device=codes.device)).sum(-1).to(torch.uint8)


def unpack_bits(data: Tensor, width: int, count: int) -> Tensor:
    """Invert ``pack_bits``: bytes ``[rows, ...]`` to ``count`` int64 codes per row."""
    bits = ((data.long().unsqueeze(-1) >> torch.arange(8, device=data.device)) & 1).flatten(1)
    bits = bits[:, : count * width].view(data.shape[0], count, width)
    return (bits << torch.arange(width, device=data.device)).sum(-1)


def stored_bytes(packed: NamedTuple) -> int:
    """Bytes of the tensors of a packed operand."""
    return sum(part.numel() * part.element_size() for part in packed if isinstance(part, Tensor))
