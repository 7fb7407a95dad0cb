"""The first half of a gated MLP in Triton, h = silu(x @ G.T) * (x @ U.T), for two block-sparse weights of one pattern.

Forward is one kernel: the tile of x is fetched once for both products, and neither of them is ever written to memory.
Backward is three. The first computes both products again and writes their gradients, dg and du; the second adds
dx = dg @ G + du @ U up in one accumulator; the third fetches x once for dG = dg.T @ x and dU = du.T @ x.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsesurvey.kernels.block import DEEP, WIDE, Sparse, aligned, fetch, has_tma, operand, put, split, tuned
from sparsesurvey.kernels.launch import interpreting, processors, tuning
from sparsesurvey.structure import Plan, check_activations, check_pair


@triton.jit
def gated(x, gate, up, dh, first_out, second_out, pointers, sources, order, tokens, targets, stored, x_width, value_width, y_width, KEY,
          TARGET: tl.constexpr, SOURCE: tl.constexpr, BACKWARD: tl.constexpr, EXACT: tl.constexpr, READY: tl.constexpr,
          TMA: tl.constexpr, PROGRAMS: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Forward: first_out = h. Backward: first_out = dg and second_out = du for the gradient dh."""
    PIECES: tl.constexpr = TARGET // BN
    STEPS: tl.constexpr = SOURCE // BK
    strips = tl.cdiv(tokens, BT)
    for tile in tl.range(tl.program_id(0), strips * targets * PIECES, PROGRAMS):
        token = tile % strips * BT
        piece = (tile // strips) % PIECES * BN
        row = tl.load(order + tile // (strips * PIECES))
        first = tl.load(pointers + row) * STEPS
        last = tl.load(pointers + row + 1) * STEPS
        g = tl.zeros((BT, BN), dtype=tl.float32)
        u = tl.zeros((BT, BN), dtype=tl.float32)
        source = tl.load(sources + first // STEPS)
        for step in tl.range(first, last):
            next_source = tl.load(sources + (step + 1) // STEPS)
            deep = step % STEPS * BK
            place = step // STEPS * TARGET + piece
            left = fetch(x, token, source * SOURCE + deep, tokens, x_width, BT, BK, TMA)
            g = tl.dot(left, fetch(gate, place, deep, stored, value_width, BN, BK, TMA).T, g,
                       input_precision="ieee" if EXACT else None)
            u = tl.dot(left, fetch(up, place, deep, stored, value_width, BN, BK, TMA).T, u,
                       input_precision="ieee" if EXACT else None)
            source = next_source
        column = row * TARGET + piece
        share = 1 / (1 + tl.exp(-g))
        if BACKWARD:
            d = fetch(dh, token, column, tokens, y_width, BT, BN, TMA).to(tl.float32)
            put(first_out, token, column, tokens, y_width, d * u * share * (1 + g * (1 - share)), BT, BN, TMA)
            put(second_out, token, column, tokens, y_width, d * g * share, BT, BN, TMA)
        else:
            put(first_out, token, column, tokens, y_width, g * share * u, BT, BN, TMA)


@triton.jit
def together(dg, du, gate, up, dx, pointers, sources, places, order, tokens, targets, stored, y_width, value_width, x_width, KEY,
             TARGET: tl.constexpr, SOURCE: tl.constexpr, EXACT: tl.constexpr, READY: tl.constexpr, TMA: tl.constexpr,
             PROGRAMS: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """dx = dg @ G + du @ U: as ``block.multiply`` with the blocks as they are, two products a step."""
    PIECES: tl.constexpr = TARGET // BN
    STEPS: tl.constexpr = SOURCE // BK
    strips = tl.cdiv(tokens, BT)
    for tile in tl.range(tl.program_id(0), strips * targets * PIECES, PROGRAMS):
        token = tile % strips * BT
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
            column, line = source * SOURCE + deep, place * SOURCE + deep
            left = fetch(dg, token, column, tokens, y_width, BT, BK, TMA)
            total = tl.dot(left, fetch(gate, line, piece, stored, value_width, BK, BN, TMA), total,
                           input_precision="ieee" if EXACT else None)
            left = fetch(du, token, column, tokens, y_width, BT, BK, TMA)
            total = tl.dot(left, fetch(up, line, piece, stored, value_width, BK, BN, TMA), total,
                           input_precision="ieee" if EXACT else None)
            source = next_source
            place = next_place
        put(dx, token, row * TARGET + piece, tokens, x_width, total, BT, BN, TMA)


@triton.jit
def sample(dg, du, x, first_out, second_out, rows, columns, tokens, each, y_width, x_width, KEY,
           ROWS: tl.constexpr, COLS: tl.constexpr, EXACT: tl.constexpr, READY: tl.constexpr, TMA: tl.constexpr,
           BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """dG and dU of every stored block, over one of the parts that the tokens are split into: ``block.sample``, twice."""
    ACROSS: tl.constexpr = COLS // BK
    PIECES: tl.constexpr = ROWS // BN * ACROSS
    block = tl.program_id(0) // PIECES
    down = (tl.program_id(0) % PIECES) // ACROSS * BN
    across = (tl.program_id(0) % ACROSS) * BK
    row = tl.load(rows + block) * ROWS + down
    column = tl.load(columns + block) * COLS + across
    part = tl.program_id(1)
    first = tl.zeros((BN, BK), dtype=tl.float32)
    second = tl.zeros((BN, BK), dtype=tl.float32)
    for token in tl.range(part * each, tl.minimum((part + 1) * each, tokens), BT):
        right = fetch(x, token, column, tokens, x_width, BT, BK, TMA)
        first = tl.dot(fetch(dg, token, row, tokens, y_width, BT, BN, TMA).T, right, first,
                       input_precision="ieee" if EXACT else None)
        second = tl.dot(fetch(du, token, row, tokens, y_width, BT, BN, TMA).T, right, second,
                        input_precision="ieee" if EXACT else None)
    blocks = tl.num_programs(0) // PIECES
    start = (part.to(tl.int64) * blocks + block) * ROWS * COLS
    place = start + (down + tl.arange(0, BN))[:, None] * COLS + across + tl.arange(0, BK)[None, :]
    tl.store(first_out + place, first.to(first_out.dtype.element_ty))
    tl.store(second_out + place, second.to(second_out.dtype.element_ty))


def setter(**tiles: str) -> Any:
    """Before a launch: the descriptors' tiles, two letters of BT, BN and BK each, are those of the configuration that is tried."""
    def set_blocks(arguments: dict[str, Any]) -> bool:
        for name, tile in tiles.items() if arguments["TMA"] else ():
            arguments[name].block_shape = [arguments[f"B{side}"] for side in tile]
        return True

    return set_blocks


def configs(*tried: tuple[int, int, int]) -> list[triton.Config]:
    """Tiles of tokens, with warps and stages of the pipeline; one small tile where kernels are interpreted."""
    if interpreting():
        return [triton.Config({"BT": 32}, num_warps=4, num_stages=2)]
    return [triton.Config({"BT": tokens}, num_warps=warps, num_stages=stages) for tokens, warps, stages in tried]


FORWARD = (128, 8, 3), (128, 8, 4), (128, 8, 2), (64, 4, 3), (64, 4, 4), (64, 8, 4)
INPUT = (256, 8, 2), (128, 8, 2), (128, 8, 3), (128, 4, 3), (64, 4, 3), (64, 4, 4)
WEIGHT = (64, 8, 3), (64, 8, 4), (64, 4, 3), (64, 4, 4), (128, 8, 2)

tuned_gated = tuned(gated, configs(*FORWARD), ["TARGET", "SOURCE", "BACKWARD", "KEY", "targets", "stored"],
                    setter(x="TK", gate="NK", up="NK", dh="TN", first_out="TN", second_out="TN"))
tuned_together = tuned(together, configs(*INPUT), ["TARGET", "SOURCE", "KEY", "targets", "stored"],
                       setter(dg="TK", du="TK", gate="KN", up="KN", dx="TN"))
tuned_sample = tuned(sample, configs(*WEIGHT), ["ROWS", "COLS", "KEY"], setter(dg="TN", du="TN", x="TK"))


def gated_plan(gate: Sparse, up: Sparse, backward: bool) -> Plan:
    """Plan of ``h = run(x)``, or of ``dg, du = run(x, dh)``; the two weights have the same blocks."""
    (targets, width), (sources, depth) = gate.target, gate.source
    weights = [part.values.detach().contiguous().view(-1, part.values.shape[-1]) for part in (gate, up)]
    programs, tma = processors(gate.values.device), has_tma(gate.values)
    sizes = {"TARGET": width, "SOURCE": depth, "BN": min(width, WIDE), "BK": min(depth, DEEP)}

    def run(x: Tensor, dh: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        x = aligned(check_activations("x", x, sources * depth, gate.values).contiguous())
        given = [aligned(check_activations("dh", dh, targets * width, gate.values).contiguous())] if backward else []
        outs = [x.new_empty(len(x), targets * width) for _ in range(1 + backward)]
        if not len(x) or not len(gate.values):
            outs = [out.zero_() for out in outs]
        else:
            with torch.cuda.device_of(x):
                tuned_gated[(programs,)](
                    *(operand(matrix, tma) for matrix in (x, *weights, *(given or outs[:1]), outs[0], outs[-1])),
                    gate.pointers, gate.sources, gate.order, len(x), targets, len(weights[0]), x.shape[1], depth, targets * width,
                    **sizes, TMA=tma, BACKWARD=backward, EXACT=x.dtype == torch.float32, KEY=tuning(x), PROGRAMS=programs)
        return tuple(outs) if backward else outs[0]

    return run


def input_gradient_plan(gate: Sparse, up: Sparse) -> Plan:
    """Plan of ``dx = run(dg, du)``; the two weights have the same blocks, arranged by columns."""
    (targets, width), (sources, depth) = gate.target, gate.source
    weights = [part.values.detach().contiguous().view(-1, part.values.shape[-1]) for part in (gate, up)]
    programs, tma = processors(gate.values.device), has_tma(gate.values)
    sizes = {"TARGET": width, "SOURCE": depth, "BN": min(width, WIDE), "BK": min(depth, DEEP)}

    def run(dg: Tensor, du: Tensor) -> Tensor:
        dg, du = check_same(dg, du, sources * depth, gate.values)
        dx = dg.new_empty(len(dg), targets * width)
        if not len(dg) or not len(gate.values):
            return dx.zero_()
        with torch.cuda.device_of(dg):
            tuned_together[(programs,)](
                *(operand(matrix, tma) for matrix in (dg, du, *weights, dx)), gate.pointers, gate.sources, gate.places, gate.order,
                len(dg), targets, len(weights[0]), dg.shape[1], weights[0].shape[1], dx.shape[1], **sizes, TMA=tma,
                EXACT=dg.dtype == torch.float32, KEY=tuning(dg), PROGRAMS=programs)
        return dx

    return run


def weight_gradient_plan(values: Tensor, rows: Tensor, columns: Tensor, grid: tuple[int, int]) -> Plan:
    """Plan of ``dgate, dup = run(dg, du, x)``, each in the layout of ``values [blocks, rows, cols]``; see ``block.gradient_plan``."""
    blocks, height, width = values.shape
    out, inn = grid[0] * height, grid[1] * width
    rows, columns = rows.int(), columns.int()
    tile = {"BN": min(height, WIDE), "BK": min(width, WIDE)}
    pieces, tma = height // tile["BN"] * (width // tile["BK"]), has_tma(values)

    def run(dg: Tensor, du: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        dg, du = check_same(dg, du, out, values)
        x = aligned(check_pair(dg, x, (out, inn), values)[1].contiguous())
        if not blocks or not len(x):
            return x.new_zeros(values.shape), x.new_zeros(values.shape)
        parts = split(len(x), blocks * pieces, processors(x.device))
        each = -(-len(x) // (128 * parts)) * 128  # a multiple of every tile of tokens
        sums = [torch.empty(parts, *values.shape, dtype=x.dtype if parts == 1 else torch.float32, device=x.device) for _ in range(2)]
        with torch.cuda.device_of(x):
            tuned_sample[(blocks * pieces, parts)](
                *(operand(matrix, tma) for matrix in (dg, du, x)), *sums, rows, columns, len(x), each, out, inn, ROWS=height,
                COLS=width, **tile, TMA=tma, EXACT=x.dtype == torch.float32, KEY=tuning(x))
        first, second = (part[0] if parts == 1 else part.sum(0).to(x.dtype) for part in sums)
        return first, second

    return run


def check_same(dg: Tensor, du: Tensor, features: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Both gradients ``[tokens, features]``, as descriptors want them, or raise ValueError."""
    dg, du = check_activations("dg", dg, features, like), check_activations("du", du, features, like)
    if len(dg) != len(du):
        raise ValueError(f"dg and du must have the same number of tokens, got {len(dg)} and {len(du)}")
    return aligned(dg.contiguous()), aligned(du.contiguous())
