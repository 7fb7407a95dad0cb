"""torch's own Triton kernel for block-sparse rows, ``torch.sparse._triton_ops.bsr_dense_addmm``, as the peer to beat.

Its table of tuned parameters has entries for an A100 alone; on any other GPU it takes one stage and four warps. So it
is timed twice: as shipped, and with stages, warps and tile searched for each shape.
"""

from itertools import product
from typing import Any

import torch
from torch import Tensor

from sparsesurvey.kernels.search import seconds
from sparsesurvey.structure import Plan, Unavailable, check_activations

STAGES, WARPS, TILES = (1, 2, 3, 4), (4, 8), (64, 128)  # searched; a tile is so many tokens wide


def require(values: Tensor) -> None:
    """Raise Unavailable unless torch's kernel takes these blocks ``[blocks, rows, cols]``."""
    if values.device.type != "cuda":
        raise Unavailable(f"needs a CUDA device, got an operand on {values.device}")
    if any(side < 16 or side & (side - 1) for side in values.shape[1:]):
        raise Unavailable(f"needs blocks whose sides are powers of two of at least 16, got {values.shape[1]}x{values.shape[2]}")
    try:
        from torch.sparse._triton_ops import bsr_dense_addmm  # noqa: F401
    except ImportError:
        raise Unavailable("needs triton") from None


def padded(x: Tensor, rows: int) -> Tensor:
    """``x [tokens, in]`` as its transpose ``[in, columns]``, zeros up to a whole number of tiles of ``rows`` columns."""
    return torch.nn.functional.pad(x, (0, 0, 0, -len(x) % rows)).T


def metas(columns: int, rows: int) -> list[dict[str, int]]:
    """The parameters that are searched for so many columns of the dense side; blocks have ``rows`` rows.

    >>> len(metas(256, 64)), metas(16, 64)[0]
    (16, {'SPLIT_N': 1, 'GROUP_SIZE_ROW': 4, 'num_stages': 1, 'num_warps': 4})
    """
    splits = sorted({columns // width for width in TILES if columns % width == 0} or {max(1, columns // rows)})
    return [{"SPLIT_N": split, "GROUP_SIZE_ROW": 4, "num_stages": stages, "num_warps": warps}
            for split, stages, warps in product(splits, STAGES, WARPS)]


def plan(matrix: Tensor, values: Tensor, searched: bool) -> Plan:
    """Plan of ``x @ matrix.T`` for a matrix in torch's BSR layout. The first run with so many tokens searches."""
    from torch.sparse._triton_ops import bsr_dense_addmm

    (out, inn), rows, best = matrix.shape, max(16, values.shape[1]), {}

    def multiply(dense: Tensor, meta: dict[str, Any] | None) -> Tensor:
        y = dense.new_empty(out, dense.shape[1])
        return bsr_dense_addmm(y, matrix, dense, beta=0, out=y, meta=None if meta is None else dict(meta))

    def run(x: Tensor) -> Tensor:
        x = check_activations("x", x, inn, values)
        if not len(x):
            return x.new_empty(0, out)
        with torch.cuda.device_of(x):
            dense = padded(x, rows)
            columns = dense.shape[1]
            if searched and columns not in best:
                best[columns] = min(metas(columns, rows), key=lambda meta: seconds(lambda: multiply(dense, meta)))
            return multiply(dense, best.get(columns)).T[: len(x)]

    return run
