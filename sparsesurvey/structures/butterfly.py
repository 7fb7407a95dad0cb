"""Flat block butterfly: fixed blocks at distances 0, 1, 2, 4 ... (Pixelated Butterfly, Chen et al. 2022); no index.

>>> scores = torch.arange(16.0).view(4, 4)
>>> structure = Butterfly(size=4, factors=1)
>>> structure.mask(scores).int()  # whatever the scores
tensor([[1, 1, 0, 0],
        [1, 1, 0, 0],
        [0, 0, 1, 1],
        [0, 0, 1, 1]], dtype=torch.int32)
>>> Butterfly(size=4, factors=2).layout().int()  # I + XOR 1 + XOR 2
tensor([[1, 1, 1, 0],
        [1, 1, 0, 1],
        [1, 0, 1, 1],
        [0, 1, 1, 1]], dtype=torch.int32)
>>> packed = structure.pack(scores * structure.mask(scores))
>>> packed.values.shape, packed.values.flatten().tolist()  # 4 rows of 2 blocks of 1 x 1
(torch.Size([4, 2, 1, 1]), [0.0, 1.0, 4.0, 5.0, 10.0, 11.0, 14.0, 15.0])
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparsesurvey.packing import compress_rows, tiles, untile
from sparsesurvey.structure import Facts, Pattern, Plan, Shape, check_int, check_part
from sparsesurvey.structures.block import Block, PackedBSR


class PackedButterfly(NamedTuple):
    values: Tensor  # [size, factors + 1, out / size, in / size]: the blocks of a block row from left to right
    shape: Shape


@dataclass(frozen=True)
class Butterfly(Pattern):
    """The weight is a grid of ``size`` x ``size`` blocks; block (p, q) may hold something iff p = q or p XOR q is 1, 2,
    4 ... 2 ** (factors - 1).

    The blocks are stretched: each is ``out / size`` high and ``in / size`` wide. Which are kept does not depend on the
    scores, so that nothing but values is stored. ``size`` is a power of two, ``factors`` at most its logarithm.
    """

    size: int = 16
    factors: int = 3

    def __post_init__(self) -> None:
        size = self.size
        if isinstance(size, bool) or not isinstance(size, int) or size < 2 or size & (size - 1):
            raise ValueError(f"size must be a power of two of at least 2, got {size!r}")
        check_int("factors", self.factors, 1, size.bit_length() - 1)

    def __str__(self) -> str:
        return f"butterfly {self.size} {100 * self.density:g}%"

    @classmethod
    def variants(cls) -> tuple["Butterfly", ...]:
        return cls(16, 3), cls(8, 3), cls(8, 1), cls(16, 1), cls(32, 2), cls(4, 2)

    @property
    def tile(self) -> Shape:
        return (self.size, self.size)

    @property
    def density(self) -> float:
        return (self.factors + 1) / self.size

    def facts(self) -> Facts:
        why = "row {row}: {row_kept} of {cols} kept, whatever the weights; the pattern is fixed"
        hardware = ("Dense tensor cores multiply the blocks, whose places are known before training and cost no "
                    f"memory. A block is a {self.size}th of the weight each way, large enough in a large layer; in a "
                    "small one expect what the chapter on blocks says of low blocks.")
        return Facts("dense tensor cores", hardware, self.density, 0.0, why, pruned=why)

    def layout(self, device: torch.device | str = "cpu") -> Tensor:
        """Which blocks are kept: boolean ``[size, size]``."""
        cell = torch.arange(self.size, device=device)
        distance = cell[:, None] ^ cell
        power = (distance & (distance - 1)) == 0  # 0 or a power of two
        return power & (distance < 1 << self.factors)

    def rounded(self, shape: Shape, block: int) -> Tensor:
        """Which ``block`` x ``block`` blocks of the weight hold anything: boolean ``[out / block, in / block]``.

        The released code keeps all of these, which is more than ``density`` where blocks are cut by the grid.
        """
        self.check_shape(shape)
        Block(block, block, 1.0).check_shape(shape)
        return tiles(self.spread(shape, "cpu"), block, block).any(-1).any(-1)

    def spread(self, shape: Shape, device: torch.device | str) -> Tensor:
        """The layout stretched to the weight: boolean ``[out, in]``."""
        height, width = shape[0] // self.size, shape[1] // self.size
        return self.layout(device).repeat_interleave(height, 0).repeat_interleave(width, 1)

    def holds(self, mask: Tensor) -> bool:
        """Every kept weight is in a block (p, q) with p = q or p XOR q one of the first powers of two."""
        row, column = self.check_mask(mask).nonzero().unbind(1)
        distance = (row * self.size // mask.shape[0]) ^ (column * self.size // mask.shape[1])
        return bool(torch.isin(distance, self.distances(mask.device)).all())

    def select(self, scores: Tensor) -> Tensor:
        """The one mask of exactly the density: there is nothing to choose, scores are not looked at."""
        return self.spread(tuple(scores.shape), scores.device)

    def index_bits(self, shape: Shape) -> int:
        self.check_shape(shape)
        return 0

    def distances(self, device: torch.device | str) -> Tensor:
        """What p XOR q may be: 0 and the first powers of two, ``[factors + 1]``."""
        return torch.tensor([0, *(1 << factor for factor in range(self.factors))], device=device)

    def places(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Block row and block column (int64) of every block, row by row, ``[size * (factors + 1)]`` each."""
        row = torch.arange(self.size, device=device)
        column = (row[:, None] ^ self.distances(device)).sort(1).values
        return row.repeat_interleave(self.factors + 1), column.flatten()

    def pack(self, weight: Tensor) -> PackedButterfly:
        shape = tuple(self.check_member(weight).shape)
        blocks = tiles(weight, shape[0] // self.size, shape[1] // self.size)[self.places(weight.device)]
        return PackedButterfly(blocks.unflatten(0, (self.size, self.factors + 1)), shape)

    def unpack(self, packed: PackedButterfly) -> Tensor:
        values = self.blocks(packed)
        tiled = values.new_zeros(self.size, self.size, *values.shape[1:])
        tiled[self.places(values.device)] = values
        return untile(tiled)

    def blocks(self, packed: PackedButterfly) -> Tensor:
        """All blocks row by row, ``[size * (factors + 1), out / size, in / size]``; ValueError if they are corrupt."""
        out, inn = self.check_shape(packed.shape)
        check_part("values", packed.values, None, (self.size, self.factors + 1, out // self.size, inn // self.size))
        return packed.values.flatten(0, 1)

    # A butterfly is multiplied as what it is, blocks of one size in known places: by the kernels of ``Block``.

    def general(self, packed: PackedButterfly) -> tuple[Block, PackedBSR]:
        """The same weight as a block-sparse one."""
        values = self.blocks(packed)
        block = Block(values.shape[1], values.shape[2], self.density)
        return block, PackedBSR(values, *compress_rows(self.layout(values.device)), packed.shape)

    def spmm_gather(self, packed: PackedButterfly) -> Plan:
        block, general = self.general(packed)
        return block.spmm_gather(general)

    def spmmt_gather(self, packed: PackedButterfly) -> Plan:
        block, general = self.general(packed)
        return block.spmmt_gather(general)

    def sddmm_gather(self, packed: PackedButterfly) -> Plan:
        block, general = self.general(packed)
        run = block.sddmm_gather(general)
        return lambda dy, x: run(dy, x).view(packed.values.shape)

    def spmm_torch_bsr(self, packed: PackedButterfly) -> Plan:
        block, general = self.general(packed)
        return block.spmm_torch_bsr(general)

    def spmm_scipy_bsr(self, packed: PackedButterfly) -> Plan:
        block, general = self.general(packed)
        return block.spmm_scipy_bsr(general)
