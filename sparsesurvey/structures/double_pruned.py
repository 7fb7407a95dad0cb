"""Double-pruned N:M: one n:m weight for the forward product, another n:m weight for the input gradient.

The second is n:m along the outputs. BDWP (Fang et al. 2023) prunes both from the same dense weight, each for itself;
SLoPe (Mozaffari et al. 2025) prunes what the forward kept once more.

>>> weight = torch.tensor([[9.0, 4.0, 3.0, 2.0],
...                        [4.0, 5.0, 8.0, 0.0],
...                        [2.0, 0.0, 7.0, 6.0],
...                        [3.0, 6.0, 1.0, 5.0]])
>>> bdwp, slope = DoublePruned(2, 4), DoublePruned(2, 4, nested=True)
>>> bdwp.forward_weight(bdwp.pack(weight)).int()  # two of each row
tensor([[9, 4, 0, 0],
        [0, 5, 8, 0],
        [0, 0, 7, 6],
        [0, 6, 0, 5]], dtype=torch.int32)
>>> bdwp.backward_weight(bdwp.pack(weight)).int()  # two of each column; the 4 was not in the forward product
tensor([[9, 0, 0, 0],
        [4, 5, 8, 0],
        [0, 0, 7, 6],
        [0, 6, 0, 5]], dtype=torch.int32)
>>> slope.backward_weight(slope.pack(weight)).int()  # of each column two of those that the forward kept
tensor([[9, 0, 0, 0],
        [0, 5, 8, 0],
        [0, 0, 7, 6],
        [0, 6, 0, 5]], dtype=torch.int32)
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import comb
from typing import NamedTuple

import torch
from torch import Tensor

from sparsesurvey.structure import Facts, Plan, Shape, Structure, check_int, check_part, check_weight
from sparsesurvey.structures.nm import NM, PackedNM, tensor_cores


class PackedDoublePruned(NamedTuple):
    values: Tensor  # [2 * out * in * n / m]: those of the forward operand, then those of the backward one
    forward_index: Tensor  # uint8 [out, bytes]: the n:m code of W, see PackedNM
    backward_index: Tensor  # uint8 [in, bytes]: the n:m code of W.T
    shape: Shape


@dataclass(frozen=True)
class DoublePruned(Structure):
    """Two n:m weights made from one: ``forward_weight`` n:m along the inputs, ``backward_weight`` along the outputs.

    ``nested`` False: each keeps the largest of the dense weight (BDWP). True: the backward weight keeps the largest of
    what the forward weight kept, so that it has fewer than n of some groups (SLoPe). Both products are forward products
    of an n:m operand, of W and of W.T, and each reads only its own. The input gradient is not the one of the forward
    product: training with it follows no loss exactly.

    It has no mask: a place that only one direction keeps is in the weight for that direction alone.
    """

    n: int = 2
    m: int = 4
    nested: bool = False

    def __post_init__(self) -> None:
        check_int("m", self.m, 1, 64)
        check_int("n", self.n, 1, self.m)
        if not isinstance(self.nested, bool):
            raise ValueError(f"nested must be True (SLoPe) or False (BDWP), got {self.nested!r}")

    def __str__(self) -> str:
        return f"double-pruned {self.n}:{self.m}{' nested' if self.nested else ''}"

    @classmethod
    def variants(cls) -> tuple["DoublePruned", ...]:
        return cls(2, 4), cls(2, 4, True), cls(2, 8), cls(4, 8, True), cls(8, 16)

    @property
    def ahead(self) -> NM:
        """The structure of the forward weight."""
        return NM(self.n, self.m)

    @property
    def back(self) -> NM:
        """The structure of the backward weight."""
        return NM(self.n, self.m, "out")

    @property
    def tile(self) -> Shape:
        return (self.m, self.m)

    @property
    def training_arithmetic(self) -> float:
        """Arithmetic of a training step as a share of dense: two sparse products and a dense one, for dW."""
        return (2 * self.n / self.m + 1) / 3

    def facts(self) -> Facts:
        verdict, hardware, arithmetic = tensor_cores(self.n, self.m)
        hardware += " Both directions are such products: the weight is stored twice for that, once for each."
        return Facts(verdict, hardware, arithmetic, weight_grad=1.0)

    def nnz(self, shape: Shape) -> int:
        """Weights of either operand: what one product multiplies. Twice as many are stored."""
        return self.ahead.nnz(self.check_shape(shape))

    def value_bits(self, shape: Shape, itemsize: int = 2) -> int:
        return 2 * super().value_bits(shape, itemsize)

    def index_bits(self, shape: Shape) -> int:
        self.check_shape(shape)
        return self.ahead.index_bits(shape) + self.back.index_bits(shape)

    def pack(self, weight: Tensor) -> PackedDoublePruned:
        check_weight(weight)
        shape = self.check_shape(weight.shape)
        weight = weight.detach()
        forward = self.ahead.project(weight)
        backward = self.back.project(forward if self.nested else weight)
        one, two = self.ahead.pack(forward), self.back.pack(backward)
        return PackedDoublePruned(torch.cat([one.values.flatten(), two.values.flatten()]), one.index, two.index, shape)

    def unpack(self, packed: PackedDoublePruned) -> Tensor:
        """What is stored, wherever it is: the union of both weights (for SLoPe, that is the forward weight).

        Pruning it again changes nothing. The n largest of a group of the dense weight are all in the union, and what
        else is there is not larger, so that they are the n largest of the group again, in either direction; of equal
        ones the first wins both times.
        """
        forward, backward = self.operands(packed)
        weight = self.ahead.unpack(forward)
        return weight if self.nested else torch.where(self.back.decode(backward), self.back.unpack(backward), weight)

    def forward_weight(self, packed: PackedDoublePruned) -> Tensor:
        return self.ahead.unpack(self.operands(packed)[0])

    def backward_weight(self, packed: PackedDoublePruned) -> Tensor:
        return self.back.unpack(self.operands(packed)[1])

    def operands(self, packed: PackedDoublePruned) -> tuple[PackedNM, PackedNM]:
        """The operands of ``ahead`` and ``back``; ValueError if one is corrupt.

        SLoPe's backward operand is filled up where a group has fewer than n left: what stands there is no weight of it.
        """
        shape = self.check_shape(packed.shape)
        check_part("values", packed.values, None, (2 * self.nnz(shape),))
        indices = {"forward_index": packed.forward_index, "backward_index": packed.backward_index}
        made = []
        for structure, name, values in zip((self.ahead, self.back), indices, packed.values.chunk(2), strict=True):
            operand = PackedNM(values.view(*structure.grid(shape), self.n), indices[name], shape)
            try:
                structure.decode(operand)
            except ValueError as error:
                raise ValueError(str(error).replace("packed.index", f"packed.{name}")) from None
            made.append(operand)
        forward, backward = made
        return forward, backward._replace(values=backward.values * self.alive(forward, backward))

    def alive(self, forward: PackedNM, backward: PackedNM) -> Tensor:
        """1 for each value of ``backward`` that is a weight of it, else 0."""
        if not self.nested:
            return torch.ones_like(backward.values)
        kept, again = self.ahead.decode(forward).T, self.back.decode(backward).T  # [in, out], the order of the values
        return kept[again].view(backward.values.shape).to(backward.values.dtype)

    def sddmm_reference(self, packed: PackedDoublePruned) -> Plan:
        return self.sampled(packed, self.ahead.sddmm_reference, self.back.sddmm_reference)

    def sampled(self, packed: PackedDoublePruned, ahead: Callable[[PackedNM], Plan],
                back: Callable[[PackedNM], Plan]) -> Plan:
        """The gradient of W where it is stored: twice for a place stored twice, so that both copies stay equal."""
        forward, backward = self.operands(packed)
        run_ahead, run_back, alive = ahead(forward), back(backward), self.alive(forward, backward)
        return lambda dy, x: torch.cat([run_ahead(dy, x).flatten(), (run_back(dy, x) * alive).flatten()])

    # Each direction has the kernels of its own operand, whose groups lie along the axis that its product sums over.

    def spmm_torch_csr(self, packed: PackedDoublePruned) -> Plan:
        return self.ahead.spmm_torch_csr(self.operands(packed)[0])

    def spmmt_torch_csr(self, packed: PackedDoublePruned) -> Plan:
        return self.back.spmmt_torch_csr(self.operands(packed)[1])

    def sddmm_torch_csr(self, packed: PackedDoublePruned) -> Plan:
        return self.sampled(packed, self.ahead.sddmm_torch_csr, self.back.sddmm_torch_csr)

    def spmm_tiled_csr(self, packed: PackedDoublePruned) -> Plan:
        return self.ahead.spmm_tiled_csr(self.operands(packed)[0])

    def spmmt_tiled_csr(self, packed: PackedDoublePruned) -> Plan:
        return self.back.spmmt_tiled_csr(self.operands(packed)[1])

    def spmm_scipy_csr(self, packed: PackedDoublePruned) -> Plan:
        return self.ahead.spmm_scipy_csr(self.operands(packed)[0])

    def spmmt_scipy_csr(self, packed: PackedDoublePruned) -> Plan:
        return self.back.spmmt_scipy_csr(self.operands(packed)[1])


def extra_zeros(n: int, m: int) -> float:
    """Share of all weights that a second pruning of an n:m weight, along the other axis, drops on average.

    For masks at random: each of a column's m weights is kept with probability n / m, whatever the others, and a group
    with j > n of them loses j - n (Mozaffari et al. 2025).
    """
    share = n / m
    return sum(comb(m, j) * share**j * (1 - share) ** (m - j) * (j - n) / m for j in range(n + 1, m + 1))
