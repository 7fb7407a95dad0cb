"""TVW, tile-wise with 2:4 inside (Guo et al. 2024): each tile of g outputs picks its inputs, and 2:4 prunes what is left.

>>> scores = torch.tensor([[9.0, 1.0, 5.0, 0.0, 4.0, 0.0, 8.0, 0.0],
...                        [0.0, 1.0, 8.0, 0.0, 7.0, 3.0, 6.0, 1.0]])
>>> structure = TVW(2, 0.25)
>>> structure.mask(scores).int()  # the sums are 9 2 13 0 11 3 14 1: inputs 0, 2, 4 and 6 stay, and 2:4 takes them as four
tensor([[1, 0, 0, 0, 0, 0, 1, 0],
        [0, 0, 1, 0, 1, 0, 0, 0]], dtype=torch.int32)
>>> packed = structure.pack(scores * structure.mask(scores))
>>> packed.values
tensor([[[9., 8.],
         [8., 7.]]])
>>> packed.columns.tolist(), packed.row_pointers.tolist()  # one quad of inputs, in the only tile
([[0, 2, 4, 6]], [0, 1])
>>> [f"{byte:08b}" for byte in packed.index.flatten().tolist()]  # from the right: the first and fourth, second and third
['10011100']
"""

from dataclasses import dataclass
from itertools import pairwise
from math import ceil, comb, log2
from typing import NamedTuple

import torch
from torch import Tensor

from sparsesurvey.packing import entropy, index_dtype, top
from sparsesurvey.structure import Facts, Pattern, Plan, Shape, check_density, check_int, check_part
from sparsesurvey.structures.block import Panel, gather_gradient_plan, gather_plan, panel_code, scatter_plan
from sparsesurvey.structures.nm import NM, PackedNM
from sparsesurvey.structures.tilewise import NONE, first, tile_facts

QUAD = 4  # inputs of a tile that follow each other once it is compacted, of which 2:4 keeps two in each row


class PackedTVW(NamedTuple):
    values: Tensor  # [quads, g, 2], tile after tile
    index: Tensor  # uint8 [quads, bytes]: the 2:4 code of each quad's g rows
    columns: Tensor  # [quads, 4], the inputs of each quad, NONE where it has fewer; int16 or int32
    row_pointers: Tensor  # int32 [tiles + 1], where the quads of each tile start
    shape: Shape


@dataclass(frozen=True)
class TVW(Pattern):
    """The inputs that a tile of ``g`` outputs uses are split, in order, in quads of at most four of which each output
    keeps at most two; there are at most ``2 * density * out * in / 4g`` quads in all tiles together.

    That is tile-wise at twice the density, with all tiles there, and then 2:4 along the inputs that are left of each.
    """

    g: int = 128
    density: float = 0.25

    def __post_init__(self) -> None:
        check_int("g", self.g, 1)
        check_density(self.density)
        if self.density > 0.5:
            raise ValueError(f"density must be at most 0.5, that of 2:4 alone, got {self.density!r}")

    def __str__(self) -> str:
        return f"TW {self.g} {100 * self.density:g}% 2:4"

    @classmethod
    def variants(cls) -> tuple["TVW", ...]:
        return cls(), cls(16, 0.25), cls(16, 0.4), cls(32, 0.1), cls(128, 0.1)

    @property
    def tile(self) -> Shape:
        return (self.g, QUAD)

    @property
    def inner(self) -> NM:
        """The structure of a quad's rows."""
        return NM(2, QUAD)

    def facts(self) -> Facts:
        double = 2 * self.density
        positions = entropy(double) / self.g + double * log2(comb(QUAD, 2)) / QUAD
        height = max(1.0, 16 / self.g)  # sparse tensor cores take 16 rows that share their inputs
        hardware = tile_facts(self.g, double)[1]
        hardware += " Inside the tile sparse tensor cores halve what is left of the forward product."
        why = "of the inputs that this tile of {rows} outputs keeps, in fours, output {row} keeps two each"
        gone = "either this tile of {rows} outputs keeps nothing of input {col}, or output {row} has two larger ones in " \
            "its four"
        grad = min(1.0, double * max(1.0, 8 / self.g))
        return Facts("gathered, then sparse tensor cores", hardware, min(1.0, grad, self.density * height), positions, why,
                     gone, gone, grad, grad)

    def quads(self, shape: Shape) -> int:
        """How many quads are kept."""
        out, inn = self.check_shape(shape)
        return max(1, round(2 * self.density * (out // self.g * (inn // QUAD))))

    def nnz(self, shape: Shape) -> int:
        return self.quads(shape) * self.g * 2

    def holds(self, mask: Tensor) -> bool:
        numbers = quad_numbers(self.tiled(self.check_mask(mask)))
        return int((numbers.amax(1) + 1).sum()) <= self.quads(mask.shape)

    def tiled(self, matrix: Tensor) -> Tensor:
        """``[out, in]`` as ``[tiles, g, in]``."""
        return matrix.unflatten(0, (-1, self.g))

    def select(self, scores: Tensor) -> Tensor:
        """Greedy as in the paper: whole pieces by their sums, in fours so that a tile keeps a multiple of four, then 2:4.

        A tile's pieces by falling sum, four at a time, are worth less and less: the best fours of all tiles are the best
        choice of pieces.
        """
        tiled = self.tiled(scores)  # [tiles, g, in]
        count, _, inn = tiled.shape
        sums = tiled.sum(1, dtype=torch.promote_types(scores.dtype, torch.float32))
        falling, order = sums.sort(dim=1, descending=True, stable=True)
        fours = top(falling.unflatten(1, (-1, QUAD)).sum(2).flatten(), self.quads(scores.shape)).view(count, -1)
        kept = torch.zeros_like(sums, dtype=torch.bool).scatter(1, order, fours.repeat_interleave(QUAD, 1))
        compact = first(kept, inn).unsqueeze(1).expand_as(tiled)  # the tile's own inputs first, in order
        best = top(tiled.gather(2, compact).unflatten(2, (-1, QUAD)), 2).flatten(2)
        mask = torch.zeros_like(tiled, dtype=torch.bool).scatter(2, compact, best)
        return (mask & kept.unsqueeze(1)).flatten(0, 1)

    def index_bits(self, shape: Shape) -> int:
        out, inn = self.check_shape(shape)
        quads = self.quads(shape)
        code = self.inner.index_bits((quads, QUAD * self.g))
        return code + 8 * (quads * QUAD * index_dtype(inn).itemsize + 4 * (out // self.g + 1))

    def pack(self, weight: Tensor) -> PackedTVW:
        tiled = self.tiled(self.check_member(weight).detach())
        numbers, quads = quad_numbers(tiled != 0), self.quads(weight.shape)  # [tiles, in]
        per_tile = numbers.amax(1) + 1
        per_tile[-1] += quads - per_tile.sum()  # those to spare are empty
        pointers = torch.nn.functional.pad(per_tile.cumsum(0), (1, 0))
        tile, column = (numbers != NONE).nonzero().unbind(1)
        quad = pointers[tile] + numbers[tile, column]
        slot = torch.arange(len(quad), device=quad.device) - torch.searchsorted(quad, quad)
        columns = column.new_full((quads, QUAD), NONE).index_put_((quad, slot), column)
        compact = tiled.new_zeros(quads, QUAD, self.g).index_put_((quad, slot), tiled.mT[tile, column])
        inner = self.inner.pack(compact.mT.flatten(1))
        values = inner.values.view(quads, self.g, 2)
        columns = columns.to(index_dtype(weight.shape[1]))
        return PackedTVW(values, inner.index, columns, pointers.int(), tuple(weight.shape))

    def places(self, packed: PackedTVW) -> tuple[Tensor, Tensor]:
        """Tile ``[quads]`` and inputs ``[quads, 4]`` of every quad, NONE where there is none; ValueError if corrupt."""
        out, inn = self.check_shape(packed.shape)
        quads, pointers = self.quads(packed.shape), packed.row_pointers
        check_part("columns", packed.columns, index_dtype(inn), (quads, QUAD))
        check_part("row_pointers", pointers, torch.int32, (out // self.g + 1,))
        counts = pointers.long().diff()
        if pointers[0] != 0 or pointers[-1] != quads or (counts < 0).any():
            raise ValueError(f"packed.row_pointers must rise from 0 to {quads}, the number of quads")
        tile = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
        columns = packed.columns.long()
        there, of = columns[columns != NONE], tile.repeat_interleave((columns != NONE).sum(1))
        if (there < 0).any() or (there >= inn).any() or ((there.diff() <= 0) & (of.diff() == 0)).any():
            raise ValueError(f"packed.columns must rise strictly in each tile and stay from 0 to {inn - 1}, or be {NONE}")
        return tile, columns

    def compact(self, packed: PackedTVW) -> Tensor:
        """The dense weights of every quad, ``[quads, g, 4]``, zero where it has no input; ValueError if corrupt."""
        quads = self.quads(packed.shape)
        check_part("values", packed.values, None, (quads, self.g, 2))
        inner = PackedNM(packed.values.view(quads, self.g, 2), packed.index, (quads, QUAD * self.g))
        weight = self.inner.unpack(inner).view(quads, self.g, QUAD)
        return weight.masked_fill((self.places(packed)[1] == NONE).unsqueeze(1), 0)

    def unpack(self, packed: PackedTVW) -> Tensor:
        compact, (tile, columns) = self.compact(packed), self.places(packed)
        out, inn = packed.shape
        weight = compact.new_zeros(out // self.g, inn + 1, self.g)  # what belongs to no input ends in the last line
        weight[tile.unsqueeze(1), columns] = compact.mT
        return weight[:, :inn].mT.flatten(0, 1)

    # As a list of dense products again, the zeros of 2:4 among the rest: only sparse tensor cores skip those.

    def panels(self, packed: PackedTVW) -> tuple[list[Panel], Shape, Tensor]:
        """Each tile's inputs and dense weight, the grid of pieces, and the weights as vectors: what a plan needs."""
        compact, (_, columns) = self.compact(packed).detach(), self.places(packed)
        weights = compact.mT.reshape(-1, self.g)  # [4 * quads, g]
        bounds = pairwise((QUAD * packed.row_pointers).tolist())
        columns = columns.flatten().clamp(min=0)
        found = [Panel(columns[start:stop], weights[start:stop]) for start, stop in bounds]
        return found, (len(found), packed.shape[1]), weights.unsqueeze(-1)

    def spmm_gather(self, packed: PackedTVW) -> Plan:
        return gather_plan(*self.panels(packed))

    def spmmt_gather(self, packed: PackedTVW) -> Plan:
        return scatter_plan(*self.panels(packed))

    def sddmm_gather(self, packed: PackedTVW) -> Plan:
        return self.of_the_kept(gather_gradient_plan(*self.panels(packed)), packed)

    # On a GPU the same on dense tensor cores (kernels/panel.py), or without the zeros of 2:4 on sparse ones (kernels/mma_sp.py).

    def spmm_triton(self, packed: PackedTVW) -> Plan:
        return panel_code().gather_plan(*self.panels(packed))

    def spmmt_triton(self, packed: PackedTVW) -> Plan:
        return panel_code().spread_plan(*self.panels(packed))

    def spmmt_triton_scatter(self, packed: PackedTVW) -> Plan:
        return panel_code().scatter_plan(*self.panels(packed))

    def sddmm_triton(self, packed: PackedTVW) -> Plan:
        return self.of_the_kept(panel_code().sample_plan(*self.panels(packed)), packed)

    def spmm_cuda(self, packed: PackedTVW) -> Plan:
        from sparsesurvey.kernels import mma_sp

        compact = self.compact(packed)
        mma_sp.require(packed.values, 2, QUAD, self.g)
        counts = packed.row_pointers.long().diff()
        return mma_sp.product_plan(mma_sp.arrange(*mma_sp.compressed(compact), packed.columns.clamp(min=0), counts, packed.shape))

    def of_the_kept(self, run: Plan, packed: PackedTVW) -> Plan:
        """A plan of the gradients of whole quads, as one of those of the values in them."""
        quads = len(packed.values)
        code = PackedNM(packed.values, packed.index, (quads, QUAD * self.g))
        kept = self.inner.decode(code).view(quads, self.g, QUAD)
        nowhere = (self.places(packed)[1] == NONE).unsqueeze(1)

        def gradient(dy: Tensor, x: Tensor) -> Tensor:
            every = run(dy, x).view(quads, QUAD, self.g).mT.masked_fill(nowhere, 0)
            return every[kept].view(packed.values.shape)

        return gradient


def quad_numbers(mask: Tensor) -> Tensor:
    """In which quad each input of each tile is, int64 ``[tiles, in]``, rising from 0; NONE where no output uses it.

    A quad takes the inputs in use one after the other until there are four, or an output would keep a third of them: no
    split in order has fewer quads.
    """
    used = mask.any(1)
    plain = torch.where(used, (used.cumsum(1) - 1) // QUAD, NONE)  # four by four
    fits = mask.new_zeros(*mask.shape[:2], ceil(mask.shape[2] / QUAD) + 1, dtype=torch.int16)
    fits = fits.scatter_add_(2, (plain + 1).unsqueeze(1).expand_as(mask), mask.to(torch.int16)).amax((1, 2)) <= 2
    if fits.all():
        return plain
    mask, numbers = mask[~fits], []
    number, size, kept = mask.new_zeros(len(mask), dtype=torch.int64), 0, 0
    for column in mask.unbind(2):  # [tiles, g]
        full = ((kept + column.int()).amax(1) > 2) | (size + column.any(1).int() > QUAD)
        number = number + full
        size = torch.where(full, 0, size) + column.any(1).int()
        kept = torch.where(full.unsqueeze(1), 0, kept) + column.int()
        numbers.append(torch.where(column.any(1), number, NONE))
    plain[~fits] = torch.stack(numbers, 1)
    return plain
