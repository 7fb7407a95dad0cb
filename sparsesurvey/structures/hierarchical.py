"""Hierarchical pruning, HP (Qi et al. 2021): whole blocks go, then each row of a block that stays keeps equally many.

The abstract names a hierarchy and no more; what the two levels are is our reading.

>>> scores = torch.tensor([[9.0, 1.0, 1.0, 1.0],
...                        [0.0, 5.0, 3.0, 1.0],
...                        [2.0, 3.0, 0.0, 1.0],
...                        [4.0, 4.0, 6.0, 0.0]])
>>> structure = Hierarchical(block=2, blocks=0.5, keep=1)
>>> structure.mask(scores).int()  # with one weight a row the blocks would keep 14, 4, 7 and 7
tensor([[1, 0, 0, 0],
        [0, 1, 0, 0],
        [0, 1, 0, 0],
        [1, 0, 0, 0]], dtype=torch.int32)
>>> packed = structure.pack(scores * structure.mask(scores))
>>> packed.values
tensor([[[9.],
         [5.]],
<BLANKLINE>
        [[3.],
         [4.]]])
>>> packed.columns.tolist(), packed.row_pointers.tolist()  # one block in either block row, in block column 0
([0, 0], [0, 1, 2])
>>> [f"{byte:02b}" for byte in packed.index.flatten().tolist()]  # in the first block 1, 0 from the right; then 0, 1
['10', '01']
"""

from dataclasses import dataclass
from math import comb, log2
from typing import NamedTuple

import torch
from torch import Tensor

from sparsesurvey.packing import compress_rows, entropy, expand_rows, index_dtype, tiles, top, untile
from sparsesurvey.structure import Facts, Pattern, Plan, Shape, check_density, check_int, check_part
from sparsesurvey.structures.block import Block, PackedBSR
from sparsesurvey.structures.nm import NM, PackedNM
from sparsesurvey.structures.unstructured import (
    NO_PATH, PackedCSR, scipy_csr, scipy_product, tiled_product, torch_csr, torch_product, torch_sampled,
)


class PackedHierarchical(NamedTuple):
    values: Tensor  # [blocks, block, keep], block row after block row
    index: Tensor  # uint8 [blocks, bytes]: for each row of the block which columns, the keep:block code
    columns: Tensor  # [blocks], the block's column; int16 where there are at most 32768, else int32
    row_pointers: Tensor  # int32 [out / block + 1]
    shape: Shape


@dataclass(frozen=True)
class Hierarchical(Pattern):
    """At most ``round(blocks * number)`` of the ``block`` x ``block`` blocks keep anything, at most ``keep`` in each row.

    Stored is the list of the blocks, as in BSR, and for each row of a block ``keep`` weights with their columns in the
    block: ceil(log2 block) bits each, or a bitmap of ``block`` bits a row where that is shorter.
    """

    block: int = 16
    blocks: float = 0.5
    keep: int = 8

    def __post_init__(self) -> None:
        check_int("block", self.block, 1, 64)
        check_density(self.blocks, "blocks")
        check_int("keep", self.keep, 1, self.block)

    def __str__(self) -> str:
        return f"hierarchical {self.block}x{self.block} {100 * self.blocks:g}% {self.keep}:{self.block}"

    @classmethod
    def variants(cls) -> tuple["Hierarchical", ...]:
        return cls(), cls(32, 0.5, 16), cls(16, 0.5, 4), cls(16, 0.25, 8), cls(32, 0.25, 4), cls(8, 0.5, 3)

    @property
    def tile(self) -> Shape:
        return (self.block, self.block)

    @property
    def density(self) -> float:
        return self.blocks * self.keep / self.block

    @property
    def inner(self) -> NM:
        """The structure of the rows of a block."""
        return NM(self.keep, self.block)

    def grid(self, shape: Shape) -> Shape:
        """How many block rows and block columns a weight of this shape has."""
        out, inn = self.check_shape(shape)
        return out // self.block, inn // self.block

    def stay(self, shape: Shape) -> int:
        """How many blocks stay, at least one."""
        down, across = self.grid(shape)
        return max(1, round(self.blocks * down * across))

    def facts(self) -> Facts:
        size, keep = self.block, self.keep
        place = "block ({tile_row}, {tile_col}): {tiles_kept} of {tiles} blocks stay; "
        why = place + "in each of its rows " + f"{keep} of {size} weights, here " + "{row_kept}"
        positions = entropy(self.blocks) / size**2 + self.blocks * log2(comb(size, keep)) / size
        hardware = (
            "Made for an FPGA, where each row of a block gives a lane the same work. Tensor cores skip the blocks that "
            f"went and multiply the others whole, {self.blocks:g} of the arithmetic; zeros inside only save bytes."
        )
        if size < 16:
            hardware += f" And an instruction takes 8 rows by 16 columns or more: blocks of {size} fill it only in part."
        shares = min(1.0, self.blocks * max(1.0, 16 / size) * max(1.0, 8 / size))
        return Facts("blocks only" if shares < 1 else NO_PATH, hardware, shares, positions, why, pruned=why)

    def holds(self, mask: Tensor) -> bool:
        tiled = tiles(self.check_mask(mask), self.block, self.block)
        here = int(tiled.any(-1).any(-1).count_nonzero())
        return here <= self.stay(mask.shape) and bool((tiled.sum(-1, dtype=torch.uint8) <= self.keep).all())

    def select(self, scores: Tensor) -> Tensor:
        """In each row of a block the highest; then the blocks that keep most: optimal, as blocks are independent."""
        fine = self.inner.select(scores)
        return self.choose(fine, scores * fine)

    def select_by_norm(self, scores: Tensor) -> Tensor:
        """First the blocks of the highest norm, with all their weights counted, then in each row the highest."""
        return self.choose(self.inner.select(scores), scores.to(torch.promote_types(scores.dtype, torch.float32)).square())

    def choose(self, fine: Tensor, worth: Tensor) -> Tensor:
        """Of a mask ``[out, in]`` the blocks over which ``worth`` has the highest sums."""
        wide = torch.promote_types(worth.dtype, torch.float32)
        sums = tiles(worth, self.block, self.block).sum((-2, -1), dtype=wide)
        stay = top(sums.flatten(), self.stay(fine.shape)).view(sums.shape)
        return untile(tiles(fine, self.block, self.block) & stay[..., None, None])

    def nnz(self, shape: Shape) -> int:
        return self.stay(shape) * self.block * self.keep

    def index_bits(self, shape: Shape) -> int:
        (down, across), stay = self.grid(shape), self.stay(shape)
        return self.inner.index_bits((stay, self.block**2)) + stay * 8 * index_dtype(across).itemsize + 32 * (down + 1)

    def pack(self, weight: Tensor) -> PackedHierarchical:
        tiled = tiles(self.check_member(weight), self.block, self.block)
        here = tiles(self.stored(weight), self.block, self.block).any(-1).any(-1)
        inner = self.inner.pack(tiled[here].flatten(1))
        values = inner.values.view(-1, self.block, self.keep)
        return PackedHierarchical(values, inner.index, *compress_rows(here), tuple(weight.shape))

    def unpack(self, packed: PackedHierarchical) -> Tensor:
        rows, columns, blocks = self.parts(packed)
        tiled = blocks.new_zeros(*self.grid(packed.shape), self.block, self.block)
        tiled[rows, columns] = blocks
        return untile(tiled)

    def parts(self, packed: PackedHierarchical) -> tuple[Tensor, Tensor, Tensor]:
        """Block row and block column of every block that stays, and the blocks with their zeros; ValueError if corrupt."""
        (down, across), stay = self.grid(packed.shape), self.stay(packed.shape)
        check_part("values", packed.values, None, (stay, self.block, self.keep))
        check_part("columns", packed.columns, index_dtype(across), (stay,))
        rows, columns = expand_rows(packed.columns, packed.row_pointers, down, across)
        blocks = self.inner.unpack(self.fine(packed))
        return rows, columns, blocks.view(stay, self.block, self.block)

    def fine(self, packed: PackedHierarchical) -> PackedNM:
        """The rows of all blocks, one block after the other, as an operand of ``inner``."""
        values = packed.values.reshape(-1, self.block, self.keep)
        return PackedNM(values, packed.index, (len(values), self.block**2))

    # A CPU can use either level. ``gather`` multiplies the blocks that stay as dense ones, zeros included; the products of
    # CSR skip every zero and are told nothing of blocks. From about a quarter of the weights down the latter win.

    def coarse(self, packed: PackedHierarchical) -> tuple[Block, PackedBSR]:
        """The blocks with the zeros in them, as an operand of the block structure."""
        down, across = self.grid(packed.shape)
        rows, _, blocks = self.parts(packed)
        return Block(*self.tile, len(rows) / (down * across)), PackedBSR(blocks, *packed[2:])

    def general(self, packed: PackedHierarchical) -> tuple[PackedCSR, Tensor]:
        """The same weights as CSR, and for each of its entries the place in ``values``."""
        rows, columns, _ = self.parts(packed)
        down, across = self.grid(packed.shape)
        place = torch.zeros(down, across, self.block, self.block, dtype=torch.int64, device=rows.device)
        number = torch.arange(1, packed.values.numel() + 1, device=rows.device)
        place[rows, columns] = place.new_zeros(len(rows), self.block, self.block).masked_scatter(
            self.inner.decode(self.fine(packed)).view(-1, self.block, self.block), number)
        flat = untile(place)
        order = flat[flat > 0] - 1
        return PackedCSR(packed.values.flatten()[order], *compress_rows(flat > 0), packed.shape), order

    def spmm_gather(self, packed: PackedHierarchical) -> Plan:
        outer, blocks = self.coarse(packed)
        return outer.spmm_gather(blocks)

    def spmmt_gather(self, packed: PackedHierarchical) -> Plan:
        outer, blocks = self.coarse(packed)
        return outer.spmmt_gather(blocks)

    def sddmm_gather(self, packed: PackedHierarchical) -> Plan:
        outer, blocks = self.coarse(packed)
        run, kept = outer.sddmm_gather(blocks), self.inner.decode(self.fine(packed)).flatten().nonzero().flatten()
        return lambda dy, x: run(dy, x).flatten().index_select(0, kept).view(packed.values.shape)

    def spmm_torch_csr(self, packed: PackedHierarchical) -> Plan:
        return torch_product("x", torch_csr(self.general(packed)[0]))

    def spmmt_torch_csr(self, packed: PackedHierarchical) -> Plan:
        return torch_product("dy", torch_csr(self.general(packed)[0].transposed()))

    def sddmm_torch_csr(self, packed: PackedHierarchical) -> Plan:
        csr, order = self.general(packed)
        run = torch_sampled(torch_csr(csr))
        places = order.argsort()
        return lambda dy, x: run(dy, x).index_select(0, places).view(packed.values.shape)

    def spmm_tiled_csr(self, packed: PackedHierarchical) -> Plan:
        return tiled_product("x", torch_csr(self.general(packed)[0]))

    def spmmt_tiled_csr(self, packed: PackedHierarchical) -> Plan:
        return tiled_product("dy", torch_csr(self.general(packed)[0].transposed()))

    def spmm_scipy_csr(self, packed: PackedHierarchical) -> Plan:
        return scipy_product("x", scipy_csr(self.general(packed)[0]), packed.values)

    def spmmt_scipy_csr(self, packed: PackedHierarchical) -> Plan:
        return scipy_product("dy", scipy_csr(self.general(packed)[0].transposed()), packed.values)
