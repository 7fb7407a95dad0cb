"""Skip what is not stored (skip.cu), for matrices of which very little is kept: layout and plan.

Every weight is multiplied by ordinary arithmetic, once a token, and nothing else is. What limits it is that each product
reads an activation from shared memory, 2 bytes for 2 FLOP: about 30 TFLOP/s on an H200, so that it can beat dense tensor
cores where more than 96 % are missing (an estimate). With few tokens it reads 4 bytes a stored weight, fewer than bits and
values (kernels/bitmap.py) where less than 6 % are kept.
"""

from math import ceil, prod
from typing import NamedTuple

import torch
from torch import Tensor

from sparsesurvey.kernels import bitmap, cuda
from sparsesurvey.kernels.features import feature_major
from sparsesurvey.kernels.mma_sp import DTYPES
from sparsesurvey.structure import Plan, Shape, Unavailable, check_activations

MOST = 8  # of so many weights one may be kept; with more this is a waste of anybody's time
FEW = 64  # tokens up to which they are one strip, and blocks of threads are small
STAGES = 4, 3, 2  # of the pipeline, of which one is being used
DEPTHS = 512, 256  # inputs of a stage; a stage of 64 tokens then takes 64 or 32 KiB


class Operand(NamedTuple):
    """Weights as the threads read them."""

    entries: Tensor  # int32: input in its block above, 16-bit value below; by block, output, input; four more to read beyond the end
    pointers: Tensor  # int32 [blocks * out + 1], where the entries of an output in a block start
    depth: int  # inputs of a block
    shape: Shape
    dtype: torch.dtype


class Launch(NamedTuple):
    """How a product is spread over the processors."""

    definitions: dict[str, int]
    each: int  # blocks of inputs of one part
    parts: int
    programs: int
    shared: int  # bytes a block of threads


def require(values: Tensor, shape: Shape) -> None:
    """Raise Unavailable unless so few weights of a matrix can be multiplied here."""
    if MOST * values.numel() > prod(shape):
        raise Unavailable(f"needs at most 1 of {MOST} weights kept, got {values.numel() / prod(shape):.0%}")
    bitmap.require(values)


def depth(most: int) -> int:
    """Inputs of a block: as many as let two stages of 64 tokens fit ``most`` bytes."""
    return next((size for size in DEPTHS if stage_bytes(size, 8) * 2 <= most), DEPTHS[-1])


def stage_bytes(depth: int, lanes: int) -> int:
    """Of a stage with 8 tokens for each of ``lanes`` threads."""
    return depth * 16 * lanes


def arrange(values: Tensor, rows: Tensor, columns: Tensor, shape: Shape, depth_: int | None = None) -> Operand:
    """Stored weights, 16-bit ``[n]``, at rows and columns int64 ``[n]``."""
    depth_ = depth_ or depth(cuda.shared_bytes(values.device))
    out, inn = shape
    order = (columns // depth_ * out * depth_ + rows * depth_ + columns % depth_).argsort()
    line = columns // depth_ * out + rows
    pointers = torch.nn.functional.pad(line.bincount(minlength=ceil(inn / depth_) * out).cumsum(0), (1, 0))
    bits = values.detach().view(torch.int16).long() & 0xFFFF
    entries = ((columns % depth_) << 16 | bits)[order].int()
    entries = torch.nn.functional.pad(entries, (0, 4 + -len(entries) % 4))
    return Operand(entries, pointers.int(), depth_, shape, values.dtype)


def launch(operand: Operand, tokens: int, processors: int, most: int) -> Launch:
    """Large blocks of threads for many tokens; for few, narrow ones, and the inputs in parts until every processor has one."""
    out, blocks = operand.shape[0], ceil(operand.shape[1] / operand.depth)
    lanes = next((size for size in (1, 2, 4) if 8 * size >= tokens), 8)
    warps, rows = (16, 8) if tokens > FEW else (4, lanes)
    heights, strips = ceil(out / (32 * warps // lanes * rows)), ceil(tokens / (8 * lanes))
    each = blocks if tokens > FEW else ceil(blocks / max(1, min(blocks, processors // heights)))
    stages = next((count for count in STAGES if stage_bytes(operand.depth, lanes) * count <= most), None)
    if stages is None:
        raise Unavailable(f"needs {2 * stage_bytes(operand.depth, lanes)} bytes of shared memory a block of threads, the device has {most}")
    definitions = {"LANES": lanes, "WARPS": warps, "ROWS": rows, "DEEP": operand.depth, "STAGES": stages}
    parts = ceil(blocks / each)
    return Launch(definitions, each, parts, heights * strips * parts, stage_bytes(operand.depth, lanes) * stages)


def product_plan(operand: Operand, name: str = "x") -> Plan:
    """Plan of ``y = x @ W.T``; feature-major in, feature-major out where the inputs are not in parts."""
    entries, pointers, depth_, (out, inn), dtype = operand
    like = entries.new_empty(0, dtype=dtype)
    processors, most = cuda.processors(entries.device), cuda.shared_bytes(entries.device)

    def run(x: Tensor) -> Tensor:
        x = check_activations(name, x, inn, like)
        if not len(x):
            return x.new_empty(0, out)
        made = launch(operand, len(x), processors, most)
        rows, features = feature_major(x)
        features = features and made.parts == 1
        y = x.new_empty(out, len(x)).T if features else x.new_empty(len(x), out)
        sums = y if made.parts == 1 else torch.empty(made.parts, *y.shape, dtype=torch.float32, device=x.device)
        definitions = {**made.definitions, "BFLOAT": DTYPES[dtype], "PARTS": int(made.parts > 1), "FEATURES": int(features)}
        cuda.launch("skip.cu", "product", definitions, made.programs, 32 * definitions["WARPS"], made.shared, x.device, entries, pointers,
                    rows, sums, len(x), rows.shape[1], inn, out, rows.stride(0), len(x) if features else out, ceil(inn / depth_), made.each)
        return y if made.parts == 1 else bitmap.add_up(sums, y)

    return run
