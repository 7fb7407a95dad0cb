"""Flat block butterfly (Pixelated Butterfly): the layout literally, its density, its reach, its products."""

import pytest
import torch

from sparsesurvey.pruning import gaussian
from sparsesurvey.structure import Unavailable, stored_bytes
from sparsesurvey.structures import Block, Butterfly

EVERY = [Butterfly(size, factors) for size in (2, 4, 8, 16, 32) for factors in range(1, size.bit_length())]
each = pytest.mark.parametrize("structure", EVERY, ids=str)


def test_layout_of_4():
    assert Butterfly(4, 1).layout().int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    assert Butterfly(4, 2).layout().int().tolist() == [[1, 1, 1, 0], [1, 1, 0, 1], [1, 0, 1, 1], [0, 1, 1, 1]]


def test_layout_of_8():
    drawn = ["xxx.x...", "xx.x.x..", "x.xx..x.", ".xxx...x", "x...xxx.", ".x..xx.x", "..x.x.xx", "...x.xxx"]
    assert Butterfly(8, 3).layout().tolist() == [[cell == "x" for cell in row] for row in drawn]


@each
def test_layout_is_the_sum_of_butterfly_factors(structure):
    """A factor of stride s couples p with p + s within blocks of 2 s on the diagonal: kron(I, ones(2, 2), I)."""
    total = torch.zeros(structure.size, structure.size)
    for factor in range(structure.factors):
        stride = 2**factor
        outer = torch.eye(structure.size // (2 * stride))
        total += torch.kron(outer, torch.kron(torch.ones(2, 2), torch.eye(stride)))
    assert torch.equal(structure.layout(), total > 0)


@each
def test_density_is_factors_plus_one_over_size(structure):
    layout = structure.layout()
    assert layout.double().mean() == structure.density == (structure.factors + 1) / structure.size
    assert torch.equal(layout, layout.T)
    assert (layout.sum(0) == structure.factors + 1).all()


@each
def test_as_many_layers_as_factors_reach_everything_within_their_span(structure):
    """One layer changes any one of the lowest bits: ``factors`` layers reach every pattern of these."""
    span = 2**structure.factors
    reach = torch.matrix_power(structure.layout().double(), structure.factors) > 0
    same = torch.arange(structure.size) // span
    assert torch.equal(reach, same[:, None] == same)
    if structure.factors > 1:
        assert not torch.equal(torch.matrix_power(structure.layout().double(), structure.factors - 1) > 0, reach)


def test_all_factors_reach_the_whole_matrix():
    for size in 2, 4, 8, 16, 32:
        factors = size.bit_length() - 1
        assert (torch.matrix_power(Butterfly(size, factors).layout().double(), factors) > 0).all()


def test_blocks_are_stretched_to_the_weight():
    mask = Butterfly(4, 1).mask(torch.zeros(4, 12))
    assert mask.int().tolist() == 2 * [[1] * 6 + [0] * 6] + 2 * [[0] * 6 + [1] * 6]
    assert Butterfly(4, 1).holds(mask.T.contiguous())


@each
def test_the_transpose_is_a_member(structure):
    mask = structure.mask(torch.zeros(structure.size * 3, structure.size * 2))
    assert structure.holds(mask) and structure.holds(mask.T.contiguous())
    assert torch.equal(mask.T, structure.mask(torch.zeros(structure.size * 2, structure.size * 3)))


def test_scores_are_not_looked_at_and_no_index_is_stored():
    structure, scores = Butterfly(8, 3), gaussian((64, 192)).abs()
    assert torch.equal(structure.mask(scores), structure.mask(-scores))
    packed = structure.pack(structure.project(scores))
    assert structure.index_bits((64, 192)) == 0
    assert stored_bytes(packed) == 64 * 192 // 2 * 4


def test_rounding_to_blocks_keeps_more_where_the_grid_cuts_them():
    structure = Butterfly(16, 3)
    assert structure.rounded((512, 2048), 32).double().mean() == 0.25  # 32 x 128 blocks: nothing is cut
    assert structure.rounded((768, 3072), 32).double().mean() > 0.25  # 48 rows are a block and a half
    layout = Butterfly(4, 1).rounded((12, 12), 2)  # 3 rows each: blocks 1 and 4 of 2 touch two of the grid's
    assert layout.int().tolist() == [[1, 1, 1, 0, 0, 0]] * 3 + [[0, 0, 0, 1, 1, 1]] * 3
    with pytest.raises(ValueError, match="block 5x5"):
        structure.rounded((768, 3072), 5)


@pytest.mark.parametrize("shape", [(64, 192), (512, 1024)], ids=str)
def test_products_of_narrow_and_of_wide_blocks(shape):
    structure = Butterfly(16, 3)
    weight = structure.project(gaussian(shape))
    packed = structure.pack(weight)
    x, dy = gaussian((37, shape[1]), 1), gaussian((37, shape[0]), 2)
    mask = structure.mask(weight)
    right = {"spmm": x.double() @ weight.double().T, "spmmt": dy.double() @ weight.double(),
             "sddmm": dy.double().T @ x.double() * mask}
    for product, expected in right.items():
        for name, plan in structure.kernels(product).items():
            try:
                got = plan(packed)(*{"spmm": (x,), "spmmt": (dy,), "sddmm": (dy, x)}[product])
            except Unavailable:
                continue
            got = structure.unpack(packed._replace(values=got)) if product == "sddmm" else got
            torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-3, msg=f"{product}_{name}")


def test_it_is_a_block_matrix():
    weight = Butterfly(8, 2).project(gaussian((64, 32)))
    assert Block(8, 4, Butterfly(8, 2).density).holds(weight != 0)


@pytest.mark.parametrize("size", [1, 3, 6, 12, 2.0, True])
def test_size_is_a_power_of_two(size):
    with pytest.raises(ValueError, match="size must be a power of two of at least 2"):
        Butterfly(size, 1)


@pytest.mark.parametrize("size, factors", [(2, 2), (4, 3), (16, 5)])
def test_factors_are_at_most_the_logarithm_of_size(size, factors):
    with pytest.raises(ValueError, match=f"factors must be an integer from 1 to {size.bit_length() - 1}"):
        Butterfly(size, factors)


def test_a_grid_that_does_not_divide_the_weight_is_refused():
    with pytest.raises(ValueError, match="out is a multiple of 16"):
        Butterfly(16, 3).mask(torch.zeros(40, 64))
