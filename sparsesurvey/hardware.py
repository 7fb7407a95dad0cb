"""What tensor cores can make of each structure: plain functions of its parameters, from a datasheet and publications.

Nothing here is measured by us. ``arithmetic`` is for a bound; what is only an estimate is in words, never in a number
that is drawn. A structure that is not in ``FACTS`` is one of which nothing is on record.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from math import comb, lcm, log2
from typing import Any, NamedTuple


class Gpu(NamedTuple):
    """Two numbers of a datasheet, in FLOP/s and bytes/s. A bound from them is no measurement."""

    name: str
    flops: float
    bytes_per_second: float
    source: str


H200 = Gpu("H200 SXM", 989e12, 4.8e12, "NVIDIA H200 datasheet: 989 TFLOP/s bf16 dense, 4.8 TB/s")


class Fact(NamedTuple):
    """What is known of one structure beside its definition.

    ``verdict`` in a few words, ``hardware`` in a few sentences: can tensor cores use the structure?
    ``arithmetic``: share of the dense product's arithmetic that tensor cores must still do, None if not known.
    ``positions``: bits a weight that any code of the mask's positions needs on average, None if not known.
    ``kept``, ``column``, ``pruned``: why a weight stayed, or went with its whole tile column, or went alone, with
    places in braces that the front end fills in (see ``explain`` in explorer.js).
    """

    verdict: str
    hardware: str
    arithmetic: float | None = None
    positions: float | None = None
    kept: str = "tile ({tile_row}, {tile_col}): {kept} of {size} kept"
    column: str = ""
    pruned: str = "tile ({tile_row}, {tile_col}): {kept} of {size} kept"


NO = "no tensor-core path"
NO_PATH = (
    "Tensor cores cannot skip these zeros: with them the product costs a dense product's arithmetic. Only bytes can be "
    "saved, which helps while reading the weight is the limit (on an H200 up to about 200 tokens)."
)


def _dense(structure: Any) -> Fact:
    return Fact("baseline", "Dense tensor cores.", 1.0, 0.0, "dense: nothing is pruned")


def _unstructured(structure: Any) -> Fact:
    why = "number {rank_all} of {total} by magnitude; the first {kept_all} are kept, wherever they are"
    slow = " Ordinary CUDA cores can skip, but so slowly that it pays only above about 96 % sparsity (estimate)."
    return Fact(NO, NO_PATH + slow, 1.0, _entropy(structure.density), why, pruned=why)


def _nm(structure: Any) -> Fact:
    n, m = structure.n, structure.m
    why = "group {tile_col} of row {row}: {row_kept} of {cols} kept; this is number {rank_row} by magnitude"
    return Fact(*_rows_of(n, m), log2(comb(m, n)) / m, why, pruned=why)


def _rows_of(n: int, m: int) -> tuple[str, str, float]:
    """Verdict, words and arithmetic of rows that are n:m and share nothing with other rows."""
    if n == m:
        return "baseline", f"{n}:{m} prunes nothing.", 1.0
    if _most_of_4(n, m) > 2:
        return NO, f"Sparse tensor cores take 2 of every 4 at most, and {n}:{m} may have more. {NO_PATH}", 1.0
    if (n, m) == (2, 4):
        return "sparse tensor cores, 2×", (
            "Sparse tensor cores (NVIDIA Ampere and later) multiply 2:4 at most twice as fast as dense. Published "
            "large products on an H100 reach 1.2 to 1.7 times; small ones and few tokens gain little or lose."
        ), 0.5
    saved = "" if 2 * n == m else f", not {m / n:g} times: the other zeros are multiplied"
    return "sparse tensor cores, 2×", (
        f"Every {n}:{m} mask is also a 2:4 mask, so sparse tensor cores run it at most twice as fast as dense{saved}."
    ), 0.5


def _vnm(structure: Any) -> Fact:
    v, n, m = structure.v, structure.n, structure.m
    where = "{rows}-row tile ({tile_row}, {tile_col}): column {col} is "
    why = where + "one of the {cols_kept} of {cols} kept; in this row {row_kept} of those {cols_kept} stay, and this " \
        "is number {rank_cols} of them by magnitude"
    gone = where + "none of the {cols_kept} of {cols} that the tile keeps"
    positions = (log2(comb(m, 4)) + v * log2(comb(4, n))) / (v * m)
    if m == 4:  # every column is kept: nothing to gather
        return Fact(*_rows_of(n, m), positions, why, gone, why)
    sparse = n <= 2  # at most 2 of the 4: what is left is a 2:4 product
    rows = 16 if sparse else 8  # of weights that one instruction multiplies
    gathered = 4 / m * (0.5 if sparse else 1.0) * max(1.0, rows / v)
    verdict, hardware, plain = _rows_of(n, m)
    if plain < gathered:
        hardware = f"Tiles of {v} rows are too low to gather their columns. {hardware}"
        return Fact(verdict, hardware, plain, positions, why, gone, why)
    inside = "sparse tensor cores halve what is left" if sparse else "dense tensor cores multiply them"
    verdict = f"gathered, then {'sparse' if sparse else 'dense'} tensor cores"
    hardware = f"The 4 kept columns of every tile are gathered, which leaves 4/{m} of the arithmetic; {inside}."
    if v < rows:
        hardware += f" But an instruction takes {rows} rows that share their columns, and {v} fill it only in part."
    limit = 30 * v / 790 * m / 4  # an activation read from shared memory, 30 TB/s, serves v rows; dense has 790 TFLOP/s
    if limit < 1 / gathered:
        verdict = "tiles too low" if limit < 1 else verdict
        hardware += (
            f" A gathered activation serves {v} rows only: the shared memory of an H200 limits this product to about "
            f"{limit:.1f} times dense (estimate, not in the curve)."
        )
    if sparse and v >= 32:
        hardware += (
            " The public kernel, Spatha, is made for Ampere and took 128:2:8 to 2.9 to 3.9 times dense on an RTX 3090; "
            "none is made for Hopper."
        )
    return Fact(verdict, hardware, min(1.0, gathered), positions, why, gone, why)


# Sparsity in % above which blocks so many rows high are expected to win with many tokens, from the traffic L2 -> SMEM.
BREAK_EVEN = {8: (93, 95), 16: (88, 90), 32: (78, 83), 64: (58, 68), 128: (32, 47)}


def _block(structure: Any) -> Fact:
    rows, cols, density = structure.rows, structure.cols, structure.density
    why = "block ({tile_row}, {tile_col}): {tiles_kept} of {tiles} blocks kept; this is number {rank_tile} by its Σ|w|"
    tall = max((height for height in BREAK_EVEN if height <= rows), default=None)
    positions, arithmetic = _entropy(density) / (rows * cols), min(1.0, density * max(1.0, 8 / rows))
    if tall is None:
        hardware = f"An instruction takes 8 rows that share their columns; blocks {rows} high fill it only in part."
        return Fact("blocks too low", hardware, arithmetic, positions, why, pruned=why)
    low, high = BREAK_EVEN[tall]
    hardware = (
        "Dense tensor cores multiply the stored blocks and skip the rest. But an activation that is fetched serves "
        f"only the {rows} rows of a block: with many tokens, expect a gain on an H200 above {low} to {high} % sparsity "
        "(estimate, not in the curve)."
    )
    verdict = "dense tensor cores" if 100 * (1 - density) >= low else "blocks too low for this density"
    return Fact(verdict, hardware, arithmetic, positions, why, pruned=why)


FACTS: dict[str, Callable[[Any], Fact]] = {
    "Dense": _dense, "Unstructured": _unstructured, "NM": _nm, "VNM": _vnm, "Block": _block,
}


def unknown(structure: Any) -> Fact:
    """For a structure that is not in ``FACTS``."""
    return Fact(
        "not known",
        f"Nothing is on record here of how hardware multiplies {structure}: the curve assumes that all arithmetic "
        "saved is time saved.",
    )


def _entropy(share: float) -> float:
    """Bits that one yes or no of probability ``share`` needs."""
    return -sum(p * log2(p) for p in (share, 1 - share) if p > 0)


def _most_of_4(n: int, m: int) -> int:
    """Most weights that n:m can keep among 4 aligned inputs; with 2 or fewer it is a 2:4 mask too."""
    starts = range(0, lcm(4, m), 4)
    return max(sum(min(n, size) for size in Counter((start + i) // m for i in range(4)).values()) for start in starts)
