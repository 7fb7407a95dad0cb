"""Orders found by assignment and learned: they keep more, cost nothing, and the penalty knows permutations."""

from itertools import permutations

import pytest
import torch

from sparsesurvey import pruning
from sparsesurvey.assignment import (
    arrange, doubly_stochastic, improve, in_order, kept_share, learn_order, penalty,
)
from sparsesurvey.structures import NM, VNM, Block


def clustered(out=64, inn=64, groups=4, seed=0):
    """|w| of outputs that use one of a few sets of inputs each, in no order."""
    generator = torch.Generator().manual_seed(seed)
    use = torch.rand(groups, inn, generator=generator) < 0.25
    mine = torch.randint(0, groups, (out,), generator=generator)
    return torch.randn(out, inn, generator=generator).abs() * (0.1 + use[mine])


@pytest.mark.parametrize("structure", [VNM(16, 2, 8), NM(2, 4), VNM(8, 2, 16), Block(8, 8, 0.25)], ids=str)
@pytest.mark.parametrize("weight", ["gaussian", "clustered"])
def test_arrangement_never_keeps_less(structure, weight):
    scores = clustered() if weight == "clustered" else pruning.gaussian((64, 64)).abs()
    found = arrange(structure, scores)
    assert found.kept == sorted(found.kept) and len(found.kept) == 3
    assert found.kept[-1] > found.kept[0]
    for order in found[:2]:
        assert sorted(order.tolist()) == list(range(64))
    assert kept_share(structure, found.apply(scores)) == pytest.approx(found.kept[-1])


def test_rows_that_agree_are_brought_together():
    """Two panels of interleaved outputs that use different columns: after a few rounds nothing is lost."""
    scores = torch.zeros(8, 8)
    scores[::2, :2], scores[1::2, 4:6] = 1, 1
    scores[::2, 2:4], scores[1::2, 6:] = 0.5, 0.5
    structure = VNM(4, 4, 8)
    assert kept_share(structure, scores) < 1
    assert arrange(structure, scores, rounds=8).kept[-1] == 1


def test_folding_leaves_the_product_unchanged():
    """P_o W P_i, pruned, on inputs in order, gives the outputs in order; and the mask goes back to the weight."""
    weight, x = pruning.gaussian((64, 64)).double(), pruning.gaussian((5, 64), seed=1).double()
    structure = VNM(16, 2, 8)
    found = arrange(structure, weight.abs(), rounds=1)
    assert torch.equal(found.undo(found.apply(weight)), weight)
    mask = structure.mask(found.apply(weight.abs()))
    there = x[:, found.columns] @ (found.apply(weight) * mask).T
    here = x @ (weight * found.undo(mask)).T
    torch.testing.assert_close(there, here[:, found.rows])


def test_an_order_of_hidden_features_folds_into_both_layers_of_an_mlp():
    up, down, x = (pruning.gaussian(size, seed).double() for seed, size in enumerate(((64, 32), (16, 64), (5, 32))))
    order = arrange(NM(2, 4), down.abs(), rounds=1).columns
    plain = torch.relu(x @ up.T) @ down.T
    folded = torch.relu(x @ up[order].T) @ down[:, order].T
    torch.testing.assert_close(folded, plain)


def test_one_pass_is_the_best_of_all_deals_of_one_place():
    """Two-wide tiles of 1:2: one place of each of four tiles, against all 24 ways to deal it."""
    scores = torch.rand(6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start, best = torch.arange(8), 0.0
    for deal in permutations(range(4)):
        order = start.clone().view(4, 2)
        order[:, 0] = order[list(deal), 0].clone()
        best = max(best, kept_share(NM(1, 2), scores, order.flatten()))
    assert kept_share(NM(1, 2), scores, improve(NM(1, 2), scores, start)) >= best - 1e-12


def test_a_short_order_is_that_of_every_window():
    scores = pruning.channel_scaled((32, 64)).abs()
    order = improve(NM(2, 4), scores, torch.arange(16))
    assert sorted(order.tolist()) == list(range(16))
    assert torch.equal(in_order(scores, order)[:, 16:32], scores[:, 16:32][:, order])
    assert kept_share(NM(2, 4), scores, order) > kept_share(NM(2, 4), scores)


# ---- learned


def test_penalty_is_zero_for_permutations_and_above_elsewhere_on_the_polytope():
    generator = torch.Generator().manual_seed(0)
    for size in (1, 2, 5, 16):
        permutation = torch.eye(size)[torch.randperm(size, generator=generator)]
        assert float(penalty(permutation)) == pytest.approx(0, abs=1e-7)
    for _ in range(20):
        soft = doubly_stochastic(torch.rand(8, 8, generator=generator), rounds=100)
        torch.testing.assert_close(soft.sum(0), torch.ones(8))
        torch.testing.assert_close(soft.sum(1), torch.ones(8))
        assert float(penalty(soft)) > 0.01
        other = torch.eye(8)[torch.randperm(8, generator=generator)]
        assert float(penalty(0.9 * torch.eye(8) + 0.1 * other)) > 0 or torch.equal(other, torch.eye(8))


def test_the_uniform_matrix_is_farthest():
    """l1 - l2 of a row of the polytope is 1 - |row|, largest where the row is flat: 1 - 1 / sqrt(n)."""
    assert float(penalty(torch.full((16, 16), 1 / 16))) == pytest.approx(1 - 1 / 4)


@pytest.mark.parametrize("structure", [NM(2, 4), VNM(16, 2, 8)], ids=str)
def test_learned_orders_beat_random_ones_and_assignment_beats_learning(structure):
    scores = pruning.channel_scaled((64, 64)).abs()
    learned = learn_order(structure, scores)
    random = [kept_share(structure, scores, torch.randperm(64, generator=torch.Generator().manual_seed(seed)))
              for seed in range(20)]
    assigned = kept_share(structure, scores, improve(structure, scores, torch.arange(64)))
    assert sorted(learned.order.tolist()) == list(range(64))
    assert max(kept_share(structure, scores), sum(random) / 20) < kept_share(structure, scores, learned.order) < assigned
    assert learned.penalty[-1] < 0.05 * learned.penalty[0]
    for axis in (0, 1):  # what leaves the polytope counts strong inputs more than once, and keeps "more" than is there
        torch.testing.assert_close(learned.soft.sum(axis), torch.ones(64), rtol=0, atol=0.1)
    assert learned.kept[-1] == pytest.approx(kept_share(structure, scores, learned.order), abs=0.01)


def test_learning_ends_when_the_penalty_is_low():
    learned = learn_order(NM(2, 4), pruning.gaussian((32, 32)).abs(), window=16, below=0.1)
    assert learned.penalty[-1] < 0.1 <= learned.penalty[-2]
    assert learned.order.shape == (16,) and learned.soft.shape == (16, 16)


@pytest.mark.parametrize("options, what", [
    ({"window": 5}, "window must divide the 8 inputs, got 5"), ({"window": 9}, "window must be an integer from 1 to 8"),
    ({"steps": 0}, "steps must be"),
])
def test_learning_refuses(options, what):
    with pytest.raises(ValueError, match=what):
        learn_order(NM(2, 4), torch.ones(4, 8), **options)


def test_arrange_refuses():
    with pytest.raises(ValueError, match="rounds must be"):
        arrange(NM(2, 4), torch.ones(4, 8), rounds=-1)
    with pytest.raises(ValueError, match="scores must be finite"):
        arrange(NM(2, 4), torch.full((4, 8), torch.nan))
    with pytest.raises(ValueError, match="shape"):
        arrange(NM(2, 4), torch.ones(4, 9))
