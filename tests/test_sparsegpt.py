"""SparseGPT against brute force, against a plain loop over columns, and under every pattern."""

import warnings
from types import SimpleNamespace

import pytest
import torch

from sparsesurvey.calibration import correlated_layer, inputs_of
from sparsesurvey.reconstruction import output_error, refit
from sparsesurvey.sparsegpt import columns_at_a_time, sparsegpt, sweep
from sparsesurvey.structure import Pattern
from sparsesurvey.structures import (
    NM, VNM, Balanced, Block, Dense, Diagonal, HiNM, Monarch, Neurons, Permuted, TileWise, Transposable, Unstructured,
    all_structures,
)

PATTERNS = [one for kind in all_structures().values() if issubclass(kind, Pattern) for one in kind.variants()]


def layer(out=8, inn=8, tokens=64, seed=0, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, inn, generator=draw, dtype=torch.float64)
    x = torch.randn(tokens, inn, generator=draw, dtype=torch.float64)
    x = x @ torch.randn(inn, inn, generator=draw, dtype=torch.float64)
    return weight.to(dtype), SimpleNamespace(gram=(x.T @ x).to(dtype), square=x.square().sum(0), tokens=tokens)


def diagonal(square):
    return SimpleNamespace(gram=torch.diag(square), square=square, tokens=1)


def brute_force(weight, structure, gram, width):
    """Optimal brain surgeon in a fixed order: for every input the inverse of what is left of H, written out."""
    weight, mask = weight.clone(), torch.zeros_like(weight, dtype=torch.bool)
    inverse = [torch.linalg.inv(gram[j:, j:]) for j in range(len(gram))]
    for j in range(len(gram)):
        if j % width == 0:
            saliency = [weight[:, k].square() / inverse[k][0, 0] for k in range(j, j + width)]
            mask[:, j:j + width] = structure.mask(torch.stack(saliency, 1))
        for row in range(len(weight)):
            if not mask[row, j]:
                weight[row, j:] -= weight[row, j] / inverse[j][0, 0] * inverse[j][:, 0]
    return weight, mask


def plain(weight, structure, gram, width):
    """The sweep as the paper states it: one input after the other, all later weights corrected at once."""
    factor = torch.linalg.cholesky(torch.linalg.inv(gram), upper=True)
    weight, mask = weight.clone(), torch.zeros_like(weight, dtype=torch.bool)
    for j in range(len(gram)):
        if j % width == 0:
            part = slice(j, j + width)
            mask[:, part] = structure.mask(weight[:, part].square() / factor.diagonal()[part].square())
        error = weight[:, j] * ~mask[:, j] / factor[j, j]
        weight[:, j:] -= error[:, None] * factor[j, j:]
    return weight * mask, mask


def with_damp(inputs, damp=0.01):
    gram = inputs.gram / inputs.tokens
    return gram + damp * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


@pytest.mark.parametrize("structure, width", [(NM(2, 4), 4), (NM(1, 4), 4), (NM(1, 2), 2), (NM(4, 8), 8), (NM(2, 4, "out"), 1),
                                              (Unstructured(0.5), 4), (Unstructured(0.25), 8), (Block(2, 2, 0.5), 8)], ids=str)
def test_is_optimal_brain_surgery_on_8_by_8(structure, width):
    weight, inputs = layer()
    found, mask = sparsegpt(weight, structure, inputs, block=width, dtype=torch.float64)
    expected, chosen = brute_force(weight, structure, with_damp(inputs), width)
    assert columns_at_a_time(structure, (8, 8), width) == width
    assert torch.equal(mask, chosen)
    torch.testing.assert_close(found, expected * chosen, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("structure, width", [(NM(2, 4), 4), (NM(4, 8), 8), (VNM(16, 2, 8), 8), (Unstructured(0.5), 32)], ids=str)
def test_agrees_with_a_plain_loop_over_the_inputs(structure, width):
    weight, inputs = layer(64, 96, 512)
    found, mask = sparsegpt(weight, structure, inputs, block=width, dtype=torch.float64)
    expected, chosen = plain(weight, structure, with_damp(inputs), width)
    assert torch.equal(mask, chosen)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    single, chosen = sparsegpt(weight.float(), structure, inputs, block=width)
    assert (chosen == mask).double().mean() > 0.99  # a near tie may fall the other way in float32
    same = (chosen == mask).all(1)
    torch.testing.assert_close(single[same].double(), found[same], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("structure", [NM(2, 4), VNM(16, 2, 8), Unstructured(0.3), Block(16, 16, 0.5), TileWise(16, 0.5)],
                         ids=str)
def test_without_correlation_it_is_magnitude(structure):
    weight, _ = layer(64, 64)
    found, mask = sparsegpt(weight, structure, diagonal(torch.ones(64)), block=64)
    assert torch.equal(mask, structure.mask(weight.float().square()))
    assert torch.equal(found, (weight.float() * mask).double())


def test_with_a_diagonal_gram_it_is_wanda():
    weight, inputs = layer(32, 64)
    found, mask = sparsegpt(weight, NM(2, 4), diagonal(inputs.square), damp=0.0)
    assert torch.equal(mask, NM(2, 4).mask(weight.abs() * inputs.square.sqrt()))
    assert torch.equal(found, (weight.float() * mask).double())


@pytest.mark.parametrize("structure", PATTERNS, ids=str)
def test_every_pattern_holds_and_compensation_helps(structure):
    size = [step * -(-64 // step) for step in structure.tile]
    weight, inputs = layer(*size, tokens=4 * size[1], dtype=torch.float32)
    found, mask = sparsegpt(weight, structure, inputs, block=32)
    assert structure.holds(mask) and structure.holds(found != 0)
    assert not found[~mask].any()
    if mask.all():
        assert torch.equal(found, weight)
    elif mask.any():  # 10 % of four blocks is none
        only_mask, best = weight * mask, refit(weight, mask, inputs)
        least, error, most = (output_error(weight, one, inputs) for one in (best, found, only_mask))
        in_rows = (mask.any(1) == mask.all(1)).all()  # a row that goes as a whole leaves nothing to move
        assert (least == pytest.approx(error) == pytest.approx(most)) if in_rows else (least < error < most)


def test_when_it_chooses():
    at_a_time = {NM(2, 4): 4, NM(2, 4, "out"): 1, VNM(16, 2, 8): 8, Transposable(2, 4): 4, Dense(): 1,
                 Permuted(NM(2, 4), (0, 2, 4, 6, 1, 3, 5, 7)): 8, Unstructured(0.5): 128, Balanced(1, 0.5): 128,
                 Balanced(16, 0.5): 256, Block(32, 32, 0.5): 256, TileWise(16, 0.5): 256, HiNM(16, 0.5): 256,
                 Diagonal(0.5): 256, Neurons(0.5): 256}
    assert {structure: columns_at_a_time(structure, (256, 256)) for structure in at_a_time} == at_a_time
    assert columns_at_a_time(Unstructured(0.5), (256, 256), block=512) == 256


@pytest.mark.parametrize("structure", [Unstructured(0.35), Unstructured(0.01), Balanced(1, 0.35), Balanced(1, 0.37)], ids=str)
def test_parts_that_round_up_do_not_keep_more_than_the_whole(structure):
    weight, inputs = layer(5, 40, tokens=100, dtype=torch.float32)
    for block in (3, 7, 10, 16):
        found, mask = sparsegpt(weight, structure, inputs, block=block)
        assert structure.holds(mask) and structure.holds(found != 0)


def test_the_steps_add_up_to_the_error_and_can_be_looked_at():
    weight, inputs = layer(16, 32, tokens=128)
    done = sweep(weight, NM(2, 4), inputs, dtype=torch.float64)
    lost = weight - done.weight
    torch.testing.assert_close(done.losses().sum(), ((lost @ with_damp(inputs)) * lost).sum())
    torch.testing.assert_close(done.after(0), weight)
    torch.testing.assert_close(done.after(32), done.weight)
    half = done.after(12)
    torch.testing.assert_close(half[:, :12], done.weight[:, :12])
    assert (half[:, 12:] != 0).all()  # what is to come is compensated, not pruned yet


def test_a_given_mask_is_kept():
    weight, inputs = layer(16, 32, tokens=128)
    mask = torch.rand(16, 32, generator=torch.Generator().manual_seed(1)) < 0.5
    done = sweep(weight, Unstructured(1.0), inputs, mask=mask, dtype=torch.float64)
    assert torch.equal(done.mask, mask) and not done.weight[~mask].any()
    assert output_error(weight, done.weight, inputs) < output_error(weight, weight * mask, inputs)


def wanda(weight, inputs):
    return weight.abs() * inputs.square.sqrt()


def test_the_order_of_the_methods_on_correlated_inputs():
    """Relative output error of 2:4: magnitude .135 > Wanda .0325 > SparseGPT .0222 > least squares on Wanda's mask .0173.

    Correlated inputs, four channels 15 times as loud; what the four numbers' own case left open is fitted to them.
    """
    weight, x = correlated_layer()
    inputs = inputs_of(x, ("gram",))
    keep = {"magnitude": NM(2, 4).mask(weight.abs()), "wanda": NM(2, 4).mask(wanda(weight, inputs))}
    errors = [output_error(weight, weight * keep["magnitude"], inputs), output_error(weight, weight * keep["wanda"], inputs),
              output_error(weight, sparsegpt(weight, NM(2, 4), inputs).weight, inputs),
              output_error(weight, refit(weight, keep["wanda"], inputs), inputs)]
    assert errors == sorted(errors, reverse=True)
    assert errors == pytest.approx([0.135, 0.0325, 0.0222, 0.0173], rel=0.15)


def test_the_made_up_layer_has_four_loud_channels():
    weight, x = correlated_layer(tokens=512, size=64)
    assert weight.shape == (64, 64) and x.shape == (512, 64) and x.norm(dim=0).topk(5).values.diff().argmin() == 3
    assert all(map(torch.equal, correlated_layer(tokens=512, size=64), (weight, x)))


def test_a_dead_input_loses_its_weights():
    weight, inputs = layer(8, 16, tokens=64)
    inputs.gram[3], inputs.gram[:, 3] = 0, 0
    found, mask = sparsegpt(weight, NM(2, 4), inputs, dtype=torch.float64)
    assert not found[:, 3].any() and not mask[:, 3].any()
    rest = [column for column in range(16) if column != 3]
    assert found[:, rest].isfinite().all() and (found[:, rest] != 0).any(0).all()


def test_the_scale_of_the_gram_does_not_matter():
    weight, inputs = layer(8, 16)
    louder = SimpleNamespace(gram=inputs.gram * 1024, tokens=inputs.tokens)
    for one, other in zip(sparsegpt(weight, NM(2, 4), inputs), sparsegpt(weight, NM(2, 4), louder)):
        assert torch.equal(one, other)


def test_half_precision_comes_back_as_such():
    weight, inputs = layer(8, 16)
    found, _ = sparsegpt(weight.bfloat16(), NM(2, 4), inputs)
    assert found.dtype == torch.bfloat16
    assert sweep(weight, NM(2, 4), inputs, dtype=torch.float64).weight.dtype == torch.float64


def test_enough_damping_makes_no_fuss():
    weight, inputs = layer(8, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparsegpt(weight, NM(2, 4), inputs)


@pytest.mark.parametrize("structure, words", [(Monarch(4), "with a mask"), (NM(2, 5), "multiple of 5"), ("2:4", "with a mask")])
def test_a_structure_that_does_not_fit_is_refused(structure, words):
    weight, inputs = layer(8, 16)
    with pytest.raises(ValueError, match=words):
        sparsegpt(weight, structure, inputs)


@pytest.mark.parametrize("block", [0, -1, 1.5, True, None])
def test_block_must_be_a_number_of_inputs(block):
    weight, inputs = layer(8, 16)
    with pytest.raises(ValueError, match="block must be"):
        sparsegpt(weight, NM(2, 4), inputs, block=block)
