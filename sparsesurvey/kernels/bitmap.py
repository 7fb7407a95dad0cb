"""Load sparse, compute dense (bitmap.cu), for weights whose zeros are anywhere and at most 64 tokens: layout and plan.

With few tokens a product waits for the weight's bytes, so these are what has to be few; tensor cores have time to multiply
the zeros (Flash-LLM, Xia et al. 2023; SpInfer, Fan et al. 2025). A tile of 64 outputs x 64 inputs is a bit for each weight
and its values: 2 d + 1/8 bytes a weight at density d, in 16-bit numbers. From about a fifth down, a bit for each two
neighbouring inputs and both their values wherever one of them is kept: more bytes, but half the steps to place them.

mma.m16n8k16 multiplies 16 outputs of 16 inputs. Thread ``4 g + t`` (g from 0 to 7, t from 0 to 3) holds of outputs g and
g + 8 the inputs 2 t, 2 t + 1 and 2 t + 8, 2 t + 9: four registers, in the order (g, left), (g + 8, left), (g, right),
(g + 8, right). A tile is 4 x 4 of these, i downwards and s to the right. (PTX ISA, "Matrix fragments for mma.m16n8k16".)
"""

from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from sparsesurvey.kernels import cuda
from sparsesurvey.kernels.mma_sp import DTYPES
from sparsesurvey.structure import Plan, Shape, Unavailable, check_activations

SIDE, MOST = 64, 64  # of a tile, and tokens
THICK = 0.8  # bytes a weight from which pairs would be read for longer than single values take to place (an estimate)
DOWN = 4  # tiles below each other in a block of threads, which share its activations
SLICES = {1: (4, 2, 1), 2: (4, 2, 1), 4: (2, 1), 8: (2, 1)}  # warps a tile, by eights of tokens; more would have too few registers
STAGES = 4, 3, 2  # of the pipeline, of which one is being used


class Operand(NamedTuple):
    """Weights as the threads read them."""

    records: Tensor  # int32: of each tile its bits, then its values filled up to 16 bytes; from left to right, then down
    starts: Tensor  # int32 [tiles + 1], in units of 16 bytes
    unit: int  # weights a bit, 1 or 2
    capacity: int  # units of the largest tile
    shape: Shape
    dtype: torch.dtype


class Launch(NamedTuple):
    """How a product is spread over the processors."""

    definitions: dict[str, int]
    each: int  # tiles across of one part
    parts: int
    shared: int  # bytes a block of threads


def head(unit: int) -> int:
    """Bytes of a tile that are bits."""
    return SIDE * SIDE // 8 // unit


def arrange(values: Tensor, rows: Tensor, columns: Tensor, shape: Shape, unit: int | None = None) -> Operand:
    """Stored weights, 16-bit ``[n]``, at rows and columns int64 ``[n]``; by default whichever unit is thought to be faster."""
    down, across = ceil(shape[0] / SIDE), ceil(shape[1] / SIDE)
    tile = rows // SIDE * across + columns // SIDE
    size = down * across
    place = places(rows % SIDE, columns % SIDE)
    if unit is None or unit == 2:
        pairs, pair = (tile * (SIDE * SIDE) + thread_major(*place)).unique(return_inverse=True)
        unit = unit or (2 if 4 * len(pairs) + size * head(2) < THICK * size * SIDE * SIDE else 1)
    lane, step, operand, register, odd = place
    if unit == 2:
        tile, key = pairs // (SIDE * SIDE), pairs % (SIDE * SIDE)
        lane, word, bit = key // 64, key % 64 // 32, key % 32
        stored = values.new_zeros(len(pairs), 2)
        stored[pair, odd] = values.detach()
    else:
        order = (tile * (SIDE * SIDE) + half_major(*place)).argsort()
        stored, tile = values.detach()[order], tile[order]
        lane, word, bit = lane[order], step[order], (8 * operand + 2 * register + odd)[order]
    counts = tile.bincount(minlength=size)
    units = (head(unit) + 2 * unit * counts + 15) // 16
    starts = torch.nn.functional.pad(units.cumsum(0), (1, 0))
    records = torch.zeros(4 * int(starts[-1]), dtype=torch.int32, device=values.device)
    each = torch.arange(len(stored), device=tile.device) - (counts.cumsum(0) - counts)[tile]  # of its tile
    where = starts[tile] * 16 + head(unit)
    records.view(values.dtype)[(where + 2 * unit * each)[:, None] // 2 + torch.arange(unit, device=tile.device)] = stored.view(-1, unit)
    bits = torch.zeros(size * head(unit) // 4, dtype=torch.int64, device=tile.device)
    bits.index_add_(0, tile * (head(unit) // 4) + lane * (4 // unit) + word, 1 << bit)
    words = (starts[:-1] * 4)[:, None] + torch.arange(head(unit) // 4, device=tile.device)
    records[words.flatten()] = bits.int()  # the highest bit is the sign
    return Operand(records, starts.int(), unit, int(units.max()), shape, values.dtype)


def places(row: Tensor, column: Tensor) -> tuple[Tensor, ...]:
    """Of a row and column in a tile: the thread, s, i, the register, and which of its two numbers."""
    register = row % 16 // 8 + column % 16 // 8 * 2
    return row % 8 * 4 + column % 8 // 2, column // 16, row // 16, register, column % 2


def half_major(lane: Tensor, step: Tensor, operand: Tensor, register: Tensor, odd: Tensor) -> Tensor:
    """Order of single values: by s, i, left or right half, thread, upper or lower row, input."""
    return (((step * 4 + operand) * 2 + register // 2) * 32 + lane) * 4 + register % 2 * 2 + odd


def thread_major(lane: Tensor, step: Tensor, operand: Tensor, register: Tensor, odd: Tensor) -> Tensor:
    """Order of pairs: by thread, s, i, register."""
    return lane * 64 + step * 16 + operand * 4 + register


def require(values: Tensor) -> None:
    """Raise Unavailable unless such a weight can be multiplied here."""
    if values.dtype not in DTYPES:
        raise Unavailable(f"needs bfloat16 or float16, got {values.dtype}")
    if values.device.type != "cuda":
        raise Unavailable(f"needs a CUDA device, got an operand on {values.device}")
    have = torch.cuda.get_device_capability(values.device)
    if have < (8, 0):
        raise Unavailable(f"needs CUDA compute capability 8.0, got {have[0]}.{have[1]}")
    cuda.require_cupy()


def launch(operand: Operand, tokens: int, processors: int, most: int) -> Launch:
    """One block of threads for each processor if it can be, with as many warps and stages as ``most`` bytes have room for.

    The inputs are cut in parts until there are enough blocks, or until the activations of a part leave room for weights.
    """
    down, across = (ceil(side / SIDE) for side in operand.shape)
    eights = next(size for size in SLICES if 8 * size >= tokens)
    high = min(DOWN, down)
    groups = ceil(down / high)
    for parts in range(min(across, max(1, processors // groups)), across + 1):
        each = ceil(across / parts)
        for slices in SLICES[eights]:
            for stages in STAGES:
                shared = shared_bytes(eights, high, slices, stages, each, operand.capacity)
                if shared <= most and slices <= max(1, each):
                    definitions = {"DOWN": high, "SLICES": slices, "NT": eights, "UNIT": operand.unit, "STAGES": stages}
                    return Launch(definitions, each, ceil(across / each), shared)
    raise Unavailable(f"needs {shared} bytes of shared memory a block of threads, the device has {most}")


def shared_bytes(eights: int, high: int, slices: int, stages: int, each: int, capacity: int) -> int:
    """Activations and the warps' tiles; then, in their place, the warps' sums."""
    activations = 8 * eights * (each * SIDE + 8) * 2
    return max(activations + high * slices * stages * capacity * 16, high * slices * 8 * eights * (SIDE + 4) * 4)


def product_plan(operand: Operand, name: str = "x") -> Plan:
    """Plan of ``y = x @ W.T``, for at most 64 tokens; more raise Unavailable."""
    records, starts, _, capacity, (out, inn), dtype = operand
    like = records.new_empty(0, dtype=dtype)
    processors, most = cuda.processors(records.device), cuda.shared_bytes(records.device)

    def run(x: Tensor) -> Tensor:
        x = check_activations(name, x, inn, like)
        if len(x) > MOST:
            raise Unavailable(f"needs at most {MOST} tokens, got {len(x)}")
        y = x.new_empty(len(x), out)
        if not len(x):
            return y
        x, made = rows_of_16_bytes(x), launch(operand, len(x), processors, most)
        definitions = {**made.definitions, "BFLOAT": DTYPES[dtype], "PARTS": int(made.parts > 1)}
        sums = y if made.parts == 1 else torch.empty(made.parts, *y.shape, dtype=torch.float32, device=x.device)
        high = definitions["DOWN"]
        cuda.launch("bitmap.cu", "product", definitions, ceil(out / (SIDE * high)) * made.parts, 32 * high * definitions["SLICES"],
                    made.shared, x.device, records, starts, x, sums, len(x), x.shape[1], x.stride(0), out,
                    ceil(inn / SIDE), made.each, capacity)
        return y if made.parts == 1 else add_up(sums, y)

    return run


def rows_of_16_bytes(x: Tensor) -> Tensor:
    """``x`` with rows that start at multiples of 16 bytes, filled up with zeros to a multiple; itself where it is so."""
    if x.stride(1) == 1 and not (x.shape[1] % 8 or x.stride(0) % 8 or x.data_ptr() % 16):
        return x
    filled = x.new_zeros(len(x), ceil(x.shape[1] / 8) * 8)
    filled[:, : x.shape[1]] = x
    return filled


def add_up(sums: Tensor, y: Tensor) -> Tensor:
    """Float32 sums of the parts, ``[parts, ...]``, added to ``y [...]``, always in the same order."""
    cuda.launch("sums.cu", "add_up", {"BFLOAT": DTYPES[y.dtype]}, ceil(y.numel() / 256), 256, 0, y.device, sums, y, len(sums), y.numel())
    return y
