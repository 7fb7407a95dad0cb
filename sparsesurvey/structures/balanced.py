"""Balanced: every row in banks that keep equally many (Yao et al. 2019; Cao et al. 2019), stored as values and positions.

>>> scores = torch.tensor([[5.0, 1.0, 2.0, 4.0, 0.0, 3.0, 2.0, 9.0]])
>>> structure = Balanced(2, 0.5)  # 2 banks of 4 inputs, of which 2 are kept
>>> structure.mask(scores).int()
tensor([[1, 0, 0, 1, 0, 1, 0, 1]], dtype=torch.int32)
>>> packed = structure.pack(scores * structure.mask(scores))
>>> packed.values
tensor([[[5., 4.],
         [3., 9.]]])
>>> [f"{byte:08b}" for byte in packed.index.flatten().tolist()]  # second bank 3, 1; first bank 3, 0
['11011100']
"""

from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from sparsesurvey.packing import bits_for, entropy, in_cache, index_dtype, pack_bits, top, unpack_bits
from sparsesurvey.structure import (
    Facts, Pattern, Plan, Shape, check_activations, check_density, check_int, check_order, check_part,
)
from sparsesurvey.structures.unstructured import (
    NO_PATH, WHY_NOT, PackedCSR, bitmap_product, scipy_csr, scipy_product, skipping_product, tiled_product, torch_csr, torch_product,
    torch_sampled,
)

BYTE = 8  # positions of up to so many bits are stored side by side without a gap, longer ones as int16 or int32


class PackedBalanced(NamedTuple):
    values: Tensor  # [out, banks, kept], in the order of the inputs
    index: Tensor  # uint8 [out, bytes]: a position inside its bank for each, in ceil(log2 bank) bits; int16 or int32
    # [out, banks * kept] where a bank has more than 256 inputs
    shape: Shape


@dataclass(frozen=True)
class Balanced(Pattern):
    """At most ``round(density * bank)``, but at least one, kept in each of the ``banks`` equal parts of every row.

    With banks of C inputs of which k are kept this is k:C, an N:M with a group as long as the row permits. Stored as
    values and positions inside the bank, without row pointers: all rows and banks have the same length.
    """

    banks: int = 16
    density: float = 0.5

    def __post_init__(self) -> None:
        check_int("banks", self.banks, 1)
        check_density(self.density)

    def __str__(self) -> str:
        return f"balanced {self.banks} {100 * self.density:g}%"

    @classmethod
    def variants(cls) -> tuple["Balanced", ...]:
        return cls(16, 0.5), cls(16, 0.25), cls(4, 0.5), cls(4, 0.1), cls(1, 0.5), cls(3, 0.3)

    @property
    def tile(self) -> Shape:
        return (1, self.banks)

    def bank(self, shape: Shape) -> int:
        """Inputs of a bank."""
        return self.check_shape(shape)[1] // self.banks

    def kept(self, shape: Shape) -> int:
        """How many of them are kept."""
        bank = self.bank(shape)
        return max(1, round(self.density * bank))

    def nnz(self, shape: Shape) -> int:
        return self.check_shape(shape)[0] * self.banks * self.kept(shape)

    def facts(self) -> Facts:
        why = "number {rank_row} by magnitude in row {row}; each bank keeps its own best"
        hardware = (
            f"{WHY_NOT} What balance buys is equal work: threads or lanes that take a bank each finish together, and none "
            "reads in another's bank."
        )
        return Facts(NO_PATH, hardware, 1.0, entropy(self.density), why, pruned=why)  # positions: of long banks

    def holds(self, mask: Tensor) -> bool:
        counts = self.check_mask(mask).unflatten(1, (self.banks, -1)).sum(-1, dtype=torch.int32)
        return bool((counts <= self.kept(mask.shape)).all())

    def select(self, scores: Tensor) -> Tensor:
        """The highest of every bank, which is optimal: banks are independent."""
        return top(scores.unflatten(1, (self.banks, -1)), self.kept(scores.shape)).flatten(1)

    def position_bits(self, shape: Shape) -> int:
        """Bits of one position: as few as tell the bank's inputs apart, beyond a byte as many as an int16 or int32 has."""
        bank = self.bank(shape)
        width = bits_for(bank)
        return width if width <= BYTE else 8 * index_dtype(bank).itemsize

    def code(self, shape: Shape) -> tuple[torch.dtype, int]:
        """The dtype of the index, and how many numbers a row has."""
        width, count = self.position_bits(shape), self.banks * self.kept(shape)
        return (torch.uint8, ceil(width * count / 8)) if width <= BYTE else (index_dtype(self.bank(shape)), count)

    def index_bits(self, shape: Shape) -> int:
        dtype, count = self.code(shape)
        return 8 * dtype.itemsize * count * self.check_shape(shape)[0]

    def pack(self, weight: Tensor) -> PackedBalanced:
        kept, shape = self.stored(weight), self.check_shape(weight.shape)
        bank, (dtype, count) = self.bank(shape), self.code(shape)
        values = weight.new_empty(shape[0], self.banks, self.kept(shape))
        index = torch.empty(shape[0], count, dtype=dtype, device=weight.device)
        for part, chosen, stored, code in in_cache(weight.detach(), kept, values, index):
            places = chosen.flatten().nonzero().flatten()
            torch.index_select(part.flatten(), 0, places, out=stored.view(-1))
            positions = (places % bank).view(len(part), -1)
            code.copy_(pack_bits(positions, self.position_bits(shape)) if dtype == torch.uint8 else positions)
        return PackedBalanced(values, index, shape)

    def unpack(self, packed: PackedBalanced) -> Tensor:
        positions = self.positions(packed)
        weight = packed.values.new_zeros(packed.shape[0], self.banks, self.bank(packed.shape))
        return weight.scatter(-1, positions, packed.values).flatten(1)

    def positions(self, packed: PackedBalanced) -> Tensor:
        """Place in its bank (int64) of every stored weight, ``[out, banks, kept]``; ValueError if the operand is corrupt."""
        shape = self.check_shape(packed.shape)
        (dtype, count), each = self.code(shape), self.kept(shape)
        check_part("values", packed.values, None, (shape[0], self.banks, each))
        check_part("index", packed.index, dtype, (shape[0], count))
        index = packed.index
        if dtype == torch.uint8:
            index = unpack_bits(index, self.position_bits(shape), self.banks * each)
        positions = index.view(packed.values.shape).long()
        check_order("index", positions, self.bank(shape))
        return positions

    def columns(self, packed: PackedBalanced) -> Tensor:
        """Input (int64) of every stored weight, ``[out, banks * kept]``, rising in each row."""
        bank = self.bank(packed.shape)
        first = torch.arange(0, packed.shape[1], bank, device=packed.values.device)
        return (self.positions(packed) + first[:, None]).flatten(1)

    def general(self, packed: PackedBalanced) -> PackedCSR:
        """The same weights as CSR, which has them in the same order, with row pointers that need no counting."""
        columns = self.columns(packed)
        pointers = torch.arange(len(columns) + 1, device=columns.device) * columns.shape[1]
        return PackedCSR(packed.values.flatten(), columns.flatten().to(index_dtype(packed.shape[1])), pointers.int(), packed.shape)

    # Rows of equal length are bags of equal size: each output adds up as many inputs, weighted. On a CPU that is
    # torch's embedding_bag, with the inputs' values over the tokens as the table.

    def spmm_torch_bag(self, packed: PackedBalanced) -> Plan:
        columns, values = self.columns(packed), packed.values.detach().flatten(1)
        wide = torch.promote_types(values.dtype, torch.float32)  # in which it adds
        weights = values.to(wide)

        def run(x: Tensor) -> Tensor:
            x = check_activations("x", x, packed.shape[1], values)
            if not len(x):
                return x.new_empty(0, len(values))
            features = x.T.to(wide).contiguous()
            return embedding_bag(columns, features, mode="sum", per_sample_weights=weights).T.to(x.dtype)

        return run

    def spmm_torch_csr(self, packed: PackedBalanced) -> Plan:
        return torch_product("x", torch_csr(self.general(packed)))

    def spmmt_torch_csr(self, packed: PackedBalanced) -> Plan:
        return torch_product("dy", torch_csr(self.general(packed).transposed()))

    def sddmm_torch_csr(self, packed: PackedBalanced) -> Plan:
        run = torch_sampled(torch_csr(self.general(packed)))
        return lambda dy, x: run(dy, x).view(packed.values.shape)

    def spmm_tiled_csr(self, packed: PackedBalanced) -> Plan:
        return tiled_product("x", torch_csr(self.general(packed)))

    def spmmt_tiled_csr(self, packed: PackedBalanced) -> Plan:
        return tiled_product("dy", torch_csr(self.general(packed).transposed()))

    def spmm_scipy_csr(self, packed: PackedBalanced) -> Plan:
        return scipy_product("x", scipy_csr(self.general(packed)), packed.values)

    def spmmt_scipy_csr(self, packed: PackedBalanced) -> Plan:
        return scipy_product("dy", scipy_csr(self.general(packed).transposed()), packed.values)

    # On a GPU the two kernels for zeros anywhere; that banks are equal in work is nothing to them.

    def spmm_cuda_bitmap(self, packed: PackedBalanced) -> Plan:
        return bitmap_product(self.general(packed))

    def spmm_cuda_skip(self, packed: PackedBalanced) -> Plan:
        return skipping_product("x", self.general(packed))

    def spmmt_cuda_skip(self, packed: PackedBalanced) -> Plan:
        return skipping_product("dy", self.general(packed).transposed())
