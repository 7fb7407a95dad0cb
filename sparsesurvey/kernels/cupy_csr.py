"""cuSPARSE's product of CSR and dense through CuPy: float32 alone, column-major activations."""

from typing import Any

import torch
from torch import Tensor

from sparsesurvey.structure import Plan, Unavailable, check_activations


def plan(name: str, packed: Any) -> Plan:
    """Plan of ``x @ W.T`` for a weight in CSR: ``packed`` has values, columns, row_pointers and shape."""
    values = packed.values.detach()
    if values.device.type != "cuda":
        raise Unavailable(f"needs a CUDA device, got an operand on {values.device}")
    if values.dtype != torch.float32:
        raise Unavailable(f"needs float32, CuPy has no 16-bit sparse matrices, got {values.dtype}")
    try:
        import cupy
        from cupyx import cusparse
        from cupyx.scipy import sparse
    except ImportError:
        raise Unavailable("needs cupy") from None
    with cupy.cuda.Device(values.device.index or 0):
        parts = [cupy.from_dlpack(part.contiguous()) for part in (values, packed.columns.int(), packed.row_pointers)]
        matrix = sparse.csr_matrix(tuple(parts), shape=packed.shape)
        matrix.has_canonical_format = True

    def run(x: Tensor) -> Tensor:
        x = check_activations(name, x, packed.shape[1], values).contiguous()
        y = x.new_empty(len(x), packed.shape[0])
        if not len(x) or not len(values):
            return y.zero_()
        stream = torch.cuda.current_stream(x.device).cuda_stream
        with cupy.cuda.Device(x.device.index or 0), cupy.cuda.ExternalStream(stream):
            # A row-major [tokens, features] is a column-major [features, tokens].
            cusparse.spmm(matrix, cupy.from_dlpack(x).T, cupy.from_dlpack(y).T, beta=0)
        return y

    return run
