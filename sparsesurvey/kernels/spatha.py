"""Spatha's kernel for V:N:M (Castro et al. 2023), made for Ampere, a peer to beat: a library that the reader builds.

Its source is no part of ours (UDC-GAC/venom, Apache-2.0; we read commit 8ddaf38e). Build it with our one C function,
spatha.cu, for the GPU at hand, and say where:

    nvcc -O3 -std=c++17 -arch=sm_90 -shared -Xcompiler -fPIC -DOUT_32B -I venom/include/spatha/block_sparse \\
         -o libspatha.so sparsesurvey/kernels/spatha.cu
    export SPARSESURVEY_SPATHA=$PWD/libspatha.so

OUT_32B is the plainer of its two ways to write the result: in the other one, as we read it, all warps side by side along the
tokens share one buffer, which is right for tiles of one warp. Tiles and stages are from its own list.

The weight's quads (the four inputs of a tile) are stored as ``mma.sp.m16n8k32`` reads them, but row g and row g + 8 of an
instruction are neighbours in the matrix: 16 rows by 4 quads are a piece, in which a thread reads four rows of one quad.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsesurvey.kernels import built
from sparsesurvey.kernels.built import NUMBER, PLACE
from sparsesurvey.kernels.search import seconds
from sparsesurvey.structure import Plan, Shape, Unavailable, check_activations

VARIABLE = "SPARSESURVEY_SPATHA"
HEIGHTS, CHOICES, TOKENS = (64, 128), 5, 128  # panels, tiles that are tried, and what tokens are filled up to a multiple of
QUADS = 8  # of a row that one instruction sums over


class Operand(NamedTuple):
    values: Tensor  # float16 [out / 16, quads / 4, 4 threads, 4 quads, 4 rows, 2]
    positions: Tensor  # int32 [out / 32, quads / 4, 16]: of two rows, 4 bits a quad
    columns: Tensor  # int32 [panels, quads, 4], of the tile
    shape: Shape


def arrange(values: Tensor, positions: Tensor, columns: Tensor, shape: Shape) -> Operand:
    """``values`` and ``positions`` in the quad ``[out, quads, 2]``, ``columns`` in the tile ``[panels, quads, 4]``."""
    out, quads, _ = values.shape
    pieces = values.detach().reshape(out // 16, 4, 4, quads // 4, 4, 2).permute(0, 3, 1, 4, 2, 5)
    codes = (positions[..., 0] | positions[..., 1] << 2).long().view(out, quads // 4, 4)
    rows = sum(codes[..., quad] << 4 * quad for quad in range(4))  # [out, quads / 4], 16 bits
    pairs = rows.view(out // 32, 16, 2, quads // 4)
    words = (pairs[:, :, 0] | pairs[:, :, 1] << 16).int().transpose(1, 2)  # the highest bit is the sign
    return Operand(pieces.contiguous(), words.contiguous(), columns.int().contiguous(), shape)


def function(values: Tensor) -> Any:
    """The library's product; Unavailable where it is not built or cannot multiply these values."""
    return built.function("Spatha", VARIABLE, {torch.float16: "spatha_product"}, [NUMBER] * 6 + [PLACE] * 6, values)


def plan(values: Tensor, positions: Tensor, columns: Tensor, v: int, m: int, shape: Shape) -> Plan:
    """Plan of ``x @ W.T`` for V:2:M as ``arrange`` takes it. The first run with so many tokens searches for the tile."""
    if v not in HEIGHTS or values.shape[2] != 2 or values.shape[1] % QUADS:
        raise Unavailable(f"needs panels of {' or '.join(map(str, HEIGHTS))} outputs, 2 of 4 columns of a tile and a multiple "
                          f"of {QUADS} tiles, got {v}, {values.shape[2]} and {values.shape[1]}")
    product, best = function(values), {}
    operand, (out, inn) = arrange(values, positions, columns, shape), shape

    def multiply(rows: Tensor, choice: int) -> Tensor:
        y = rows.new_empty(out, rows.shape[1])
        built.call("Spatha", product, v, choice, out, rows.shape[1], inn, m, operand.values, operand.positions,
                   operand.columns, rows, y, built.stream(rows))
        return y

    def run(x: Tensor) -> Tensor:
        x = check_activations("x", x, inn, values)
        if not len(x):
            return x.new_empty(0, out)
        with torch.cuda.device_of(x):
            rows = built.feature_rows(x, TOKENS)
            width = rows.shape[1]
            if width not in best:
                best[width] = min(range(CHOICES), key=lambda choice: seconds(lambda: multiply(rows, choice)))
            return multiply(rows, best[width]).T[: len(x)]

    return run
