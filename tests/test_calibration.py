"""What layers saw: against the activations themselves, on Mistral, Llama and Qwen2, with nothing left behind."""

from math import log

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from sparsesurvey.calibration import LEAST, WANT, Inputs, calibrate, entropies, inputs_of, layer_by_layer
from sparsesurvey.mistral import projections

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
         "vocab_size": 64, "max_position_embeddings": 64, "attn_implementation": "sdpa"}
KINDS = {"mistral": (MistralForCausalLM, MistralConfig), "llama": (LlamaForCausalLM, LlamaConfig),
         "qwen2": (Qwen2ForCausalLM, Qwen2Config)}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
GATE, UP, DOWN = (f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down"))


def make(kind="mistral", **changes):
    build, config = KINDS[kind]
    torch.manual_seed(0)
    model = build(config(**{**SHAPE, **changes}))
    with torch.no_grad():
        for weight in model.parameters():  # far from the tiny weights of a fresh model, so that blocks matter
            weight.copy_(torch.randn(weight.shape) * 0.3 if weight.dim() == 2 else weight)
    return model


def tokens(count=3, sequences=2, length=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 64, (sequences, length), generator=generator) for _ in range(count)]


def seen(model, batches, name):
    """The activations themselves, ``[tokens, in]``, by a hook of the test's own."""
    found = []
    hook = model.get_submodule(name).register_forward_hook(lambda layer, args, out: found.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    hook.remove()
    return torch.cat(found)


def quiet(model, batches, visit=lambda *_: None, **options):
    """``layer_by_layer`` that also returns what was visited."""
    found = {}

    def remember(name, layer, inputs):
        found[name] = inputs
        visit(name, layer, inputs)

    layer_by_layer(model, batches, remember, progress=False, **options)
    return found


def same(one: Inputs, two: Inputs) -> bool:
    pairs = [(getattr(one, part), getattr(two, part)) for part in WANT]
    return (one.tokens, one.sequences) == (two.tokens, two.sequences) and all(
        a is b is None or torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in pairs)


def test_sums_by_hand():
    found = inputs_of(torch.tensor([[3.0, 0.0], [4.0, 1.0]]), ("gram",), torch.float64)
    assert found.tokens == 2
    assert found.norms().tolist() == [5, 1]
    assert found.gram.tolist() == [[25, 4], [4, 1]] and found.gram.dtype == torch.float64


def test_entropy_by_hand():
    constant, fair, skew = torch.full((4,), 7.0), torch.tensor([0.0, 1, 0, 1]), torch.tensor([0.0, 1, 1, 1])
    found = entropies(torch.stack([constant, fair, skew], dim=1))
    assert found.tolist() == pytest.approx([0, log(2), log(4) - 0.75 * log(3)], abs=1e-6)
    even = torch.arange(64.0).repeat(4)
    assert entropies(even[:, None]).item() == pytest.approx(log(64), abs=1e-5)


def test_entropy_does_not_depend_on_the_unit():
    x = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(entropies(x), entropies(1024 * x))


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_gathers_what_went_in(kind):
    model, batches = make(kind), tokens()
    found = calibrate(model, batches, want=("gram", "entropy", "output_square"), dtype=torch.float64, progress=False)
    assert list(found) == list(projections(model)) and len(found) == 9
    for name, inputs in found.items():
        x = seen(model, batches, name).double()
        assert inputs.tokens == len(x) == 96 and inputs.sequences == 6
        assert torch.allclose(inputs.square, x.square().sum(0), rtol=1e-4)
        assert torch.allclose(inputs.gram, x.T @ x, rtol=1e-3, atol=1e-3)
        assert torch.allclose(inputs.entropy, entropies(x.float()).double(), atol=1e-6)
    assert torch.equal(found[GATE].output_square, found[DOWN].square)
    assert torch.equal(found[UP].output_square, found[DOWN].square) and found[DOWN].output_square is None
    assert found[GATE].gram is found[UP].gram, "one input, one gram"


def test_any_linear_layer_can_be_looked_at():
    found = calibrate(make(), tokens(), modules=[*ATTENTION, "lm_head"], progress=False)
    assert len(found) == 13
    assert found["model.layers.0.self_attn.q_proj"].square is found["model.layers.0.self_attn.v_proj"].square
    assert found["lm_head"].tokens == 96


def test_many_tokens_are_sampled_for_the_entropy(monkeypatch):
    monkeypatch.setattr("sparsesurvey.calibration.SAMPLE", 32)
    model, batches = make(), tokens()
    found = calibrate(model, batches, want=("entropy",), progress=False)[GATE]
    assert found.tokens == 96
    assert torch.allclose(found.entropy, entropies(seen(model, batches, GATE)[::3]))


@pytest.mark.parametrize("kind", KINDS)
def test_the_regional_gradient_is_that_of_the_blocks_output_norm(kind):
    """Against autograd through the whole model: blocks before do not depend on this one's weights."""
    model, batches = make(kind), tokens(2)
    found = calibrate(model, batches, want=("gradient",), progress=False)
    outputs = []
    hook = model.model.layers[1].register_forward_hook(lambda block, args, out: outputs.append(out))
    for batch in batches:
        model(batch)
    hook.remove()
    weight = model.get_submodule(UP).weight
    each = [torch.autograd.grad(sequence.norm(), weight, retain_graph=True)[0] for out in outputs for sequence in out]
    assert torch.allclose(found[UP].gradient, torch.stack(each).square().mean(0).sqrt(), rtol=1e-3, atol=1e-6)


def test_the_models_gradient_is_that_of_its_loss():
    model, batches = make(), tokens(2)
    found = calibrate(model, batches, want=("gradient",), region="model", progress=False)
    weight = model.get_submodule(GATE).weight
    each = [torch.autograd.grad(model(some[None], labels=some[None]).loss, weight)[0] for batch in batches for some in batch]
    assert torch.allclose(found[GATE].gradient, torch.stack(each).square().mean(0).sqrt(), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("step", ["block", "layer"])
def test_layer_by_layer_without_a_change_is_one_pass(step):
    model, batches = make(), tokens()
    at_once = calibrate(model, batches, want=WANT, progress=False)
    found = quiet(model, batches, want=WANT, step=step)
    assert list(found) == list(at_once)
    assert all(same(found[name], at_once[name]) for name in found)


@pytest.mark.parametrize("kind", KINDS)
def test_later_blocks_see_what_changed_ones_give(kind):
    model, batches = make(kind), tokens()
    dense = calibrate(model, batches, progress=False)
    found = quiet(model, batches, lambda name, layer, inputs: layer.weight.data.mul_(0.5))
    after = calibrate(model, batches, progress=False)  # every layer's final inputs, as all are halved now
    assert same(found["model.layers.0.mlp.gate_proj"], dense["model.layers.0.mlp.gate_proj"])
    for name in (GATE, UP, "model.layers.2.mlp.gate_proj"):
        assert same(found[name], after[name]) and not same(found[name], dense[name])
    assert not same(found[DOWN], after[DOWN]), "a block's own layers are calibrated together"


def test_later_layers_of_a_block_see_what_changed_ones_give():
    model, batches = make(), tokens()
    found = quiet(model, batches, lambda name, layer, inputs: layer.weight.data.mul_(0.5), step="layer")
    after = calibrate(model, batches, progress=False)
    assert all(same(found[name], after[name]) for name in found)


def test_what_is_done_is_not_visited_again():
    model, batches = make(), tokens()
    halve = lambda name, layer, inputs: layer.weight.data.mul_(0.5)
    whole = quiet(make(), batches, halve)
    first = [name for name in projections(model) if "layers.0" in name]
    for name in first:
        model.get_submodule(name).weight.data.mul_(0.5)  # an earlier session got as far as this
    found = quiet(model, batches, halve, done=first)
    assert set(found) == set(whole) - set(first)
    assert all(same(found[name], whole[name]) for name in found)


@pytest.mark.parametrize("step, times", [("block", 2), ("layer", 4)])
def test_no_block_runs_more_often_than_said_and_the_head_never(step, times):
    model, batches = make(), tokens()
    calls = {name: 0 for name in ("model.layers.0.mlp", "model.layers.1.mlp", "model.layers.2.mlp", "lm_head")}
    for name in calls:
        def count(*_, name=name):
            calls[name] += 1
        model.get_submodule(name).register_forward_hook(count)
    quiet(model, batches, step=step)
    assert max(calls.values()) <= times * len(batches) and calls["lm_head"] == 0
    calibrate(model, batches, progress=False)
    assert calls["lm_head"] == 0


def test_nothing_is_left_behind():
    model, batches = make().train(), tokens()
    model.model.layers[0].mlp.eval()
    model.get_submodule(GATE).weight.requires_grad_(False)
    before = {name: weight.clone() for name, weight in model.named_parameters()}

    def fail(name, layer, inputs):
        if name == GATE:
            raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        quiet(model, batches, fail, want=WANT)
    calibrate(model, batches, want=WANT, progress=False)
    assert model.training and not model.model.layers[0].mlp.training and torch.is_grad_enabled()
    assert not model.get_submodule(GATE).weight.requires_grad and model.get_submodule(UP).weight.requires_grad
    assert all(weight.grad is None for weight in model.parameters())
    for name, part in model.named_modules():
        assert not part._forward_hooks and not part._forward_pre_hooks and "forward" not in vars(part), name
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_a_failing_model_leaves_no_hook_either():
    model = make()
    with pytest.raises(IndexError):
        calibrate(model, [torch.full((4, 32), 10_000)], want=WANT, progress=False)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    assert torch.is_grad_enabled()


def test_half_precision_is_summed_in_single():
    model, batches = make().bfloat16(), tokens()
    found = calibrate(model, batches, want=("gram", "gradient"), progress=False)[DOWN]
    x = seen(model, batches, DOWN)
    assert found.gram.dtype == torch.float32 and torch.allclose(found.gram, x.float().T @ x.float(), rtol=1e-4)


def test_a_plain_network_can_be_calibrated_too():
    model = nn.Sequential(nn.Embedding(64, 8), nn.Linear(8, 8))
    assert calibrate(model, tokens(), modules="1", progress=False)["1"].tokens == 96
    with pytest.raises(ValueError, match="model must hold its layers in one ModuleList of decoder blocks, got a Sequential"):
        quiet(model, tokens(), modules="1")
    with pytest.raises(ValueError, match="ModuleList of decoder blocks"):
        calibrate(model, tokens(), modules="1", want=("gradient",), progress=False)


@pytest.mark.parametrize("options, what", [
    ({"modules": ["fc"]}, "modules must name linear layers of the model, got fc: it has none such"),
    ({"want": "gram"}, "want must be some of square, gram"),
    ({"want": ("hessian",)}, "want must be some of square, gram"),
    ({"dtype": torch.float16}, "dtype must be torch.float32 or torch.float64, got torch.float16"),
    ({"dead": "ignore"}, "dead must be 'refuse' or 'keep', got 'ignore'"),
    ({"modules": ATTENTION, "want": ("output_square",)}, "model must have a gated MLP"),
])
def test_wrong_arguments_are_named(options, what):
    with pytest.raises(ValueError, match=what):
        calibrate(make(), tokens(), progress=False, **options)
    with pytest.raises(ValueError, match=what):
        quiet(make(), tokens(), **options)


@pytest.mark.parametrize("options, what", [
    ({"step": "column"}, "step must be 'block' or 'layer', got 'column'"),
    ({"done": ["lm_head"]}, "done must name layers of the model, got lm_head"),
])
def test_wrong_arguments_of_layer_by_layer_are_named(options, what):
    with pytest.raises(ValueError, match=what):
        quiet(make(), tokens(), **options)


def test_the_region_is_a_block_or_the_model():
    with pytest.raises(ValueError, match="region must be 'block' or 'model', got 'layer'"):
        calibrate(make(), tokens(), want=("gradient",), region="layer", progress=False)


@pytest.mark.parametrize("batches, what", [
    ([], "batches must not be empty"),
    ([torch.randn(2, 16)], "batches must be token ids .sequences, tokens. without padding, got torch.float32 .2, 16."),
    ([torch.arange(99)], "batches must be token ids .sequences, tokens. without padding, got torch.int64 .99."),
    ([{"input_ids": torch.zeros(2, 16)}], "without padding, got dict"),
    (tokens(1), f"batches must hold at least {LEAST} tokens for model.layers.0.mlp.gate_proj, got 32"),
])
def test_wrong_batches_are_named(batches, what):
    with pytest.raises(ValueError, match=what):
        calibrate(make(), batches, progress=False)


def test_a_gram_needs_as_many_tokens_as_inputs():
    model = make(intermediate_size=128)
    what = "at least 128 tokens for the gram of model.layers.0.mlp.down_proj, which has 128 inputs, got 96"
    with pytest.raises(ValueError, match=what):
        calibrate(model, tokens(), want=("gram",), progress=False)
    assert calibrate(model, tokens(4), want=("gram",), progress=False)


def test_a_dead_channel_is_refused_or_kept():
    model = make()
    for part in (GATE, UP):
        model.get_submodule(part).weight.data[5] = 0
    with pytest.raises(ValueError, match=f"batches leave 1 of 48 input channels of {DOWN} at zero, the first is 5"):
        calibrate(model, tokens(), progress=False)
    assert calibrate(model, tokens(), dead="keep", progress=False)[DOWN].square[5] == 0


def test_activations_that_are_no_numbers_are_refused():
    model = make()
    model.model.layers[1].post_attention_layernorm.weight.data[3] = float("nan")
    with pytest.raises(ValueError, match=f"model must give finite activations: {GATE} saw NaN or infinity .inputs.square."):
        calibrate(model, tokens(), progress=False)


def test_a_layer_that_no_token_reaches_is_named():
    model = nn.Sequential(nn.Embedding(64, 8), nn.Linear(8, 8))
    model.side = nn.Linear(8, 8)
    model.forward = lambda ids: model[1](model[0](ids))
    with pytest.raises(ValueError, match="none of their tokens reached side"):
        calibrate(model, tokens(), modules="side", progress=False)


@pytest.mark.parametrize("x", [torch.zeros(3), torch.tensor([[float("inf")]]), torch.ones(2, 2, dtype=torch.int64), [[1.0]]])
def test_only_finite_activations_have_inputs(x):
    with pytest.raises(ValueError, match="x must be finite activations .tokens, in."):
        inputs_of(x)
    with pytest.raises(ValueError, match="want may be square, gram and entropy"):
        inputs_of(torch.ones(2, 2), ("gradient",))


def test_norms_of_the_outputs_must_be_known():
    with pytest.raises(ValueError, match="inputs.output_square must be known"):
        inputs_of(torch.ones(2, 2)).output_norms()
