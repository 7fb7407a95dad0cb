"""Orders that keep more, by hand and by exhaustion, and a gated MLP that computes the same in any of them."""

from itertools import permutations

import matplotlib.pyplot as plt
import pytest
import torch
from torch import nn

from sparsesurvey import mistral, shuffles
from sparsesurvey.assignment import kept_share
from sparsesurvey.calibration import calibrate, correlated_layer, inputs_of
from sparsesurvey.pruning import channel_scaled
from sparsesurvey.reconstruction import output_error
from sparsesurvey.shuffles import (
    compare, deal, e_sparse_order, fold, folded, gated, hidden_orders, mask_in, ria_order, snake, swapped,
)
from sparsesurvey.structures import NM, VNM, Block, Permuted

ORDERS = {"e_sparse": e_sparse_order, "ria": ria_order, "deal": lambda s, x: deal(x, s.tile[1]),
          "snake": lambda s, x: snake(x, s.tile[1])}


class Gated(nn.Module):
    def __init__(self, hidden=16, inner=32, bias=False):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(hidden, inner, bias=bias), nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


def wanda(weight, inputs):
    return weight.abs() * inputs.square.sqrt()


def test_deal_and_snake_by_hand():
    scores = torch.tensor([[1.0, 5.0, 2.0, 6.0, 3.0, 7.0, 4.0, 8.0]])
    assert scores[:, deal(scores, 2)].tolist() == [[8, 4, 7, 3, 6, 2, 5, 1]]
    assert scores[:, deal(scores, 4)].tolist() == [[8, 6, 4, 2, 7, 5, 3, 1]]
    assert scores[:, snake(scores, 2)].tolist() == [[1, 8, 2, 7, 3, 6, 4, 5]]
    assert scores[:, snake(scores, 4)].tolist() == [[1, 4, 5, 8, 2, 3, 6, 7]]


@pytest.mark.parametrize("find", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("structure", [NM(2, 4), NM(4, 8), NM(1, 4), VNM(16, 2, 8)], ids=str)
def test_orders_are_permutations_and_what_they_keep_fits(find, structure):
    scores = channel_scaled((32, 64), seed=3).abs()
    order = find(structure, scores)
    assert order.sort().values.tolist() == list(range(64))
    mask = mask_in(structure, scores, order)
    assert structure.holds(mask[:, order])
    assert Permuted(structure, tuple(order.tolist())).holds(mask)
    assert kept_share(structure, scores, order) == pytest.approx(float((scores * mask).sum() / scores.sum()))


@pytest.mark.parametrize("seed", range(5))
def test_search_never_loses_and_helps_where_neighbours_are_alike(seed):
    weight, x = correlated_layer(seed, size=64, tokens=256, alike=0.5)
    inputs = inputs_of(x)
    scores, start = wanda(weight, inputs), torch.randperm(64)
    plain = kept_share(NM(2, 4), scores)
    assert kept_share(NM(2, 4), scores, swapped(NM(2, 4), scores, start)) > kept_share(NM(2, 4), scores, start)
    dealt, snaked = (kept_share(NM(2, 4), scores, order(scores, 4)) for order in (deal, snake))
    assert kept_share(NM(2, 4), scores, e_sparse_order(NM(2, 4), scores)) >= dealt > plain
    assert kept_share(NM(2, 4), scores, ria_order(NM(2, 4), scores)) >= snaked > plain


def test_swaps_stay_in_their_block_and_stop_where_none_helps():
    scores = channel_scaled((8, 32)).abs()
    order = swapped(NM(2, 4), scores, torch.arange(32), block=8)
    assert all(sorted(part.tolist()) == list(range(8 * i, 8 * i + 8)) for i, part in enumerate(order.view(4, 8)))
    assert torch.equal(swapped(NM(2, 4), scores, torch.arange(32), block=4), torch.arange(32))
    for _ in range(10):
        order = swapped(NM(2, 4), scores, order)
    best = kept_share(NM(2, 4), scores, order)
    trials = [order.clone() for _ in range(32 * 31 // 2)]
    for trial, (one, other) in zip(trials, ((i, j) for i in range(32) for j in range(i))):
        trial[[one, other]] = trial[[other, one]]
    assert max(kept_share(NM(2, 4), scores, trial) for trial in trials) <= best + 1e-9


def test_no_order_of_eight_inputs_is_better_than_all_of_them():
    scores = channel_scaled((4, 8), seed=1).abs()
    best = max(kept_share(NM(2, 4), scores, torch.tensor(order)) for order in permutations(range(8)) if order[0] == 0)
    for find in ORDERS.values():
        assert kept_share(NM(2, 4), scores, find(NM(2, 4), scores)) <= best + 1e-9
    assert kept_share(NM(2, 4), scores, ria_order(NM(2, 4), scores, passes=4)) > 0.99 * best


def test_what_the_deal_gains_where_neighbours_are_alike():
    """Retained score + 1.2 %, and a sixth of the output error: .0325 -> .0269 were found in another such case."""
    gains, falls = [], []
    for seed in range(3):
        weight, x = correlated_layer(seed, alike=0.22)
        inputs = inputs_of(x, ("gram",))
        scores = wanda(weight, inputs)
        plain, dealt = NM(2, 4).mask(scores), mask_in(NM(2, 4), scores, deal(scores, 4))
        gains.append(float((scores * dealt).sum() / (scores * plain).sum()) - 1)
        falls.append(1 - output_error(weight, weight * dealt, inputs) / output_error(weight, weight * plain, inputs))
    assert sum(gains) / 3 == pytest.approx(0.012, abs=0.002)
    assert sum(falls) / 3 == pytest.approx(1 - 0.0269 / 0.0325, abs=0.04)


def test_compare_starts_with_what_is_kept_as_it_is():
    weight, x = correlated_layer(size=64, tokens=256, alike=0.4)
    inputs = inputs_of(x)
    table = compare(NM(2, 4), wanda(weight, inputs))
    assert table["kept"].iloc[0] == kept_share(NM(2, 4), wanda(weight, inputs)) and table["gain %"].iloc[0] == 0
    assert (table["gain %"].iloc[1:] > 0).all()


@pytest.mark.parametrize("bias", [False, True])
def test_fold_changes_nothing_that_is_computed(bias):
    mlp = Gated(bias=bias).double()
    before, x = mlp.gate_proj.weight.detach().clone(), torch.randn(7, 16, dtype=torch.float64)
    expected, order = mlp(x), torch.randperm(32)
    fold(mlp, order)
    assert torch.equal(mlp.gate_proj.weight, before[order])
    assert (mlp(x) - expected).abs().max() < 1e-12
    fold(mlp, order.argsort())
    assert torch.equal(mlp.gate_proj.weight, before)
    assert torch.equal(mlp(x), expected)


def test_a_folded_mistral_computes_the_same_and_keeps_more():
    model = mistral.build("markov").double().eval()
    ids = torch.randint(0, 32, (4, 64), generator=torch.Generator().manual_seed(0))
    inputs = calibrate(model, [ids], progress=False)
    expected = model(ids).logits
    found = hidden_orders(model, NM(2, 4), wanda, inputs)
    assert list(found) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    layers = {name: mlp.down_proj for name, mlp in gated(model).items()}
    share = lambda inputs: [kept_share(NM(2, 4), wanda(layer.weight.detach(), inputs[f"{name}.down_proj"]))
                            for name, layer in layers.items()]
    before = share(inputs)
    fold(model, found)
    assert (model(ids).logits - expected).abs().max() < 1e-12
    after = share(calibrate(model, [ids], progress=False))
    assert all(now > then for now, then in zip(after, before))


def test_folded_leaves_the_model_itself_alone():
    mlp = Gated()
    before = mlp.up_proj.weight.detach().clone()
    other = folded(mlp, torch.arange(32).flip(0))
    assert torch.equal(mlp.up_proj.weight, before) and torch.equal(other.up_proj.weight, before.flip(0))
    assert torch.equal(folded(mlp, {}).up_proj.weight, before)


def test_draw_has_a_column_for_each_order():
    scores = channel_scaled((8, 16)).abs()
    figure = shuffles.draw(NM(2, 4), scores, {"as they are": torch.arange(16), "dealt": deal(scores, 4)})
    share = kept_share(NM(2, 4), scores, deal(scores, 4))
    assert [ax.get_title() for ax in figure.axes][1] == f"dealt: {share:.1%} kept" and len(figure.axes) == 4
    plt.close(figure)


def test_an_order_that_does_not_fit_leaves_the_model_as_it_was():
    model = nn.ModuleDict({"a": Gated(), "b": Gated()})
    before = [weight.detach().clone() for weight in model.parameters()]
    good, cases = torch.arange(32).flip(0), [
        (torch.arange(32), "name the MLPs"), ({"a": torch.arange(32).flip(0), "c": torch.arange(32)}, "for gated MLPs"),
        ({"a": torch.arange(32).flip(0), "b": torch.zeros(32, dtype=torch.int64)}, "each number below 32 once")]
    for orders, words in cases:
        with pytest.raises(ValueError, match=words):
            fold(model, orders)
    assert all(torch.equal(now, then) for now, then in zip(model.parameters(), before))
    fold(model, {"b": good})
    assert torch.equal(model["b"].up_proj.weight.flip(0), before[4])


@pytest.mark.parametrize("order", [None, [0, 1], torch.arange(31), torch.arange(32).float(), torch.arange(1, 33)])
def test_an_order_must_be_a_permutation(order):
    with pytest.raises(ValueError, match="order must be an int64 tensor"):
        shuffles.check_order(order, 32)


def test_what_does_not_fit_is_refused():
    scores = channel_scaled((16, 32)).abs()
    with pytest.raises(ValueError, match="gated MLPs.*Linear with none"):
        fold(nn.Linear(4, 4), torch.arange(4))
    with pytest.raises(ValueError, match="tiles choose alone"):
        ria_order(Block(4, 4, 0.5), scores)
    with pytest.raises(ValueError, match="tiles choose alone"):
        swapped("2:4", scores, torch.arange(32))
    with pytest.raises(ValueError, match="width must divide the 32 inputs, got 5"):
        deal(scores, 5)
    with pytest.raises(ValueError, match="scores must be finite"):
        snake(scores.masked_fill(scores > 1, float("nan")), 4)
    with pytest.raises(ValueError, match="inputs must hold down_proj"):
        hidden_orders(Gated(), NM(2, 4), wanda, {})
