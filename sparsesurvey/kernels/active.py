"""Skip the weights of inputs whose activation is small, in Triton: y = W x for the one to four tokens of decoding.

The weight is dense and kept transposed, so that what an input is multiplied with is one row, fetched 16 bytes at a time; a
row that is not needed is not fetched, which is all that is saved. First each chunk of the inputs lists those that any token
needs; then each program adds up the listed rows of a chunk for some outputs; then the chunks are added up, always in the
same order. (Deja Vu, Liu et al. 2023; CATS, Lee et al. 2024; TEAL, Liu et al. 2024.)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsesurvey.kernels.launch import interpreting, require
from sparsesurvey.structure import Plan, Unavailable, check_activations

if interpreting():
    from sparsesurvey.kernels.interpreter import mend

    mend()

MOST = 4  # tokens: what one of them needs all of them fetch, so that more would fetch nearly everything
CHUNK, ROWS, WIDE = 512, 8, 256  # inputs of a chunk, rows that are fetched at once, outputs of a program


@triton.jit
def list_active(x, listed, counts, threshold, tokens, inputs, x_width, TOKENS: tl.constexpr, CHUNK: tl.constexpr):
    """The numbers of a chunk's inputs that are beyond the threshold for any token, rising, and how many these are."""
    chunk, token = tl.program_id(0), tl.arange(0, TOKENS)
    column = chunk * CHUNK + tl.arange(0, CHUNK)
    there = (token < tokens)[:, None] & (column < inputs)[None, :]
    numbers = tl.load(x + token[:, None] * x_width + column[None, :], mask=there, other=0.0).to(tl.float32)
    small = (tl.abs(numbers) <= threshold) | (there == 0)  # so that NaN is not small
    active = tl.max(tl.where(small, 0, 1), 0)
    tl.store(listed + chunk * CHUNK + tl.cumsum(active, 0) - 1, column, mask=active > 0)
    tl.store(counts + chunk, tl.sum(active, 0))


@triton.jit
def add_rows(x, rows, sums, listed, counts, threshold, tokens, outputs, x_width, value_width,
             TOKENS: tl.constexpr, CHUNK: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr):
    """The listed rows of one chunk times their activations, for BN outputs."""
    chunk, token = tl.program_id(1), tl.arange(0, TOKENS)
    across = tl.program_id(0) * BN + tl.arange(0, BN)
    total = tl.zeros((TOKENS, BK, BN), dtype=tl.float32)
    count = tl.load(counts + chunk)
    for start in tl.range(0, count, BK):
        which = start + tl.arange(0, BK)
        row = tl.load(listed + chunk * CHUNK + which, mask=which < count, other=0)
        here = (token < tokens)[:, None] & (which < count)[None, :]
        left = tl.load(x + token[:, None] * x_width + row[None, :], mask=here, other=0.0).to(tl.float32)
        left = tl.where(tl.abs(left) <= threshold, 0.0, left)
        inside = (which < count)[:, None] & (across < value_width)[None, :]
        right = tl.load(rows + row.to(tl.int64)[:, None] * value_width + across[None, :], mask=inside, other=0.0).to(tl.float32)
        total += left[:, :, None] * right[None, :, :]
    places = (chunk * tokens + token[:, None]) * outputs + across[None, :]
    tl.store(sums + places, tl.sum(total, 1), mask=(token < tokens)[:, None] & (across < outputs)[None, :])


@triton.jit
def add_chunks(sums, y, count, chunks, BN: tl.constexpr):
    """Sums over the chunks, ``[chunks, count]``."""
    place = tl.program_id(0) * BN + tl.arange(0, BN)
    total = tl.zeros((BN,), dtype=tl.float32)
    for chunk in tl.range(0, chunks):
        total += tl.load(sums + chunk * count + place, mask=place < count, other=0.0)
    tl.store(y + place, total.to(y.dtype.element_ty), mask=place < count)


def plan(weight: Tensor, threshold: float) -> Plan:
    """Plan of ``y = where(|x| <= threshold, 0, x) @ weight.T`` for at most 4 tokens; more raise Unavailable."""
    require(weight)
    out, inn = weight.shape
    rows = weight.new_zeros(inn, -(-out // 16) * 16)  # rows that start at multiples of 16 bytes
    rows[:, :out] = weight.detach().T
    chunks = triton.cdiv(inn, CHUNK)

    def run(x: Tensor) -> Tensor:
        x = check_activations("x", x, inn, rows).contiguous()
        if len(x) > MOST:
            raise Unavailable(f"needs at most {MOST} tokens, got {len(x)}")
        y = x.new_empty(len(x), out)
        if not len(x):
            return y
        listed, counts = (torch.empty(size, dtype=torch.int32, device=x.device) for size in (chunks * CHUNK, chunks))
        sums = torch.empty(chunks, *y.shape, dtype=torch.float32, device=x.device)
        fixed = {"TOKENS": triton.next_power_of_2(len(x)), "CHUNK": CHUNK}
        with torch.cuda.device_of(x):
            list_active[(chunks,)](x, listed, counts, threshold, len(x), inn, inn, **fixed)
            add_rows[(triton.cdiv(out, WIDE), chunks)](
                x, rows, sums, listed, counts, threshold, len(x), out, inn, rows.shape[1], **fixed, BK=ROWS, BN=WIDE)
            add_chunks[(triton.cdiv(y.numel(), WIDE),)](sums, y, y.numel(), chunks, BN=WIDE)
        return y

    return run
