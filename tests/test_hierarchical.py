"""Hierarchical pruning: cases by hand, the best choice by trying all, both readings of the first step, and the picker."""

from itertools import combinations, product

import pytest
import torch

from sparsesurvey.picker import FPGAS, Pick, bound, pick
from sparsesurvey.pruning import channel_scaled, gaussian, kept
from sparsesurvey.roofline import Roofline
from sparsesurvey.structure import stored_bytes
from sparsesurvey.structures import NM, Block, Hierarchical, Unstructured


@pytest.mark.parametrize("mask, holds", [
    ([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]], True),
    ([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]], True),  # one block only
    ([[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]], False),  # two in a row of a block
    ([[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1], [1, 0, 0, 0]], False),  # three blocks
])
def test_holds_by_hand(mask, holds):
    assert Hierarchical(2, 0.5, 1).holds(torch.tensor(mask, dtype=torch.bool)) is holds


def test_selection_is_the_best_of_all():
    """Two of four 2 x 2 blocks, one weight in each of their rows: all 6 x 2^4 ways."""
    structure = Hierarchical(2, 0.5, 1)
    for seed in range(20):
        scores = gaussian((4, 4), seed).abs()
        best = 0.0
        for pair in combinations(product((0, 2), (0, 2)), 2):
            for which in product((0, 1), repeat=4):
                places = [(row + i, col + which[2 * number + i]) for number, (row, col) in enumerate(pair) for i in (0, 1)]
                best = max(best, float(sum(scores[place] for place in places)))
        assert float(scores[structure.mask(scores)].sum()) == pytest.approx(best)


def test_the_norm_of_a_block_is_not_what_it_keeps():
    """One large weight makes the norm, two rows make the worth: by norm 9 + 0 is kept, and 8 + 8 is lost."""
    scores = torch.tensor([[9.0, 8.5, 8.0, 0.0], [0.0, 0.0, 8.0, 0.0]])
    structure = Hierarchical(2, 0.5, 1)
    assert scores[structure.select(scores)].sum() == 16 and scores[structure.select_by_norm(scores)].sum() == 9
    assert structure.holds(structure.select_by_norm(scores))


@pytest.mark.parametrize("weight", [gaussian((256, 256)), channel_scaled((256, 256))], ids=["gaussian", "channel-scaled"])
def test_choosing_blocks_by_norm_loses_little(weight):
    structure = Hierarchical(16, 0.5, 4)
    scores = weight.abs()
    best, norm = (scores[mask].sum() for mask in (structure.mask(scores), structure.select_by_norm(scores)))
    assert 0.99 * best < norm < best


@pytest.mark.parametrize("weight", [gaussian((256, 256)), channel_scaled((256, 256))], ids=["gaussian", "channel-scaled"])
@pytest.mark.parametrize("structure", Hierarchical.variants(), ids=str)
def test_keeps_more_than_blocks_and_less_than_weights_of_the_same_density(weight, structure):
    """The catalogue's property of HP."""
    alike = Block(structure.block, structure.block, structure.density), Unstructured(structure.density)
    here, blocks, best = (kept(weight, kind.mask(weight.abs())).energy for kind in (structure, *alike))
    assert blocks < here < best


@pytest.mark.parametrize("structure", Hierarchical.variants(), ids=str)
def test_every_row_of_every_block_that_stays_keeps_as_many(structure):
    mask = structure.mask(gaussian((128, 192)))
    tiled = mask.view(128 // structure.block, structure.block, 192 // structure.block, structure.block).transpose(1, 2)
    stay = tiled.any(-1).any(-1)
    assert int(stay.sum()) == structure.stay(mask.shape)
    assert set(tiled[stay].sum(-1).flatten().tolist()) == {structure.keep}


def test_one_level_alone_is_blocks_or_n_of_m():
    weight = gaussian((64, 64)).abs()
    assert torch.equal(Hierarchical(16, 0.5, 16).mask(weight), Block(16, 16, 0.5).mask(weight))
    assert torch.equal(Hierarchical(16, 1.0, 4).mask(weight), NM(4, 16).mask(weight))


def test_bytes_by_hand():
    """Half of 16 blocks of 16 x 16, 4 a row: 8 * 64 values, as many 4-bit columns, 8 block columns, 5 pointers."""
    structure = Hierarchical(16, 0.5, 4)
    packed = structure.pack((weight := gaussian((64, 64)).half()) * structure.mask(weight.abs()))
    by_hand = 8 * 64 * 2 + 8 * 64 * 4 // 8 + 8 * 2 + 5 * 4
    assert stored_bytes(packed) == structure.cost((64, 64), 1, 2).weight_bytes == by_hand


@pytest.mark.parametrize("keep, bits", [(1, 4), (4, 16), (5, 16), (8, 16), (16, 0)])
def test_a_row_of_a_block_has_the_shorter_code(keep, bits):
    """Columns of 4 bits each, a bitmap of 16 bits from 5 of 16 on, nothing where all are kept."""
    structure = Hierarchical(16, 0.5, keep)
    assert structure.index_bits((16, 32)) == 16 * bits + 16 + 2 * 32


def test_a_block_stays_even_where_the_share_rounds_to_none():
    structure = Hierarchical(4, 0.1, 2)
    assert structure.stay((4, 8)) == 1 and structure.nnz((4, 8)) == 8


@pytest.mark.parametrize("field, value, message", [
    ("keep", 17, "keep must be an integer from 1 to 16, got 17"),
    ("block", 65, "block must be an integer from 1 to 64, got 65"),
    ("blocks", 0, "blocks must be a number above 0 and at most 1"),
])
def test_bad_parameters(field, value, message):
    with pytest.raises(ValueError, match=message):
        Hierarchical(**{"block": 16, "blocks": 0.5, "keep": 8, field: value})


def test_corrupt_operands():
    structure = Hierarchical(4, 0.5, 1)
    packed = structure.pack((weight := gaussian((8, 8))) * structure.mask(weight.abs()))
    with pytest.raises(ValueError, match="packed.row_pointers must rise from 0 to 2"):
        structure.unpack(packed._replace(row_pointers=packed.row_pointers.flip(0)))
    with pytest.raises(ValueError, match="packed.columns must be from 0 to 1"):
        structure.unpack(packed._replace(columns=packed.columns + 5))
    with pytest.raises(ValueError, match="packed.index must be torch.uint8"):
        structure.unpack(packed._replace(index=packed.index[:, :0]))


# ---- the device picker


GRID = [Hierarchical(16, blocks, keep) for blocks in (0.25, 0.5, 1.0) for keep in (2, 4, 8)]
SHAPES = [(3072, 768), (3072, 768), (768, 3072)]


def choose(most_seconds: float, least_accuracy: float, devices=FPGAS) -> Pick | None:
    seconds = lambda device, structure: bound(device, structure, SHAPES, tokens=128)
    return pick(devices, GRID, seconds, lambda structure: structure.density**0.5, most_seconds, least_accuracy)


def test_the_picker_is_monotone():
    """Loosening either constraint never picks a larger device, and never turns an answer into none."""
    sizes = {None: 99, **{device.machine: number for number, device in enumerate(FPGAS)}}
    size = lambda seconds, accuracy: sizes[getattr(choose(seconds, accuracy), "device", None)]
    times, goals = [10**(exponent / 4) for exponent in range(-20, 4)], [0.1, 0.2, 0.3, 0.5, 0.7]
    found = [[size(seconds, goal) for seconds in times] for goal in goals]
    assert all(row == sorted(row, reverse=True) for row in found)
    assert all(list(column) == sorted(column) for column in zip(*found))
    assert {number for row in found for number in row} == {0, 1, 2, 99}, "all devices and none"


def test_the_pick_meets_both_constraints_and_nothing_smaller_does():
    found = choose(0.01, 0.3)
    assert found.seconds <= 0.01 and found.accuracy >= 0.3
    smaller = FPGAS[:[device.machine for device in FPGAS].index(found.device)]
    assert choose(0.01, 0.3, smaller) is None
    assert choose(0.01, 0.3, reversed(FPGAS)) == found, "the order in which devices are listed does not matter"


def test_the_picker_asks_for_no_accuracy_in_vain():
    asked = []
    devices = [Roofline("one", 1e9, 1e12, "made up"), Roofline("two", 2e9, 1e12, "made up")]
    found = pick(devices, [0.1, 0.2, 0.4], lambda device, density: density * 1e9 / device.flops_per_second,
                 lambda density: asked.append(density) or density, most_seconds=0.2, least_accuracy=0.3)
    assert found == Pick("two", 0.4, 0.2, 0.4)
    assert asked == [0.1, 0.2, 0.4]
    assert pick([], [0.1], lambda *_: 0.0, lambda _: 1.0, 1.0, 0.0) is None
