"""Diagonal (DynaDiag): literal cases, the best choice by trying all, transposition, products with many tokens."""

from itertools import combinations

import pytest
import torch

from sparsesurvey.pruning import gaussian, kept
from sparsesurvey.structure import Unavailable, stored_bytes
from sparsesurvey.structures import Diagonal
from sparsesurvey.structures.diagonal import FEW, TOKENS, skewed, spread

SHAPES = [(8, 8), (6, 9), (9, 6), (1, 5), (5, 1), (12, 40), (40, 12)]


def offsets(mask):
    """The definition, entry by entry: which diagonals a mask touches, counted along the longer side."""
    out, inn = mask.shape
    return {(column - row) % inn if out <= inn else (row - column) % out for row, column in mask.nonzero().tolist()}


def test_a_wide_weight():
    scores = torch.tensor([[1.0, 0.0, 0.0, 0.0],
                           [0.0, 0.0, 2.0, 9.0],
                           [0.0, 8.0, 0.0, 3.0]])
    structure = Diagonal(0.5)  # of 4 diagonals: 0 has 1, 1 has 2 + 3, 2 has 9, 3 has 8
    assert structure.mask(scores).int().tolist() == [[0, 0, 1, 1], [1, 0, 0, 1], [1, 1, 0, 0]]
    packed = structure.pack(scores * structure.mask(scores))
    assert packed.offsets.tolist() == [2, 3]
    assert packed.values.tolist() == [[0, 9, 0], [0, 0, 8]]


def test_a_tall_weight_counts_down_its_columns():
    weight = torch.tensor([[0.0, 0.0], [0.0, 0.0], [5.0, 0.0], [0.0, 7.0]])
    packed = Diagonal(0.25).pack(weight)
    assert packed.offsets.tolist() == [2] and packed.values.tolist() == [[5, 7]]
    assert Diagonal(0.25).holds(weight != 0)


def test_wrapped_entries_belong_to_their_diagonal():
    mask = torch.zeros(5, 5, dtype=torch.bool)
    mask[0, 4] = mask[1, 0] = True  # 4 - 0 = 4 and 0 - 1 = -1 = 4 modulo 5
    assert Diagonal(0.2).holds(mask)
    mask[0, 1] = True
    assert not Diagonal(0.2).holds(mask)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_holds_counts_the_diagonals_that_are_touched(shape):
    structure = Diagonal(0.4)
    for seed in range(20):
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.02 * seed
        assert structure.holds(mask) == (len(offsets(mask)) <= round(0.4 * max(shape)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_skewed_columns_are_the_diagonals_and_spread_turns_them_back(shape):
    out, inn = shape
    weight = torch.arange(out * inn).view(shape)
    lines = skewed(weight)
    assert lines.shape == (min(shape), max(shape)) and sorted(lines.flatten().tolist()) == list(range(out * inn))
    for offset in range(max(shape)):
        mask = spread(torch.arange(max(shape)) == offset, shape)
        assert offsets(mask) == {offset} and mask.sum() == min(shape)
        assert set(lines[:, offset].tolist()) == set(weight[mask].tolist())


@pytest.mark.parametrize("shape", [(7, 7), (4, 8), (8, 4)], ids=str)
def test_no_other_choice_of_diagonals_keeps_more(shape):
    structure, scores = Diagonal(0.4), gaussian(shape).abs()
    count = structure.diagonals(shape)
    every = (spread(torch.tensor([k in choice for k in range(max(shape))]), shape)
             for choice in combinations(range(max(shape)), count))
    best = max(float(scores[mask].sum()) for mask in every)
    assert float(scores[structure.mask(scores)].sum()) == pytest.approx(best)


@pytest.mark.parametrize("density, magnitude, energy", [(0.5, 0.512, 0.523), (0.25, 0.259, 0.269)])
def test_golden_values_of_the_catalogue(density, magnitude, energy):
    weight = gaussian((512, 512))
    found = kept(weight, Diagonal(density).mask(weight.abs()))
    assert found.density == density
    assert found.magnitude == pytest.approx(magnitude, abs=0.005)
    assert found.energy == pytest.approx(energy, abs=0.005)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_transpose_of_a_member_is_a_member(shape):
    structure = Diagonal(0.4)
    member = structure.project(gaussian(shape))
    assert structure.holds((member != 0).T)
    other = structure.transposed(structure.pack(member))
    assert torch.equal(structure.unpack(other), member.T)
    direct = structure.pack(member.T.contiguous())
    assert torch.equal(other.values, direct.values) and torch.equal(other.offsets, direct.offsets)


def test_the_short_side_is_balanced_and_the_long_side_need_not_be():
    wide = Diagonal(0.25).mask(gaussian((64, 192)).abs())
    assert (wide.sum(1) == 48).all()
    tall = Diagonal(0.25).mask(gaussian((192, 64)).abs())
    assert (tall.sum(0) == 48).all() and tall.sum(1).unique().numel() > 1
    empty = Diagonal(0.25).mask(torch.zeros(192, 64))  # the first 48 diagonals: nothing reaches the last outputs
    assert not empty[111:].any() and empty[:111].any(1).all()


def test_stored_are_the_values_and_one_number_a_diagonal():
    packed = Diagonal(0.1).pack(torch.zeros(1000, 500))
    assert packed.values.shape == (100, 500) and packed.offsets.dtype == torch.int16
    assert stored_bytes(packed) == 100 * 500 * 4 + 100 * 2
    assert Diagonal(0.1).index_bits((100, 40000)) == 4000 * 32


@pytest.mark.parametrize("tokens", [FEW, FEW + 1, 2 * TOKENS["gradient"] + 1, 2 * TOKENS["product"] + 3])
@pytest.mark.parametrize("shape", [(24, 24), (12, 40), (40, 12), (1, 5), (5, 1)], ids=str)
def test_products_of_few_and_of_many_tokens(shape, tokens):
    structure = Diagonal(0.2)
    weight = structure.project(gaussian(shape))
    packed = structure.pack(weight)
    x, dy = gaussian((tokens, shape[1]), 1), gaussian((tokens, shape[0]), 2)
    mask = structure.unpack(packed._replace(values=torch.ones_like(packed.values)))
    right = {"spmm": x.double() @ weight.double().T, "spmmt": dy.double() @ weight.double(),
             "sddmm": dy.double().T @ x.double() * mask}
    for product, expected in right.items():
        for name, plan in structure.kernels(product).items():
            try:
                got = plan(packed)(*{"spmm": (x,), "spmmt": (dy,), "sddmm": (dy, x)}[product])
            except Unavailable:
                continue
            got = structure.unpack(packed._replace(values=got)) if product == "sddmm" else got
            torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-4, msg=f"{product}_{name}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_many_terms_are_summed_in_single_precision(dtype):
    structure = Diagonal(0.5)
    weight = torch.ones(4, 4096, dtype=dtype) * structure.mask(torch.ones(4, 4096))
    run = structure.spmm_roll(structure.pack(weight))
    for tokens in 1, FEW + 1:
        assert (run(torch.ones(tokens, 4096, dtype=dtype)) == 2048).all()  # summed in 16 bits it stops far below


def test_a_weight_too_small_for_its_density_keeps_nothing():
    structure = Diagonal(0.01)
    packed = structure.pack(torch.zeros(9, 40))
    assert packed.values.shape == (0, 9) and structure.nnz((9, 40)) == 0
    for tokens in 1, 20:
        assert not structure.spmm_roll(packed)(gaussian((tokens, 40))).any()
        assert not structure.spmmt_roll(packed)(gaussian((tokens, 9))).any()


def test_offsets_that_do_not_fit_are_refused():
    packed = Diagonal(0.4).pack(Diagonal(0.4).project(gaussian((5, 5))))
    for wrong in [0, 0], [1, 0], [0, 5], [-1, 3]:
        with pytest.raises(ValueError, match="packed.offsets must rise strictly and stay from 0 to 4"):
            Diagonal(0.4).unpack(packed._replace(offsets=torch.tensor(wrong, dtype=torch.int16)))
