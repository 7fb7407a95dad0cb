"""Least squares on a support, by enumeration and by a solver that sees the inputs; damping; bad grams."""

import warnings
from functools import partial
from itertools import combinations, product
from types import SimpleNamespace

import pytest
import torch

from sparsesurvey import mistral
from sparsesurvey.alps import alps
from sparsesurvey.models import prune_model
from sparsesurvey.reconstruction import MEMORY, DampingRaised, damped, output_error, refit, refitted
from sparsesurvey.scores import magnitude, wanda
from sparsesurvey.sparsegpt import sparsegpt
from sparsesurvey.structures import NM, Block, Unstructured


def seen(out=4, inn=8, tokens=40, seed=0):
    draw = torch.Generator().manual_seed(seed)
    weight, mixing = torch.randn(out, inn, generator=draw).double(), torch.randn(inn, inn, generator=draw).double()
    x = torch.randn(tokens, inn, generator=draw).double() @ mixing
    return weight, x, SimpleNamespace(gram=x.T @ x, tokens=tokens)


def by_lstsq(weight, mask, x):
    fitted = torch.zeros_like(weight)
    for row, kept in enumerate(mask):
        if kept.any():
            fitted[row, kept] = torch.linalg.lstsq(x[:, kept], x @ weight[row]).solution
    return fitted


MASKS = {
    "2:4": lambda weight: NM(2, 4).mask(weight.abs()),
    "unstructured": lambda weight: Unstructured(0.4).mask(weight.abs()),
    "blocks, shared by rows": lambda weight: Block(2, 2, 0.5).mask(weight.abs()),
    "a row without any": lambda weight: NM(2, 4).mask(weight.abs()) & (torch.arange(len(weight)) > 0)[:, None],
    "all": lambda weight: torch.ones_like(weight, dtype=torch.bool),
    "none": lambda weight: torch.zeros_like(weight, dtype=torch.bool),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_refit_is_least_squares(mask):
    weight, x, inputs = seen(12, 16, 64)
    mask = mask(weight)
    fitted = refit(weight, mask, inputs)
    assert not fitted[~mask].any()
    torch.testing.assert_close(fitted, by_lstsq(weight, mask, x), rtol=1e-7, atol=1e-7)


def test_a_score_and_refit_make_a_pruner():
    weight, _, inputs = seen(12, 16, 64)
    pruner = partial(refitted, score=magnitude, damp=0, dtype=torch.float64)
    found, mask = pruner(weight, NM(2, 4), inputs)
    assert torch.equal(mask, NM(2, 4).mask(weight.abs())) and torch.equal(found, refit(weight, mask, inputs))
    model = mistral.build("markov").eval()
    batches = [torch.randint(0, 32, (4, 64), generator=torch.Generator().manual_seed(0))]
    report = prune_model(model, NM(2, 4), partial(refitted, score=wanda), batches, progress=False)
    assert report.density == 0.5
    with pytest.raises(ValueError, match="with a mask"):
        refitted(weight, "2:4", inputs, magnitude)


def test_refit_in_pieces_is_the_same(monkeypatch):
    weight, _, inputs = seen(12, 16, 64)
    mask = Unstructured(0.4).mask(weight.abs())
    whole = refit(weight, mask, inputs)
    monkeypatch.setitem(MEMORY, "cpu", 4096)
    torch.testing.assert_close(refit(weight, mask, inputs), whole)


def test_no_2_4_mask_with_any_values_is_better_than_enumeration():
    weight, x, inputs = seen(3, 8)
    groups = [torch.zeros(4, dtype=torch.bool).index_fill(0, torch.tensor(two), True) for two in combinations(range(4), 2)]
    supports = torch.stack([torch.cat(pair) for pair in product(groups, repeat=2)])  # all 36
    errors = torch.stack([((x @ (row - fitted).T) ** 2).sum(0) for row in weight
                          for fitted in [by_lstsq(row.expand(36, -1), supports, x)]])  # [row, support]
    best = supports[errors.argmin(1)]
    total = ((x @ weight.T) ** 2).sum()
    optimum = float(errors.amin(1).sum() / total)
    assert output_error(weight, refit(weight, best, inputs), inputs) == pytest.approx(optimum, rel=1e-6)
    for prune in (sparsegpt, alps):
        found, mask = prune(weight, NM(2, 4), inputs, dtype=torch.float64)
        assert output_error(weight, found, inputs) >= optimum * (1 - 1e-9)
        assert output_error(weight, refit(weight, mask, inputs), inputs) <= output_error(weight, found, inputs) * (1 + 1e-9)


def test_output_error_is_that_of_the_outputs():
    weight, x, inputs = seen()
    pruned = weight * NM(2, 4).mask(weight.abs())
    by_hand = (x @ (weight - pruned).T).square().sum() / (x @ weight.T).square().sum()
    assert output_error(weight, pruned, inputs) == pytest.approx(float(by_hand))
    assert output_error(weight, weight, inputs) == 0 and output_error(weight, torch.zeros_like(weight), inputs) == 1


def test_damping_is_raised_and_said_so():
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    inputs = SimpleNamespace(gram=x.T @ x, tokens=4)  # rank 4 of 16
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    with pytest.warns(DampingRaised, match=r"damp=0: used 1e-0"):
        found, mask = sparsegpt(weight, NM(2, 4), inputs, damp=0)
    assert found.isfinite().all() and NM(2, 4).holds(mask)
    with pytest.warns(DampingRaised):
        assert refit(weight, mask, inputs).isfinite().all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparsegpt(weight, NM(2, 4), inputs)


def test_the_factor_is_that_of_the_damped_gram():
    _, _, inputs = seen()
    shifted, factor = damped(inputs.gram, 0.01)
    torch.testing.assert_close(shifted, inputs.gram + 0.01 * inputs.gram.diagonal().mean() * torch.eye(8))
    torch.testing.assert_close(factor @ factor.T, shifted)
    assert torch.equal(factor, factor.triu())


def test_a_gram_that_is_none_is_refused():
    with pytest.raises(ValueError, match="positive semidefinite.*raised from 0.01 to 10"):
        damped(torch.tensor([[1.0, 50.0], [50.0, 1.0]]), 0.01)


@pytest.mark.parametrize("damp", [-0.1, None, "0.01", True, float("nan"), float("inf"), 11])
def test_damp_must_be_a_small_number(damp):
    with pytest.raises(ValueError, match="damp must be a number from 0 to 10"):
        damped(torch.eye(2), damp)


def bad_grams():
    gram = torch.eye(8, dtype=torch.float64)
    return [(None, "needs inputs.gram: calibrate"), (torch.eye(4), r"inputs.gram must be \[8, 8\]"),
            (gram.masked_fill(gram > 0, float("nan")), "inputs.gram must be finite, got 8 NaN"),
            (gram.int(), "floating point"), (-gram, "diagonal of at least 0")]


@pytest.mark.parametrize("gram, words", bad_grams(), ids=range(len(bad_grams())))
def test_a_gram_that_does_not_fit_is_one_clear_error(gram, words):
    weight, _, _ = seen()
    inputs = SimpleNamespace(gram=gram, tokens=1)
    calls = [lambda: sparsegpt(weight, NM(2, 4), inputs), lambda: alps(weight, NM(2, 4), inputs),
             lambda: refit(weight, weight > 0, inputs), lambda: output_error(weight, weight, inputs)]
    for call in calls:
        with pytest.raises(ValueError, match=words):
            call()


def test_inputs_that_are_none_and_weights_with_nan_are_refused():
    weight, _, inputs = seen()
    with pytest.raises(ValueError, match="needs inputs.gram"):
        sparsegpt(weight, NM(2, 4), None)
    weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="weight must be finite"):
        sparsegpt(weight, NM(2, 4), inputs)


@pytest.mark.parametrize("mask", [None, torch.ones(4, 8), torch.ones(4, 4, dtype=torch.bool)])
def test_refit_wants_a_mask_of_the_weight(mask):
    weight, _, inputs = seen()
    with pytest.raises(ValueError, match="mask must be a boolean matrix"):
        refit(weight, mask, inputs)
