"""V:N:M, the order of VENOM (Castro et al. 2023): 4 columns of every v x m tile, then n of these 4 in each row.

>>> scores = torch.tensor([[9.0, 1.0, 5.0, 0.0, 0.0, 4.0, 8.0, 0.0],
...                        [0.0, 1.0, 5.0, 0.0, 7.0, 3.0, 6.0, 1.0]])
>>> structure = VNM(2, 2, 8)
>>> structure.mask(scores).int()  # the columns' sums are 9 2 10 0 7 7 14 1: columns 0, 2, 6 and the first of the 7s
tensor([[1, 0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 1, 0, 1, 0]], dtype=torch.int32)
>>> packed = structure.pack(scores * structure.mask(scores))
>>> packed.values
tensor([[[9., 8.]],
<BLANKLINE>
        [[7., 6.]]])
>>> packed.columns.tolist()  # columns 0, 4 and 6 and, to make four, a zero one
[[[0, 1, 4, 6]]]
>>> [f"{byte:04b}" for byte in packed.index.flatten().tolist()]  # of those: the fourth and the first; fourth and third
['1100', '1110']
"""

from dataclasses import dataclass
from math import comb, log2
from typing import NamedTuple

import torch
from torch import Tensor

from sparsesurvey.structure import (
    Facts, Pattern, Plan, Shape, check_int, check_order, check_part, index_dtype, tiles, top, untile,
)
from sparsesurvey.structures.block import Block, PackedBSR
from sparsesurvey.structures.nm import NM, PackedNM, tensor_cores

COLUMNS = 4  # of every tile; the sparse tensor cores then want 2 of these 4 in each row


class PackedVNM(NamedTuple):
    values: Tensor  # [out, in / m, n]
    index: Tensor  # uint8 [out, bytes]: the n:4 code of the compacted matrix [out, 4 * in / m]
    columns: Tensor  # uint8 [out / v, in / m, 4], which columns of the tile the compacted matrix has, rising
    shape: Shape


@dataclass(frozen=True)
class VNM(Pattern):
    """At most 4 columns of every ``v`` x ``m`` tile keep anything, and each row of the tile at most ``n`` of them.

    Compacted to its 4 columns a tile it is an n:4 matrix and is stored as one, with the columns beside it.
    """

    v: int = 64
    n: int = 2
    m: int = 8

    def __post_init__(self) -> None:
        check_int("v", self.v, 1)
        check_int("m", self.m, COLUMNS, 256)
        check_int("n", self.n, 1, COLUMNS)

    def __str__(self) -> str:
        return f"{self.v}:{self.n}:{self.m}"

    @classmethod
    def variants(cls) -> tuple["VNM", ...]:
        return cls(64, 2, 8), cls(16, 2, 8), cls(128, 2, 8), cls(64, 2, 16), cls(64, 2, 5), cls(32, 1, 32), cls(8, 4, 8)

    @property
    def tile(self) -> Shape:
        return (self.v, self.m)

    @property
    def density(self) -> float:
        return self.n / self.m

    @property
    def inner(self) -> NM:
        """The structure of the compacted matrix."""
        return NM(self.n, COLUMNS)

    def facts(self) -> Facts:
        v, n, m = self.v, self.n, self.m
        where = "{rows}-row tile ({tile_row}, {tile_col}): column {col} is "
        why = where + "one of the {cols_kept} of {cols} kept; in this row {row_kept} of those {cols_kept} stay, and this " \
            "is number {rank_cols} of them by magnitude"
        gone = where + "none of the {cols_kept} of {cols} that the tile keeps"
        positions = (log2(comb(m, 4)) + v * log2(comb(4, n))) / (v * m)
        if m == 4:  # every column is kept: nothing to gather
            return Facts(*tensor_cores(n, m), positions, why, gone, why)
        sparse = n <= 2  # at most 2 of the 4: what is left is a 2:4 product
        rows = 16 if sparse else 8  # of weights that one instruction multiplies
        gathered = 4 / m * (0.5 if sparse else 1.0) * max(1.0, rows / v)
        verdict, hardware, plain = tensor_cores(n, m)
        if plain < gathered:
            hardware = f"Tiles of {v} rows are too low to gather their columns. {hardware}"
            return Facts(verdict, hardware, plain, positions, why, gone, why)
        inside = "sparse tensor cores halve what is left" if sparse else "dense tensor cores multiply them"
        verdict = f"gathered, then {'sparse' if sparse else 'dense'} tensor cores"
        hardware = f"The 4 kept columns of every tile are gathered, which leaves 4/{m} of the arithmetic; {inside}."
        if v < rows:
            hardware += f" But an instruction takes {rows} rows that share their columns, and {v} fill it only in part."
        limit = 30 * v / 790 * m / 4  # an activation read from shared memory, 30 TB/s, serves v rows; dense has 790 TFLOP/s
        if limit < 1 / gathered:
            verdict = "tiles too low" if limit < 1 else verdict
            hardware += (
                f" A gathered activation serves {v} rows only: the shared memory of an H200 limits this product to about "
                f"{limit:.1f} times dense (estimate, not in the curve)."
            )
        if sparse and v >= 32:
            hardware += (
                " The public kernel, Spatha, is made for Ampere and took 128:2:8 to 2.9 to 3.9 times dense on an RTX 3090; "
                "none is made for Hopper."
            )
        return Facts(verdict, hardware, min(1.0, gathered), positions, why, gone, why)

    def holds(self, mask: Tensor) -> bool:
        tiled = tiles(self.check_mask(mask), self.v, self.m)
        return bool((tiled.any(-2).sum(-1) <= COLUMNS).all() and (tiled.sum(-1, dtype=torch.int16) <= self.n).all())

    def select(self, scores: Tensor) -> Tensor:
        """VENOM's cheap choice: the 4 columns with the highest sums of scores, then the n highest in each row.

        Not optimal; on Gaussian weights it keeps 0.6 points of energy less than trying all sets of 4 columns.
        """
        wide = torch.promote_types(scores.dtype, torch.float32)
        tiled = tiles(scores, self.v, self.m)  # [out/v, in/m, v, m]
        columns = self.positions(top(tiled.sum(-2, dtype=wide), COLUMNS))
        kept = top(tiled.gather(-1, columns), self.n)
        return untile(torch.zeros_like(tiled, dtype=torch.bool).scatter_(-1, columns, kept))

    def positions(self, kept: Tensor) -> Tensor:
        """Tile columns kept, bool ``[out/v, in/m, m]`` with 4 each, to their rising int64 numbers ``[out/v, in/m, v, 4]``."""
        first = kept.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :COLUMNS]
        return first.unsqueeze(-2).expand(-1, -1, self.v, -1)

    def nnz(self, shape: Shape) -> int:
        out, inn = self.check_shape(shape)
        return out * inn // self.m * self.n

    def index_bits(self, shape: Shape) -> int:
        out, inn = self.check_shape(shape)
        tiles_ = out // self.v * (inn // self.m)
        return self.inner.index_bits((out, COLUMNS * inn // self.m)) + 8 * COLUMNS * tiles_

    def pack(self, weight: Tensor) -> PackedVNM:
        tiled = tiles(self.check_member(weight), self.v, self.m)
        columns = self.positions(top((tiled != 0).any(-2).float(), COLUMNS))
        inner = self.inner.pack(untile(tiled.gather(-1, columns)))
        return PackedVNM(inner.values, inner.index, columns[:, :, 0].to(torch.uint8), tuple(weight.shape))

    def unpack(self, packed: PackedVNM) -> Tensor:
        out, inn = self.check_shape(packed.shape)
        compact = tiles(self.compact(packed), self.v, COLUMNS)
        columns = packed.columns.long().unsqueeze(-2).expand(compact.shape)
        tiled = compact.new_zeros(out // self.v, inn // self.m, self.v, self.m)
        return untile(tiled.scatter_(-1, columns, compact))

    def compact(self, packed: PackedVNM) -> Tensor:
        """The n:4 matrix ``[out, 4 * in / m]`` of the kept columns; ValueError if the operand is corrupt."""
        out, inn = self.check_shape(packed.shape)
        check_part("columns", packed.columns, torch.uint8, (out // self.v, inn // self.m, COLUMNS))
        check_order("columns", packed.columns, self.m)
        return self.inner.unpack(PackedNM(packed.values, packed.index, (out, COLUMNS * inn // self.m)))

    # Without the zeros of the n:4 code a V:N:M weight is a matrix of kept v x 1 vectors: 4 / m of the dense arithmetic,
    # which a CPU does as dense products of gathered columns. Only sparse tensor cores save the rest.

    @property
    def outer(self) -> Block:
        """The structure of the kept columns, each of v weights."""
        return Block(self.v, 1, COLUMNS / self.m)

    def vectors(self, packed: PackedVNM) -> PackedBSR:
        """The kept columns with the zeros in them, as an operand of ``outer``."""
        out, inn = self.check_shape(packed.shape)
        panels, groups = out // self.v, inn // self.m
        values = self.compact(packed).view(panels, self.v, -1).mT.reshape(-1, self.v, 1)
        first = torch.arange(0, inn, self.m, device=values.device)  # of each tile
        columns = (packed.columns.long() + first[:, None]).flatten().to(index_dtype(inn))
        pointers = torch.arange(panels + 1, dtype=torch.int32, device=values.device) * groups * COLUMNS
        return PackedBSR(values, columns, pointers, packed.shape)

    def spmm_gather(self, packed: PackedVNM) -> Plan:
        return self.outer.spmm_gather(self.vectors(packed))

    def spmmt_gather(self, packed: PackedVNM) -> Plan:
        return self.outer.spmmt_gather(self.vectors(packed))

    def sddmm_gather(self, packed: PackedVNM) -> Plan:
        run = self.outer.sddmm_gather(self.vectors(packed))
        out, inn = self.check_shape(packed.shape)
        panels, width = out // self.v, COLUMNS * inn // self.m
        kept = self.inner.decode(PackedNM(packed.values, packed.index, (out, width)))
        number = torch.arange(out * width, device=kept.device).view(panels, width, self.v)  # place in the vectors
        places = number.mT.reshape(out, width)[kept]
        return lambda dy, x: run(dy, x).flatten().index_select(0, places).view(packed.values.shape)
