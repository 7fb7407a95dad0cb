"""Monarch: the definition of Dao et al. (2022) entry by entry, the closed-form projection, and what it is worth."""

import pytest
import torch

from sparsesurvey import pruning
from sparsesurvey.structure import stored_bytes
from sparsesurvey.structures import LowRank, Monarch

SQUARE, WIDE = Monarch(3), Monarch(2, 2)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def energy(weight, structure):
    return pruning.captured(weight, structure.project(weight), 1.0).energy


def permutation(blocks, size):
    """P [blocks * size, blocks * size]: what is in block l at place i goes to place i * blocks + l."""
    return torch.eye(blocks * size).view(blocks, size, -1).transpose(0, 1).reshape(blocks * size, -1).double()


def test_it_is_two_block_diagonal_factors_and_two_permutations():
    """W = P L P' R, the paper's formula, with dense matrices."""
    packed = SQUARE.pack(random(9, 9))
    first, second = SQUARE.factors(packed)
    right, left, shuffle = torch.block_diag(*first), torch.block_diag(*second), permutation(3, 3)
    torch.testing.assert_close(SQUARE.unpack(packed), shuffle @ left @ shuffle.T @ right)


@pytest.mark.parametrize("structure, shape", [(SQUARE, (6, 12)), (WIDE, (8, 6)), (Monarch(1, 2), (3, 4))], ids=str)
def test_every_entry_is_the_sum_that_the_definition_says(structure, shape):
    packed = structure.pack(random(*shape))
    first, second = structure.factors(packed)
    b, rank, p = structure.blocks, structure.rank, shape[1] // structure.blocks
    for row in range(shape[0]):
        for column in range(shape[1]):
            i, l, k, j = row // b, row % b, column // p, column % p
            want = sum(second[l, i, k * rank + r] * first[k, l * rank + r, j] for r in range(rank))
            assert structure.unpack(packed)[row, column] == pytest.approx(float(want))


def test_members_by_hand_are_kept_and_others_are_not():
    """Of 4 x 4 with two blocks the slices are rows 0 and 2, or 1 and 3, by inputs 0 and 1, or 2 and 3."""
    weight = torch.tensor([[1.0, 2, 3, 4], [1, 1, 0, 0], [2, 4, -3, -4], [5, 5, 0, 7]])
    torch.testing.assert_close(Monarch(2).project(weight), weight)
    weight[2, 1] = 5  # slice [[1, 2], [2, 5]] has rank 2
    near = Monarch(2).project(weight)
    assert not near.allclose(weight, atol=0.05) and near[1].allclose(weight[1])
    torch.testing.assert_close(Monarch(2, 2).project(weight), weight)


def test_the_fourier_transform_is_one():
    """The discrete Fourier transform of b * b points, every b-th input side by side: its complex slices have rank one."""
    b = 4
    points = torch.arange(b * b, dtype=torch.float64)
    angle = 2 * torch.pi / b**2 * points[:, None] * points
    order = points.long().view(b, b).T.flatten()
    cosine, sine = angle.cos()[:, order], angle.sin()[:, order]
    for part in cosine, sine:  # real and imaginary part of a complex rank-one slice: rank two
        torch.testing.assert_close(Monarch(b, 2).project(part), part)


def test_projection_is_the_closest_member():
    """No member near the projection, and none made by other factors, is closer; a slice alone agrees with its own SVD."""
    structure, weight = Monarch(2), random(6, 8)
    packed = structure.pack(weight)
    loss = (weight - structure.unpack(packed)).square().sum()
    for seed in range(200):
        step = random(packed.values.numel(), seed=seed)
        for scale in 1e-3, 0.1, 1.0:
            other = packed._replace(values=packed.values + scale * step)
            assert (weight - structure.unpack(other)).square().sum() > loss
    singular = torch.linalg.svdvals(structure.slices(weight))
    torch.testing.assert_close(loss, singular[..., 1:].square().sum())


def test_gradient_descent_over_the_factors_ends_at_the_projection():
    structure, weight = Monarch(2), random(4, 4)
    best = (weight - structure.project(weight)).square().sum()
    found = []
    for seed in range(5):
        packed = structure.pack(random(4, 4, seed=seed + 1))
        values = packed.values.clone().requires_grad_()
        for _ in range(2000):
            loss = (weight - structure.unpack(packed._replace(values=values))).square().sum()
            values.data -= 0.02 * torch.autograd.grad(loss, values)[0]
        found.append(float(loss.detach()))
    assert min(found) == pytest.approx(float(best), rel=1e-3) and min(found) >= best * (1 - 1e-9)


def test_golden_energies_of_a_gaussian():
    """Catalogue 4.7: 12.5 % of the values keep 21.4 % as Monarch, 21.2 % as low rank, 50.4 % where they like."""
    weight = pruning.gaussian((256, 256))
    for structure, kept in (Monarch(16), 0.214), (LowRank(0.125), 0.212):
        assert pruning.density(structure, (256, 256)) == 0.125
        assert energy(weight, structure) == pytest.approx(kept, abs=0.005)
    assert pruning.best_kept(weight, 0.125).energy == pytest.approx(0.504, abs=0.005)


def test_it_wins_where_the_target_has_its_structure():
    structure = Monarch(16)
    target = structure.unpack(structure.pack(pruning.gaussian((256, 256), seed=1))) + 0.02 * pruning.gaussian((256, 256))
    assert energy(target, structure) > 0.99
    assert energy(target, LowRank(0.125)) < 0.6
    assert pruning.best_kept(target, 0.125).energy < 0.9


def test_rank_reaches_further_than_that_of_as_many_values():
    """b blocks have as many values as a matrix of rank b, and ranks up to b * b."""
    weight = random(64, 64)
    assert torch.linalg.matrix_rank(Monarch(8).project(weight)) == 64
    assert torch.linalg.matrix_rank(Monarch(4).project(weight)) == 16
    assert Monarch(4).nnz((64, 64)) == 4 * (64 + 64)


@pytest.mark.parametrize("n, b", [(16, 4), (256, 16), (4096, 64)])
def test_square_monarch_has_two_n_root_n_values(n, b):
    assert Monarch(b).nnz((n, n)) == 2 * n * b == round(2 * n**1.5)


def test_one_block_is_low_rank():
    weight = random(12, 20)
    torch.testing.assert_close(Monarch(1, 3).project(weight), LowRank(3 * 32 / 240).project(weight))


def test_slices_of_full_rank_are_every_matrix():
    weight = random(8, 12)
    torch.testing.assert_close(Monarch(2, 4).project(weight), weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_packed_in_theirs(dtype):
    packed = Monarch(4, 3).pack(random(192, 64).to(dtype))
    assert packed.values.dtype == dtype and stored_bytes(packed) == 2 * 12 * 256


def test_slices_too_small_for_their_rank_are_refused():
    with pytest.raises(ValueError, match="monarch 4 rank 3 needs a shape of at least 12 x 12"):
        Monarch(4, 3).nnz((8, 64))
