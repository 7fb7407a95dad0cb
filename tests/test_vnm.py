"""V:N:M: what is chosen and how far from the best, (V, M) by diversity, the storage by hand, VENOM's known traps."""

from itertools import combinations
from itertools import product as cross
from math import comb, log

import pytest
import torch

from sparsesurvey.packing import tiles
from sparsesurvey.structure import stored_bytes
from sparsesurvey.structures import NM, VNM
from sparsesurvey.structures.vnm import bound, choose, exhaustive_mask, falling, top_of_few


@pytest.fixture(scope="module")
def gaussian():
    return torch.randn(512, 512, generator=torch.Generator().manual_seed(0))


def shares(weight, mask):
    """Kept |w| and kept w^2 as shares of the whole."""
    return [float((size * mask).sum() / size.sum()) for size in (weight.double().abs(), weight.double().square())]


# ---- what is chosen


def test_exhaustive_search_keeps_what_the_catalogue_says(gaussian):
    cheap, best = VNM().mask(gaussian.abs()), exhaustive_mask(VNM(), gaussian.abs())
    assert VNM().holds(best) and int(best.sum()) == VNM().nnz((512, 512))
    assert shares(gaussian, cheap) == pytest.approx([0.395, 0.482], abs=0.002)
    assert shares(gaussian, best) == pytest.approx([0.398, 0.488], abs=0.002)
    assert 0.97 < shares(gaussian, cheap)[0] / shares(gaussian, best)[0] < 1


@pytest.mark.parametrize("structure", [VNM(2, 2, 5), VNM(2, 1, 5), VNM(1, 2, 6), VNM(2, 3, 5), VNM(2, 4, 5), VNM(3, 2, 4)], ids=str)
def test_exhaustive_is_the_best_of_all_masks_of_a_tile(structure):
    """Against every mask of the tile that the definition allows, scores of either sign."""
    scores = torch.randn(structure.v, structure.m, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    every = torch.tensor(list(cross([False, True], repeat=scores.numel()))).view(-1, *scores.shape)
    full = every[(every.sum(-1) == structure.n).all(-1)]  # select keeps exactly n in each row
    best = max(float(scores[mask].sum()) for mask in full if structure.holds(mask))
    assert float(scores[exhaustive_mask(structure, scores)].sum()) == pytest.approx(best)
    assert float(scores[structure.mask(scores)].sum()) <= best + 1e-12


@pytest.mark.parametrize("structure", [VNM(4, 2, 8), VNM(8, 1, 10), VNM(2, 3, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_exhaustive_equals_a_loop_over_the_column_sets(structure, dtype):
    shape = structure.v * 3, structure.m * 3
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    tiled = tiles(scores.double(), structure.v, structure.m)
    sets = combinations(range(structure.m), 4)
    best = torch.stack([tiled[..., list(four)].topk(structure.n).values.sum((-2, -1)) for four in sets]).amax(0)
    mask = exhaustive_mask(structure, scores)
    assert structure.holds(mask)
    torch.testing.assert_close(tiles(scores.double() * mask, structure.v, structure.m).sum((-2, -1)), best)
    assert torch.equal(exhaustive_mask(structure, scores.T.contiguous().T), mask)


def test_select_is_the_sums_of_the_columns_and_then_the_rows():
    """Against a slow version, with ties: of equal columns and entries, the first."""
    structure = VNM(4, 2, 8)
    scores = torch.randint(0, 4, (16, 40), generator=torch.Generator().manual_seed(3)).float()
    want = torch.zeros(16, 40, dtype=torch.bool)
    for panel, tile in cross(range(4), range(5)):
        part = scores[4 * panel:4 * panel + 4, 8 * tile:8 * tile + 8]
        columns = sorted(sorted(range(8), key=lambda column: (-float(part[:, column].sum()), column))[:4])
        for row in range(4):
            for column in sorted(columns, key=lambda column: (-float(part[row, column]), column))[:2]:
                want[4 * panel + row, 8 * tile + column] = True
    assert torch.equal(structure.mask(scores), want)


@pytest.mark.parametrize("m", [17, 32, 256])
def test_wide_tiles_are_not_searched(m):
    with pytest.raises(ValueError, match=f"^m must be at most 16 .* got {m}, which has {comb(m, 4)}"):
        exhaustive_mask(VNM(2, 2, m), torch.zeros(2, m))


def test_exhaustive_checks_its_scores():
    for bad, why in ((torch.zeros(64, 9), "shape"), (torch.full((64, 8), torch.nan), "finite"), (torch.zeros(64, 8).long(), "float")):
        with pytest.raises(ValueError, match=why):
            exhaustive_mask(VNM(), bad)


@pytest.mark.parametrize("keep", range(5))
def test_few_are_ordered_without_a_sort(keep):
    four = torch.randint(0, 3, (4, 50), generator=torch.Generator().manual_seed(4)).float()
    assert torch.equal(torch.stack(list(falling(*four))), four.sort(0, descending=True).values)
    first = four.argsort(dim=0, descending=True, stable=True)[:keep]
    assert torch.equal(top_of_few(four.unbind(), keep), torch.zeros(4, 50, dtype=torch.bool).scatter_(0, first, True))


# ---- which V and M


@pytest.mark.parametrize("structure, value", [
    (VNM(16, 2, 8), 0.257), (VNM(64, 2, 8), 0.232), (VNM(128, 2, 8), 0.228), (VNM(64, 2, 5), 0.363), (VNM(64, 2, 6), 0.306),
], ids=str)
def test_diversity(structure, value):
    assert structure.diversity == pytest.approx(value, abs=5e-4)
    assert structure.facts().positions == pytest.approx(structure.diversity / log(2))  # the same, in bits


def test_diversity_counts_choices():
    """Of a tile small enough to count: columns and entries in them."""
    choices = sum(6**2 for _ in combinations(range(5), 4))  # 2 of 4 in both rows
    assert VNM(2, 2, 5).diversity == pytest.approx(log(choices) / 10)


def test_choose_takes_the_most_diverse_that_is_fast_enough():
    candidates = [VNM(64, 2, 5), VNM(64, 2, 6), VNM(16, 2, 8), VNM(64, 2, 8)]
    speedups = {structure: bound(structure) for structure in candidates}
    assert list(speedups.values()) == [2.5, 3, 4, 4]
    assert [str(choose(target, speedups)) for target in (2, 2.5, 3, 3.5, 4)] == ["64:2:5", "64:2:5", "64:2:6", "16:2:8", "16:2:8"]
    with pytest.raises(ValueError, match="^target must be at most 4, the best of speedups, got 5"):
        choose(5, speedups)
    with pytest.raises(ValueError, match="^target must be"):
        choose(1, {})


def test_the_extra_exponent_of_the_public_note_chooses_another_structure():
    """A note prints C(M, 4)^4, the superscript of a binomial misread: 16:2:8 would be more diverse than 64:2:6."""
    misread = lambda s: (4 * log(comb(s.m, 4)) + s.v * log(comb(4, s.n))) / (s.v * s.m)
    right, wrong = VNM(64, 2, 6), VNM(16, 2, 8)
    assert right.diversity > wrong.diversity and misread(right) < misread(wrong)
    assert choose(3, {right: 3, wrong: 4}) == right


# ---- how it is stored and multiplied


def test_the_parts_by_hand():
    """One tile of two rows: columns 1, 2, 5, 7 are in use; row 0 has the second and fourth of them, row 1 one of two."""
    weight = torch.tensor([[0.0, 0, 3, 0, 0, 0, 0, 4], [0, 5, 0, 0, 0, 6, 0, 0]])
    packed = VNM(2, 2, 8).pack(weight)
    assert packed.columns.tolist() == [[[1, 2, 5, 7]]]
    assert packed.values.tolist() == [[[3, 4]], [[5, 6]]]
    assert [f"{byte:04b}" for byte in packed.index.flatten().tolist()] == ["1101", "1000"]  # 3 and 1; 2 and 0
    assert stored_bytes(packed) == 4 * 4 + 2 + 4
    assert torch.equal(VNM(2, 2, 8).unpack(packed), weight)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_every_n_has_a_code(n):
    structure = VNM(4, n, 8)
    weight = torch.randn(12, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    weight = weight * structure.mask(weight.abs())
    packed = structure.pack(weight)
    assert torch.equal(structure.unpack(packed), weight)
    vectors = structure.vectors(packed, structure.places(packed))
    assert torch.equal(structure.outer.unpack(vectors), weight), "the same weights as v x 1 vectors"
    assert torch.equal(vectors.values.flatten()[structure.places(packed)], packed.values)


def test_a_tile_that_agrees_on_two_columns_only_is_two_to_four():
    """Zero columns fill up to four, and the compacted matrix is 2:4 whatever the tile."""
    weight = torch.zeros(2, 8)
    weight[:, 6:] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    packed = VNM(2, 2, 8).pack(weight)
    assert packed.columns.tolist() == [[[0, 1, 6, 7]]]
    assert packed.values.tolist() == [[[1, 2]], [[3, 4]]]
    assert NM(2, 4).holds(weight[:, packed.columns[0, 0].long()] != 0)
