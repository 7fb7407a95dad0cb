"""The first half of a gated MLP in one Triton kernel: h = silu(x @ G.T) * (x @ U.T) for two block-sparse weights of one pattern.

The tile of x is fetched once for both products, and neither of them is ever written to memory. The backward kernel
computes both again and writes what the three products of the backward pass start from, dg and du.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsesurvey.kernels.block import DEEP, WIDE, Sparse, aligned, fetch, has_tma, operand, put, tuned
from sparsesurvey.kernels.launch import bucket, interpreting, processors
from sparsesurvey.structure import Plan, check_activations


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


def set_blocks(arguments: dict[str, Any]) -> bool:
    """The descriptors' tiles are those of the configuration that is tried."""
    BT, BN, BK = (arguments[name] for name in ("BT", "BN", "BK"))
    tiles = {"x": [BT, BK], "gate": [BN, BK], "up": [BN, BK], "dh": [BT, BN], "first_out": [BT, BN], "second_out": [BT, BN]}
    for name, tile in tiles.items() if arguments["TMA"] else ():
        arguments[name].block_shape = tile
    return True


def configs() -> list[triton.Config]:
    if interpreting():
        return [triton.Config({"BT": 32}, num_warps=4, num_stages=2)]
    tried = (128, 8, 3), (128, 8, 4), (128, 8, 2), (64, 4, 3), (64, 4, 4), (64, 8, 4)
    return [triton.Config({"BT": tokens}, num_warps=warps, num_stages=stages)
            for tokens, warps, stages in tried]


tuned_gated = tuned(gated, configs(), ["TARGET", "SOURCE", "BACKWARD", "KEY", "targets", "stored"], set_blocks)


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
                    **sizes, TMA=tma, BACKWARD=backward, EXACT=x.dtype == torch.float32, KEY=bucket(len(x)), PROGRAMS=programs)
        return tuple(outs) if backward else outs[0]

    return run
