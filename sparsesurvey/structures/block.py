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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, prod
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsesurvey.packing import compress_rows, entropy, expand_rows, index_dtype, tiles, top, untile
from sparsesurvey.structure import (
    Facts, Pattern, Plan, Shape, Unavailable, check_activations, check_density, check_int, check_pair, check_part,
)
from sparsesurvey.structures.unstructured import (
    PackedCSR, check_library, compressed, scipy_product, scipy_sparse, torch_csr, torch_product,
)

WIDE = 32  # blocks of at least this many rows and columns are multiplied where they are, smaller ones gathered
TOKENS = 512  # multiplied at a time, so that a strip of the activations stays in a core's cache
GATHERED = 1 << 17  # activations gathered at a time, for the same reason


class PackedBSR(NamedTuple):
    values: Tensor  # [blocks, rows, cols], block row after block row
    columns: Tensor  # [blocks], the block's column; int16 where there are at most 32768, else int32
    row_pointers: Tensor  # int32 [out / rows + 1]
    shape: Shape


# Sparsity in % above which blocks so many rows high are expected to win with many tokens, from the traffic L2 -> SMEM.
BREAK_EVEN = {8: (93, 95), 16: (88, 90), 32: (78, 83), 64: (58, 68), 128: (32, 47)}


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

    def facts(self) -> Facts:
        rows, cols, density = self.rows, self.cols, self.density
        why = "block ({tile_row}, {tile_col}): {tiles_kept} of {tiles} blocks kept; this is number {rank_tile} by its Σ|w|"
        tall = max((height for height in BREAK_EVEN if height <= rows), default=None)
        positions, arithmetic = entropy(density) / (rows * cols), min(1.0, density * max(1.0, 8 / rows))
        if tall is None:
            hardware = f"An instruction takes 8 rows that share their columns; blocks {rows} high fill it only in part."
            return Facts("blocks too low", hardware, arithmetic, positions, why, pruned=why)
        low, high = BREAK_EVEN[tall]
        hardware = (
            "Dense tensor cores multiply the stored blocks and skip the rest. But an activation that is fetched serves "
            f"only the {rows} rows of a block: with many tokens, expect a gain on an H200 above {low} to {high} % sparsity "
            "(estimate, not in the curve)."
        )
        verdict = "dense tensor cores" if 100 * (1 - density) >= low else "blocks too low for this density"
        return Facts(verdict, hardware, arithmetic, positions, why, pruned=why)

    def holds(self, mask: Tensor) -> bool:
        kept = tiles(self.check_mask(mask), self.rows, self.cols).any(-2).any(-1)
        return int(kept.count_nonzero()) <= self.blocks(mask.shape)

    def select(self, scores: Tensor) -> Tensor:
        """The blocks with the highest sums of scores, which is optimal for the sum of all kept scores."""
        wide = torch.promote_types(scores.dtype, torch.float32)
        sums = tiles(scores, self.rows, self.cols).sum((-2, -1), dtype=wide)
        kept = top(sums.flatten(), self.blocks(scores.shape)).view(sums.shape)
        return kept.repeat_interleave(self.rows, 0).repeat_interleave(self.cols, 1)

    def index_bits(self, shape: Shape) -> int:
        down, across = self.grid(shape)
        return self.blocks(shape) * 8 * index_dtype(across).itemsize + 32 * (down + 1)

    def pack(self, weight: Tensor) -> PackedBSR:
        kept = tiles(self.stored(weight), self.rows, self.cols).any(-2).any(-1)
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

    # On a CPU the blocks are multiplied one BLAS call each, or one call a block row where they are narrow. Wide blocks
    # read their strip of x and write their strip of y where these lie: nothing is moved. For narrow ones the features
    # that a block row needs are gathered from a feature-major copy of x, in which each is contiguous.

    @property
    def wide(self) -> bool:
        return min(self.tile) >= WIDE

    def spmm_gather(self, packed: PackedBSR) -> Plan:
        rows, columns = self.places(packed)
        if not self.wide:
            return gather_plan(self.panels(packed), self.grid(packed.shape), packed.values)
        down, across = self.grid(packed.shape)
        terms = collect(rows, columns, packed.values.detach().mT, down)
        return strip_plan("x", terms, (across, self.cols), (down, self.rows), packed.values)

    def spmmt_gather(self, packed: PackedBSR) -> Plan:
        rows, columns = self.places(packed)
        if not self.wide:
            return scatter_plan(self.panels(packed), self.grid(packed.shape), packed.values)
        down, across = self.grid(packed.shape)
        terms = collect(columns, rows, packed.values.detach(), across)
        return strip_plan("dy", terms, (down, self.rows), (across, self.cols), packed.values)

    def sddmm_gather(self, packed: PackedBSR) -> Plan:
        rows, columns = self.places(packed)
        if not self.wide:
            return gather_gradient_plan(self.panels(packed), self.grid(packed.shape), packed.values)
        return block_gradient_plan(rows.tolist(), columns.tolist(), self.grid(packed.shape), packed.values)

    def panels(self, packed: PackedBSR) -> list["Panel"]:
        """The block rows, each as one dense matrix beside the block columns that it is made of."""
        values, columns = packed.values.detach().mT, packed.columns.long()  # [blocks, cols, rows]
        bounds = pairwise(packed.row_pointers.tolist())
        return [Panel(columns[a:b], values[a:b].reshape(-1, self.rows)) for a, b in bounds]

    def outlines(self, packed: PackedBSR) -> tuple[list["Panel"], Shape, Tensor]:
        """The panels, the grid of blocks and the blocks: what a plan for panels wants to know."""
        self.places(packed)
        return self.panels(packed), self.grid(packed.shape), packed.values

    # On a GPU a block is a tile of tensor-core products (kernels/block.py), or gathered where it is too narrow (kernels/panel.py).

    @property
    def gathered(self) -> bool:
        return self.cols < 16 <= self.rows

    def spmm_triton(self, packed: PackedBSR) -> Plan:
        if self.gathered:
            return panel_code().gather_plan(*self.outlines(packed))
        return self.device_code(packed).product_plan("x", self.arranged(packed, transposed=False))

    def spmmt_triton(self, packed: PackedBSR) -> Plan:
        if self.gathered:
            return panel_code().spread_plan(*self.outlines(packed))
        return self.device_code(packed).product_plan("dy", self.arranged(packed, transposed=True))

    def sddmm_triton(self, packed: PackedBSR) -> Plan:
        if self.gathered:
            return panel_code().sample_plan(*self.outlines(packed))
        device_code, (rows, columns) = self.device_code(packed), self.places(packed)
        return device_code.gradient_plan(packed.values, rows, columns, self.grid(packed.shape))

    def swiglu_triton(self, gate: PackedBSR, up: PackedBSR, backward: bool = False) -> Plan:
        """Plan of ``h = silu(x @ gate.T) * (x @ up.T)``, or of ``dg, du = run(x, dh)``, for two weights with the same blocks."""
        code, *sides = self.both(gate, up, transposed=False)
        return code.gated_plan(*sides, backward)

    def both_spmmt_triton(self, gate: PackedBSR, up: PackedBSR) -> Plan:
        """Plan of ``dx = dg @ gate + du @ up``, for two weights with the same blocks."""
        code, *sides = self.both(gate, up, transposed=True)
        return code.input_gradient_plan(*sides)

    def both_sddmm_triton(self, gate: PackedBSR, up: PackedBSR) -> Plan:
        """Plan of ``dgate, dup = run(dg, du, x)``, the gradients of the values of two weights with the same blocks."""
        return self.both(gate, up, transposed=False)[0].weight_gradient_plan(gate.values, *self.places(gate), self.grid(gate.shape))

    def mlp_triton(self, gate: PackedBSR, up: PackedBSR, down: PackedBSR) -> Plan:
        """Plan of ``y = (silu(x @ gate.T) * (x @ up.T)) @ down.T`` in one kernel, for at most 768 outputs (kernels/whole.py)."""
        _, *sides = self.both(gate, up, transposed=False)
        from sparsesurvey.kernels import whole
        return whole.whole_plan(*sides, self.arranged(down, transposed=False))

    def both(self, gate: PackedBSR, up: PackedBSR, transposed: bool) -> tuple[Any, ...]:
        """The module kernels/swiglu.py and both weights arranged for it; ValueError if their blocks differ."""
        self.device_code(gate)
        if not (up.columns.equal(gate.columns) and up.row_pointers.equal(gate.row_pointers) and up.shape == gate.shape):
            raise ValueError("up must have the blocks of gate, got other places: choose one mask for both")
        from sparsesurvey.kernels import swiglu
        return swiglu, self.arranged(gate, transposed), self.arranged(up, transposed)

    def arranged(self, packed: PackedBSR, transposed: bool) -> Any:
        """One direction of the operand for the Triton kernels, a ``kernels.block.Sparse``."""
        device_code, (rows, columns), (down, across) = self.device_code(packed), self.places(packed), self.grid(packed.shape)
        sides = [(rows, (down, self.rows)), (columns, (across, self.cols))]
        (targets, target), (sources, source) = reversed(sides) if transposed else sides
        return device_code.arrange(packed.values, targets, sources, target, source, transposed)

    def lasting(self, kernel: str) -> bool:
        """Do this kernel's plans read the values where these are? Then they stay right while the values are trained."""
        return kernel == "triton" and not self.gathered or kernel == "gather" and self.wide

    def device_code(self, packed: PackedBSR) -> ModuleType:
        """The Triton kernels, or raise Unavailable where they cannot multiply this operand."""
        try:
            from sparsesurvey.kernels import block
        except ImportError:
            raise Unavailable("needs triton") from None
        block.require_blocks(packed.values, packed.shape)
        return block

    def spmm_torch_bsr(self, packed: PackedBSR) -> Plan:
        """On a CPU by MKL; on a GPU by torch's Triton kernel as it is shipped (kernels/torch_bsr.py)."""
        self.places(packed)
        if packed.values.device.type == "cpu":
            return torch_product("x", torch_bsr(packed))
        return self.torch_triton(packed, searched=False)

    def spmm_torch_bsr_searched(self, packed: PackedBSR) -> Plan:
        """torch's Triton kernel with its stages, warps and tiles searched for each shape."""
        self.places(packed)
        return self.torch_triton(packed, searched=True)

    def torch_triton(self, packed: PackedBSR, searched: bool) -> Plan:
        from sparsesurvey.kernels import torch_bsr as library

        library.require(packed.values)
        return library.plan(compressed(torch.sparse_bsr_tensor, packed), packed.values.detach(), searched)

    def spmm_stk(self, packed: PackedBSR) -> Plan:
        """STK's kernels (kernels/stk.py), for blocks of 128 x 128."""
        return self.by_stk("spmm", packed)

    def spmmt_stk(self, packed: PackedBSR) -> Plan:
        return self.by_stk("spmmt", packed)

    def sddmm_stk(self, packed: PackedBSR) -> Plan:
        return self.by_stk("sddmm", packed)

    def by_stk(self, product: str, packed: PackedBSR) -> Plan:
        from sparsesurvey.kernels import stk

        return stk.plan(product, packed.values, *self.places(packed), packed.row_pointers, packed.shape)

    def spmm_torch_csr(self, packed: PackedBSR) -> Plan:
        kept = self.unpack(packed._replace(values=torch.ones_like(packed.values))) != 0
        return torch_product("x", torch_csr(PackedCSR(self.unpack(packed)[kept], *compress_rows(kept), packed.shape)))

    def spmm_scipy_bsr(self, packed: PackedBSR) -> Plan:
        self.places(packed)
        sparse = scipy_sparse(packed.values)
        parts = packed.values.detach().numpy(), packed.columns.int().numpy(), packed.row_pointers.numpy()
        return scipy_product("x", sparse.bsr_array(parts, shape=packed.shape), packed.values)


def torch_bsr(packed: PackedBSR) -> Tensor:
    """The weight as a tensor of torch's BSR layout."""
    check_library(packed.values)
    if packed.values.shape[1] != packed.values.shape[2]:
        raise Unavailable("needs square blocks")
    return compressed(torch.sparse_bsr_tensor, packed)


class Panel(NamedTuple):
    """The stored blocks of one block row side by side."""

    columns: Tensor  # int64 [k], their block columns
    weight: Tensor  # [k * cols, rows]


def panel_code() -> ModuleType:
    """The Triton kernels that multiply panels on a GPU (kernels/panel.py): plans as ``gather_plan`` and its like below."""
    try:
        from sparsesurvey.kernels import panel
    except ImportError:
        raise Unavailable("needs triton") from None
    return panel


Terms = list[list[tuple[int, Tensor]]]


def collect(targets: Tensor, sources: Tensor, weights: Tensor, count: int) -> Terms:
    """For each of ``count`` target strips the (source strip, weight ``[source width, target width]``) to add up."""
    terms: Terms = [[] for _ in range(count)]
    for target, source, weight in zip(targets.tolist(), sources.tolist(), weights.unbind()):
        terms[target].append((source, weight))
    return terms


def strips(matrix: Tensor, count: int, width: int) -> Sequence[Tensor]:
    """``[tokens, count * width]`` as ``count`` views ``[tokens, width]``."""
    return matrix.unflatten(1, (count, width)).unbind(1)


def parts(x: Tensor, y: Tensor, most: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The same tokens of both, at most so many at a time."""
    count = max(1, ceil(len(x) / most))
    return zip(x.chunk(count), y.chunk(count))


def strip_plan(name: str, terms: Terms, source: Shape, target: Shape, like: Tensor) -> Plan:
    """Plan of ``y[:, t] = sum of x[:, s] @ weight``; ``source`` and ``target`` are (number of strips, their width)."""
    def run(x: Tensor) -> Tensor:
        x = check_activations(name, x, prod(source), like).contiguous()
        y = x.new_empty(len(x), prod(target))
        for x_part, y_part in parts(x, y, TOKENS):
            inputs = strips(x_part, *source)
            for output, summands in zip(strips(y_part, *target), terms):
                add_up(output, [(inputs[index], weight) for index, weight in summands])
        return y

    return run


def add_up(output: Tensor, summands: list[tuple[Tensor, Tensor]]) -> None:
    """Write the sum of the matrix products into ``output``, whatever was there."""
    if not summands:
        output.zero_()
    for number, (left, right) in enumerate(summands):
        if number:
            output.addmm_(left, right)
        else:
            torch.mm(left, right, out=output)


def block_gradient_plan(rows: list[int], columns: list[int], grid: Shape, like: Tensor) -> Plan:
    """Plan of one product ``dy[:, row].T @ x[:, column]`` for each stored block."""
    (down, across), (_, height, width) = grid, like.shape

    def run(dy: Tensor, x: Tensor) -> Tensor:
        dy, x = check_pair(dy, x, (down * height, across * width), like)
        gradient = x.new_empty(like.shape)
        lefts, rights = strips(dy.contiguous(), down, height), strips(x.contiguous(), across, width)
        for row, column, block in zip(rows, columns, gradient.unbind()):
            torch.mm(lefts[row].T, rights[column], out=block)
        return gradient

    return run


def feature_major(x: Tensor, count: int) -> Tensor:
    """``[tokens, features]`` to a contiguous ``[count, features / count, tokens]``."""
    return x.T.contiguous().unflatten(0, (count, -1))


def most_tokens(panels: list[Panel]) -> int:
    return max(64, GATHERED // max(1, *(len(panel.weight) for panel in panels)))


def gather_plan(panels: list[Panel], grid: Shape, like: Tensor) -> Plan:
    """Plan of ``y[:, row] = gathered x @ weight`` for every panel."""
    (down, across), (_, height, width) = grid, like.shape

    def run(x: Tensor) -> Tensor:
        x = check_activations("x", x, across * width, like)
        y = x.new_empty(len(x), down * height)
        for x_part, y_part in parts(x, y, most_tokens(panels)):
            features = feature_major(x_part, across)
            for panel, output in zip(panels, strips(y_part, down, height)):
                gathered = features.index_select(0, panel.columns).flatten(0, 1)  # [k * cols, tokens]
                torch.mm(gathered.T, panel.weight, out=output)
        return y

    return run


def scatter_plan(panels: list[Panel], grid: Shape, like: Tensor) -> Plan:
    """Plan of ``dx[:, columns] += dy[:, row] @ weight.T`` for every panel, added up feature-major."""
    (down, across), (_, height, width) = grid, like.shape

    def run(dy: Tensor) -> Tensor:
        dy = check_activations("dy", dy, down * height, like).contiguous()
        dx = dy.new_empty(len(dy), across * width)
        for dy_part, dx_part in parts(dy, dx, most_tokens(panels)):
            features = dx.new_zeros(across, width, len(dx_part))
            for panel, strip in zip(panels, strips(dy_part, down, height)):
                spread = panel.weight @ strip.T  # [k * cols, tokens]
                features.index_add_(0, panel.columns, spread.unflatten(0, (-1, width)))
            dx_part.copy_(features.flatten(0, 1).T)
        return dx

    return run


def gather_gradient_plan(panels: list[Panel], grid: Shape, like: Tensor) -> Plan:
    """Plan of ``gathered x.T @ dy[:, row]`` for every panel, which is the gradient of its weight."""
    (down, across), (_, height, width) = grid, like.shape
    counts = [len(panel.weight) for panel in panels]

    def run(dy: Tensor, x: Tensor) -> Tensor:
        dy, x = check_pair(dy, x, (down * height, across * width), like)
        gradient = x.new_zeros(len(like) * width, height)  # [blocks * cols, rows]
        for dy_part, x_part in parts(dy.contiguous(), x, most_tokens(panels)):
            features = feature_major(x_part, across)
            strip = strips(dy_part, down, height)
            for panel, left, output in zip(panels, strip, gradient.split(counts)):
                gathered = features.index_select(0, panel.columns).flatten(0, 1)  # [k * cols, tokens]
                output.addmm_(gathered, left)
        return gradient.view(-1, width, height).mT.contiguous()

    return run
