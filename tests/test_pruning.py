"""What a mask keeps, and pruning a whole model at once."""

import pytest
import torch
from torch import nn

from sparsesurvey.pruning import best_kept, channel_scaled, gaussian, kept, prune, retention
from sparsesurvey.structure import Pattern
from sparsesurvey.structures import NM, Block, Unstructured, all_structures


class Gated(nn.Module):
    def __init__(self, hidden=64, inner=128):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(hidden, inner, bias=False), nn.Linear(hidden, inner, bias=False)
        self.down_proj, self.head = nn.Linear(inner, hidden, bias=False), nn.Linear(hidden, 8, bias=False)


def test_kept_by_hand():
    weight = torch.tensor([[3.0, -1.0], [0.0, 2.0]])
    mask = torch.tensor([[True, False], [False, True]])
    assert kept(weight, mask) == pytest.approx((0.5, 5 / 6, 13 / 14))
    assert best_kept(weight, 0.25) == pytest.approx((0.25, 3 / 6, 9 / 14))


def test_no_pattern_keeps_more_than_the_best_choice():
    weight = channel_scaled((128, 128))
    structures = [kind() for kind in all_structures().values() if issubclass(kind, Pattern)]
    table = retention(weight, structures).set_index("structure")
    assert (table["share of best"] <= 1 + 1e-12).all()
    assert table.loc["unstructured 50%", "share of best"] == pytest.approx(1)


def test_random_weights_are_repeatable_and_scaled_as_said():
    assert torch.equal(gaussian((8, 4), 3), gaussian((8, 4), 3))
    assert not torch.equal(gaussian((8, 4), 3), gaussian((8, 4), 4))
    assert gaussian((256, 256)).std() == pytest.approx(1, abs=0.02)
    norms = channel_scaled((2048, 256)).norm(dim=1).log()
    assert norms.std() == pytest.approx(0.5, abs=0.05)


def test_prune_zeroes_the_smallest_of_the_named_layers_only():
    model = Gated()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    density = prune(model, NM(2, 4))
    assert density == {"gate_proj": 0.5, "up_proj": 0.5, "down_proj": 0.5}
    for name, weight in model.named_parameters():
        expected = before[name] if name == "head.weight" else before[name] * NM(2, 4).mask(before[name].abs())
        assert torch.equal(weight, expected)


def test_a_layer_that_does_not_fit_leaves_the_model_whole():
    model = Gated(hidden=64, inner=96)
    before = [weight.detach().clone() for weight in model.parameters()]
    with pytest.raises(ValueError, match="multiple of 64"):
        prune(model, Block(64, 64, 0.5))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_a_model_without_such_layers_is_refused():
    with pytest.raises(ValueError, match="gate_proj, up_proj, down_proj"):
        prune(nn.Sequential(nn.Linear(4, 4)), Unstructured(0.5))


def test_weights_with_nan_are_refused():
    with pytest.raises(ValueError, match="finite"):
        kept(torch.tensor([[float("nan"), 1.0]]), torch.tensor([[True, True]]))
