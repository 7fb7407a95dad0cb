"""STK's Triton kernels for blocks of 128 x 128 (Gale et al. 2023, MegaBlocks), as the peer to beat: the package stanford-stk.

Its three products of one sparse and two dense matrices are named by what is sparse: ``dds`` is dense = dense x sparse and
``sdd`` sparse = dense x dense. A matrix holds its blocks row by row, as ours, and the index of its transpose beside it.
"""

from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsesurvey.kernels.launch import interpreting, require
from sparsesurvey.structure import Plan, Unavailable, check_activations, check_pair

SIDE = 128  # of its blocks, and what tokens are filled up to a multiple of: its kernels mask nothing


def library(values: Tensor) -> ModuleType:
    """The package; Unavailable where it is not installed or cannot multiply these blocks ``[blocks, rows, cols]``."""
    if tuple(values.shape[1:]) != (SIDE, SIDE):
        raise Unavailable(f"needs blocks of {SIDE}x{SIDE}, got {values.shape[1]}x{values.shape[2]}")
    try:
        import stk
        from stk import Matrix, ops  # noqa: F401  (another package of chemists bears the name)
    except ImportError:
        raise Unavailable("needs the package stanford-stk") from None
    require(values)
    if interpreting():
        from sparsesurvey.kernels.interpreter import mend

        mend()
    return stk


def plan(product: str, values: Tensor, rows: Tensor, columns: Tensor, pointers: Tensor, shape: tuple[int, int]) -> Plan:
    """Plan of one of ``PRODUCTS`` for blocks at these block rows and columns (int64), and where each block row starts."""
    stk = library(values)
    with torch.cuda.device_of(values):
        # int32: STK's own topologies are int16, in which the place of a column's first input need not fit.
        matrix = stk.Matrix(torch.Size(shape), values.detach().contiguous(), rows.int(), columns.int(), pointers)

    def forward(x: Tensor) -> Tensor:
        return times("x", x, matrix.t())

    def backward(dy: Tensor) -> Tensor:
        return times("dy", dy, matrix)

    def times(name: str, dense: Tensor, right: object) -> Tensor:
        dense = check_activations(name, dense, right.size()[0], values)
        if not len(dense):
            return dense.new_empty(0, right.size()[1])
        with torch.cuda.device_of(dense):
            return stk.ops.dds(filled(dense), right)[: len(dense)]

    def gradient(dy: Tensor, x: Tensor) -> Tensor:
        dy, x = check_pair(dy, x, shape, values)
        if not len(x):
            return torch.zeros_like(values)
        with torch.cuda.device_of(x):
            return stk.ops.sdd(filled(dy).T, filled(x), matrix).data

    return {"spmm": forward, "spmmt": backward, "sddmm": gradient}[product]


def filled(x: Tensor) -> Tensor:
    """``x [tokens, features]`` with zeros up to a multiple of 128 tokens, contiguous."""
    return pad(x, (0, 0, 0, -len(x) % SIDE)).contiguous()
