"""ALPS: under every pattern, better than what it starts from, its last step the least squares of its support."""

from types import SimpleNamespace

import pytest
import torch

from sparsesurvey.alps import alps, conjugate_gradients, solver, support
from sparsesurvey.calibration import correlated_layer, inputs_of
from sparsesurvey.reconstruction import output_error, refit
from sparsesurvey.sparsegpt import sparsegpt
from sparsesurvey.structure import Pattern
from sparsesurvey.structures import NM, Monarch, Unstructured, all_structures

FIRST = [kind() for kind in all_structures().values() if issubclass(kind, Pattern)]


def small(out=64, inn=64, seed=0):
    weight, x = correlated_layer(seed, size=max(out, inn), tokens=4 * inn)
    return weight[:out, :inn], inputs_of(x[:, :inn], ("gram",))


@pytest.mark.parametrize("structure", FIRST, ids=str)
def test_every_pattern_holds(structure):
    size = [step * -(-64 // step) for step in structure.tile]
    weight, inputs = small(*size)
    found, mask = alps(weight, structure, inputs)
    assert structure.holds(mask) and structure.holds(found != 0) and not found[~mask].any()
    if mask.any() and not mask.all():
        by_size = weight * structure.mask(weight.abs())
        assert output_error(weight, found, inputs) < output_error(weight, by_size, inputs)


@pytest.mark.parametrize("structure", [NM(2, 4), Unstructured(0.5), Unstructured(0.3)], ids=str)
def test_beats_sparsegpt_and_is_near_the_best_values_of_its_support(structure):
    weight, x = correlated_layer()
    inputs = inputs_of(x, ("gram",))
    found, mask = alps(weight, structure, inputs)
    error = output_error(weight, found, inputs)
    assert error < output_error(weight, sparsegpt(weight, structure, inputs).weight, inputs)
    best = output_error(weight, refit(weight, mask, inputs), inputs)
    assert best <= error < 1.05 * best


def test_without_correlation_it_is_magnitude_up_to_near_ties():
    """ADMM is no exact solver: where two weights are nearly alike it may keep the smaller one."""
    weight, inputs = small()[0], SimpleNamespace(gram=torch.eye(64), tokens=1)
    found, mask = alps(weight, NM(2, 4), inputs)
    torch.testing.assert_close(found, weight * mask)
    best = NM(2, 4).mask(weight.abs())
    assert (mask == best).double().mean() > 0.95
    assert output_error(weight, found, inputs) < 1.03 * output_error(weight, weight * best, inputs)


def by_the_letter(dense, gram, structure, rhos):
    """ADMM as the paper writes it: W, its copy D in the structure and the dual V, an inverse for each penalty of ``rhos``."""
    copy, dual = dense * structure.select(dense.square()), torch.zeros_like(dense)
    for rho in rhos:
        free = (dense @ gram - dual + rho * copy) @ torch.linalg.inv(gram + rho * torch.eye(len(gram), dtype=gram.dtype))
        copy = (free + dual / rho) * structure.select((free + dual / rho).square())
        dual = dual + rho * (free - copy)
    return free


@pytest.mark.parametrize("shape", [(48, 24), (8, 96)], ids=str)  # many rows, few rows: ``solver`` goes two ways
@pytest.mark.parametrize("structure", [NM(2, 4), Unstructured(0.2)], ids=str)
def test_iterations_are_those_of_the_paper(shape, structure):
    weight, inputs = small(*shape)
    gram = inputs.gram.double() / inputs.tokens
    gram = gram / gram.diagonal().sqrt() / gram.diagonal().sqrt()[:, None] + 0.01 * torch.eye(len(gram))
    dense = weight.double()
    found, mask = support(dense, dense @ gram, gram, structure, 9)
    torch.testing.assert_close(found, by_the_letter(dense, gram, structure, [0.1] * 3 + [0.13] * 3 + [0.169] * 3))
    assert torch.equal(mask, structure.select(found.square()))


@pytest.mark.parametrize("rows", [3, 64])
def test_solver_is_the_inverse(rows):
    gram = small()[1].gram.double()
    side = torch.randn(rows, 64, dtype=torch.float64)
    found = solver(gram, 0.7, rows)(side)
    torch.testing.assert_close(found @ (gram + 0.7 * torch.eye(64)), side)


def test_conjugate_gradients_reach_the_least_squares():
    weight, inputs = small(16, 24)
    weight, gram = weight.double(), inputs.gram.double() / inputs.tokens
    mask = NM(2, 4).mask(weight.abs())
    found = conjugate_gradients(gram, weight @ gram, mask, weight * mask, steps=200, enough=1e-12)
    torch.testing.assert_close(found, refit(weight, mask, inputs), rtol=1e-6, atol=1e-6)


def test_a_weight_that_fits_already_stays():
    weight, inputs = small()
    member = weight * NM(2, 4).mask(weight.abs())
    found, _ = alps(member, NM(2, 4), inputs)
    torch.testing.assert_close(found, member, rtol=1e-2, atol=1e-3)


def test_bad_arguments_are_refused():
    weight, inputs = small()
    with pytest.raises(ValueError, match="with a mask"):
        alps(weight, Monarch(4), inputs)
    with pytest.raises(ValueError, match="iterations must be"):
        alps(weight, NM(2, 4), inputs, iterations=0)
    with pytest.raises(ValueError, match="polish must be"):
        alps(weight, NM(2, 4), inputs, polish=-1)
