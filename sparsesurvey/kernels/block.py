"""Block-sparse products in Triton: the tiles of the activations come through tensor descriptors (TMA on Hopper), the
programs are persistent, and the index of the next block is carried through the loop.

The carry matters: where a tile's address depends on an index loaded in the same iteration, Triton counts two levels of
indirection and gives the pipeline half of its stages. Tokens are the M side of the tensor-core instruction, so that
blocks of 16, 32 and 64 rows still get wgmma (m64 n16, n32, n64).
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sparsesurvey.kernels.launch import divides_by_16_bytes, interpreting, processors, require, tuning
from sparsesurvey.structure import Plan, Unavailable, check_activations, check_pair

if interpreting():
    from sparsesurvey.kernels.interpreter import mend

    mend()

WIDE, DEEP = 128, 64  # at most so many outputs and so many summed inputs of one instruction tile


class Sparse(NamedTuple):
    """One direction of a block-sparse matrix: for every target strip the blocks that add to it, and what they read."""

    values: Tensor  # [blocks, rows, cols]
    pointers: Tensor  # int32 [targets + 1]
    sources: Tensor  # int32 [blocks + 1], source strip of each entry, one more at the end
    places: Tensor  # int32 [blocks + 1], where in values each entry is
    order: Tensor  # int32 [targets], the strip with most blocks first
    target: tuple[int, int]  # number of strips, their width
    source: tuple[int, int]
    transposed: bool  # are the blocks multiplied as they are (dy @ W), or as their transposes (x @ W.T)?


def arrange(values: Tensor, targets: Tensor, sources: Tensor, target: tuple[int, int], source: tuple[int, int],
            transposed: bool) -> Sparse:
    """Sort the blocks by target strip. Values stay where they are, whatever the direction: only indices are made."""
    places = targets.argsort(stable=True)
    counts = targets.bincount(minlength=target[0])
    pointers = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    padded = lambda index: torch.nn.functional.pad(index, (0, 1)).int()
    order = counts.argsort(descending=True, stable=True).int()
    return Sparse(values, pointers, padded(sources[places]), padded(places), order, target, source, transposed)


@triton.jit
def fetch(source, row, column, rows, width, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, TMA: tl.constexpr):
    """The tile ``[HEIGHT, WIDTH]`` that starts at (row, column), zeros below the last row."""
    if TMA:
        tile = source.load([row, column])
    else:
        down = row + tl.arange(0, HEIGHT)
        places = down[:, None].to(tl.int64) * width + column + tl.arange(0, WIDTH)[None, :]
        tile = tl.load(source + places, mask=down[:, None] < rows, other=0.0)
    return tile


@triton.jit
def put(target, row, column, rows, width, tile, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, TMA: tl.constexpr):
    if TMA:
        target.store([row, column], tile.to(target.dtype))
    else:
        down = row + tl.arange(0, HEIGHT)
        places = down[:, None].to(tl.int64) * width + column + tl.arange(0, WIDTH)[None, :]
        tl.store(target + places, tile.to(target.dtype.element_ty), mask=down[:, None] < rows)


@triton.jit
def multiply(x, values, y, pointers, sources, places, order, tokens, targets, stored, x_width, value_width, y_width, KEY,
             TARGET: tl.constexpr, SOURCE: tl.constexpr, TRANSPOSED: tl.constexpr, EXACT: tl.constexpr, READY: tl.constexpr,
             TMA: tl.constexpr, PROGRAMS: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """``y[:, t] = sum of x[:, s] @ block`` for every target strip t.

    x, values (``[stored, value_width]``, one block below the other) and y are tensor descriptors, or pointers without TMA.
    """
    PIECES: tl.constexpr = TARGET // BN
    STEPS: tl.constexpr = SOURCE // BK  # of one block; all blocks' steps are one loop, so that one stage holds one step
    strips = tl.cdiv(tokens, BT)
    for tile in tl.range(tl.program_id(0), strips * targets * PIECES, PROGRAMS):
        token = tile % strips * BT  # the fastest, so that a block of weights is used again while it is in the L2 cache
        piece = (tile // strips) % PIECES * BN
        row = tl.load(order + tile // (strips * PIECES))
        first = tl.load(pointers + row) * STEPS
        last = tl.load(pointers + row + 1) * STEPS
        total = tl.zeros((BT, BN), dtype=tl.float32)
        source = tl.load(sources + first // STEPS)
        place = tl.load(places + first // STEPS)
        for step in tl.range(first, last):
            next_source = tl.load(sources + (step + 1) // STEPS)
            next_place = tl.load(places + (step + 1) // STEPS)
            deep = step % STEPS * BK
            left = fetch(x, token, source * SOURCE + deep, tokens, x_width, BT, BK, TMA)
            if TRANSPOSED:
                right = fetch(values, place * SOURCE + deep, piece, stored, value_width, BK, BN, TMA)
            else:
                right = fetch(values, place * TARGET + piece, deep, stored, value_width, BN, BK, TMA).T
            total = tl.dot(left, right, total, input_precision="ieee" if EXACT else None)
            source = next_source
            place = next_place
        put(y, token, row * TARGET + piece, tokens, y_width, total, BT, BN, TMA)


@triton.jit
def sample(dy, x, out, rows, columns, tokens, each, dy_width, x_width, KEY,
           ROWS: tl.constexpr, COLS: tl.constexpr, EXACT: tl.constexpr, READY: tl.constexpr, TMA: tl.constexpr,
           BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """``dy[:, row].T @ x[:, column]`` of every stored block, over one of the parts that the tokens are split into."""
    ACROSS: tl.constexpr = COLS // BK
    PIECES: tl.constexpr = ROWS // BN * ACROSS
    block = tl.program_id(0) // PIECES
    down = (tl.program_id(0) % PIECES) // ACROSS * BN
    across = (tl.program_id(0) % ACROSS) * BK
    row = tl.load(rows + block) * ROWS + down
    column = tl.load(columns + block) * COLS + across
    part = tl.program_id(1)
    total = tl.zeros((BN, BK), dtype=tl.float32)
    for token in tl.range(part * each, tl.minimum((part + 1) * each, tokens), BT):
        left = fetch(dy, token, row, tokens, dy_width, BT, BN, TMA)
        right = fetch(x, token, column, tokens, x_width, BT, BK, TMA)
        total = tl.dot(left.T, right, total, input_precision="ieee" if EXACT else None)
    blocks = tl.num_programs(0) // PIECES
    start = (part.to(tl.int64) * blocks + block) * ROWS * COLS
    place = (down + tl.arange(0, BN))[:, None] * COLS + across + tl.arange(0, BK)[None, :]
    tl.store(out + start + place, total.to(out.dtype.element_ty))


def set_multiply_blocks(arguments: dict[str, Any]) -> bool:
    """Before a launch: the descriptors' tiles are those of the configuration that is tried.

    This is a heuristic of Triton's, which sees every launch, and no hook of a configuration: Triton keeps no tuning on disk
    whose configurations have hooks.
    """
    if arguments["TMA"]:
        BT, BN, BK = (arguments[name] for name in ("BT", "BN", "BK"))
        arguments["x"].block_shape = [BT, BK]
        arguments["values"].block_shape = [BK, BN] if arguments["TRANSPOSED"] else [BN, BK]
        arguments["y"].block_shape = [BT, BN]
    return True


def set_sample_blocks(arguments: dict[str, Any]) -> bool:
    if arguments["TMA"]:
        arguments["dy"].block_shape = [arguments["BT"], arguments["BN"]]
        arguments["x"].block_shape = [arguments["BT"], arguments["BK"]]
    return True


def multiply_configs() -> list[triton.Config]:
    """Tiles that fit the shared memory of an H200 for every block; Triton's tuner drops those that do not fit elsewhere."""
    if interpreting():
        return [triton.Config({"BT": 32}, num_warps=4, num_stages=2)]
    tried = (256, 8, 3), (256, 8, 4), (128, 4, 4), (128, 8, 3), (128, 8, 4), (64, 4, 4), (64, 4, 5)
    return [triton.Config({"BT": tokens}, num_warps=warps, num_stages=stages)
            for tokens, warps, stages in tried]


def sample_configs() -> list[triton.Config]:
    if interpreting():
        return [triton.Config({"BT": 32}, num_warps=4, num_stages=2)]
    tried = (64, 4, 3), (64, 4, 4), (64, 8, 3), (64, 8, 4), (128, 8, 3)
    return [triton.Config({"BT": tokens}, num_warps=warps, num_stages=stages)
            for tokens, warps, stages in tried]


def tuned(kernel: Any, configs: list[triton.Config], key: list[str], ready: Any = lambda arguments: True) -> Any:
    """The kernel with the fastest of its configurations for each value of ``key``, the dtypes, the device and the versions,
    kept in Triton's cache. ``KEY`` among them (see ``launch.tuning``) is no constant, so that it compiles nothing anew.
    """
    return triton.autotune(configs, key, cache_results=not interpreting())(triton.heuristics({"READY": ready})(kernel))


tuned_multiply = tuned(multiply, multiply_configs(), ["TARGET", "SOURCE", "TRANSPOSED", "KEY", "targets", "stored"], set_multiply_blocks)
tuned_sample = tuned(sample, sample_configs(), ["ROWS", "COLS", "KEY"], set_sample_blocks)


def require_blocks(values: Tensor, shape: tuple[int, int]) -> None:
    """Raise Unavailable unless blocks ``[blocks, rows, cols]`` can be tiles of a tensor-core product here."""
    sides = values.shape[1:]
    if any(side < 16 or side & (side - 1) for side in sides):
        raise Unavailable(f"needs blocks whose sides are powers of two of at least 16, got {sides[0]}x{sides[1]}")
    if not all(divides_by_16_bytes(size, values.dtype) for size in shape):
        raise Unavailable(f"needs rows of a multiple of 16 bytes, got a weight of {shape[0]}x{shape[1]} in {values.dtype}")
    require(values)


def operand(matrix: Tensor, tma: bool) -> TensorDescriptor | Tensor:
    """A descriptor of a contiguous matrix, whose tile is set before the launch; the matrix itself without TMA.

    The stride is the width, whatever the matrix says: that of a single row means nothing, and may be no multiple of 16 bytes.
    """
    return TensorDescriptor(matrix, list(matrix.shape), [matrix.shape[1], 1], [1, 1]) if tma else matrix


def has_tma(values: Tensor) -> bool:
    """Hopper and later fetch tiles by tensor descriptor; the interpreter does as they do."""
    return values.device.type != "cuda" or torch.cuda.get_device_capability(values.device) >= (9, 0)


def product_plan(name: str, sparse: Sparse) -> Plan:
    """Plan of ``x @ W.T`` or ``dy @ W`` for one direction of the matrix."""
    values, (targets, width), (sources, depth) = sparse.values.detach().contiguous(), sparse.target, sparse.source
    flat = values.view(-1, values.shape[-1])  # [blocks * rows, cols]
    programs, tma = processors(values.device), has_tma(values)
    sizes = {"TARGET": width, "SOURCE": depth, "BN": min(width, WIDE), "BK": min(depth, DEEP)}

    def run(x: Tensor) -> Tensor:
        x = check_activations(name, x, sources * depth, values).contiguous()
        y = x.new_empty(len(x), targets * width)
        if not len(x) or not len(values):
            return y.zero_()
        with torch.cuda.device_of(x):
            tuned_multiply[(programs,)](
                *(operand(matrix, tma) for matrix in (aligned(x), flat, y)), sparse.pointers, sparse.sources, sparse.places,
                sparse.order, len(x), targets, len(flat), x.shape[1], flat.shape[1], y.shape[1], **sizes, TMA=tma,
                TRANSPOSED=sparse.transposed, EXACT=x.dtype == torch.float32, KEY=tuning(x), PROGRAMS=programs)
        return y

    return run


def gradient_plan(values: Tensor, rows: Tensor, columns: Tensor, grid: tuple[int, int]) -> Plan:
    """Plan of ``dy[:, row].T @ x[:, column]`` for each stored block, in the layout of ``values [blocks, rows, cols]``.

    Few blocks would leave most processors idle, so the tokens are split among several programs a block, whose sums
    are added up afterwards, always in the same order.
    """
    blocks, height, width = values.shape
    shape = grid[0] * height, grid[1] * width
    rows, columns = rows.int(), columns.int()
    tile = {"BN": min(height, WIDE), "BK": min(width, WIDE)}
    pieces, tma = height // tile["BN"] * (width // tile["BK"]), has_tma(values)

    def run(dy: Tensor, x: Tensor) -> Tensor:
        dy, x = (aligned(part.contiguous()) for part in check_pair(dy, x, shape, values))
        if not blocks or not len(x):
            return x.new_zeros(values.shape)
        parts = split(len(x), blocks * pieces, processors(x.device))
        each = -(-len(x) // (128 * parts)) * 128  # a multiple of every tile of tokens
        out = torch.empty(parts, *values.shape, dtype=x.dtype if parts == 1 else torch.float32, device=x.device)
        with torch.cuda.device_of(x):
            tuned_sample[(blocks * pieces, parts)](
                operand(dy, tma), operand(x, tma), out, rows, columns, len(x), each, *shape, ROWS=height, COLS=width, **tile,
                TMA=tma, EXACT=x.dtype == torch.float32, KEY=tuning(x))
        return out[0] if parts == 1 else out.sum(0).to(x.dtype)

    return run


def split(tokens: int, programs: int, processors: int) -> int:
    """How many parts of at least 256 tokens give every processor two programs, at most 16."""
    return max(1, min(16, tokens // 256, -(-2 * processors // programs)))


def aligned(x: Tensor) -> Tensor:
    """The same numbers at an address that a tensor descriptor can start from."""
    return x if x.data_ptr() % 16 == 0 else x.clone()
