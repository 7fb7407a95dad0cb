"""Panels in Triton: outputs that share their inputs are one dense product of the inputs gathered, on dense tensor cores.

The activations are gathered feature-major, ``x.T``: there an input is contiguous along the tokens and comes in pieces
of 16 bytes (cp.async), where a column of a row-major matrix would come in single numbers. Who hands over a transposed
view of a feature-major matrix saves the copy, and gets its result feature-major too. A gather by tensor descriptor
would need Blackwell.

What a panel keeps is no help to the input gradient's sums over the outputs. There are two ways: ``spread`` adds in
registers and does all of the dense arithmetic, from the compressed weights; ``scatter`` does that of the panels only,
and adds in memory, which takes high panels that keep little to be worth it.
"""

from typing import NamedTuple, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsesurvey.kernels.block import aligned, split
from sparsesurvey.kernels.features import ROUND, feature_major
from sparsesurvey.kernels.launch import interpreting, processors, require, tuning
from sparsesurvey.structure import Plan, Shape, Unavailable, check_activations, check_pair

LOW, WIDE = 16, 128  # the fewest and the most outputs of one instruction tile
DEEP = 64  # inputs that are summed in one step; panels are filled up to a multiple
LONG = 512  # inputs on average from which the weight gradient takes twice as many at a time


class Panel(Protocol):
    """The weight of some outputs, as in ``structures.block``."""

    columns: Tensor  # int64 [k], which groups of inputs it is made of
    weight: Tensor  # [k * inputs in a group, rows]


class Panels(NamedTuple):
    """All panels of a matrix below each other, each filled up with zeros to a multiple of ``step`` inputs."""

    weights: Tensor  # [stored, width]: for every listed input the weights of the panel's outputs, zeros above ``height``
    inputs: Tensor  # int32 [stored + step]: which input that is; what fills a panel up names its last one again
    pointers: Tensor  # int32 [panels + 1]
    places: Tensor  # int64 [listed], where in ``weights`` each listed input is
    order: Tensor  # int32 [panels], the one with the most inputs first
    height: int
    step: int
    shape: Shape


def stack(panels: list[Panel], grid: Shape, like: Tensor) -> Panels:
    """Panels as the CPU's plans take them: ``grid`` of groups, ``like`` ``[groups, height, width]``; see ``gather_plan``."""
    (down, across), (_, height, each) = grid, like.shape
    device = like.device
    counts = torch.tensor([len(panel.weight) for panel in panels])
    step = DEEP if counts.sum() < LONG * down else 2 * DEEP
    filled = -(-counts // step) * step
    pointers = torch.nn.functional.pad(filled.cumsum(0), (1, 0))
    total = int(pointers[-1])
    shift = pointers[:-1] - counts.cumsum(0) + counts
    places = (torch.arange(int(counts.sum())) + shift.repeat_interleave(counts)).to(device)
    columns = torch.cat([panel.columns for panel in panels])
    listed = (columns.unsqueeze(1) * each + torch.arange(each, device=device)).flatten()
    weights = like.new_zeros(total, max(LOW, power_of_two(height)) if height < WIDE else -(-height // WIDE) * WIDE)
    weights[places, :height] = torch.cat([panel.weight for panel in panels]).detach()
    inputs = torch.zeros(total + step, dtype=torch.int32, device=device)
    last = (counts.cumsum(0) - 1).repeat_interleave(filled).to(device)  # of the panel that an input is to fill up
    if len(listed):
        inputs[:total] = listed[last].int()
        inputs[places] = listed.int()
    order = counts.argsort(descending=True, stable=True).int().to(device)
    return Panels(weights, inputs, pointers.int().to(device), places, order, height, step, (down * height, across * each))


def power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


@triton.jit
def gather(xt, weights, y, inputs, pointers, order, tokens, row_width, panels, x_width, value_width, y_width, KEY,
           HEIGHT: tl.constexpr, PIECES: tl.constexpr, FEATURES: tl.constexpr, EXACT: tl.constexpr,
           BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr):
    """``y[:, panel] = xt[inputs].T @ weights`` for one panel and BT tokens.

    GROUP strips of tokens go through all panels before the next ones, so that their activations stay in the L2 cache.
    """
    work = panels * PIECES * GROUP
    first = tl.program_id(0) // work * GROUP
    side = tl.minimum(tl.cdiv(tokens, BT) - first, GROUP)
    token = (first + tl.program_id(0) % work % side) * BT + tl.arange(0, BT)
    piece = tl.program_id(0) % work // side
    panel = tl.load(order + piece // PIECES)
    across = piece % PIECES * BN + tl.arange(0, BN)
    deep = tl.arange(0, BK)
    total = tl.zeros((BT, BN), dtype=tl.float32)
    start, stop = tl.load(pointers + panel), tl.load(pointers + panel + 1)
    source = tl.load(inputs + start + deep)
    for step in tl.range(start, stop, BK):
        after = tl.load(inputs + step + BK + deep)
        left = tl.load(xt + source.to(tl.int64)[:, None] * x_width + token[None, :], mask=token[None, :] < row_width, other=0.0)
        right = tl.load(weights + (step + deep).to(tl.int64)[:, None] * value_width + across[None, :])
        total = tl.dot(left.T, right, total, input_precision="ieee" if EXACT else None)
        source = after
    column = panel * HEIGHT + across
    inside = across[None, :] < HEIGHT
    if FEATURES:  # all rows are full
        places = column.to(tl.int64)[None, :] * y_width + token[:, None]
        tl.store(y + places, total.to(y.dtype.element_ty), mask=(token[:, None] < row_width) & inside)
    else:
        places = token.to(tl.int64)[:, None] * y_width + column[None, :]
        tl.store(y + places, total.to(y.dtype.element_ty), mask=(token[:, None] < tokens) & inside)


@triton.jit
def spread(dy, weights, dx, slots, tokens, panels, dy_width, value_width, x_width, KEY,
           HEIGHT: tl.constexpr, PIECES: tl.constexpr, EXACT: tl.constexpr,
           BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr):
    """``dx[:, some inputs] = dy @ W`` for BT tokens: of every panel the weights of those inputs that it has, else zeros."""
    strips, sides = tl.cdiv(tokens, BT), tl.cdiv(x_width, BN)
    first = tl.program_id(0) // (sides * GROUP) * GROUP
    side = tl.minimum(strips - first, GROUP)
    token = (first + tl.program_id(0) % (sides * GROUP) % side) * BT + tl.arange(0, BT)
    column = tl.program_id(0) % (sides * GROUP) // side * BN + tl.arange(0, BN)
    here, real = token < tokens, column < x_width
    total = tl.zeros((BT, BN), dtype=tl.float32)
    slot = tl.load(slots + column, mask=real, other=-1)
    for step in tl.range(0, panels * PIECES):
        panel, deep = step // PIECES, step % PIECES * BK + tl.arange(0, BK)
        after = tl.load(slots + (step + 1) // PIECES * x_width + column, mask=real, other=-1)
        inside = deep < HEIGHT
        left = tl.load(dy + token.to(tl.int64)[:, None] * dy_width + panel * HEIGHT + deep[None, :],
                       mask=here[:, None] & inside[None, :], other=0.0)
        right = tl.load(weights + slot.to(tl.int64)[None, :] * value_width + deep[:, None], mask=slot[None, :] >= 0, other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee" if EXACT else None)
        slot = after
    places = token.to(tl.int64)[:, None] * x_width + column[None, :]
    tl.store(dx + places, total.to(dx.dtype.element_ty), mask=here[:, None] & real[None, :])


@triton.jit
def scatter(dy, weights, sums, inputs, owners, real, tokens, dy_width, value_width, x_width, KEY,
            HEIGHT: tl.constexpr, PIECES: tl.constexpr, EXACT: tl.constexpr,
            BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """``sums[inputs] += weights @ dy[:, panel].T`` of BK of a panel's inputs, the first ``real`` of them, for BT tokens."""
    strips = tl.cdiv(tokens, BT)
    block, token = tl.program_id(0) // strips, tl.program_id(0) % strips * BT + tl.arange(0, BT)
    panel, line, here = tl.load(owners + block), tl.arange(0, BK), token < tokens
    total = tl.zeros((BK, BT), dtype=tl.float32)
    for piece in tl.range(0, PIECES):
        across = piece * BN + tl.arange(0, BN)
        left = tl.load(weights + (block * BK + line).to(tl.int64)[:, None] * value_width + across[None, :])
        right = tl.load(dy + token.to(tl.int64)[None, :] * dy_width + panel * HEIGHT + across[:, None],
                        mask=here[None, :] & (across < HEIGHT)[:, None], other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee" if EXACT else None)
    target = tl.load(inputs + block * BK + line).to(tl.int64)[:, None] * x_width + token[None, :]
    there = (token < x_width)[None, :] & (line < tl.load(real + block))[:, None]  # the rows of sums are filled up
    tl.atomic_add(sums + target, total, mask=there, sem="relaxed")


@triton.jit
def sample(xt, dy, out, inputs, owners, tokens, row_width, each, x_width, dy_width, value_width, KEY,
           HEIGHT: tl.constexpr, PIECES: tl.constexpr, EXACT: tl.constexpr,
           BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """``xt[inputs] @ dy[:, panel]`` of BK of a panel's inputs, over one of the parts that the tokens are split into."""
    block, part = tl.program_id(0) // PIECES, tl.program_id(1)
    across = tl.program_id(0) % PIECES * BN + tl.arange(0, BN)
    panel = tl.load(owners + block)
    line = block * BK + tl.arange(0, BK)
    source = xt + tl.load(inputs + line).to(tl.int64)[:, None] * x_width
    inside = across < HEIGHT
    total = tl.zeros((BK, BN), dtype=tl.float32)
    for strip in tl.range(part * each // BT, tl.cdiv(tl.minimum((part + 1) * each, tokens), BT)):
        token = strip * BT + tl.arange(0, BT)  # a product with BT, so that the compiler sees 16 bytes of alignment
        left = tl.load(source + token[None, :], mask=token[None, :] < row_width, other=0.0)
        right = tl.load(dy + token.to(tl.int64)[:, None] * dy_width + panel * HEIGHT + across[None, :],
                        mask=(token < tokens)[:, None] & inside[None, :], other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee" if EXACT else None)
    blocks = tl.num_programs(0) // PIECES
    places = (part.to(tl.int64) * blocks * BK + line)[:, None] * value_width + across[None, :]
    tl.store(out + places, total.to(out.dtype.element_ty))


def configs(tried: tuple[tuple[int, int, int], ...], **fixed: int) -> list[triton.Config]:
    """Tiles of tokens, with warps and stages of the pipeline; one small tile where kernels are interpreted."""
    if interpreting():
        return [triton.Config({"BT": 32, **fixed}, num_warps=4, num_stages=2)]
    return [triton.Config({"BT": tokens, **fixed}, num_warps=warps, num_stages=stages) for tokens, warps, stages in tried]


FORWARD = (16, 4, 4), (64, 4, 4), (128, 4, 4), (128, 8, 4), (256, 8, 3), (256, 8, 4)
BACKWARD = (16, 4, 4), (64, 4, 4), (128, 8, 3), (128, 8, 4), (256, 8, 3)
SCATTER = (16, 4, 2), (64, 4, 2), (128, 4, 2), (128, 8, 2), (256, 8, 2)
GRADIENT = (64, 4, 3), (64, 4, 4), (64, 8, 4), (128, 8, 3)

# The tuner keys on these arguments, the dtypes, the device and the versions, and keeps its choice in Triton's cache.
tuned_gather = triton.autotune(configs(FORWARD, GROUP=8), ["HEIGHT", "PIECES", "BN", "KEY", "panels"], cache_results=True)(gather)
tuned_spread = triton.autotune(configs(BACKWARD, GROUP=8), ["HEIGHT", "PIECES", "BK", "KEY", "panels"], cache_results=True)(spread)
tuned_scatter = triton.autotune(configs(SCATTER), ["HEIGHT", "PIECES", "BN", "BK", "KEY"], reset_to_zero=["sums"], cache_results=True)(scatter)
tuned_sample = triton.autotune(configs(GRADIENT), ["HEIGHT", "PIECES", "BN", "BK", "KEY"], cache_results=True)(sample)


def require_panels(like: Tensor, height: int) -> None:
    """Raise Unavailable unless panels of so many outputs can be multiplied by tensor cores here."""
    if height < LOW:
        raise Unavailable(f"needs panels of at least {LOW} outputs that share their inputs, got {height}")
    require(like)


def cut(width: int) -> tuple[int, int]:
    """Outputs of a tile, and in how many tiles a panel is cut."""
    return min(width, WIDE), -(-width // WIDE)


def gather_plan(panels: list[Panel], grid: Shape, like: Tensor) -> Plan:
    """Plan of ``y[:, panel] = gathered x @ weight`` for every panel.

    ``panels``, ``grid`` (how many panels, and how many groups of inputs) and ``like`` ``[groups, outputs, inputs]``, the
    shape of what is stored, are as the CPU's plans in ``structures.block`` take them.
    """
    require_panels(like, like.shape[1])
    stacked = stack(panels, grid, like)
    (out, inn), (tile, pieces) = stacked.shape, cut(stacked.weights.shape[1])

    def run(x: Tensor) -> Tensor:
        x = check_activations("x", x, inn, like)
        if not len(x):
            return x.new_empty(0, out)
        rows, features = feature_major(x)
        y = x.new_empty(out, len(x)).T if features else x.new_empty(len(x), out)
        programs = lambda chosen: (triton.cdiv(len(x), chosen["BT"]) * len(panels) * pieces,)
        with torch.cuda.device_of(x):
            tuned_gather[programs](
                rows, stacked.weights, y, stacked.inputs, stacked.pointers, stacked.order, len(x), rows.shape[1], len(panels),
                rows.stride(0), stacked.weights.shape[1], max(y.stride()), HEIGHT=stacked.height, PIECES=pieces,
                FEATURES=features, EXACT=x.dtype == torch.float32, KEY=tuning(x), BN=tile, BK=DEEP)
        return y

    return run


def spread_plan(panels: list[Panel], grid: Shape, like: Tensor) -> Plan:
    """Plan of ``dx = dy @ W``; where a panel lists an input again, its first weights are those that count."""
    require_panels(like, like.shape[1])
    stacked = stack(panels, grid, like)
    (out, inn), width = stacked.shape, stacked.weights.shape[1]
    slots, deep = find(stacked), min(width, DEEP)

    def run(dy: Tensor) -> Tensor:
        dy = aligned(check_activations("dy", dy, out, like).contiguous())
        dx = dy.new_empty(len(dy), inn)
        if not len(dy):
            return dx
        tile = min(WIDE, max(LOW, power_of_two(inn)))
        programs = lambda chosen: (triton.cdiv(len(dy), chosen["BT"]) * triton.cdiv(inn, tile),)
        with torch.cuda.device_of(dy):
            tuned_spread[programs](
                dy, stacked.weights, dx, slots, len(dy), len(panels), out, width, inn, HEIGHT=stacked.height,
                PIECES=width // deep, EXACT=dy.dtype == torch.float32, KEY=tuning(dy), BN=tile, BK=deep)
        return dx

    return run


def scatter_plan(panels: list[Panel], grid: Shape, like: Tensor) -> Plan:
    """Plan of ``dx[:, inputs] += dy[:, panel] @ weight.T`` for every panel: only their arithmetic, but sums in memory.

    They are in float32, feature-major, added to by atomic operations: in no fixed order, so that their rounding may differ
    from run to run.
    """
    require_panels(like, like.shape[1])
    stacked = stack(panels, grid, like)
    (stored, width), step, (out, inn) = stacked.weights.shape, stacked.step, stacked.shape
    owners, deep = owner(stacked), min(width, WIDE)
    listed = torch.zeros(stored, dtype=torch.int32, device=like.device).index_fill_(0, stacked.places, 1)
    real = listed.view(-1, step).sum(1, dtype=torch.int32)

    def run(dy: Tensor) -> Tensor:
        dy = aligned(check_activations("dy", dy, out, like).contiguous())
        sums = torch.zeros(inn, -(-len(dy) // ROUND) * ROUND, dtype=torch.float32, device=dy.device)
        if len(dy) and stored:
            programs = lambda chosen: (triton.cdiv(len(dy), chosen["BT"]) * (stored // step),)
            with torch.cuda.device_of(dy):
                tuned_scatter[programs](
                    dy, stacked.weights, sums, stacked.inputs, owners, real, len(dy), out, width, sums.shape[1],
                    HEIGHT=stacked.height, PIECES=width // deep, EXACT=dy.dtype == torch.float32, KEY=tuning(dy), BN=deep, BK=step)
        return torch.empty(len(dy), inn, dtype=dy.dtype, device=dy.device).copy_(sums.T[: len(dy)])

    return run


def owner(stacked: Panels) -> Tensor:
    """The panel of each ``step`` rows of the weights, int32."""
    first = torch.arange(0, len(stacked.weights), stacked.step, device=stacked.weights.device)
    return torch.searchsorted(stacked.pointers[1:].long(), first, right=True).int()


def find(stacked: Panels) -> Tensor:
    """Where each panel's weights of each input are, int32 ``[panels + 1, in]``: -1 for nowhere, as all of the last line."""
    panels, inn = len(stacked.order), stacked.shape[1]
    nowhere = torch.iinfo(torch.int32).max
    slots = torch.full(((panels + 1) * inn,), nowhere, dtype=torch.int32, device=stacked.weights.device)
    panel = torch.searchsorted(stacked.pointers[1:].long(), stacked.places, right=True)
    target = panel * inn + stacked.inputs[stacked.places]
    slots.scatter_reduce_(0, target, stacked.places.int(), "amin")
    return slots.masked_fill_(slots == nowhere, -1).view(panels + 1, inn)


def sample_plan(panels: list[Panel], grid: Shape, like: Tensor) -> Plan:
    """Plan of ``gathered x.T @ dy[:, panel]`` for every panel: the gradients of all groups, shaped as ``like``.

    Where few tiles would leave most processors idle, the tokens are split among several programs, whose sums are added
    up afterwards, always in the same order.
    """
    require_panels(like, like.shape[1])
    stacked = stack(panels, grid, like)
    (stored, width), step = stacked.weights.shape, stacked.step
    tile, pieces = cut(width)
    blocks = stored // step
    owners = owner(stacked)

    def run(dy: Tensor, x: Tensor) -> Tensor:
        dy, x = check_pair(dy, x, stacked.shape, like)
        if not len(x) or not blocks:
            return x.new_zeros(like.shape)
        dy, (rows, _) = aligned(dy.contiguous()), feature_major(x)
        parts = split(len(x), blocks * pieces, processors(x.device))
        each = -(-len(x) // (WIDE * parts)) * WIDE  # a multiple of every tile of tokens
        sums = torch.empty(parts, stored, width, dtype=x.dtype if parts == 1 else torch.float32, device=x.device)
        with torch.cuda.device_of(x):
            tuned_sample[(blocks * pieces, parts)](
                rows, dy, sums, stacked.inputs, owners, len(x), rows.shape[1], each, rows.stride(0), dy.shape[1], width,
                HEIGHT=stacked.height, PIECES=pieces, EXACT=x.dtype == torch.float32, KEY=tuning(x), BN=tile, BK=step)
        gradient = sums[0] if parts == 1 else sums.sum(0).to(x.dtype)
        listed = gradient[stacked.places, : stacked.height]  # [groups * inputs, outputs]
        return listed.unflatten(0, (-1, like.shape[2])).mT.contiguous().view(like.shape)

    return run
