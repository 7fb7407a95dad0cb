"""Tile-wise patterns: every mask of a small matrix against the definition spelt out, and what the papers say of them."""

from itertools import combinations, product
from math import inf

import pytest
import torch

from sparsesurvey.pruning import channel_scaled, gaussian, kept
from sparsesurvey.packing import tiles
from sparsesurvey.structure import stored_bytes
from sparsesurvey.structures import TEW, Block, TileWise, Unstructured
from sparsesurvey.structures.tilewise import NONE, cheapest_cuts
from sparsesurvey.tilesparsity import ragged


def boolean(rows: list[str]) -> torch.Tensor:
    return torch.tensor([[letter == "x" for letter in row] for row in rows])


def every_mask(out: int, inn: int) -> list[torch.Tensor]:
    return list(torch.tensor(list(product([False, True], repeat=out * inn))).view(-1, out, inn))


def splits(count: int, most: int):
    """All ways to cut 0..count in order into parts of 1 to ``most``."""
    if count == 0:
        yield []
    for size in range(1, min(most, count) + 1):
        yield from ([size, *rest] for rest in splits(count - size, most))


def fewest_pieces(mask: torch.Tensor, count: int, g: int) -> float:
    lines = mask[mask.any(1)]
    return min((sum(int(part.any(0).sum()) for part in lines.split(sizes)) if sizes else 0
                for sizes in splits(len(lines), g) if len(sizes) <= count), default=inf)


# ---- the definitions, all masks


def test_tilewise_holds_as_defined():
    """4 x 3 in tiles of two outputs: one tile of two is there, or both, with so many pieces."""
    for structure, count, pieces in (TileWise(2, 0.5), 1, 3), (TileWise(2, 0.8), 2, 5), (TileWise(2, 0.3), 1, 2):
        assert (structure.count((4, 3)), structure.pieces((4, 3))) == (count, pieces)
        for mask in every_mask(4, 3):
            assert structure.holds(mask) == (fewest_pieces(mask, count, 2) <= pieces), mask


def test_tilewise_of_inputs_only_is_the_vector_structure():
    weight = gaussian((64, 48))
    for density in 0.5, 0.3:
        ours, block = TileWise(16, density, rows=False), Block(16, 1, density)
        assert torch.equal(ours.mask(weight.abs()), block.mask(weight.abs()))
    assert all(TileWise(2, 0.5, rows=False).holds(mask) == Block(2, 1, 0.5).holds(mask) for mask in every_mask(4, 3))


def test_tew_holds_as_defined():
    structure = TEW(2, 0.5, 0.2)
    pieces, single = structure.tilewise.pieces((4, 3)), structure.singles((4, 3))
    assert (pieces, single) == (2, 2)
    for mask in every_mask(4, 3):
        inside = tiles(mask, 2, 1).sum((-2, -1)).flatten().tolist()
        least = min(sum(inside) - sum(chosen) for chosen in combinations(inside, pieces))
        assert structure.holds(mask) == (least <= single), mask


def test_cuts_are_the_cheapest():
    generator = torch.Generator().manual_seed(0)
    for rows, count, g in product(range(1, 8), (1, 2, 3), (1, 2, 3)):
        if rows > count * g:
            continue
        mask = torch.rand(rows, 5, generator=generator) < 0.3
        mask[~mask.any(1), 0] = True
        cuts = cheapest_cuts(mask, count, g)
        assert [start for start, _ in cuts] == [0, *(stop for _, stop in cuts[:-1])] and cuts[-1][1] == rows
        assert len(cuts) <= count and all(stop - start <= g for start, stop in cuts)
        assert sum(int(mask[start:stop].any(0).sum()) for start, stop in cuts) == fewest_pieces(mask, count, g)


def test_a_member_that_lost_an_output_keeps_its_tiles():
    """Without output 1, full tiles in order would pair 0 with 2, which have no input in common: nine pieces, not six."""
    tight = TileWise(2, 0.25)
    mask = boolean(["xxx...", "......", "...xxx", "...xxx", "......", "......", "......", "......"])
    assert tight.count(mask.shape) == 2 and tight.pieces(mask.shape) == 6
    weight = mask.float() * torch.arange(1.0, 49.0).view(8, 6)
    packed = tight.pack(weight)
    assert packed.rows.tolist() == [[0, NONE], [2, 3]]
    assert torch.equal(tight.unpack(packed), weight)
    assert packed.values.shape == (6, 2) and packed.values[:3, 1].eq(0).all(), "a tile of one output is filled with zeros"
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(tight.spmm_gather(packed)(x), x @ weight.T)


# ---- the choice


def test_greedy_against_the_best_of_all_masks():
    """``exhaustive`` tries all sets of outputs; nothing that ``holds`` admits is better, and the greedy choice is near."""
    structure = TileWise(2, 0.5)
    admitted = [mask for mask in every_mask(4, 3) if structure.holds(mask)]
    for seed in range(20):
        scores = gaussian((4, 3), seed).abs()
        best = max(float(scores[mask].sum()) for mask in admitted)
        assert float(scores[structure.exhaustive(scores)].sum()) == pytest.approx(best)
        assert structure.holds(structure.exhaustive(scores))
        assert 0.7 * best < float(scores[structure.mask(scores)].sum()) <= best * (1 + 1e-6)


def test_gap_of_the_greedy_choice():
    """12 outputs, 8 inputs: the two steps reach 95 % and more of the optimum on average; on scaled channels 98 %."""
    structure = TileWise(2, 0.5)
    for weights, least in (gaussian, 0.94), (channel_scaled, 0.97):
        shares = []
        for seed in range(20):
            scores = weights((12, 8), seed).abs()
            shares.append(float(scores[structure.mask(scores)].sum() / scores[structure.exhaustive(scores)].sum()))
        assert max(shares) <= 1 + 1e-6 and least < sum(shares) / len(shares)
    with pytest.raises(ValueError, match="scores must have few outputs"):
        TileWise(2, 0.25).exhaustive(torch.ones(64, 4))


def test_tew_greedy_against_the_best_of_all_choices():
    structure, shares = TEW(2, 0.5, 0.1), []
    for seed in range(20):
        scores = gaussian((4, 5), seed).abs()
        pieces, single = structure.tilewise.pieces((4, 5)), structure.singles((4, 5))
        best = 0.0
        for chosen in combinations(range(10), pieces):
            held = torch.zeros(10, dtype=torch.bool)
            held[list(chosen)] = True
            held = held.view(2, 5).repeat_interleave(2, 0)
            best = max(best, float(scores[held].sum() + scores[~held].topk(single).values.sum()))
        shares.append(float(scores[structure.mask(scores)].sum()) / best)
    assert max(shares) <= 1 + 1e-6 and 0.95 < sum(shares) / len(shares)


def test_energy_kept_of_gaussian_weights():
    """The catalogue's L05: block .517 < tile-wise .547 < vector-wise .693 < unstructured .928, at half density."""
    weight = gaussian((512, 512))
    energy = {str(structure): kept(weight, structure.mask(weight.abs())) for structure in (
        Block(32, 32, 0.5), TileWise(128, 0.5, rows=False), TileWise(128, 0.5), Block(8, 1, 0.5), Unstructured(0.5))}
    assert energy["TW 128 50% inputs only"][1:] == pytest.approx((0.523, 0.547), abs=0.01)
    names = "block 32x32 50%", "TW 128 50% inputs only", "block 8x1 50%", "unstructured 50%"
    ordered = [energy[name].energy for name in names]
    assert ordered == sorted(ordered) and ordered == pytest.approx([0.517, 0.547, 0.693, 0.928], abs=0.01)


def test_energy_kept_of_channel_scaled_weights():
    """The catalogue's TW2 .876 against block .636; its weights were other draws, with other channel scales."""
    weights = [channel_scaled((512, 512), seed) for seed in range(5)]
    mean = lambda structure: sum(kept(weight, structure.mask(weight.abs())).energy for weight in weights) / len(weights)
    assert mean(TileWise(128, 0.5)) == pytest.approx(0.876, abs=0.02)
    assert mean(Block(32, 32, 0.5)) == pytest.approx(0.636, abs=0.02)
    assert mean(TileWise(128, 0.5)) > mean(TileWise(128, 0.5, rows=False)), "outputs of small scale go as a whole"


@pytest.mark.parametrize("density", [0.5, 0.25])
def test_tew_keeps_more_than_tilewise_at_the_same_density(density):
    for weight in gaussian((512, 512)), channel_scaled((512, 512)):
        energy = [kept(weight, structure.mask(weight.abs())).energy
                  for structure in (TileWise(128, density, rows=False), TEW(128, density, 0.01), TEW(128, density, 0.05))]
        assert energy[0] < energy[1] < energy[2]


# ---- the released code's selection


def test_short_pieces_win_in_the_released_selection():
    """For a density of .10 it keeps .042: all of its pieces are short ones, and their number is what it fills up."""
    weight = gaussian((512, 512))
    wrong, right = ragged(weight.abs(), 128, 0.1), TileWise(128, 0.1).mask(weight.abs())
    assert kept(weight, wrong).density == pytest.approx(0.042, abs=0.001)
    assert kept(weight, right).density == pytest.approx(0.1, abs=0.0003)
    assert wrong.any(1).sum() == 34, "162 outputs survive, and only those of the short tile keep anything"


def test_the_density_is_that_of_whole_pieces():
    shapes = (64, 64), (48, 7), (512, 96)
    for structure, shape in product((TileWise(16, 0.1), TileWise(16, 0.37), TileWise(16, 0.9)), shapes):
        mask = structure.mask(gaussian(shape).abs())
        pieces = structure.pieces(shape)
        assert int(mask.sum()) == 16 * pieces
        assert abs(int(mask.sum()) / mask.numel() - structure.density) <= 8 / mask.numel() * 1.001
        assert structure.count(shape) * shape[1] >= pieces


# ---- storage and products


def test_bytes_by_hand():
    """[4096 x 1024] at half density in 16 bits."""
    weight = gaussian((4096, 1024)).bfloat16()
    structure = TileWise(128, 0.5)  # 23 of 32 tiles; 16,384 pieces
    packed = structure.pack(structure.project(weight))
    assert stored_bytes(packed) == 16384 * (128 * 2 + 2) + 4 * 24 + 23 * 128 * 2
    structure = TEW(128, 0.5, 0.05)  # 14,746 pieces, 209,715 single weights
    packed = structure.pack(structure.project(weight))
    assert stored_bytes(packed) == 14746 * (128 * 2 + 2) + 4 * 33 + 209715 * (2 + 2) + 4 * 4097


@pytest.mark.parametrize("structure", [TileWise(16, 0.3), TEW(16, 0.3, 0.05)], ids=str)
def test_a_list_of_dense_products_is_the_masked_product(structure):
    weight = structure.project(gaussian((64, 48)).double())
    packed = structure.pack(weight)
    x, dy = (torch.randn(9, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64) for size in (48, 64))
    torch.testing.assert_close(structure.spmm_gather(packed)(x), x @ weight.T)
    torch.testing.assert_close(structure.spmmt_gather(packed)(dy), dy @ weight)
    gradient = structure.unpack(packed._replace(values=structure.sddmm_gather(packed)(dy, x)))
    torch.testing.assert_close(gradient, dy.T @ x * (weight != 0))


def test_corrupt_operands_are_refused():
    structure = TileWise(2, 0.5)
    packed = structure.pack(structure.project(gaussian((8, 6))))
    for wrong in packed.rows.flip(0), packed.rows * 0, packed.rows + 8, packed.rows - 9:
        with pytest.raises(ValueError, match="packed.rows must rise strictly and stay from 0 to 7, or be -1 for none"):
            structure.unpack(packed._replace(rows=wrong))
    fewer = torch.where(packed.rows == packed.rows[0, 0], NONE, packed.rows)
    assert structure.holds(structure.unpack(packed._replace(rows=fewer)) != 0)
    structure = TEW(2, 0.5, 0.1)
    packed = structure.pack(structure.project(gaussian((8, 6))))
    tile = int(packed.pieces.row_pointers.diff().argmax())
    first = packed.pieces.columns[packed.pieces.row_pointers[tile]]
    pointers = torch.where(torch.arange(9) > 2 * tile, len(packed.single.columns), 0).int()
    columns = torch.arange(len(packed.single.columns)).to(torch.int16) + first
    with pytest.raises(ValueError, match="packed.single must name no weight that packed.pieces holds"):
        structure.unpack(packed._replace(single=packed.single._replace(columns=columns.clamp(max=5), row_pointers=pointers)))


def test_impossible_parameters():
    with pytest.raises(ValueError, match="^rows must be True or False"):
        TileWise(128, 0.5, rows=1)
    with pytest.raises(ValueError, match="^delta must be below the density, 0.5, got 0.5"):
        TEW(128, 0.5, 0.5)
