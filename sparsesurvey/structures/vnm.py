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

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations, islice
from math import comb, log
from typing import NamedTuple

import torch
from torch import Tensor

from sparsesurvey.packing import index_dtype, tiles, top, unpack_bits, untile
from sparsesurvey.structure import Facts, Pattern, Plan, Shape, check_int, check_order, check_part
from sparsesurvey.structures.block import Block, PackedBSR, Panel, panel_code
from sparsesurvey.structures.nm import NM, PackedNM, tensor_cores

COLUMNS = 4  # of every tile; the sparse tensor cores then want 2 of these 4 in each row
WIDEST = 16  # tiles whose column sets are all tried: C(16, 4) is 1820, C(32, 4) already 35960


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

    @property
    def diversity(self) -> float:
        """Nats a weight of all choices of columns and of entries in them: log K(V, M) of Zhao et al. (2024).

        log(C(m, 4) C(4, n)^v) / (v m): the entropy of the kept positions if all choices are alike.
        """
        return (log(comb(self.m, COLUMNS)) + self.v * log(comb(COLUMNS, self.n))) / (self.v * self.m)

    def facts(self) -> Facts:
        v, n, m = self.v, self.n, self.m
        where = "{rows}-row tile ({tile_row}, {tile_col}): column {col} is "
        why = where + "one of the {cols_kept} of {cols} kept; in this row {row_kept} of those {cols_kept} stay, and this " \
            "is number {rank_cols} of them by magnitude"
        gone = where + "none of the {cols_kept} of {cols} that the tile keeps"
        positions = self.diversity / log(2)
        if m == 4:  # every column is kept: nothing to gather
            return Facts(*tensor_cores(n, m), positions, why, gone, why, 1.0, 1.0)
        sparse = n <= 2  # at most 2 of the 4: what is left is a 2:4 product
        rows = 16 if sparse else 8  # of weights that one instruction multiplies
        gathered = 4 / m * (0.5 if sparse else 1.0) * max(1.0, rows / v)
        verdict, hardware, plain = tensor_cores(n, m)
        if plain < gathered:
            hardware = f"Tiles of {v} rows are too low to gather their columns. {hardware}"
            return Facts(verdict, hardware, plain, positions, why, gone, why, 1.0, 1.0)
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
        grad = min(1.0, 4 / m * max(1.0, 8 / v))  # both gradients multiply the panels densely: 2:4 is along the inputs
        return Facts(verdict, hardware, min(1.0, gathered), positions, why, gone, why, grad, grad)

    def holds(self, mask: Tensor) -> bool:
        tiled = tiles(self.check_mask(mask), self.v, self.m)
        return bool((tiled.any(-2).sum(-1) <= COLUMNS).all() and (tiled.sum(-1, dtype=torch.int16) <= self.n).all())

    def select(self, scores: Tensor) -> Tensor:
        """VENOM's cheap choice: the 4 columns with the highest sums of scores, then the n highest in each row.

        Not optimal: on Gaussian weights it keeps 0.6 points of energy less than ``exhaustive_mask``.
        """
        out, inn = scores.shape
        wide = torch.promote_types(scores.dtype, torch.float32)
        sums = scores.reshape(out // self.v, self.v, inn).sum(1, dtype=wide).unflatten(-1, (-1, self.m))
        return self.within(scores, self.numbers(top(sums, COLUMNS)))

    def within(self, scores: Tensor, columns: Tensor) -> Tensor:
        """The n highest of each row among the given columns of its tile, int64 ``[out/v, in/m, 4]``, as a mask."""
        (out, inn), groups = scores.shape, columns.shape[1]
        places = columns + torch.arange(0, inn, self.m, device=columns.device)[:, None]
        places = places.mT.flatten(1).unsqueeze(1).expand(-1, self.v, -1)  # first columns of all tiles, second, ...
        rows = scores.reshape(-1, self.v, inn)
        kept = top_of_few(rows.gather(-1, places).unflatten(-1, (COLUMNS, groups)).unbind(2), self.n)
        mask = torch.zeros(rows.shape, dtype=torch.bool, device=scores.device)
        return mask.scatter_(-1, places, kept.flatten(2)).view(out, inn)

    def numbers(self, kept: Tensor) -> Tensor:
        """Kept columns, bool ``[out/v, in/m, m]`` with 4 a tile, to their rising int64 numbers ``[out/v, in/m, 4]``."""
        return kept.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :COLUMNS]

    def nnz(self, shape: Shape) -> int:
        out, inn = self.check_shape(shape)
        return out * inn // self.m * self.n

    def index_bits(self, shape: Shape) -> int:
        out, inn = self.check_shape(shape)
        tiles_ = out // self.v * (inn // self.m)
        return self.inner.index_bits((out, COLUMNS * inn // self.m)) + 8 * COLUMNS * tiles_

    def pack(self, weight: Tensor) -> PackedVNM:
        tiled = tiles(self.check_member(weight), self.v, self.m)
        columns = self.numbers(top((tiled != 0).any(-2).float(), COLUMNS))
        compact = tiled.gather(-1, columns.unsqueeze(-2).expand(-1, -1, self.v, -1))
        inner = self.inner.pack(untile(compact))
        return PackedVNM(inner.values, inner.index, columns.to(torch.uint8), tuple(weight.shape))

    def unpack(self, packed: PackedVNM) -> Tensor:
        positions = self.positions(packed)  # [out, in/m, n], of the 4 columns
        out, groups, _ = positions.shape
        columns = packed.columns.long().unsqueeze(1).expand(-1, self.v, -1, -1).reshape(out, groups, COLUMNS)
        tiled = packed.values.new_zeros(out, groups, self.m)
        return tiled.scatter_(-1, columns.gather(-1, positions), packed.values).flatten(1)

    def positions(self, packed: PackedVNM) -> Tensor:
        """In which of its tile's 4 columns each value is, int64 ``[out, in/m, n]``; ValueError if the operand is corrupt."""
        out, inn = self.check_shape(packed.shape)
        groups = inn // self.m
        check_part("values", packed.values, None, (out, groups, self.n))
        check_part("columns", packed.columns, torch.uint8, (out // self.v, groups, COLUMNS))
        check_order("columns", packed.columns, self.m)
        if not self.inner.position_bits:  # 3 or all of 4: a bitmap, or no code
            kept = self.inner.decode(PackedNM(packed.values, packed.index, (out, COLUMNS * groups)))
            return self.numbers(kept.view(out, groups, COLUMNS))[..., :self.n]
        check_part("index", packed.index, torch.uint8, (out, self.inner.row_bytes(COLUMNS * groups)))
        positions = unpack_bits(packed.index, self.inner.position_bits, groups * self.n).view(packed.values.shape)
        check_order("index", positions, COLUMNS)
        return positions.long()

    # Without the zeros of the n:4 code a V:N:M weight is a matrix of kept v x 1 vectors: 4 / m of the dense arithmetic,
    # which a CPU does as dense products of gathered columns. Only sparse tensor cores save the rest.

    @property
    def outer(self) -> Block:
        """The structure of the kept columns, each of v weights."""
        return Block(self.v, 1, COLUMNS / self.m)

    def places(self, packed: PackedVNM) -> Tensor:
        """Where every value is among those of ``vectors``, int64 ``[out, in/m, n]``."""
        positions = self.positions(packed)
        out, groups, _ = positions.shape
        row = torch.arange(out, device=positions.device)
        first = row // self.v * (groups * COLUMNS * self.v) + row % self.v
        tile = torch.arange(groups, device=positions.device) * (COLUMNS * self.v)
        return positions.mul_(self.v).add_(first[:, None, None]).add_(tile[:, None])

    def vectors(self, packed: PackedVNM, places: Tensor) -> PackedBSR:
        """The kept columns with the zeros in them, as an operand of ``outer``."""
        out, inn = self.check_shape(packed.shape)
        panels, groups = out // self.v, inn // self.m
        values = packed.values.new_zeros(panels * groups * COLUMNS * self.v)
        values[places.flatten()] = packed.values.flatten()
        first = torch.arange(0, inn, self.m, device=values.device)  # of each tile
        columns = (packed.columns.long() + first[:, None]).flatten().to(index_dtype(inn))
        pointers = torch.arange(panels + 1, dtype=torch.int32, device=values.device) * groups * COLUMNS
        return PackedBSR(values.view(-1, self.v, 1), columns, pointers, packed.shape)

    def spmm_gather(self, packed: PackedVNM) -> Plan:
        return self.outer.spmm_gather(self.vectors(packed, self.places(packed)))

    def spmmt_gather(self, packed: PackedVNM) -> Plan:
        return self.outer.spmmt_gather(self.vectors(packed, self.places(packed)))

    def sddmm_gather(self, packed: PackedVNM) -> Plan:
        places = self.places(packed)
        run = self.outer.sddmm_gather(self.vectors(packed, places))
        order = places.flatten()
        return lambda dy, x: run(dy, x).flatten().index_select(0, order).view(packed.values.shape)

    # On a GPU dense tensor cores do the same (kernels/panel.py), and sparse ones leave out the zeros too (kernels/mma_sp.py).

    def panels(self, packed: PackedVNM) -> tuple[list[Panel], Shape, Tensor]:
        """The kept columns as panels of v outputs: what a plan needs."""
        vectors = self.vectors(packed, self.places(packed))
        return self.outer.panels(vectors), self.outer.grid(packed.shape), vectors.values

    def spmm_triton(self, packed: PackedVNM) -> Plan:
        return panel_code().gather_plan(*self.panels(packed))

    def spmmt_triton(self, packed: PackedVNM) -> Plan:
        return panel_code().spread_plan(*self.panels(packed))

    def spmmt_triton_scatter(self, packed: PackedVNM) -> Plan:
        return panel_code().scatter_plan(*self.panels(packed))

    def sddmm_triton(self, packed: PackedVNM) -> Plan:
        order, run = self.places(packed).flatten(), panel_code().sample_plan(*self.panels(packed))
        return lambda dy, x: run(dy, x).flatten().index_select(0, order).view(packed.values.shape)

    def spmm_cuda(self, packed: PackedVNM) -> Plan:
        from sparsesurvey.kernels import mma_sp

        positions = self.positions(packed)
        mma_sp.require(packed.values, self.n, COLUMNS, self.v)
        return mma_sp.product_plan(mma_sp.arrange(*self.quads(packed, positions), packed.shape))

    def spmm_spatha(self, packed: PackedVNM) -> Plan:
        """Spatha's kernel, where the reader has built it (kernels/spatha.py)."""
        from sparsesurvey.kernels import spatha

        return spatha.plan(packed.values, self.positions(packed), packed.columns, self.v, self.m, packed.shape)

    def quads(self, packed: PackedVNM, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The tiles as ``mma_sp.arrange`` takes them: values and positions ``[tiles, v, n]``, inputs, tiles a panel."""
        panels, groups, _ = packed.columns.shape
        by_tile = lambda part: part.unflatten(0, (panels, self.v)).transpose(1, 2).flatten(0, 1)
        first = torch.arange(groups, device=positions.device) * self.m
        columns = (packed.columns.long() + first[:, None]).flatten(0, 1)
        return by_tile(packed.values), by_tile(positions), columns, torch.full((panels,), groups)


def top_of_few(entries: tuple[Tensor, ...], keep: int) -> Tensor:
    """Mask of the ``keep`` highest of a few ``[..., groups]``, as ``[..., few, groups]``: of equal ones, the first."""
    beaten = [torch.full(entries[0].shape, len(entries) - 1 - place, dtype=torch.uint8, device=entries[0].device)
              for place in range(len(entries))]  # by all that come later, until they lose
    for earlier, later in combinations(range(len(entries)), 2):
        wins = (entries[earlier] >= entries[later]).view(torch.uint8)
        beaten[later] += wins
        beaten[earlier] -= wins
    return torch.stack([count < keep for count in beaten], -2)


def exhaustive_mask(structure: VNM, scores: Tensor) -> Tensor:
    """The best V:N:M mask: all C(m, 4) column sets are tried in every tile, as VENOM's own code does.

    One pass over the scores for each set, all tiles at once. ValueError if m is above 16.

    >>> scores = torch.tensor([[9.0, 8, 7, 0, 0], [0, 0, 0, 3, 3]])
    >>> VNM(2, 2, 5).mask(scores).int()  # columns 0 to 3 have the highest sums, but of column 2 nothing is kept
    tensor([[1, 1, 0, 0, 0],
            [1, 0, 0, 1, 0]], dtype=torch.int32)
    >>> exhaustive_mask(VNM(2, 2, 5), scores).int()
    tensor([[1, 1, 0, 0, 0],
            [0, 0, 0, 1, 1]], dtype=torch.int32)
    """
    if structure.m > WIDEST:
        sets = comb(structure.m, COLUMNS)
        raise ValueError(f"m must be at most {WIDEST} to try every set of 4 columns, got {structure.m}, which has {sets}")
    structure.check_scores(scores)
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    entries = wide.unflatten(1, (-1, structure.m)).movedim(-1, 0).contiguous()  # [m, out, in/m]
    best = wide.new_full((scores.shape[0] // structure.v, entries.shape[-1]), -torch.inf)
    columns = torch.zeros(*best.shape, COLUMNS, dtype=torch.int64, device=scores.device)
    for chosen in combinations(range(structure.m), COLUMNS):
        kept = sum(islice(falling(*(entries[column] for column in chosen)), structure.n))
        kept = kept.unflatten(0, (-1, structure.v)).sum(1)  # [out/v, in/m]
        number = torch.tensor(chosen, device=scores.device)
        columns = torch.where((kept > best).unsqueeze(-1), number, columns)
        best = torch.maximum(best, kept)
    return structure.within(scores, columns)


def falling(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Iterator[Tensor]:
    """Four tensors in falling order, elementwise."""
    high, low = torch.maximum(a, b), torch.minimum(a, b)
    other_high, other_low = torch.maximum(c, d), torch.minimum(c, d)
    yield torch.maximum(high, other_high)
    middle = torch.minimum(high, other_high), torch.maximum(low, other_low)
    yield torch.maximum(*middle)
    yield torch.minimum(*middle)
    yield torch.minimum(low, other_low)


def choose(target: float, speedups: Mapping[VNM, float]) -> VNM:
    """The most diverse of the structures whose speed-up reaches the target (Zhao et al. 2024), for a layer of any shape.

    ``speedups``: each candidate's speed-up over dense, measured or a bound such as ``bound(structure)``.

    >>> str(choose(2.5, {VNM(16, 2, 8): 4.0, VNM(64, 2, 5): 2.5, VNM(64, 2, 4): 2.0}))
    '64:2:5'
    """
    able = [structure for structure, speedup in speedups.items() if speedup >= target]
    if not able:
        best = max(speedups.values(), default=0)
        raise ValueError(f"target must be at most {best:g}, the best of speedups, got {target!r}")
    return max(able, key=lambda structure: structure.diversity)


def bound(structure: VNM) -> float:
    """The most that tensor cores can gain over dense, by the arithmetic that is left: m/2 for n = 2 and high panels."""
    return 1 / structure.facts().arithmetic
