"""The Mistral has the size it should have, and the same weights for the same seed."""

import pytest
import torch
from transformers import MistralForCausalLM

from sparsesurvey.initial import initialise
from sparsesurvey.mistral import PARTS, SHAPES, build, config, flops, parameters, projections, weight_bytes

SIZES = {"7b": 7_241_732_096, "162m": 162_417_408, "5m": 4_984_064, "1m": 1_017_216, "bytes": 357_024,
         "markov": 108_864}


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_of_the_model_itself(name):
    with torch.device("meta"):
        model = MistralForCausalLM(config(name))
    assert sum(p.numel() for p in model.parameters()) == SIZES[name]
    counted = parameters(config(name))
    assert tuple(counted) == PARTS and sum(counted.values()) == SIZES[name]
    for part in ("gate_proj", "up_proj", "down_proj"):
        assert counted[part] == sum(layer.weight.numel() for layer in projections(model, (part,)).values())
    assert counted["attention"] == sum(p.numel() for n, p in model.named_parameters() if "self_attn" in n)


def test_grouped_query_variant():
    assert sum(parameters(config("162m", kv_heads=4)).values()) == 152_980_224


def test_flops_per_token():
    shape = config("162m")
    assert sum(flops(shape, 1024, training=True).values()) / 1e6 == pytest.approx(883.6, abs=0.05)
    forward = flops(shape, 1024)
    assert sum(flops(shape, 1024, training=True).values()) == 3 * sum(forward.values())
    mlp = sum(forward[part] for part in ("gate_proj", "up_proj", "down_proj"))
    assert mlp / sum(forward.values()) == pytest.approx(0.577, abs=0.001)
    assert flops(config("markov"), 64)["head"] > 0  # a tied head has no weights of its own, and multiplies


def test_weight_bytes():
    assert sum(weight_bytes(config("7b")).values()) == 2 * SIZES["7b"]


def test_settings_that_keep_the_fast_attention():
    shape = config("162m")
    assert shape.sliding_window is None and shape.use_cache is False and shape._attn_implementation == "sdpa"
    assert shape.max_position_embeddings == 2048


def test_same_seed_same_weights_and_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = build("markov", seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    again, other = build("markov", seed=1), build("markov", seed=2)
    for one, two in zip(first.state_dict().values(), again.state_dict().values()):
        assert torch.equal(one, two)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_initial_scale_follows_the_width():
    model = build("bytes")
    gate, down = (projections(model, (part,)) for part in ("gate_proj", "down_proj"))
    std = 0.02 * (768 / 96) ** 0.5
    for layers, expected in ((gate, std), (down, std / 6**0.5)):
        weights = torch.cat([layer.weight.flatten() for layer in layers.values()])
        assert weights.std().item() == pytest.approx(expected, rel=0.02)
    assert (model.model.norm.weight == 1).all()


def test_weights_as_transformers_draws_them():
    """Every matrix at 0.02, whatever the width; the head is the embedding; the same for the same seed."""
    model, again, other = (initialise(build("bytes"), "transformers", seed) for seed in (3, 3, 4))
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            assert weight.std().item() == pytest.approx(0.02, rel=0.05), name
    assert (model.model.norm.weight == 1).all() and model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, again.lm_head.weight) and not torch.equal(model.lm_head.weight, other.lm_head.weight)
    ours = initialise(build("bytes", 3))
    assert torch.equal(ours.lm_head.weight, build("bytes", 3).lm_head.weight)
    with pytest.raises(ValueError, match="initial must be one of ours, transformers, got 'zeros'"):
        initialise(model, "zeros")


def test_weights_of_transformers_are_spread_as_its_own():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fresh = MistralForCausalLM(config("bytes"))
    for (name, theirs), ours in zip(fresh.named_parameters(), initialise(build("bytes"), "transformers").parameters()):
        if theirs.dim() == 2:  # at least 9216 draws: a standard deviation is known to 0.7 %
            torch.testing.assert_close(ours.std(), theirs.std(), rtol=0.05, atol=0, msg=name)
            assert abs(ours.mean()) < 0.001 and abs(theirs.mean()) < 0.001, name
        else:
            assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("options, message", [
    ({"name": "tiny"}, "name must be one of 7b, 162m, .*, got 'tiny'"),
    ({"name": "162m", "kv_heads": 5}, "kv_heads must divide the 12 heads of '162m', got 5"),
    ({"name": "162m", "kv_heads": 0}, "kv_heads must divide"),
])
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)
