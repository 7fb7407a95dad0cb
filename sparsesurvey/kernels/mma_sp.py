"""Panels with 2:4 inside on sparse tensor cores (mma_sp.cu): the layout of the weights, and the plan.

mma.sp.m16n8k32 multiplies 16 rows of 32 inputs, two of every four of them stored, by 8 tokens. Thread ``4 g + t`` of a
warp (g from 0 to 7, t from 0 to 3) holds of rows g and g + 8 the two values of quads t and 4 + t, a quad being four
inputs. A quad's code is ``first | second << 2`` for its two positions; 16 bits hold four quads of one row, the lower half
of a word those of row g and the upper half those of row g + 8. Of every four threads two give such words, h = 0 for the
quads 0 to 3 and h = 1 for the quads 4 to 7: threads ``4 g + h``, or ``4 g + 2 + h`` for the selector 1. So one word of
each thread serves two instructions: a step of 64 inputs. (PTX ISA, "Matrix fragments for sparse mma.m16n8k32".)
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sparsesurvey.kernels import cuda
from sparsesurvey.kernels.features import feature_major
from sparsesurvey.structure import Plan, Shape, Unavailable, check_activations

QUADS, DEEP = 16, 64  # quads and inputs of a step
STAGES = 3, 4  # of the pipeline: at least, and at most
SPARE = 4  # the code of positions 0 and 1: what fills a step up has zeros there
DTYPES = {torch.bfloat16: 1, torch.float16: 0}
Tile = dict[str, int]

# Warps and instruction tiles (see mma_sp.cu) by the outputs of a block of threads: for many tokens, and for few.
WIDE = {128: (2, 2, 4, 8), 64: (1, 4, 4, 8), 32: (1, 4, 2, 8), 16: (1, 4, 1, 8)}
NARROW = {128: (4, 1, 2, 4), 64: (4, 1, 1, 4), 32: (2, 1, 1, 4), 16: (1, 1, 1, 4)}


class Operand(NamedTuple):
    """Weights as the threads read them, padded to whole steps of every panel."""

    weights: Tensor  # [steps, height / 16, 2, 32, 8]: of each half of a step, the eight values of each thread
    positions: Tensor  # int32 [steps, height / 16, 32]
    columns: Tensor  # int32 [steps, 64], the inputs; what fills a panel up names its last one again
    pointers: Tensor  # int32 [panels + 1], where the steps of each panel start
    shape: Shape


def arrange(values: Tensor, positions: Tensor, columns: Tensor, counts: Tensor, shape: Shape) -> Operand:
    """``values`` and their ``positions``, ``[quads, height, 1 or 2]`` and rising, of the quads' inputs ``columns [quads, 4]``.

    ``counts``: quads of each panel, which follow each other.
    """
    values, positions = two_of_four(values, positions)
    (quads, height, _), counts, device = values.shape, counts.cpu(), values.device
    filled = -(-counts // QUADS) * QUADS
    pointers = torch.nn.functional.pad(filled.cumsum(0), (1, 0))
    shift = pointers[:-1] - counts.cumsum(0) + counts
    places = (torch.arange(quads) + shift.repeat_interleave(counts)).to(device)
    total = int(pointers[-1])
    stored = values.new_zeros(total, height, 2)
    stored[places] = values.detach()
    codes = torch.full((total, height), SPARE, dtype=torch.int32, device=device)
    codes[places] = (positions[..., 0] | positions[..., 1] << 2).int()
    last = (counts.cumsum(0) - 1).repeat_interleave(filled).to(device)
    inputs = columns[last, -1:].expand(-1, 4).int().contiguous()
    inputs[places] = columns.int()
    pointers = (pointers // QUADS).int().to(device)
    return Operand(fragments(stored), words(codes), inputs.view(-1, DEEP), pointers, shape)


def fragments(values: Tensor) -> Tensor:
    """``[quads, height, 2]`` to what each thread holds: ``[steps, height / 16, 2, 32, 8]``."""
    parts = values.view(-1, 2, 2, 4, values.shape[1] // 16, 2, 8, 2)  # step, half, t < 4 or more, t, block, g < 8 or more, g, value
    return parts.permute(0, 4, 1, 6, 3, 2, 5, 7).reshape(len(parts), parts.shape[4], 2, 32, 8)


def words(codes: Tensor) -> Tensor:
    """Codes int32 ``[quads, height]`` to a word for each thread: int32 ``[steps, height / 16, 32]``."""
    quads = codes.view(-1, 2, 2, 4, codes.shape[1] // 16, 2, 8)  # step, selector, h, quad, block, g < 8 or more, g
    low, high = (sum(part[:, :, :, quad] << 4 * quad for quad in range(4)) for part in quads.unbind(5))
    word = (low.long() | high.long() << 16).int()  # step, selector, h, block, g; the highest bit is the sign
    return word.permute(0, 3, 4, 1, 2).reshape(len(word), -1, 32)


def two_of_four(values: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """One of four as two of four, the other one zero: ``[..., n]`` of n = 1 or 2 values and positions to ``[..., 2]``."""
    if values.shape[-1] == 2:
        return values, positions
    last = positions == 3  # then 2 and 3, else this one and 3
    none = torch.zeros_like(values)
    return torch.cat([torch.where(last, none, values), torch.where(last, values, none)], -1), \
        torch.cat([torch.where(last, 2, positions), torch.full_like(positions, 3)], -1)


def compressed(quads: Tensor) -> tuple[Tensor, Tensor]:
    """Weights ``[quads, height, 4]`` of which a row has at most two, as those two and their rising positions."""
    positions = (quads != 0).to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :2].sort(-1).values
    return quads.gather(-1, positions), positions


def require(values: Tensor, n: int, m: int, height: int) -> None:
    """Raise Unavailable unless sparse tensor cores can multiply panels of so many outputs, n of every m inputs, here."""
    if values.dtype not in DTYPES:
        raise Unavailable(f"needs bfloat16 or float16, got {values.dtype}")
    if n > 2 or m != 4:
        raise Unavailable(f"needs at most 2 of every 4 columns, got {n} of {m}")
    if height % 16:
        raise Unavailable(f"needs panels of a multiple of 16 outputs, got {height}")
    if values.device.type != "cuda":
        raise Unavailable(f"needs a CUDA device, got an operand on {values.device}")
    have = torch.cuda.get_device_capability(values.device)
    if have < (8, 0):
        raise Unavailable(f"needs CUDA compute capability 8.0, got {have[0]}.{have[1]}")
    cuda.require_cupy()


def tile(height: int, tokens: int, panels: int, processors: int) -> Tile:
    """The tile of outputs and tokens for a product: wide, unless that would leave processors idle."""
    outputs = next(size for size in WIDE if height % size == 0)
    chosen = WIDE[outputs]
    if -(-tokens // (8 * chosen[1] * chosen[3])) * panels * (height // outputs) < processors:
        chosen = NARROW[outputs]
    return dict(zip(("WM", "WN", "MF", "NF"), chosen))


def sizes(tile: Tile, stages: int) -> tuple[int, int, int, int]:
    """Outputs, tokens, threads and bytes of shared memory of a block of threads."""
    outputs, tokens = 16 * tile["WM"] * tile["MF"], 8 * tile["WN"] * tile["NF"]
    return outputs, tokens, 32 * tile["WM"] * tile["WN"], 2 * DEEP * (tokens + 8) * stages


def stages(tile: Tile, most: int) -> int:
    """As many as let two blocks of threads share the ``most`` bytes of a processor; at least three, if one may have them."""
    each = sizes(tile, 1)[3]
    return min(max(STAGES[0], most // 2 // each), STAGES[1], most // each)


def rows_plan(name: str, weight: Tensor) -> Plan:
    """Plan for a weight ``[out, in]`` of which a row has at most 2 of every 4 inputs: panels that keep all of them."""
    out, inn = weight.shape
    height = next((size for size in WIDE if out % size == 0), out)
    require(weight, 2, 4, height)
    if inn % 4:
        raise Unavailable(f"needs a multiple of 4 inputs, got {inn}")
    return product_plan(arrange(*all_quads(weight, height), weight.shape), name)


def all_quads(weight: Tensor, height: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values, positions, inputs and quads a panel of such a weight, as ``arrange`` takes them."""
    panels, quads = len(weight) // height, weight.shape[1] // 4
    values, positions = compressed(weight.reshape(panels, height, quads, 4).transpose(1, 2).flatten(0, 1))
    columns = torch.arange(weight.shape[1], device=weight.device).view(-1, 4).repeat(panels, 1)
    return values, positions, columns, torch.full((panels,), quads)


def product_plan(operand: Operand, name: str = "x") -> Plan:
    """Plan of ``y = x @ W.T``; feature-major in, feature-major out, as those of ``kernels.panel``."""
    weights, positions, columns, pointers, (out, inn) = operand
    panels, height = len(pointers) - 1, out // (len(pointers) - 1)
    processors = cuda.processors(weights.device)
    most = cuda.shared_bytes(weights.device)

    def run(x: Tensor) -> Tensor:
        x = check_activations(name, x, inn, weights)
        if not len(x):
            return x.new_empty(0, out)
        rows, features = feature_major(x)
        y = x.new_empty(out, len(x)).T if features else x.new_empty(len(x), out)
        chosen = tile(height, len(x), panels, processors)
        depth = stages(chosen, most)
        outputs, tokens, threads, shared = sizes(chosen, depth)
        programs = -(-len(x) // tokens) * panels * (height // outputs)
        definitions = {**chosen, "STAGES": depth, "BFLOAT": DTYPES[x.dtype], "FEATURES": int(features)}
        cuda.launch("mma_sp.cu", "product", definitions, programs, threads, shared, x.device, weights, positions, columns,
                    pointers, rows, y, len(x), rows.shape[1], panels, height, rows.stride(0), max(y.stride()))
        return y

    return run
