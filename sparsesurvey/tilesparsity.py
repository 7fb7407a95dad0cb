"""What the released code of tile-wise sparsity selects (clevercool/TileSparsity), for comparison with ``TileWise``."""

from math import sqrt

import torch
from torch import Tensor


def ragged(scores: Tensor, g: int, density: float) -> Tensor:
    """A wrong selection, that of ``tiled_wise_2d`` in short.

    The last tile has the outputs that are left over, and its pieces are ranked among the others by norm over length. A
    short piece wins by that, so that short ones fill the quota, which counts pieces, and the weights are too few.
    """
    share = sqrt(density)
    norms = scores.norm(dim=1)
    rows = (norms > norms.quantile(1 - share)).nonzero().flatten()
    parts = scores[rows].split(g)
    norms = torch.stack([part.norm(dim=0) / len(part) for part in parts])  # [tiles, in]
    kept = norms > norms.flatten().quantile(1 - share)
    lengths = torch.tensor([len(part) for part in parts])
    return torch.zeros_like(scores, dtype=torch.bool).index_copy(0, rows, kept.repeat_interleave(lengths, 0))
