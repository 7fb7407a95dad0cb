"""Block: whole rows x cols blocks are kept or dropped (Gray et al. 2017); a block of V x 1 is a vector. Stored as BSR.

>>> scores = torch.tensor([[9.0, 0.0, 1.0, 1.0],
...                        [0.0, 0.0, 1.0, 1.0],
...                        [1.0, 2.0, 4.0, 0.0],
...                        [3.0, 4.0, 0.0, 0.0]])
>>> structure = Block(2, 2, 0.5)
>>> structure.mask(scores).int()  # the blocks' sums are 9, 4, 10 and 4
tensor([[1, 1, 0, 0],
        [1, 1, 0, 0],
        [1, 1, 0, 0],
        [1, 1, 0, 0]], dtype=torch.int32)
>>> packed = structure.pack(scores * structure.mask(scores))
>>> packed.values
tensor([[[9., 0.],
         [0., 0.]],
<BLANKLINE>
        [[1., 2.],
         [3., 4.]]])
>>> packed.columns.tolist(), packed.row_pointers.tolist()  # one block in either block row, in block column 0
([0, 0], [0, 1, 2])
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparsesurvey.structure import (
    Pattern, Shape, check_density, check_int, check_part, compress_rows, expand_rows, index_dtype, tiles, top, untile,
)


class PackedBSR(NamedTuple):
    values: Tensor  # [blocks, rows, cols], block row after block row
    columns: Tensor  # [blocks], the block's column; int16 where there are at most 32768, else int32
    row_pointers: Tensor  # int32 [out / rows + 1]
    shape: Shape


@dataclass(frozen=True)
class Block(Pattern):
    """At most ``round(density * blocks)`` of the ``rows`` x ``cols`` blocks of the matrix keep anything.

    Stored as BSR with exactly that many blocks: a matrix with fewer non-zero blocks stores zero blocks as well.
    """

    rows: int = 32
    cols: int = 32
    density: float = 0.5

    def __post_init__(self) -> None:
        check_int("rows", self.rows, 1)
        check_int("cols", self.cols, 1)
        check_density(self.density)

    def __str__(self) -> str:
        return f"block {self.rows}x{self.cols} {100 * self.density:g}%"

    @classmethod
    def variants(cls) -> tuple["Block", ...]:
        blocks = (32, 32), (16, 16), (64, 64), (32, 1), (8, 1), (16, 64)
        return tuple(cls(*block, density) for block in blocks for density in (0.5, 0.25, 0.1))

    @property
    def tile(self) -> Shape:
        return (self.rows, self.cols)

    def grid(self, shape: Shape) -> Shape:
        """How many block rows and block columns a weight of this shape has."""
        out, inn = self.check_shape(shape)
        return out // self.rows, inn // self.cols

    def blocks(self, shape: Shape) -> int:
        """How many blocks are kept."""
        down, across = self.grid(shape)
        return round(self.density * down * across)

    def nnz(self, shape: Shape) -> int:
        return self.blocks(shape) * self.rows * self.cols

    def holds(self, mask: Tensor) -> bool:
        return int(tiles(self.check_mask(mask), self.rows, self.cols).any(-1).any(-1).sum()) <= self.blocks(mask.shape)

    def mask(self, scores: Tensor) -> Tensor:
        """The blocks with the highest sums of scores, which is optimal for the sum of all kept scores."""
        wide = torch.promote_types(self.check_scores(scores).dtype, torch.float32)
        sums = tiles(scores, self.rows, self.cols).sum((-2, -1), dtype=wide)
        kept = top(sums.flatten(), self.blocks(scores.shape)).view(sums.shape)
        return kept.repeat_interleave(self.rows, 0).repeat_interleave(self.cols, 1)

    def index_bits(self, shape: Shape) -> int:
        down, across = self.grid(shape)
        return self.blocks(shape) * 8 * index_dtype(across).itemsize + 32 * (down + 1)

    def pack(self, weight: Tensor) -> PackedBSR:
        kept = tiles(self.stored(weight), self.rows, self.cols).any(-1).any(-1)
        values = tiles(weight, self.rows, self.cols)[kept]
        return PackedBSR(values, *compress_rows(kept), tuple(weight.shape))

    def unpack(self, packed: PackedBSR) -> Tensor:
        rows, columns = self.places(packed)
        tiled = packed.values.new_zeros(*self.grid(packed.shape), self.rows, self.cols)
        tiled[rows, columns] = packed.values
        return untile(tiled)

    def places(self, packed: PackedBSR) -> tuple[Tensor, Tensor]:
        """Block row and block column (int64) of every stored block; ValueError if the operand is corrupt."""
        down, across = self.grid(packed.shape)
        check_part("values", packed.values, None, (self.blocks(packed.shape), self.rows, self.cols))
        check_part("columns", packed.columns, index_dtype(across), packed.values.shape[:1])
        return expand_rows(packed.columns, packed.row_pointers, down, across)
