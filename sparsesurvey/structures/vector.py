"""Vector-wise N:M (NM-SpMM, Ma et al. 2025): v outputs that follow each other use the same n of every m inputs.

>>> scores = torch.tensor([[9.0, 1.0, 5.0, 0.0],
...                        [0.0, 4.0, 6.0, 1.0]])
>>> structure = VectorNM(2, 2, 4)
>>> structure.mask(scores).int()  # the columns' sums are 9, 5, 11 and 1
tensor([[1, 0, 1, 0],
        [1, 0, 1, 0]], dtype=torch.int32)
>>> packed = structure.pack(scores * structure.mask(scores))
>>> packed.values
tensor([[9., 5.],
        [0., 6.]])
>>> packed.index.tolist()  # of the one group of four inputs, for both outputs
[[0, 2]]
"""

from dataclasses import dataclass
from math import comb, log2
from typing import NamedTuple

import torch
from torch import Tensor

from sparsesurvey.packing import tiles, top
from sparsesurvey.structure import Facts, Pattern, Plan, Shape, check_int, check_order, check_part
from sparsesurvey.structures.block import BREAK_EVEN, Panel, gather_gradient_plan, gather_plan, panel_code, scatter_plan
from sparsesurvey.structures.nm import tensor_cores


class PackedVectorNM(NamedTuple):
    values: Tensor  # [out, w] with w = in * n / m, in the order of the inputs: the paper's B' [w, n], transposed
    index: Tensor  # uint8 [out / v, w], the input's place in its group of m: the paper's D [w, n / L], transposed
    shape: Shape


@dataclass(frozen=True)
class VectorNM(Pattern):
    """Of every ``m`` consecutive inputs at most ``n`` are used by ``v`` consecutive outputs, all of them the same.

    Every panel of v outputs has as many inputs, so that no pointers are stored, and one byte tells an input for all
    v of them: 8 / v bits a weight, which no shorter code could make much less of.
    """

    v: int = 32
    n: int = 16
    m: int = 32

    def __post_init__(self) -> None:
        check_int("v", self.v, 1)
        check_int("m", self.m, 1, 256)
        check_int("n", self.n, 1, self.m)

    def __str__(self) -> str:
        return f"vector {self.v}x{self.n}:{self.m}"

    @classmethod
    def variants(cls) -> tuple["VectorNM", ...]:
        return cls(), cls(32, 8, 32), cls(32, 4, 32), cls(16, 8, 16), cls(8, 2, 8), cls(4, 3, 5)

    @property
    def tile(self) -> Shape:
        return (self.v, self.m)

    @property
    def density(self) -> float:
        return self.n / self.m

    def facts(self) -> Facts:
        v, n, m = self.v, self.n, self.m
        why = "{rows}-row tile ({tile_row}, {tile_col}): column {col} is one of the {cols_kept} of {cols} that it keeps"
        gone = "{rows}-row tile ({tile_row}, {tile_col}): column {col} is none of the {cols_kept} of {cols} that it " \
            "keeps"
        positions, arithmetic = log2(comb(m, n)) / (v * m), min(1.0, n / m * max(1.0, 8 / v))
        verdict, hardware, plain = tensor_cores(n, m)
        if n == m or plain < arithmetic:  # too low to gather for: what the rows are by themselves
            return Facts(verdict, hardware, plain, positions, why, gone, why, 1.0, 1.0)
        height = max((height for height in BREAK_EVEN if height <= v), default=None)
        if height is None:
            hardware = f"An instruction takes 8 outputs that share their inputs; panels of {v} fill it only in part."
            return Facts("panels too low", hardware, arithmetic, positions, why, gone, why)
        low, high = BREAK_EVEN[height]
        hardware = (
            f"The kept inputs of a panel of {v} outputs are gathered, and dense tensor cores multiply them. But an "
            f"activation that is fetched serves only these {v}: with many tokens, expect a gain on an H200 above {low} to {high} % "
            "sparsity (estimate, not in the curve). The public kernel, NM-SpMM, runs on CUDA cores in single precision."
        )
        verdict = "gathered, then dense tensor cores" if 100 * (1 - n / m) >= low else "panels too low for this density"
        return Facts(verdict, hardware, arithmetic, positions, why, gone, why)

    def holds(self, mask: Tensor) -> bool:
        return bool((tiles(self.check_mask(mask), self.v, self.m).any(-2).sum(-1) <= self.n).all())

    def select(self, scores: Tensor) -> Tensor:
        """The n inputs of every group with the highest sums over the panel, which is optimal: groups are independent."""
        kept = top(self.sums(scores), self.n)  # [out / v, in / m, m]
        return kept.flatten(1).repeat_interleave(self.v, 0)

    def sums(self, scores: Tensor) -> Tensor:
        """Scores ``[out, in]`` summed over the outputs of each panel: ``[out / v, in / m, m]``."""
        wide = torch.promote_types(scores.dtype, torch.float32)
        return tiles(scores, self.v, self.m).sum(-2, dtype=wide)

    def width(self, shape: Shape) -> int:
        """How many inputs a panel keeps."""
        return self.check_shape(shape)[1] // self.m * self.n

    def nnz(self, shape: Shape) -> int:
        return shape[0] * self.width(shape)

    def index_bits(self, shape: Shape) -> int:
        return 8 * self.width(shape) * (shape[0] // self.v)

    def pack(self, weight: Tensor) -> PackedVectorNM:
        kept = self.stored(weight)[:: self.v].reshape(-1, self.m)  # one line a group
        index = kept.nonzero()[:, 1].view(-1, self.width(weight.shape))
        values = weight.gather(1, self.inputs(index).repeat_interleave(self.v, 0))
        return PackedVectorNM(values, index.to(torch.uint8), self.check_shape(weight.shape))

    def stored(self, weight: Tensor) -> Tensor:
        """Mask of what is stored: n inputs of every group, those that any output of the panel uses among them."""
        return self.select((self.check_member(weight) != 0).float())

    def inputs(self, index: Tensor) -> Tensor:
        """Places in the groups ``[panels, w]`` as places in a row, int64 and rising."""
        first = torch.arange(index.shape[1], device=index.device) // self.n * self.m
        return index.long() + first

    def places(self, packed: PackedVectorNM) -> Tensor:
        """The inputs that each panel keeps, int64 ``[out / v, w]``; ValueError if the operand is corrupt."""
        out, width = packed.shape[0], self.width(packed.shape)
        check_part("values", packed.values, None, (out, width))
        check_part("index", packed.index, torch.uint8, (out // self.v, width))
        check_order("index", packed.index.view(-1, width // self.n, self.n), self.m)
        return self.inputs(packed.index)

    def unpack(self, packed: PackedVectorNM) -> Tensor:
        inputs = self.places(packed).repeat_interleave(self.v, 0)
        return packed.values.new_zeros(packed.shape).scatter_(1, inputs, packed.values)

    # On a CPU one dense product a panel, of the inputs that it keeps; no value is skipped and none is multiplied in vain.

    def panels(self, packed: PackedVectorNM) -> list[Panel]:
        """Each panel as one dense matrix ``[w, v]`` beside the inputs that it is made of."""
        inputs = self.places(packed)
        weights = packed.values.detach().view(-1, self.v, inputs.shape[1]).mT.contiguous()
        return [Panel(*parts) for parts in zip(inputs, weights)]

    def outlines(self, packed: PackedVectorNM) -> tuple[Shape, Tensor]:
        """The grid of vectors, and the values as one v x 1 vector a line: what the plans for panels want to know."""
        return (packed.shape[0] // self.v, packed.shape[1]), packed.values.view(-1, self.v, 1)

    def spmm_gather(self, packed: PackedVectorNM) -> Plan:
        return gather_plan(self.panels(packed), *self.outlines(packed))

    def spmmt_gather(self, packed: PackedVectorNM) -> Plan:
        return scatter_plan(self.panels(packed), *self.outlines(packed))

    def sddmm_gather(self, packed: PackedVectorNM) -> Plan:
        return self.in_rows(gather_gradient_plan(self.panels(packed), *self.outlines(packed)), packed)

    def in_rows(self, run: Plan, packed: PackedVectorNM) -> Plan:
        """A plan that gives the gradient of one vector a line, as one of the gradient of the values."""
        panels, width = packed.index.shape
        return lambda dy, x: run(dy, x).view(panels, width, self.v).mT.reshape(packed.values.shape)

    # On a GPU the same on dense tensor cores (kernels/panel.py).

    def spmm_triton(self, packed: PackedVectorNM) -> Plan:
        return panel_code().gather_plan(self.panels(packed), *self.outlines(packed))

    def spmmt_triton(self, packed: PackedVectorNM) -> Plan:
        return panel_code().spread_plan(self.panels(packed), *self.outlines(packed))

    def spmmt_triton_scatter(self, packed: PackedVectorNM) -> Plan:
        return panel_code().scatter_plan(self.panels(packed), *self.outlines(packed))

    def sddmm_triton(self, packed: PackedVectorNM) -> Plan:
        return self.in_rows(panel_code().sample_plan(self.panels(packed), *self.outlines(packed)), packed)


def arithmetic_intensity(rows: int, outs: int, inputs: int, width: int, used: int, itemsize: int = 4,
                         v: int = 32) -> float:
    """FLOP per byte that a thread block of NM-SpMM moves from memory, for its tile of the product.

    AI = 2 Ms Ns w / (Ms Ks + Ns w + index), with Ms = ``rows`` tokens, Ns = ``outs`` outputs, ``width`` = w kept of Ks =
    ``inputs`` inputs, and a byte for each of the w * Ns / v places. ``used`` inputs are loaded for each token: all of
    Ks, or only the union of those that the panels of the tile keep (the paper's packing at high sparsity).
    """
    for name, value in (("rows", rows), ("outs", outs), ("inputs", inputs), ("itemsize", itemsize), ("v", v)):
        check_int(name, value, 1)
    check_int("width", width, 1, inputs)
    check_int("used", used, 1, inputs)
    moved = itemsize * (rows * used + outs * width) + width * outs / v
    return 2 * rows * outs * width / moved
