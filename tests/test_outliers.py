"""Outlier channels that change no function, and scores side by side on one layer."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from sparsesurvey import outliers, scoring
from sparsesurvey.calibration import calibrate, correlated_layer, inputs_of
from sparsesurvey.data import markov
from sparsesurvey.mistral import build
from sparsesurvey.models import samples
from sparsesurvey.outliers import add_outliers, ratio
from sparsesurvey.pruning import gaussian
from sparsesurvey.scores import magnitude, ria, wanda
from sparsesurvey.structures import NM, Unstructured

KINDS = {"mistral": (MistralForCausalLM, MistralConfig), "llama": (LlamaForCausalLM, LlamaConfig),
         "qwen2": (Qwen2ForCausalLM, Qwen2Config)}
IDS = torch.arange(128).view(4, 32) * 7 % 32


def make(kind):
    model, config = KINDS[kind]
    torch.manual_seed(0)
    return model(config(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=32,
                        num_key_value_heads=2, max_position_embeddings=64)).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_the_function_stays_and_the_channels_grow(kind):
    model = make(kind)
    before = [weight.clone() for weight in model.parameters()]
    spiked = add_outliers(model, channels=3, factor=64.0)
    assert torch.allclose(model(IDS).logits, spiked(IDS).logits, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(one, two) for one, two in zip(before, model.parameters())), "it is a copy"
    old, new = (calibrate(each, [IDS], progress=False) for each in (model, spiked))
    for block in range(2):
        name = f"model.layers.{block}.mlp"
        grown = new[f"{name}.gate_proj"].norms() / old[f"{name}.gate_proj"].norms()
        assert grown.sort().values.tolist() == pytest.approx([1] * 29 + [64] * 3, rel=1e-3)
        assert torch.allclose(new[f"{name}.down_proj"].square, old[f"{name}.down_proj"].square, rtol=1e-3)
    assert ratio(new["model.layers.0.mlp.up_proj"]) > 30 * ratio(old["model.layers.0.mlp.up_proj"])


def test_wanda_chooses_the_same_and_magnitude_does_not():
    model = build("markov")
    masks = []
    for each in (model, add_outliers(model, factor=32.0)):
        inputs = calibrate(each, [IDS], progress=False)["model.layers.1.mlp.up_proj"]
        weight = each.model.layers[1].mlp.up_proj.weight.detach()
        masks.append([NM().mask(score(weight, inputs)) for score in (wanda, magnitude, ria)])
    (before, plain, share), (after, other, half) = masks
    assert (before == after).float().mean() > 0.9995, "equal but for rounding"
    assert (plain == other).float().mean() < 0.97
    assert (share == half).float().mean() > (plain == other).float().mean()


def test_one_factor_or_no_channel_is_no_change():
    model = make("mistral")
    for spiked in (add_outliers(model, factor=1), add_outliers(model, channels=0)):
        assert all(torch.equal(one, two) for one, two in zip(model.parameters(), spiked.parameters()))


class Shifted(nn.Module):
    """A norm that multiplies by one more than its weight, as Gemma's."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(32))

    def forward(self, x):
        return x * (1 + self.weight)


def test_models_that_it_would_break_are_refused():
    model = make("mistral")
    model.model.layers[0].post_attention_layernorm = Shifted()
    with pytest.raises(ValueError, match="model must have norms that multiply by their weight, Shifted does not"):
        add_outliers(model)
    with pytest.raises(ValueError, match="model must have blocks with post_attention_layernorm before a gated MLP, got a Linear"):
        add_outliers(nn.Linear(4, 4))


@pytest.mark.parametrize("options, what", [
    ({"factor": 0}, "factor must be a finite number above 0, got 0"),
    ({"factor": float("inf")}, "factor must be a finite number above 0"),
    ({"factor": "30"}, "factor must be a finite number above 0, got '30'"),
    ({"channels": 33}, "channels must be an integer from 0 to 32, got 33"),
    ({"channels": 1.0}, "channels must be an integer from 0 to 32"),
])
def test_wrong_numbers_are_named(options, what):
    with pytest.raises(ValueError, match=what):
        add_outliers(make("mistral"), **options)


def test_a_sweep_tells_which_methods_depend_on_the_outliers():
    model, language = build("markov"), markov(length=8192, valid=4096)
    cases = {"magnitude": (NM(), magnitude), "Wanda": (NM(), wanda)}
    batches = samples(language.train, 32, 16, size=32)
    table = outliers.sweep(model, language, cases, batches, factors=(1, 32), count=16, seq=16)
    assert list(table.index) == ["magnitude", "Wanda"] and list(table.columns) == [1, 32]
    assert table.loc["Wanda", 32] == pytest.approx(table.loc["Wanda", 1], abs=2e-4)
    assert table.loc["magnitude", 32] != pytest.approx(table.loc["magnitude", 1], abs=2e-4)
    plain = scoring.increases(model, language, cases, batches, count=16, seq=16)
    assert plain["magnitude"] == pytest.approx(table.loc["magnitude", 1], abs=1e-6)
    assert len(outliers.draw_sweep(table).lines) == 2


def test_pictures_and_tables_of_one_layer():
    weight, x = correlated_layer(size=32, tokens=256)
    inputs = inputs_of(x, ("gram", "entropy"))
    layers = {"one": (weight, inputs)}
    table = scoring.errors(layers, NM())
    assert list(table.index) == list(scoring.FIVE) and table.loc["Wanda", "one"] < table.loc["magnitude", "one"]
    assert (scoring.errors(layers, Unstructured(1.0)) == 0).all().all()
    shared = scoring.agreement(weight, inputs, NM())
    assert (shared.to_numpy().diagonal() == 1).all() and shared.loc["magnitude", "DaSS"] < 1
    assert shared.loc["DaSS", "Wanda"] == 1, "without output norms DaSS is Wanda"
    assert len(scoring.draw(weight, inputs, NM()).axes) == 10
    assert outliers.draw_norms({"seen": inputs}).lines[0].get_ydata()[0] == pytest.approx(ratio(inputs))
