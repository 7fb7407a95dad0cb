"""MACKO's product with one token (Macko and Boža 2025), as the peer to beat: a library that the reader builds.

Its source is no part of ours (vlejd/macko_spmv, MIT; we read commit afa70330). Build it with our one C function, macko.cu,
for the GPU at hand, and say where (its source includes cublas_v2.h, of which it uses nothing):

    nvcc -O3 -std=c++17 -arch=sm_90 -shared -Xcompiler -fPIC -I macko_spmv/src/macko_spmv/cuda \\
         -o libmacko.so sparsesurvey/kernels/macko.cu
    export SPARSESURVEY_MACKO=$PWD/libmacko.so

Stored are, row by row, the weights and before each the number of zeros since the last one, in 4 bits: after 15 zeros the 16th
is stored as if it were a weight. Several tokens are as many products.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsesurvey.kernels import built
from sparsesurvey.kernels.built import NUMBER, PLACE
from sparsesurvey.packing import pack_bits
from sparsesurvey.structure import Plan, Unavailable, check_activations

VARIABLE = "SPARSESURVEY_MACKO"
LONGEST, TOKENS = 16, 16  # one more than the zeros that 4 bits count, and the most tokens that are worth trying
AHEAD = 32  # rows that a block of threads looks at, whether they are there or not


class Operand(NamedTuple):
    values: Tensor  # float16, filled up to a multiple of 8
    gaps: Tensor  # uint8, two a byte, the first in the lower bits
    rows: Tensor  # int32 [out + 1 + AHEAD], where each row starts
    shape: tuple[int, int]


def arrange(packed: Any) -> Operand:
    """A weight in CSR (values, columns, row_pointers, shape) in that format."""
    values, columns, pointers = packed.values.detach(), packed.columns.long(), packed.row_pointers.long()
    out, device = packed.shape[0], values.device
    gaps, first = torch.empty_like(columns), pointers[:-1][pointers.diff() > 0]
    gaps[1:] = columns.diff() - 1
    gaps[first] = columns[first]
    ends = (1 + gaps // LONGEST).cumsum(0)  # stored entries up to and including each weight
    size = -(-int(ends[-1]) // 8) * 8 if len(ends) else 8
    stored = values.new_zeros(size).index_copy_(0, ends - 1, values)
    codes = torch.zeros(size, dtype=torch.uint8, device=device)
    codes[: int(ends[-1]) if len(ends) else 0] = LONGEST - 1
    codes[ends - 1] = (gaps % LONGEST).to(torch.uint8)
    rows = torch.nn.functional.pad(ends, (1, 0))[pointers]
    rows = torch.cat([rows, rows[-1:].expand(AHEAD)]).int()
    return Operand(stored, pack_bits(codes[None], 4)[0], rows, (out, packed.shape[1]))


def function(values: Tensor) -> Any:
    """The library's product; Unavailable where it is not built or cannot multiply these values."""
    return built.function("MACKO", VARIABLE, {torch.float16: "macko_product"}, [NUMBER] * 2 + [PLACE] * 6, values)


def plan(packed: Any) -> Plan:
    """Plan of ``x @ W.T`` for a weight in CSR."""
    product, operand = function(packed.values), arrange(packed)
    out, inn = operand.shape

    def run(x: Tensor) -> Tensor:
        x = check_activations("x", x, inn, packed.values).contiguous()
        if len(x) > TOKENS:
            raise Unavailable(f"needs at most {TOKENS} tokens, which it multiplies one by one, got {len(x)}")
        y = x.new_empty(len(x), out)
        with torch.cuda.device_of(x):
            for source, target in zip(x, y):
                built.call("MACKO", product, out, inn, operand.values, operand.gaps, operand.rows, source, target,
                           built.stream(x))
        return y

    return run
