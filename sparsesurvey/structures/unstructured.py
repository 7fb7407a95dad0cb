"""Unstructured: any weight may be kept, the best of the whole matrix (Han et al. 2015); stored row by row, CSR.

>>> scores = torch.tensor([[5.0, 1.0, 0.0, 4.0],
...                        [1.0, 2.0, 0.0, 3.0]])
>>> structure = Unstructured(0.5)
>>> structure.mask(scores).int()
tensor([[1, 0, 0, 1],
        [0, 1, 0, 1]], dtype=torch.int32)
>>> packed = structure.pack(scores * structure.mask(scores))
>>> packed.values
tensor([5., 4., 2., 3.])
>>> packed.columns.tolist(), packed.row_pointers.tolist()  # row 1 is entries 2 and 3
([0, 3, 1, 3], [0, 2, 4])
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparsesurvey.structure import (
    Pattern, Shape, check_density, check_part, compress_rows, expand_rows, index_dtype, top,
)


class PackedCSR(NamedTuple):
    values: Tensor  # [nnz], row after row
    columns: Tensor  # [nnz], int16 where in <= 32768, else int32
    row_pointers: Tensor  # int32 [out + 1]
    shape: Shape


@dataclass(frozen=True)
class Unstructured(Pattern):
    """At most ``round(density * out * in)`` weights of the matrix, anywhere.

    Stored as CSR with exactly that many entries: a matrix with fewer non-zeros stores zeros as well.
    """

    density: float = 0.5

    def __post_init__(self) -> None:
        check_density(self.density)

    def __str__(self) -> str:
        return f"unstructured {100 * self.density:g}%"

    @classmethod
    def variants(cls) -> tuple["Unstructured", ...]:
        return cls(0.5), cls(0.25), cls(0.1), cls(0.05), cls(0.01)

    def holds(self, mask: Tensor) -> bool:
        return int(self.check_mask(mask).sum()) <= round(self.density * mask.numel())

    def mask(self, scores: Tensor) -> Tensor:
        """The highest scores of the whole matrix, which is optimal."""
        return top(self.check_scores(scores).flatten(), self.nnz(scores.shape)).view(scores.shape)

    def index_bits(self, shape: Shape) -> int:
        out, inn = self.check_shape(shape)
        return self.nnz(shape) * 8 * index_dtype(inn).itemsize + 32 * (out + 1)

    def pack(self, weight: Tensor) -> PackedCSR:
        kept = self.stored(weight)
        return PackedCSR(weight[kept], *compress_rows(kept), tuple(weight.shape))

    def unpack(self, packed: PackedCSR) -> Tensor:
        rows, columns = self.places(packed)
        weight = packed.values.new_zeros(packed.shape)
        weight[rows, columns] = packed.values
        return weight

    def places(self, packed: PackedCSR) -> tuple[Tensor, Tensor]:
        """Row and column (int64) of every stored weight; ValueError if the operand is corrupt."""
        check_part("values", packed.values, None, (self.nnz(packed.shape),))
        check_part("columns", packed.columns, index_dtype(packed.shape[1]), packed.values.shape)
        return expand_rows(packed.columns, packed.row_pointers, *packed.shape)
