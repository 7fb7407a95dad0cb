"""Directions of gradients, masks looked at while they move, and rows of both."""

from dataclasses import replace

import pytest
import torch

from sparsesurvey import asides
from sparsesurvey.asides import bearings, compass, orderings, traced
from sparsesurvey.data import markov, windows
from sparsesurvey.directions import INPUT, WEIGHTS, directions, exact, gradient, input_gradient
from sparsesurvey.experiments import recipe_curves
from sparsesurvey.linear import SparseLinear, sparse_layers, sparsify
from sparsesurvey.mistral import build
from sparsesurvey.moving import draw_update, one_update
from sparsesurvey.orders import FOUND, PENALTY, order_state
from sparsesurvey.recipe import Recipe
from sparsesurvey.recipes import BDWP, FST, PADST, SET, STE, PruneAndGrow, RigL, SLoPe, Static
from sparsesurvey.structures import NM, Block, Dense, Diagonal, Transposable, Unstructured
from sparsesurvey.train import TrainConfig

LANGUAGE = markov(length=1 << 13, valid=1 << 11)
MEAN = f"{WEIGHTS}, mean of 16"
TINY = TrainConfig(steps=8, warmup=2, eval_every=4, eval_batches=1, batch=4, seq=16)


def made(structure, recipe):
    return sparsify(build("markov", 0), structure, recipe)


@pytest.mark.parametrize(("structure", "recipe", "low", "high"), [
    (NM(2, 4), STE(), 1.0, 1.0), (Transposable(2, 4), FST(), 1.0, 1.0),
    (NM(2, 4), BDWP(), 0.8, 0.95), (NM(2, 4), SLoPe(), 0.8, 0.99),
])
def test_the_input_gradient_is_off_where_two_weights_are_used(structure, recipe, low, high):
    found = directions(made(structure, recipe), *windows(LANGUAGE.valid, 4, 16), draws=16)
    assert low - 1e-6 <= found[INPUT] <= high + 1e-6
    if recipe == FST():
        assert found[WEIGHTS] < found[MEAN] < 1  # noise, which a mean takes away
    else:
        assert found[WEIGHTS] == found[MEAN] and (found[WEIGHTS] > 1 - 1e-6) == (found[INPUT] > 1 - 1e-6)


def test_cosine_of_one_layer_by_hand():
    layer = SparseLinear(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)), NM(2, 4), BDWP())
    x, dy = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(input_gradient(layer, x, dy), dy @ (layer.weight * layer.back_mask))
    with exact({"layer": layer}):
        torch.testing.assert_close(input_gradient(layer, x, dy), dy @ (layer.weight * layer.mask))
    assert layer.recipe == BDWP()


def test_the_exact_gradient_is_autograd_s_own():
    model, plain = made(NM(2, 4), BDWP()), build("markov", 0)
    for name, layer in sparse_layers(model).items():
        plain.get_submodule(name).weight.data.copy_(layer.weight.detach() * layer.mask)
    x, y = windows(LANGUAGE.valid, 2, 16)
    with exact(sparse_layers(model)):
        torch.testing.assert_close(*(gradient(one, x, y, list(one.parameters())) for one in (model, plain)))


@pytest.mark.parametrize(("call", "message"), [
    (lambda: directions(build("markov"), *windows(LANGUAGE.valid, 2, 16)), "model must have masked layers"),
    (lambda: directions(made(NM(2, 4), STE()), *windows(LANGUAGE.valid, 2, 16), draws=1), "draws must be an integer of at least 2, got 1"),
    (lambda: order_state(made(NM(2, 4), STE())), "model must have layers that learn an order"),
    (lambda: one_update(NM(2, 4), STE()), "recipe must be one that drops and grows"),
    (lambda: one_update(Block(8, 8, 0.25), RigL(), number=11), "number must be from 1 to 10, got 11"),
])
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("structure", [Unstructured(0.25), Block(4, 4, 0.25), Diagonal(0.25)], ids=str)
@pytest.mark.parametrize("recipe", [RigL(every=2), SET(every=2)], ids=str)
def test_one_update_grows_what_it_drops_elsewhere(structure, recipe):
    update = one_update(structure, recipe)
    assert update.dropped.sum() == update.grown.sum() > 0 and not (update.dropped & update.grown).any()
    assert torch.equal(update.after, update.before & ~update.dropped | update.grown) and structure.holds(update.after)
    assert len(draw_update(structure, update).axes) == 4


def test_a_ramp_drops_more_than_it_grows():
    update = one_update(Block(4, 4, 0.25), PruneAndGrow(every=2))
    assert update.before.all() and update.dropped.sum() > update.grown.sum()


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSESURVEY_RUNS", str(folder / "runs"))
        yield str(folder)


def test_bearings_are_measured_once(record, monkeypatch):
    pairs = [(NM(2, 4), BDWP())]
    rows = bearings(pairs, (0,), LANGUAGE, config=TINY, record=record)
    assert {(row.at["step"], row.at["of"]) for row in rows} == {(step, of) for step in (0, 7) for of in (INPUT, WEIGHTS, MEAN)}
    assert not any(row.stale for row in rows) and "sparsesurvey.recipes.bdwp" in rows[0].source
    monkeypatch.setattr(asides, "_bearings", lambda *_: pytest.fail("measured again"))
    assert bearings(pairs, (0,), LANGUAGE, config=TINY, record=record) == rows
    table = compass(rows)
    assert table.loc["2:4, bdwp", (INPUT, "at the start")] == pytest.approx(rows[0].value, abs=1e-3)


def test_traces_are_those_of_the_runs(record):
    options = {"language": LANGUAGE, "record": record, "progress": False, "workers": 1}
    pairs = [(Dense(), Recipe()), (Block(8, 8, 0.1), RigL(every=2))]
    losses = recipe_curves(pairs, (0,), config=TINY, **options)
    recipe_curves(pairs[1:], (0,), config=replace(TINY, steps=4, eval_every=2), **options)
    plan = {"model": "markov", "config": TINY, "seeds": (0, 1)}
    assert asides.with_seeds(plan, pairs, LANGUAGE, record)["seeds"] == (0,)  # the one that is recorded
    assert asides.with_seeds(plan, [(NM(2, 4), STE())], LANGUAGE, record) == plan
    flips = traced(losses, "flip rate", record=record)
    assert [row.at["step"] for row in flips] == [4, 8] and flips[0].value > 0
    assert {row.at["step"] for row in traced(losses, "gradient norm", record=record) if row.structure == "dense"} == {4, 8}


def test_orders_are_followed_to_permutations(record, monkeypatch):
    pairs = [(Block(8, 8, 0.25), PADST(Static()))]
    rows = orderings(pairs, (0,), LANGUAGE, config=TINY, looks=4, record=record)
    penalty = {row.at["step"]: row.value for row in rows if row.metric == PENALTY}
    found = {row.at["step"]: row.value for row in rows if row.metric == FOUND}
    assert list(penalty) == [0, 2, 4, 6, 8] and penalty[0] > 0.3 and penalty[8] == 0  # a deadline at half of the steps
    assert found[0] == 0 and found[8] == 1
    monkeypatch.setattr(asides, "_orderings", lambda *_: pytest.fail("measured again"))
    assert len(orderings(pairs, (0,), LANGUAGE, config=TINY, looks=4, record=record)) == len(rows)
