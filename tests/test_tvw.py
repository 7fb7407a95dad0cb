"""Tile-wise with 2:4 inside: random masks against the definition spelt out, and what the paper says of it."""

from itertools import combinations

import pytest
import torch

from sparsesurvey.packing import tiles
from sparsesurvey.pruning import gaussian
from sparsesurvey.structure import stored_bytes
from sparsesurvey.structures import NM, TVW, TileWise
from sparsesurvey.structures.tilewise import NONE
from sparsesurvey.structures.tvw import quad_numbers


def boolean(rows: list[str]) -> torch.Tensor:
    return torch.tensor([[letter == "x" for letter in row] for row in rows])


def splits(count: int, most: int):
    """All ways to cut 0..count in order into parts of 1 to ``most``."""
    if count == 0:
        yield []
    for size in range(1, min(most, count) + 1):
        yield from ([size, *rest] for rest in splits(count - size, most))


# ---- the definition


def test_tvw_holds_as_defined():
    """Random masks of 4 x 8 in tiles of two: the fewest quads by trying every way to cut a tile's inputs."""
    def fewest(tile: torch.Tensor) -> int:
        used = tile[:, tile.any(0)]
        fits = lambda sizes: all(int(quad.sum(1).max()) <= 2 for quad in used.split(sizes, 1))
        return min(len(sizes) for sizes in splits(used.shape[1], 4) if not sizes or fits(sizes))

    structure, seen = TVW(2, 0.4), set()
    generator = torch.Generator().manual_seed(0)
    for share in (0.2, 0.35, 0.5) * 60:
        mask = torch.rand(4, 8, generator=generator) < share
        least = fewest(mask[:2]) + fewest(mask[2:])
        assert structure.holds(mask) == (least <= structure.quads((4, 8)))
        seen.add(structure.holds(mask))
    assert structure.quads((4, 8)) == 3 and seen == {True, False}


def test_quads_end_where_a_third_weight_would_follow():
    mask = boolean(["xxx..xx.", "...x..x."]).unsqueeze(0)
    assert quad_numbers(mask).tolist() == [[0, 0, 1, 1, -1, 1, 2, -1]]
    plain = boolean(["xx..xx..", "..xx..xx"]).unsqueeze(0)
    assert quad_numbers(plain).tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]]


# ---- the choice


def test_tvw_greedy_against_the_best_of_all_choices():
    """4 x 8 in tiles of two, three quads: one tile has one and the other two, which share its inputs in order."""
    def one(tile: torch.Tensor) -> float:
        size = min(4, tile.shape[1])
        return max((float(tile[:, list(chosen)].topk(min(2, size)).values.sum())
                    for chosen in combinations(range(tile.shape[1]), size)), default=0.0)

    two = lambda tile: max(one(tile[:, :cut]) + one(tile[:, cut:]) for cut in range(1, 8))
    structure, shares = TVW(2, 0.4), []
    assert structure.quads((4, 8)) == 3
    for seed in range(20):
        scores = gaussian((4, 8), seed).abs()
        upper, lower = scores.split(2)
        best = max(one(upper) + two(lower), two(upper) + one(lower))
        shares.append(float(scores[structure.mask(scores)].sum()) / best)
    assert max(shares) <= 1 + 1e-6 and 0.95 < sum(shares) / len(shares)


def test_tvw_is_two_four_after_compaction():
    structure, weight = TVW(16, 0.25), gaussian((64, 64))
    mask = structure.mask(weight.abs())
    for tile in mask.split(16):
        compact = tile[:, tile.any(0)]
        assert compact.shape[1] % 4 == 0 and NM(2, 4).holds(compact)
    assert not NM(2, 4).holds(mask), "before it, it is not"
    assert TileWise(16, 0.5, rows=False).holds(mask)
    outer = torch.stack([tile.any(0) for tile in mask.split(16)])
    sums = tiles(weight.abs(), 16, 1).sum((-2, -1))
    assert sums[outer].sum() / sums[TileWise(16, 0.5, rows=False).mask(weight.abs())[::16]].sum() > 0.99


# ---- storage and products


def test_bytes_by_hand():
    """[4096 x 1024] at a quarter of the weights in 16 bits: 4,096 quads of 128 x 2 values, 128 x 2 x 2 bits and 4 inputs."""
    structure, weight = TVW(128, 0.25), gaussian((4096, 1024)).bfloat16()
    packed = structure.pack(structure.project(weight))
    assert stored_bytes(packed) == 4096 * (128 * 2 * 2 + 64 + 4 * 2) + 4 * 33


def test_a_list_of_dense_products_is_the_masked_product():
    structure = TVW(16, 0.3)
    weight = structure.project(gaussian((64, 48)).double())
    packed = structure.pack(weight)
    x, dy = (torch.randn(9, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64) for size in (48, 64))
    torch.testing.assert_close(structure.spmm_gather(packed)(x), x @ weight.T)
    torch.testing.assert_close(structure.spmmt_gather(packed)(dy), dy @ weight)
    gradient = structure.unpack(packed._replace(values=structure.sddmm_gather(packed)(dy, x)))
    torch.testing.assert_close(gradient, dy.T @ x * (weight != 0))


def test_a_quad_with_fewer_inputs_says_so():
    structure = TVW(2, 0.5)
    weight = boolean(["xx..x...", "........"]).float()
    packed = structure.pack(weight)
    assert packed.columns.tolist()[:2] == [[0, 1, NONE, NONE], [4, NONE, NONE, NONE]], "input 4 would be a third weight"
    assert torch.equal(structure.unpack(packed), weight)


def test_corrupt_operands_are_refused():
    structure = TVW(2, 0.25)
    packed = structure.pack(structure.project(gaussian((8, 16))))
    for wrong in packed.columns.flip(1), packed.columns * 0, packed.columns + 16, packed.columns - 17:
        with pytest.raises(ValueError, match="packed.columns must rise strictly in each tile and stay from 0 to 15, or be -1"):
            structure.unpack(packed._replace(columns=wrong))
    for wrong in packed.row_pointers + 1, packed.row_pointers.flip(0):
        with pytest.raises(ValueError, match="packed.row_pointers must rise from 0 to 8, the number of quads"):
            structure.unpack(packed._replace(row_pointers=wrong))


def test_impossible_parameters():
    with pytest.raises(ValueError, match="^density must be at most 0.5"):
        TVW(128, 0.51)
    with pytest.raises(ValueError, match="in is a multiple of 4"):
        TVW(16, 0.25).mask(torch.ones(16, 6))
