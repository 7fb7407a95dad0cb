"""A whole gated MLP in one Triton kernel, y = (silu(x @ G.T) * (x @ U.T)) @ D.T, whose hidden activations are never written.

A program keeps the sums of all outputs of 64 tokens in registers: 64 x 768 float32 are three quarters of those of a
multiprocessor, so 768 outputs are the most. It goes through the hidden features that both halves have blocks of; what it
computes of them is multiplied, from registers, with each block of D that reads them. So every weight is fetched anew for
each 64 tokens, where kernels apart fetch it for 128 or 256: this can win where there are few weights and the hidden
activations are most of the traffic.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsesurvey.kernels.block import Sparse, aligned, fetch, has_tma, operand, put, tuned
from sparsesurvey.kernels.launch import interpreting, processors, tuning
from sparsesurvey.kernels.swiglu import setter
from sparsesurvey.structure import Plan, Unavailable, check_activations

MOST = 768  # outputs
DEEP = 64  # at most so many inputs, and so many hidden features, at a time


@triton.jit
def whole(x, gate, up, down, y, pointers, sources, rows, table, tokens, listed, stored, kept, x_width, value_width, down_width, y_width,
          KEY, TARGET: tl.constexpr, SOURCE: tl.constexpr, OUTPUTS: tl.constexpr, COLS: tl.constexpr, EXACT: tl.constexpr,
          READY: tl.constexpr, TMA: tl.constexpr, PROGRAMS: tl.constexpr,
          BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BO: tl.constexpr):
    """``rows`` lists the block rows of gate that are worth computing, ``table`` ``[columns of D, OUTPUTS]`` where its blocks are."""
    PIECES: tl.constexpr = TARGET // BN
    STEPS: tl.constexpr = SOURCE // BK
    for tile in tl.range(tl.program_id(0), tl.cdiv(tokens, BT), PROGRAMS):
        token = tile * BT
        sums = ()
        for _ in tl.static_range(OUTPUTS):
            sums = sums + (tl.zeros((BT, BO), dtype=tl.float32),)
        for piece in tl.range(0, listed * PIECES):
            row = tl.load(rows + piece // PIECES)
            part = piece % PIECES * BN
            hidden = row * TARGET + part
            first = tl.load(pointers + row) * STEPS
            last = tl.load(pointers + row + 1) * STEPS
            g = tl.zeros((BT, BN), dtype=tl.float32)
            u = tl.zeros((BT, BN), dtype=tl.float32)
            source = tl.load(sources + first // STEPS)
            for step in tl.range(first, last):
                next_source = tl.load(sources + (step + 1) // STEPS)
                deep = step % STEPS * BK
                place = step // STEPS * TARGET + part
                left = fetch(x, token, source * SOURCE + deep, tokens, x_width, BT, BK, TMA)
                g = tl.dot(left, fetch(gate, place, deep, stored, value_width, BN, BK, TMA).T, g,
                           input_precision="ieee" if EXACT else None)
                u = tl.dot(left, fetch(up, place, deep, stored, value_width, BN, BK, TMA).T, u,
                           input_precision="ieee" if EXACT else None)
                source = next_source
            h = (g / (1 + tl.exp(-g)) * u).to(gate.dtype if TMA else gate.dtype.element_ty)
            added = ()
            for output in tl.static_range(OUTPUTS):
                total = sums[output]
                block = tl.load(table + hidden // COLS * OUTPUTS + output)
                if block >= 0:
                    right = fetch(down, block * BO, hidden % COLS, kept, down_width, BO, BN, TMA).T
                    total = tl.dot(h, right, total, input_precision="ieee" if EXACT else None)
                added = added + (total,)
            sums = added
        for output in tl.static_range(OUTPUTS):
            put(y, token, output * BO, tokens, y_width, sums[output], BT, BO, TMA)


def configs() -> list[triton.Config]:
    if interpreting():
        return [triton.Config({"BT": 32}, num_warps=4, num_stages=2)]
    return [triton.Config({"BT": 64}, num_warps=8, num_stages=stages) for stages in (2, 3, 4)]


tuned_whole = tuned(whole, configs(), ["TARGET", "SOURCE", "OUTPUTS", "COLS", "KEY", "listed", "stored", "kept"],
                    setter(x="TK", gate="NK", up="NK", down="ON", y="TO"))


def whole_plan(gate: Sparse, up: Sparse, down: Sparse) -> Plan:
    """Plan of ``y = run(x)`` for three weights arranged for the forward product, gate and up with the same blocks."""
    (targets, width), (sources, depth), (outputs, height), (across, cols) = gate.target, gate.source, down.target, down.source
    if across * cols != targets * width:
        raise ValueError(f"down must have the {targets * width} outputs of gate as its inputs, got {across * cols}")
    if outputs * height > MOST:
        raise Unavailable(f"needs at most {MOST} outputs, whose sums fit the registers, got {outputs * height}")
    device = down.values.device
    tma, programs = has_tma(down.values), processors(device)
    table = torch.full((across, outputs), -1, dtype=torch.int32, device=device)
    rows = torch.arange(outputs, device=device).repeat_interleave(down.pointers.diff())
    table[down.sources[:-1].long(), rows] = down.places[:-1]
    read = (table >= 0).any(1).repeat_interleave(cols).view(targets, width).any(1)
    listed = (read & (gate.pointers.diff() > 0)).nonzero().flatten().int()
    weights = [part.detach().contiguous().view(-1, part.shape[-1]) for part in (gate.values, up.values, down.values)]
    sizes = {"TARGET": width, "SOURCE": depth, "OUTPUTS": outputs, "COLS": cols,
             "BN": min(width, cols, DEEP), "BK": min(depth, DEEP), "BO": height}

    def run(x: Tensor) -> Tensor:
        x = aligned(check_activations("x", x, sources * depth, gate.values).contiguous())
        y = x.new_empty(len(x), outputs * height)
        if not len(x) or not len(listed):
            return y.zero_()
        with torch.cuda.device_of(x):
            tuned_whole[(programs,)](
                *(operand(matrix, tma) for matrix in (x, *weights, y)), gate.pointers, gate.sources, listed, table, len(x), len(listed),
                len(weights[0]), len(weights[2]), x.shape[1], depth, cols, y.shape[1], **sizes, TMA=tma,
                EXACT=x.dtype == torch.float32, KEY=tuning(x), PROGRAMS=programs)
        return y

    return run
