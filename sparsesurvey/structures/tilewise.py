"""Tile-wise: whole outputs go, and in each tile of g surviving outputs whole inputs (Guo et al. 2020).

>>> scores = torch.tensor([[9.0, 1.0, 5.0],
...                        [1.0, 1.0, 0.0],
...                        [2.0, 7.0, 1.0],
...                        [0.0, 8.0, 8.0],
...                        [1.0, 0.0, 1.0],
...                        [3.0, 0.0, 9.0]])
>>> structure = TileWise(2, 0.34)
>>> structure.mask(scores).int()  # outputs 0, 2, 3 and 5 stay, in tiles of two; of their six pieces the best three
tensor([[1, 1, 0],
        [0, 0, 0],
        [1, 1, 0],
        [0, 0, 1],
        [0, 0, 0],
        [0, 0, 1]], dtype=torch.int32)
>>> packed = structure.pack(scores * structure.mask(scores))
>>> packed.values  # piece by piece
tensor([[9., 2.],
        [1., 7.],
        [8., 9.]])
>>> packed.columns.tolist(), packed.row_pointers.tolist(), packed.rows.tolist()
([0, 1, 2], [0, 2, 3], [[0, 2], [3, 5]])
"""

from dataclasses import dataclass
from itertools import combinations, pairwise
from math import ceil, comb, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from sparsesurvey.packing import compress_rows, entropy, expand_rows, index_dtype, tiles, top
from sparsesurvey.structure import (
    Facts, Pattern, Plan, Shape, check_activations, check_density, check_int, check_pair, check_part,
)
from sparsesurvey.structures.block import BREAK_EVEN, Panel, gather_gradient_plan, gather_plan, panel_code, scatter_plan
from sparsesurvey.structures.unstructured import PackedCSR, tiled_product, torch_csr, torch_sampled

NONE = -1  # stored where a tile has fewer outputs than g


class PackedTW(NamedTuple):
    values: Tensor  # [pieces, g], tile after tile
    columns: Tensor  # [pieces], the input of each piece; int16 where there are at most 32768, else int32
    row_pointers: Tensor  # int32 [tiles + 1], where the pieces of each tile start
    rows: Tensor  # the outputs of each tile, [tiles, g], NONE where it has fewer; [0, g] where all tiles are there
    shape: Shape


@dataclass(frozen=True)
class TileWise(Pattern):
    """Outputs that keep anything form, in order, tiles of at most ``g``; of the pieces, a tile's weights of one input, at
    most ``density * out * in / g`` keep anything in all tiles together. With ``rows`` no more than so many tiles are
    there as are left when either dimension is pruned alike, sqrt(density) of them; without, all of them.

    The papers' K x N weight is [in, out]: their columns are our outputs (N) and their rows our inputs (K).
    """

    g: int = 128
    density: float = 0.5
    rows: bool = True

    def __post_init__(self) -> None:
        check_int("g", self.g, 1)
        check_density(self.density)
        if not isinstance(self.rows, bool):
            raise ValueError(f"rows must be True or False (are whole outputs pruned?), got {self.rows!r}")

    def __str__(self) -> str:
        return f"TW {self.g} {100 * self.density:g}%" + ("" if self.rows else " inputs only")

    @classmethod
    def variants(cls) -> tuple["TileWise", ...]:
        return cls(), cls(128, 0.25), cls(16, 0.5), cls(16, 0.25), cls(32, 0.25), cls(16, 0.5, False), cls(128, 0.5, False)

    @property
    def tile(self) -> Shape:
        return (self.g, 1)

    def facts(self) -> Facts:
        share = sqrt(self.density) if self.rows else self.density  # of the pieces of the tiles that are there
        positions = self.density / share * entropy(share) / self.g  # that of the outputs is too little to count
        left = f"at most {self.g} outputs" if self.rows else "{rows} outputs"
        kept = f"in this tile of {left} input {{col}} is kept for all of them"
        gone = f"either output {{row}} went as a whole, or its tile of {left} keeps nothing of input {{col}}"
        return Facts(*tile_facts(self.g, self.density), positions, kept, gone, gone)

    def pieces(self, shape: Shape) -> int:
        """How many pieces of g weights are kept."""
        out, inn = self.check_shape(shape)
        return round(self.density * (out // self.g * inn))

    def count(self, shape: Shape) -> int:
        """How many tiles there are: whole ones, and enough for the pieces."""
        out, inn = self.check_shape(shape)
        if not self.rows:
            return out // self.g
        return min(out // self.g, max(1, round(sqrt(self.density) * out / self.g), ceil(self.pieces(shape) / inn)))

    def nnz(self, shape: Shape) -> int:
        return self.pieces(shape) * self.g

    def holds(self, mask: Tensor) -> bool:
        return self.grouping(self.check_mask(mask)) is not None

    def grouping(self, mask: Tensor) -> Tensor | None:
        """The outputs of each tile, int64 ``[tiles, g]`` with NONE where it has fewer; None if the mask is no member.

        Full tiles in order where that does; else, since a member may have lost outputs, the cuts with the fewest pieces.
        """
        out, count, used = mask.shape[0], self.count(mask.shape), mask.any(1).nonzero().flatten()
        if not self.rows:
            found = torch.arange(out, device=mask.device).view(count, self.g)
        elif len(used) > count * self.g:
            return None
        else:
            found = torch.nn.functional.pad(used, (0, count * self.g - len(used)), value=NONE).view(count, self.g)
        if self.rows and int(gathered(mask, found).any(1).sum()) > self.pieces(mask.shape):
            found = used.new_full((count, self.g), NONE)
            for tile, (start, stop) in enumerate(cheapest_cuts(mask[used], count, self.g)):
                found[tile, : stop - start] = used[start:stop]
        return found if int(gathered(mask, found).any(1).sum()) <= self.pieces(mask.shape) else None

    def select(self, scores: Tensor) -> Tensor:
        """The papers' two steps, greedy: the outputs with the highest sums of scores, then the best pieces of their tiles.

        Theirs rank by the norm over the length, which is the same up to the norm, since here no tile is short.
        """
        if not self.rows:
            kept = top(self.sums(scores).flatten(), self.pieces(scores.shape)).view(-1, scores.shape[1])
            return kept.repeat_interleave(self.g, 0)
        wide, size = torch.promote_types(scores.dtype, torch.float32), self.count(scores.shape) * self.g
        rows = first(top(scores.sum(1, dtype=wide), size), size)
        kept = top(self.sums(scores[rows]).flatten(), self.pieces(scores.shape)).view(-1, scores.shape[1])
        mask = torch.zeros_like(scores, dtype=torch.bool)
        return mask.index_copy(0, rows, kept.repeat_interleave(self.g, 0))

    def sums(self, scores: Tensor) -> Tensor:
        """Sum of the scores of every piece, ``[tiles, in]``."""
        wide = torch.promote_types(scores.dtype, torch.float32)
        return tiles(scores, self.g, 1).sum((-2, -1), dtype=wide)

    def exhaustive(self, scores: Tensor) -> Tensor:
        """The best mask of full tiles, by trying all sets of outputs; for a small matrix only."""
        out, size = self.check_scores(scores).shape[0], self.count(scores.shape) * self.g
        if not self.rows:
            return self.select(scores)
        if comb(out, size) > 100_000:
            raise ValueError(f"scores must have few outputs to try all sets of {size}, got {list(scores.shape)}")
        sets = torch.tensor(list(combinations(range(out), size)))
        sums = scores[sets].unflatten(1, (-1, self.g)).sum(2).flatten(1)  # [sets, tiles * in]
        best = sets[sums.topk(self.pieces(scores.shape)).values.sum(1).argmax()]
        kept = top(self.sums(scores[best]).flatten(), self.pieces(scores.shape)).view(-1, scores.shape[1])
        return torch.zeros_like(scores, dtype=torch.bool).index_copy(0, best, kept.repeat_interleave(self.g, 0))

    def index_bits(self, shape: Shape) -> int:
        out, inn = self.check_shape(shape)
        rows = self.count(shape) * self.g * index_dtype(out).itemsize if self.rows else 0
        return 8 * (self.pieces(shape) * index_dtype(inn).itemsize + 4 * (self.count(shape) + 1) + rows)

    def pack(self, weight: Tensor) -> PackedTW:
        rows = self.grouping(self.check_member(weight) != 0)
        used = gathered(weight.detach() != 0, rows).any(1)
        return self.store(weight, rows, top(used.flatten().float(), self.pieces(weight.shape)).view(used.shape))

    def store(self, weight: Tensor, rows: Tensor, kept: Tensor) -> PackedTW:
        """The pieces that ``kept``, bool ``[tiles, in]``, names, of tiles with these outputs ``[tiles, g]``."""
        stored = rows.to(index_dtype(len(weight)))[: len(rows) * self.rows]
        values = gathered(weight.detach(), rows).mT[kept]
        return PackedTW(values, *compress_rows(kept), stored, self.check_shape(weight.shape))

    def places(self, packed: PackedTW) -> tuple[Tensor, Tensor, Tensor]:
        """Tile and input of each piece, and the outputs of each tile as ``grouping``; ValueError if corrupt."""
        out, inn = self.check_shape(packed.shape)
        count = self.count(packed.shape)
        check_part("values", packed.values, None, (self.pieces(packed.shape), self.g))
        check_part("columns", packed.columns, index_dtype(inn), packed.values.shape[:1])
        check_part("rows", packed.rows, index_dtype(out), (count * self.rows, self.g))
        tile, column = expand_rows(packed.columns, packed.row_pointers, count, inn)
        if not self.rows:
            return tile, column, torch.arange(out, device=tile.device).view(count, self.g)
        rows = packed.rows.long()
        there = rows[rows != NONE]
        if (there < 0).any() or (there >= out).any() or (there.diff() <= 0).any():
            raise ValueError(f"packed.rows must rise strictly and stay from 0 to {out - 1}, or be {NONE} for none")
        return tile, column, rows

    def unpack(self, packed: PackedTW) -> Tensor:
        tile, column, rows = self.places(packed)
        out, inn = packed.shape
        weight = packed.values.new_zeros(out + 1, inn)  # what belongs to no output ends in the last line
        weight[rows[tile], column.unsqueeze(-1)] = packed.values
        return weight[:out].clone()

    # A list of dense products, one a tile: its own inputs are gathered and its own outputs written.

    def panels(self, packed: PackedTW) -> tuple[list[Panel], Shape, Tensor]:
        """Each tile's inputs and dense weight, the grid of pieces, and their values as vectors: what a plan needs."""
        tile, column, rows = self.places(packed)
        weights = packed.values.detach().masked_fill((rows == NONE)[tile], 0)
        bounds = pairwise(packed.row_pointers.tolist())
        found = [Panel(column[start:stop], weights[start:stop]) for start, stop in bounds]
        return found, (len(rows), packed.shape[1]), packed.values.unsqueeze(-1)

    def spmm_gather(self, packed: PackedTW) -> Plan:
        return self.written(gather_plan(*self.panels(packed)), packed)

    def spmmt_gather(self, packed: PackedTW) -> Plan:
        return self.taken(scatter_plan(*self.panels(packed)), packed)

    def sddmm_gather(self, packed: PackedTW) -> Plan:
        return self.sampled(gather_gradient_plan(*self.panels(packed)), packed)

    # On a GPU the same on dense tensor cores (kernels/panel.py).

    def spmm_triton(self, packed: PackedTW) -> Plan:
        return self.written(panel_code().gather_plan(*self.panels(packed)), packed)

    def spmmt_triton(self, packed: PackedTW) -> Plan:
        return self.taken(panel_code().spread_plan(*self.panels(packed)), packed)

    def spmmt_triton_scatter(self, packed: PackedTW) -> Plan:
        return self.taken(panel_code().scatter_plan(*self.panels(packed)), packed)

    def sddmm_triton(self, packed: PackedTW) -> Plan:
        return self.sampled(panel_code().sample_plan(*self.panels(packed)), packed)

    # The panels' products are of the tiles' outputs side by side, [tokens, tiles * g].

    def written(self, run: Plan, packed: PackedTW) -> Plan:
        """A plan for the tiles' outputs, as one that writes them where they belong."""
        if not self.rows:
            return run
        rows = self.places(packed)[2].flatten()
        slots = (rows != NONE).nonzero().flatten()

        def spread(x: Tensor) -> Tensor:
            compact = run(x)  # [tokens, tiles * g]
            compact = compact if len(slots) == len(rows) else compact[:, slots]
            return compact.new_zeros(len(x), packed.shape[0]).index_copy_(1, rows[slots], compact)

        return spread

    def taken(self, run: Plan, packed: PackedTW) -> Plan:
        """A plan of the tiles' outputs, as one that takes them from all."""
        if not self.rows:
            return run
        rows = self.places(packed)[2].flatten().clamp(min=0)
        return lambda dy: run(check_activations("dy", dy, packed.shape[0], packed.values).index_select(1, rows))

    def sampled(self, product: Plan, packed: PackedTW) -> Plan:
        """A plan of the pieces' gradients from the tiles' outputs, as one that takes them from all."""
        tile, _, rows = self.places(packed)
        nowhere = (rows == NONE)[tile]

        def run(dy: Tensor, x: Tensor) -> Tensor:
            dy, x = check_pair(dy, x, packed.shape, packed.values)
            compact = dy.index_select(1, rows.flatten().clamp(min=0)) if self.rows else dy
            return product(compact, x).squeeze(-1).masked_fill_(nowhere, 0)

        return run


class PackedTEW(NamedTuple):
    values: Tensor  # [nnz]: the weights of the pieces, then the single ones
    pieces: PackedTW  # without values of its own
    single: PackedCSR  # without values of its own
    shape: Shape


@dataclass(frozen=True)
class TEW(Pattern):
    """Pieces of g weights as in ``TileWise(g, density - delta, rows=False)`` and a share ``delta`` of single weights."""

    g: int = 128
    density: float = 0.5
    delta: float = 0.05

    def __post_init__(self) -> None:
        check_int("g", self.g, 1)
        check_density(self.density)
        check_density(self.delta, "delta")
        if self.delta >= self.density:
            raise ValueError(f"delta must be below the density, {self.density}, got {self.delta!r}")

    def __str__(self) -> str:
        return f"TW {self.g} {100 * (self.density - self.delta):g}%+{100 * self.delta:g}%"

    @classmethod
    def variants(cls) -> tuple["TEW", ...]:
        return cls(), cls(16, 0.5), cls(16, 0.25), cls(32, 0.1, 0.01)

    @property
    def tile(self) -> Shape:
        return (self.g, 1)

    @property
    def tilewise(self) -> TileWise:
        """The structure of the pieces."""
        return TileWise(self.g, self.density - self.delta, rows=False)

    def facts(self) -> Facts:
        share = self.density - self.delta
        positions = entropy(share) / self.g + (1 - share) * entropy(self.delta / (1 - share))
        verdict, hardware, arithmetic = tile_facts(self.g, share)
        hardware += (f" The {100 * self.delta:g} % of single weights need a second kernel, on ordinary CUDA cores, that adds "
                     "to the same result: its time is not in the curve and is not small.")
        kept = "either all {rows} outputs of this tile keep input {col}, or this weight is one of the single ones: " \
            "number {rank_all} of {total} by magnitude"
        gone = "input {col} keeps {kept} of its {rows} weights in this tile; this one is number {rank_all} of {total}"
        return Facts(f"{verdict}, and a second kernel", hardware, arithmetic, positions, kept, gone, gone)

    def singles(self, shape: Shape) -> int:
        """How many single weights are kept beside the pieces."""
        size = shape[0] * shape[1]
        return min(round(self.delta * size), size - self.tilewise.nnz(shape))

    def nnz(self, shape: Shape) -> int:
        return self.tilewise.nnz(self.check_shape(shape)) + self.singles(shape)

    def holds(self, mask: Tensor) -> bool:
        inside = tiles(self.check_mask(mask), self.g, 1).sum((-2, -1)).flatten()
        covered = inside.topk(self.tilewise.pieces(mask.shape)).values.sum()
        return int(inside.sum() - covered) <= self.singles(mask.shape)

    def select(self, scores: Tensor) -> Tensor:
        """The best pieces, then the best weights outside them: greedy, as a piece may be chosen for a weight of its own."""
        pieces = self.tilewise.select(scores)
        rest = scores.masked_fill(pieces, -torch.inf).flatten()
        return pieces | top(rest, self.singles(scores.shape)).view(scores.shape)

    def index_bits(self, shape: Shape) -> int:
        out, inn = self.check_shape(shape)
        return self.tilewise.index_bits(shape) + 8 * (self.singles(shape) * index_dtype(inn).itemsize + 4 * (out + 1))

    def pack(self, weight: Tensor) -> PackedTEW:
        kept, inner = self.check_member(weight) != 0, self.tilewise
        inside = tiles(kept, self.g, 1).sum((-2, -1))  # [tiles, in]
        pieces = top(inside.flatten().float(), inner.pieces(weight.shape)).view(inside.shape)
        rest = kept.float().masked_fill(pieces.repeat_interleave(self.g, 0), -1)
        single = top(rest.flatten(), self.singles(weight.shape)).view(kept.shape)
        tiled = inner.store(weight, inner.grouping(torch.zeros_like(kept)), pieces)
        values = torch.cat([tiled.values.flatten(), weight.detach()[single]])
        rest = PackedCSR(None, *compress_rows(single), tiled.shape)
        return PackedTEW(values, tiled._replace(values=None), rest, tiled.shape)

    def parts(self, packed: PackedTEW) -> tuple[PackedTW, PackedCSR]:
        """Both operands with their values; ValueError if they are corrupt or hold a weight twice."""
        shape = self.check_shape(packed.shape)
        many = self.tilewise.nnz(shape)
        check_part("values", packed.values, None, (self.nnz(shape),))
        pieces = PackedTW(packed.values[:many].view(-1, self.g), *packed.pieces[1:4], shape)
        single = PackedCSR(packed.values[many:], *packed.single[1:3], shape)
        check_part("columns", single.columns, index_dtype(shape[1]), single.values.shape)
        row, column = expand_rows(single.columns, single.row_pointers, *shape)
        tile, input_, _ = self.tilewise.places(pieces)
        held = torch.zeros(shape[0] // self.g, shape[1], dtype=torch.bool, device=tile.device)
        held[tile, input_] = True
        if held[row // self.g, column].any():
            raise ValueError("packed.single must name no weight that packed.pieces holds")
        return pieces, single

    def unpack(self, packed: PackedTEW) -> Tensor:
        pieces, single = self.parts(packed)
        weight = self.tilewise.unpack(pieces)
        weight[expand_rows(single.columns, single.row_pointers, *packed.shape)] = single.values
        return weight

    # Two products that add up: the tiles as in TileWise, the single weights with a library's CSR.

    def spmm_gather(self, packed: PackedTEW) -> Plan:
        pieces, single = self.parts(packed)
        tiled, rest = self.tilewise.spmm_gather(pieces), tiled_product("x", torch_csr(single))
        return lambda x: tiled(x).add_(rest(x))

    def spmmt_gather(self, packed: PackedTEW) -> Plan:
        pieces, single = self.parts(packed)
        tiled, rest = self.tilewise.spmmt_gather(pieces), tiled_product("dy", torch_csr(single.transposed()))
        return lambda dy: tiled(dy).add_(rest(dy))

    def sddmm_gather(self, packed: PackedTEW) -> Plan:
        pieces, single = self.parts(packed)
        tiled, rest = self.tilewise.sddmm_gather(pieces), torch_sampled(torch_csr(single))
        return lambda dy, x: torch.cat([tiled(dy, x).flatten(), rest(dy, x)])


# ---- what they share, and TVW with them


def tile_facts(g: int, density: float) -> tuple[str, str, float]:
    """Verdict, words and arithmetic of dense tiles of g outputs over their own inputs."""
    arithmetic = min(1.0, density * max(1.0, 8 / g))
    height = max((height for height in BREAK_EVEN if height <= g), default=None)
    if height is None:
        hardware = f"An instruction takes 8 outputs that share their inputs; tiles of {g} fill it only in part."
        return "tiles too low", hardware, arithmetic
    low, high = BREAK_EVEN[height]
    verdict = "gathered, then dense tensor cores" if 100 * (1 - density) >= low else "tiles too low for this density"
    return verdict, (
        f"Every tile gathers its own inputs and is a dense product. An activation that is fetched serves the {g} outputs of "
        f"the tile only: with many tokens, expect a gain on an H200 above {low} to {high} % sparsity (estimate, not in the "
        "curve)."
    ), arithmetic


def first(kept: Tensor, size: int) -> Tensor:
    """The places of the True entries of the last axis in order, then those of the others: the first ``size``, int64."""
    return kept.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :size]


def gathered(matrix: Tensor, rows: Tensor) -> Tensor:
    """Lines ``[tiles, g]`` of a matrix ``[out, in]`` as ``[tiles, g, in]``, zeros for NONE."""
    return torch.cat([matrix, matrix.new_zeros(1, matrix.shape[1])])[rows]


def cheapest_cuts(mask: Tensor, count: int, g: int) -> list[tuple[int, int]]:
    """The ``[rows, in]`` of a mask cut in at most ``count`` tiles of at most ``g`` rows with the fewest pieces: start, stop.

    A dynamic programme over where tiles end. The union of rows i-k to i has the columns last used at most k rows ago.
    """
    rows, device = len(mask), mask.device
    line = torch.arange(rows, device=device).unsqueeze(1)
    age = (line - torch.where(mask, line, -g).cummax(0).values).clamp(max=g)
    union = age.new_zeros(rows, g + 1).scatter_add_(1, age, torch.ones_like(age))[:, :g].cumsum(1)
    far = torch.iinfo(torch.int64).max // 2
    cost = torch.full((rows + 1,), far, device=device)
    cost[0] = 0
    taken = []
    for _ in range(count):
        before = torch.nn.functional.pad(cost, (g, 0), value=far).unfold(0, g, 1)[1 : rows + 1].flip(1)
        best, length = (before + union).min(1)
        better = best < cost[1:]
        taken.append(torch.where(better, length + 1, 0).tolist())  # rows of the last tile; 0: fewer tiles are as good
        cost = torch.cat([cost[:1], torch.where(better, best, cost[1:])])
    cuts, stop = [], rows
    for lengths in reversed(taken):
        length = lengths[stop - 1] if stop else 0
        cuts += [(stop - length, stop)] * (length > 0)
        stop -= length
    return cuts[::-1]
