"""Neurons: whole rows or columns of one weight, and of the three of a gated MLP together."""

from itertools import combinations

import pytest
import torch
from torch import nn
from torch.nn.functional import silu

from sparsesurvey.mistral import build
from sparsesurvey.pruning import channel_scaled, gaussian, kept
from sparsesurvey.recipes import Static
from sparsesurvey.structure import stored_bytes
from sparsesurvey.structures import Neurons
from sparsesurvey.structures.neurons import first, neuron_scores, remove_neurons, shrink


def mlp(hidden=6, inner=10, seed=0):
    gate, up, down = (gaussian((inner, hidden), seed + number).double() for number in range(3))
    return gate, up, down.T.contiguous()


def run(gate, up, down, x):
    return (silu(x @ gate.T) * (x @ up.T)) @ down.T


def test_rows_and_columns():
    scores = torch.tensor([[1.0, 5.0, 2.0], [4.0, 1.0, 2.0]])  # rows 8 and 7, columns 5, 6 and 4
    assert Neurons(0.5, "out").mask(scores).int().tolist() == [[1, 1, 1], [0, 0, 0]]
    assert Neurons(0.34, "in").mask(scores).int().tolist() == [[0, 1, 0], [0, 1, 0]]
    assert torch.equal(Neurons(0.34).mask(scores), Neurons(0.34, "in").mask(scores)), "wider than tall"
    assert torch.equal(Neurons(0.34).mask(scores.T), Neurons(0.34, "in").mask(scores).T)


@pytest.mark.parametrize("axis", ["out", "in", "inner"])
def test_no_other_choice_of_neurons_keeps_more(axis):
    scores, structure = gaussian((7, 6)).abs(), Neurons(0.5, axis)
    dim = structure.dim(scores.shape)
    sums = [sum(float(scores.select(dim, number).sum()) for number in choice)
            for choice in combinations(range(scores.shape[dim]), structure.neurons(scores.shape))]
    assert float(scores[structure.mask(scores)].sum()) == pytest.approx(max(sums))


def test_stored_are_a_small_matrix_and_its_numbers():
    structure = Neurons(0.25)
    packed = structure.pack(structure.project(gaussian((64, 16))))
    assert packed.values.shape == (16, 16) and packed.index.dtype == torch.int16
    assert stored_bytes(packed) == 16 * 16 * 4 + 16 * 2
    assert structure.pack(torch.zeros(16, 64)).values.shape == (16, 16)


def test_energy_is_little_more_than_density_where_neurons_are_alike_and_more_where_they_differ():
    structure = Neurons(0.5)
    alike, differ = (kept(weight, structure.mask(weight.abs())).energy
                     for weight in (gaussian((512, 512)), channel_scaled((512, 512))))
    assert 0.5 < alike < 0.54
    assert differ > 0.7


@pytest.mark.parametrize("wrong", ["rows", "", "Out"])
def test_axis_is_one_of_three(wrong):
    with pytest.raises(ValueError, match="axis must be one of inner, out, in, got"):
        Neurons(0.5, wrong)


# ---- a whole MLP


def test_removed_neurons_are_the_masked_mlp_exactly():
    gate, up, down = mlp()
    keep, x = torch.tensor([0, 3, 4, 9]), gaussian((5, 6), 9).double()
    mask = torch.zeros(10, dtype=torch.bool)
    mask[keep] = True
    masked = run(gate * mask[:, None], up * mask[:, None], down * mask, x)
    torch.testing.assert_close(run(*remove_neurons(gate, up, down, keep), x), masked, rtol=0, atol=1e-14)
    for part in range(3):  # a neuron is gone wherever one of its three lines is
        lone = [gate, up, down]
        lone[part] = lone[part] * (mask if part == 2 else mask[:, None])
        torch.testing.assert_close(run(*lone, x), masked, rtol=0, atol=1e-14)


def test_a_neuron_counts_with_all_its_weights():
    gate, up, down = mlp()
    scores = neuron_scores(gate, up, down)
    assert scores[4] == pytest.approx(float(gate[4].abs().sum() + up[4].abs().sum() + down[:, 4].abs().sum()))


def test_shrink_keeps_the_strongest_neurons_of_every_layer():
    model = build("markov")
    before = [[getattr(layer.mlp, name).weight.detach().clone() for name in ("gate_proj", "up_proj", "down_proj")]
              for layer in model.model.layers]
    shrink(model, 0.25)
    for layer, weights in zip(model.model.layers, before):
        keep = neuron_scores(*weights).topk(48).indices.sort().values
        found = layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj
        for part, expected in zip(found, remove_neurons(*weights, keep)):
            assert torch.equal(part.weight, expected)
            assert (part.out_features, part.in_features) == tuple(expected.shape)
    assert model(torch.zeros(1, 3, dtype=torch.long)).logits.isfinite().all()


def test_shrinking_is_masking():
    """The model's function with neurons removed is that of the same model with these neurons' weights at zero."""
    tokens = torch.randint(0, 32, (2, 7), generator=torch.Generator().manual_seed(0))
    model, masked = build("markov").eval(), build("markov").eval()
    with torch.no_grad():
        for layer in masked.model.layers:
            part = layer.mlp
            scores = neuron_scores(part.gate_proj.weight, part.up_proj.weight, part.down_proj.weight)
            gone = scores.topk(96, largest=False).indices
            part.gate_proj.weight[gone] = 0
        torch.testing.assert_close(shrink(model, 0.5)(tokens).logits, masked(tokens).logits, rtol=1e-5, atol=1e-5)


def test_the_first_neurons_are_the_same_in_all_three():
    structure = Neurons(0.5)
    gate, down = structure.mask(first(torch.zeros(192, 64))), structure.mask(first(torch.zeros(64, 192)))
    assert torch.equal(gate, down.T) and gate[:96].all() and not gate[96:].any()
    wide = structure.mask(first(torch.zeros(4, 4096, dtype=torch.bfloat16)))
    assert wide[:, :2048].all() and not wide[:, 2048:].any()
    weight, mask = Static(first).start(gaussian((192, 64)), structure, torch.Generator())
    assert torch.equal(mask, gate) and torch.equal(weight, gaussian((192, 64)) * gate)


def test_what_is_no_mlp_is_refused():
    gate, up, down = mlp()
    keep = torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"gate and up must be \[inner, hidden\] and down \[hidden, inner\], got"):
        remove_neurons(gate, up, down.T, keep)
    with pytest.raises(ValueError, match="down must be finite"):
        neuron_scores(gate, up, down * float("nan"))
    for wrong in torch.tensor([0, 10]), torch.tensor([-1, 2]), torch.tensor([1, 1]), torch.tensor([], dtype=torch.long):
        with pytest.raises(ValueError, match="keep must rise strictly from at least 0 to at most 9"):
            remove_neurons(gate, up, down, wrong)
    for wrong in [0, 1], keep.double(), keep.bool(), keep[None]:
        with pytest.raises(ValueError, match="keep must be a vector of neurons' numbers"):
            remove_neurons(gate, up, down, wrong)
    with pytest.raises(ValueError, match="model must have modules with linear layers gate_proj, up_proj, down_proj"):
        shrink(nn.Linear(2, 2), 0.5)
    with pytest.raises(ValueError, match="density must be"):
        shrink(build("markov"), 0)
