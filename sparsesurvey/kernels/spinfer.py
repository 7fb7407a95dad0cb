"""SpInfer's kernel for unstructured weights and few tokens (Fan et al. 2025), a peer to beat: a library that is built apart.

Its source is no part of ours (xxyux/SpInfer, Apache-2.0; we read commit ee689064). Build it for the GPU at hand, and say
where:

    nvcc -O3 -arch=sm_90 -shared -Xcompiler -fPIC --use_fast_math -o libspinfer.so SpInfer/csrc/SpMM_API.cu
    export SPARSESURVEY_SPINFER=$PWD/libspinfer.so

The weight is stored in tiles of 64 x 64, each as four strips of 16 rows; a strip is 16 blocks of 8 x 8: one 64-bit mask each,
its lowest bit the upper left weight, and the weights that are kept, row by row. Blocks follow as upper left, lower left,
upper right, lower right of 16 columns: the registers of a 16 x 16 operand of mma.m16n8k16. A tile's weights are filled up to a
multiple of eight.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsesurvey.kernels import built
from sparsesurvey.kernels.built import NUMBER, PLACE
from sparsesurvey.kernels.search import seconds
from sparsesurvey.structure import Plan, Unavailable, check_activations

VARIABLE = "SPARSESURVEY_SPINFER"
NAME = "_Z25SpMM_SplitK_API_bitmap_v3P11CUstream_stPK6__halfS3_PKiS5_PKmS5_S3_PS1_iiiS8_i"  # a C++ function
TILE, STRIPS, MOST = 64, 4, 2304  # MOST: weights of a tile for which it has shared memory
TOKENS = 8, 16, 32, 64, 128  # that it has kernels for, and multiples of the last
SPLITS = range(1, 9)  # of the sum, that are tried


class Bitmaps(NamedTuple):
    values: Tensor  # float16, tile after tile
    tiles: Tensor  # int32, where each tile's values start, and two more than that: it looks ahead
    strips: Tensor  # int32 [tiles, 4] flat, where in its tile each strip starts, and one tile more
    masks: Tensor  # int64 [tiles * 64]
    largest: Tensor  # int32 [1], the most values of a tile, rounded up to a multiple of 64
    shape: tuple[int, int]


def arrange(weight: Tensor) -> Bitmaps:
    """A float16 weight ``[out, in]`` in that format; Unavailable for a shape or a tile that does not fit it."""
    (out, inn), device = weight.shape, weight.device
    if out % TILE or inn % TILE:
        raise Unavailable(f"needs a weight of multiples of {TILE}x{TILE}, got {out}x{inn}")
    # tile row, strip, upper or lower, row; tile column, pair of blocks, left or right, column
    parts = weight.detach().reshape(out // TILE, STRIPS, 2, 8, inn // TILE, 4, 2, 8).permute(0, 4, 1, 5, 6, 2, 3, 7)
    flat = parts.reshape(-1, STRIPS, 16, 64)
    kept = flat != 0
    masks = (kept.long() << torch.arange(64, device=device)).sum(-1)  # disjoint bits; the highest is the sign
    counts = kept.flatten(2).sum(-1)  # [tiles, strips]
    filled = -(-counts.sum(1) // 8) * 8
    largest = -(-int(filled.max()) // 64) * 64
    if largest > MOST:
        raise Unavailable(f"needs at most {MOST} weights in each tile of {TILE}x{TILE}, got {largest}")
    starts = pad(filled.cumsum(0), (1, 0))
    chosen, tiles = kept.flatten(1), starts[:-1, None]
    values = weight.new_zeros(int(starts[-1]))
    values[(chosen.cumsum(1) - 1 + tiles)[chosen]] = flat[kept]
    ahead = pad(starts, (0, 2), value=int(starts[-1])).int()
    strips = pad(counts.cumsum(1)[:, :-1], (1, 0)).flatten()
    most = torch.tensor([largest], dtype=torch.int32, device=device)
    return Bitmaps(values, ahead, pad(strips, (0, STRIPS)).int(), masks.flatten(), most, (out, inn))


def function(weight: Tensor) -> Any:
    """The library's product; Unavailable where it is not built or cannot multiply this weight."""
    return built.function("SpInfer", VARIABLE, {torch.float16: NAME}, [PLACE] * 9 + [NUMBER] * 3 + [PLACE, NUMBER], weight)


def plan(weight: Tensor) -> Plan:
    """Plan of ``x @ weight.T``. The first run with so many tokens searches in how many parts the sum is split."""
    product, best = function(weight), {}
    operand = arrange(weight)
    out, inn = operand.shape

    def multiply(x: Tensor, split: int) -> Tensor:
        y = x.new_empty(len(x), out)
        sums = y if split == 1 else x.new_empty(split, len(x), out)
        built.call("SpInfer", product, built.stream(x), operand.values, operand.values, operand.tiles, operand.strips,
                   operand.masks, operand.largest, x, y, out, len(x), inn, sums, split)
        return y

    def run(x: Tensor) -> Tensor:
        x = check_activations("x", x, inn, weight)
        if not len(x):
            return x.new_empty(0, out)
        with torch.cuda.device_of(x):
            whole = pad(x, (0, 0, 0, tokens(len(x)) - len(x))).contiguous()
            if len(whole) not in best:
                best[len(whole)] = min(splits(inn // TILE), key=lambda split: seconds(lambda: multiply(whole, split)))
            return multiply(whole, best[len(whole)])[: len(x)]

    return run


def tokens(count: int) -> int:
    """The next number of tokens that it takes.

    >>> [tokens(count) for count in (1, 8, 9, 100, 129)]
    [8, 8, 16, 128, 256]
    """
    return next((size for size in TOKENS if count <= size), -(-count // TOKENS[-1]) * TOKENS[-1])


def splits(steps: int) -> list[int]:
    """In how many parts a sum over so many tiles can be split: none may be left without a tile.

    >>> splits(12), splits(1)
    ([1, 2, 3, 4, 6], [1])
    """
    return [parts for parts in SPLITS if (parts - 1) * -(-steps // parts) < steps]
