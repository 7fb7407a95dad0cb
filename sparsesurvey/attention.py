"""Attention masks in two levels, the format of STOF (Dai et al. 2026): tiles that are empty, full or partly live, and a
bitmap for what is live inside a partial one. Masks here are given, not chosen: True = this query may see this key.

>>> stored = two_level(causal(4), tile=2, inner=2)
>>> stored.kind.tolist()  # 0 empty, 1 full, 2 part
[[2, 0], [1, 2]]
>>> [f"{bits:04b}" for bits in stored.bitmaps.flatten().tolist()]  # lowest bit first: row 0 sees 0; row 1 sees 0 and 1
['1101', '1101']
"""

from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from sparsesurvey.packing import tiles, untile
from sparsesurvey.structure import check_int, describe

EMPTY, FULL, PART = 0, 1, 2


class TwoLevel(NamedTuple):
    kind: Tensor  # uint8 [queries / tile, keys / tile]: EMPTY, FULL or PART
    bitmaps: Tensor  # int64 [parts, (tile / inner) ** 2]: of each partial tile, row by row, its inner x inner bits
    tile: int
    inner: int


def two_level(mask: Tensor, tile: int = 64, inner: int = 8) -> TwoLevel:
    """A boolean mask ``[queries, keys]`` in two levels; ValueError if it has no such tiles."""
    check_int("inner", inner, 1, 8)
    check_int("tile", tile, inner)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 2:
        raise ValueError(f"mask must be a boolean matrix [queries, keys], got {describe(mask)}")
    if tile % inner or mask.shape[0] % tile or mask.shape[1] % tile:
        raise ValueError(f"mask must divide into tiles of {tile} and these into {inner}, got {tuple(mask.shape)}")
    tiled = tiles(mask, tile, tile)
    live = tiled.sum((-2, -1))
    kind = (live > 0).to(torch.uint8) + ((live > 0) & (live < tile * tile)).to(torch.uint8)
    bits = tiled[kind == PART].unflatten(-1, (-1, inner)).unflatten(1, (-1, inner)).transpose(2, 3).flatten(3).flatten(1, 2)
    return TwoLevel(kind, (bits.long() << torch.arange(inner * inner)).sum(-1), tile, inner)


def whole(stored: TwoLevel) -> Tensor:
    """Invert ``two_level``."""
    tile, inner = stored.tile, stored.inner
    tiled = (stored.kind == FULL)[..., None, None].repeat(1, 1, tile, tile)
    bits = (stored.bitmaps.unsqueeze(-1) >> torch.arange(inner * inner)) & 1
    side = tile // inner
    tiled[stored.kind == PART] = bits.view(-1, side, side, inner, inner).transpose(2, 3).reshape(-1, tile, tile).bool()
    return untile(tiled)


def attend(q: Tensor, k: Tensor, v: Tensor, stored: TwoLevel, bitmaps: bool = True) -> Tensor:
    """Softmax attention ``[queries, width]`` of one head that visits the full and the partial tiles only.

    ``bitmaps=False`` treats every partial tile as full: right for masks that end at tile borders, wrong for all others.
    A query that sees nothing gets zeros.
    """
    seen = tiles(whole(stored), stored.tile, stored.tile)
    result = torch.zeros(q.shape[0], v.shape[1], dtype=q.dtype)
    keys, values = k.unflatten(0, (-1, stored.tile)), v.unflatten(0, (-1, stored.tile))
    for row, kinds in enumerate(stored.kind.unbind()):
        columns = (kinds != EMPTY).nonzero().flatten()
        here = slice(row * stored.tile, (row + 1) * stored.tile)
        scores = q[here] @ keys[columns].flatten(0, 1).T / q.shape[1] ** 0.5
        if bitmaps:
            scores = scores.masked_fill(~seen[row, columns].transpose(0, 1).flatten(1), -torch.inf)
        result[here] = scores.softmax(-1).nan_to_num(0.0) @ values[columns].flatten(0, 1)
    return result


def causal(size: int) -> Tensor:
    """A query sees itself and what is before it."""
    return torch.ones(size, size, dtype=torch.bool).tril()


def sliding_window(size: int, width: int) -> Tensor:
    """A query sees the ``width`` latest keys, its own the last."""
    return causal(size) & ~causal(size).tril(-width)


def blockwise(size: int, width: int) -> Tensor:
    """A query sees the keys of its own ``width`` x ``width`` block: no tile of that size is partial."""
    return torch.block_diag(*[torch.ones(width, width)] * (size // width)).bool()


def ignored_bitmaps(size: int = 256, width: int = 64, tile: int = 64) -> pd.DataFrame:
    """What is off when a kernel never reads the bitmaps: largest error over the largest result, by mask, and right beside."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, size, width, generator=generator, dtype=torch.float64)
    masks = {"block by block": blockwise(size, tile), "causal": causal(size), "sliding window": sliding_window(size, tile // 2)}
    lines = {}
    for name, mask in masks.items():
        stored = two_level(mask, tile)
        scores = (q @ k.T / width**0.5).masked_fill(~mask, -torch.inf)
        right = scores.softmax(-1) @ v
        error = lambda result: float((result - right).abs().max() / right.abs().max())
        lines[name] = {"partial tiles": int((stored.kind == PART).sum()), "live tiles": int((stored.kind != EMPTY).sum()),
                       "error, bitmaps read": error(attend(q, k, v, stored)),
                       "error, bitmaps ignored": error(attend(q, k, v, stored, bitmaps=False))}
    return pd.DataFrame.from_dict(lines, orient="index")
