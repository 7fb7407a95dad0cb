"""Sputnik's product of CSR and dense on CUDA cores (Gale et al. 2020), a peer to beat: a library that the reader builds.

Its source is no part of ours (google-research/sputnik, Apache-2.0; we read commit bbf5840b). Build it for the GPU at hand,
and say where:

    nvcc -x cu -O3 -std=c++17 -arch=sm_90 -shared -Xcompiler -fPIC -I sputnik \\
         -o libsputnik.so sputnik/sputnik/spmm/cuda_spmm.cu.cc
    export SPARSESURVEY_SPUTNIK=$PWD/libsputnik.so

In float16 it reads weights and columns (int16) in pairs, so that every row is filled up to an even number of weights.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsesurvey.kernels import built
from sparsesurvey.kernels.built import NUMBER, PLACE
from sparsesurvey.structure import Plan, Unavailable, check_activations

VARIABLE = "SPARSESURVEY_SPUTNIK"
NAMES = {torch.float16: "_ZN7sputnik8CudaSpmmEiiiiPKiPK7__half2S1_PK6short2S4_PS2_P11CUstream_st",  # C++ functions
         torch.float32: "_ZN7sputnik8CudaSpmmEiiiiPKiPKfS1_S1_S3_PfP11CUstream_st"}
TOKENS = 8  # what tokens are filled up to a multiple of, for loads of 16 bytes


class Operand(NamedTuple):
    values: Tensor
    columns: Tensor  # int16 for float16, else int32
    row_pointers: Tensor  # int32
    order: Tensor  # int32, the longest row first


def arrange(packed: Any) -> Operand:
    """A weight in CSR (values, columns, row_pointers, shape) as it takes it."""
    values, columns, pointers = packed.values.detach(), packed.columns, packed.row_pointers.long()
    counts = pointers.diff()
    if values.dtype == torch.float16:
        if packed.shape[1] > 1 << 15:
            raise Unavailable(f"needs at most {1 << 15} inputs in float16, got {packed.shape[1]}")
        counts = counts + counts % 2
    starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    shift = (starts[:-1] - pointers[:-1]).repeat_interleave(pointers.diff())
    places = torch.arange(len(values), device=values.device) + shift
    kind = torch.int16 if values.dtype == torch.float16 else torch.int32
    size = int(starts[-1])
    return Operand(values.new_zeros(size).index_copy_(0, places, values),
                   torch.zeros(size, dtype=kind, device=values.device).index_copy_(0, places, columns.to(kind)),
                   starts.int(), counts.argsort(descending=True, stable=True).int())


def function(values: Tensor) -> Any:
    """The library's product; Unavailable where it is not built or cannot multiply these values."""
    return built.function("Sputnik", VARIABLE, NAMES, [NUMBER] * 4 + [PLACE] * 7, values)


def plan(name: str, packed: Any) -> Plan:
    """Plan of ``x @ W.T`` for a weight in CSR: ``packed`` has values, columns, row_pointers and shape."""
    product, (out, inn) = function(packed.values), packed.shape
    operand = arrange(packed)

    def run(x: Tensor) -> Tensor:
        x = check_activations(name, x, inn, packed.values)
        if not len(x):
            return x.new_empty(0, out)
        with torch.cuda.device_of(x):
            rows = built.feature_rows(x, TOKENS)
            y = x.new_empty(out, rows.shape[1])
            built.call("Sputnik", product, out, inn, rows.shape[1], len(operand.values), operand.order, operand.values,
                       operand.row_pointers, operand.columns, rows, y, built.stream(x))
            return y.T[: len(x)]

    return run
