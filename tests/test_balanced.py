"""Balanced: cases by hand, what the catalogue says it keeps, and the index against one place at a time."""

import pytest
import torch

from sparsesurvey.structure import stored_bytes
from sparsesurvey.structures import NM, Balanced, Unstructured
from sparsesurvey.structures.balanced import PackedBalanced


@pytest.fixture(scope="module")
def gaussian():
    return torch.randn(512, 512, generator=torch.Generator().manual_seed(0))


def kept(structure, weight):
    mask = structure.mask(weight.abs())
    return (float(weight.abs()[mask].sum() / weight.abs().sum()), float(weight[mask].square().sum() / weight.square().sum()))


def test_sixteen_banks_of_512_inputs_are_16_of_32(gaussian):
    """Catalogue section 4.1: .789 of the magnitude and .920 of the energy; without any structure .928."""
    mask = Balanced(16, 0.5).mask(gaussian.abs())
    assert torch.equal(mask, NM(16, 32).mask(gaussian.abs()))
    assert kept(Balanced(16, 0.5), gaussian) == (pytest.approx(0.789, abs=0.01), pytest.approx(0.920, abs=0.01))
    assert kept(Unstructured(0.5), gaussian)[1] == pytest.approx(0.928, abs=0.01)


def test_one_bank_is_the_best_of_every_row(gaussian):
    """Row top-k of the catalogue: .796 and .928 at one half, .515 and .722 at one quarter."""
    assert kept(Balanced(1, 0.5), gaussian) == (pytest.approx(0.796, abs=0.01), pytest.approx(0.928, abs=0.01))
    assert kept(Balanced(1, 0.25), gaussian) == (pytest.approx(0.515, abs=0.01), pytest.approx(0.722, abs=0.01))


def test_fewer_banks_keep_more(gaussian):
    energies = [kept(Balanced(banks, 0.5), gaussian)[1] for banks in (128, 64, 32, 16, 4, 1)]
    assert energies == sorted(energies)


@pytest.mark.parametrize("banks, mask, holds", [
    (2, [[1, 1, 0, 0, 0, 0, 1, 1]], True),
    (2, [[1, 1, 1, 0, 0, 0, 0, 1]], False),  # four of eight, but three in the first bank
    (1, [[1, 1, 1, 0, 0, 0, 0, 1]], True),
    (1, [[1, 1, 1, 1, 0, 0, 0, 1]], False),
    (4, [[1, 0, 0, 1, 0, 0, 1, 0], [0] * 8], True),
])
def test_holds_by_hand(banks, mask, holds):
    assert Balanced(banks, 0.5).holds(torch.tensor(mask, dtype=torch.bool)) is holds


def test_every_bank_keeps_equally_many_and_at_least_one():
    structure = Balanced(3, 0.3)
    assert [structure.kept((1, 3 * bank)) for bank in (1, 2, 5, 10, 100)] == [1, 1, 2, 3, 30]
    mask = structure.mask(torch.randn(4, 30, generator=torch.Generator().manual_seed(0)))
    assert mask.view(4, 3, 10).sum(-1).eq(3).all()


@pytest.mark.parametrize("bank, dtype, width", [
    (2, torch.uint8, 1), (32, torch.uint8, 5), (33, torch.uint8, 6), (256, torch.uint8, 8), (257, torch.int16, 16),
    (32768, torch.int16, 16), (32769, torch.int32, 32),
])
def test_positions_have_as_few_bits_as_tell_the_inputs_of_a_bank_apart(bank, dtype, width):
    structure, shape = Balanced(2, 0.5), (1, 2 * bank)
    weight = torch.zeros(shape)
    weight[0, -1] = weight[0, 0] = 3
    packed = structure.pack(weight)
    each = round(0.5 * bank)
    assert packed.index.dtype == dtype and structure.position_bits(shape) == width
    assert structure.index_bits(shape) == 8 * -(-2 * each * width // 8) == 8 * packed.index.nbytes
    assert torch.equal(structure.unpack(packed), weight)
    assert structure.positions(packed)[0, 1, -1] == bank - 1


def test_bytes_by_hand():
    """Half of 4096 x 1024 in 16 banks of 64: 2 bytes and 6 bits for each kept weight."""
    structure, shape = Balanced(16, 0.5), (4096, 1024)
    weight = torch.zeros(shape, dtype=torch.bfloat16)
    assert stored_bytes(structure.pack(weight)) == 4096 * 512 * (16 + 6) // 8 == structure.cost(shape, 1).weight_bytes


@pytest.mark.parametrize("structure", [Balanced(16, 0.5), Balanced(4, 0.1), Balanced(3, 0.3)], ids=str)
def test_a_vector_times_the_stored_weights_one_by_one(structure):
    """SpMV with positions inside the bank, as a thread of a bank would do it, equals dense."""
    draw = torch.Generator().manual_seed(0)
    weight = structure.project(torch.randn(5, 96, generator=draw, dtype=torch.float64))
    x = torch.randn(96, generator=draw, dtype=torch.float64)
    packed = structure.pack(weight)
    positions, bank = structure.positions(packed), structure.bank((5, 96))
    y = [sum(float(packed.values[row, part, slot] * x[part * bank + int(positions[row, part, slot])])
             for part in range(structure.banks) for slot in range(structure.kept((5, 96)))) for row in range(5)]
    torch.testing.assert_close(torch.tensor(y, dtype=torch.float64), weight @ x)


def test_a_rising_target_keeps_masks_nested(gaussian):
    """The recalled schedule: each step chooses among what the last one kept; without training in between it ends where
    one step would.
    """
    mask = torch.ones_like(gaussian, dtype=torch.bool)
    for density in (0.75, 0.5, 0.25):
        smaller = Balanced(16, density).mask(gaussian.abs() * mask)
        assert not (smaller & ~mask).any()
        mask = smaller
    assert torch.equal(mask, Balanced(16, 0.25).mask(gaussian.abs()))


@pytest.mark.parametrize("index, what", [
    ([[0b0000]], "index must rise strictly"), ([[0b0001]], "index must rise strictly"), ([[0, 0]], "index must be torch.uint8"),
])
def test_corrupt_positions(index, what):
    packed = PackedBalanced(torch.ones(1, 1, 2), torch.tensor(index, dtype=torch.uint8), (1, 4))
    with pytest.raises(ValueError, match=f"^packed.{what}"):
        Balanced(1, 0.5).unpack(packed)
    with pytest.raises(ValueError, match="^packed.values must be"):
        Balanced(1, 0.5).unpack(packed._replace(values=torch.ones(1, 2)))
