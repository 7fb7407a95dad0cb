"""Whole models: pruned layer after layer, stopped and resumed, saved and opened again."""

import json
import os
import signal
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from sparsesurvey import hub, models
from sparsesurvey.calibration import calibrate
from sparsesurvey.checkpoint import BadCheckpoint
from sparsesurvey.data import markov
from sparsesurvey.finished import Finished
from sparsesurvey.mistral import build
from sparsesurvey.models import prune_model, pruned_weight, samples
from sparsesurvey.perplexity import encode, stream_loss, windows_loss
from sparsesurvey.scores import dass, magnitude, wanda
from sparsesurvey.sparsegpt import sparsegpt
from sparsesurvey.structures import NM, Balanced, Monarch, QuantisedNM, Unstructured
from sparsesurvey.train import TrainConfig, train

SHAPE = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 128, "use_cache": False}
KINDS = {"mistral": (MistralConfig, MistralForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM),
         "qwen2": (Qwen2Config, Qwen2ForCausalLM)}
TEXT = "The quick brown fox jumps over the lazy dog; then it sleeps. " * 12
RELEASED = {"gate_proj": (NM(2, 4, "out"), dass), "up_proj": (NM(2, 4, "out"), dass), "down_proj": (NM(2, 4), wanda)}


def made(kind="mistral", **options):
    torch.manual_seed(0)
    config, model = KINDS[kind]
    return model(config(**{**SHAPE, **options})).eval()


def tokens(count=8, length=32, seed=1):
    return list(torch.randint(256, (count, 1, length), generator=torch.Generator().manual_seed(seed)))


def weights(model):
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trained", [False, True], ids=["random", "trained"])
def test_a_checkpoint_from_disk_to_disk(kind, trained, tmp_path):
    """Saved, loaded by name, pruned, saved, reloaded, evaluated."""
    model = made(kind)
    if trained:
        config = TrainConfig(steps=40, batch=4, seq=32, lr=1e-2, warmup=2, eval_every=40, eval_batches=1)
        train(model, markov(vocab=32, length=4096, valid=1024), config, tmp_path / "run", progress=False)
    model.save_pretrained(tmp_path / "dense")
    opened = hub.open_model(tmp_path / "dense")
    ids = encode(TEXT)
    assert windows_loss(opened, ids, 64).nats == pytest.approx(windows_loss(model, ids, 64).nats)
    report = prune_model(opened, RELEASED, batches=tokens(), progress=False)
    assert [layer.density for layer in report.layers] == [0.5] * 9 and report.density == 0.5
    after = windows_loss(opened, ids, 64)
    assert after.nats != windows_loss(model, ids, 64).nats
    hub.save(opened, report, tmp_path / "sparse")
    again, masks, told = hub.load(tmp_path / "sparse")
    assert type(again) is KINDS[kind][1] and told == report and len(masks) == 9
    assert windows_loss(again, ids, 64) == after and stream_loss(again, TEXT, window=64).bits_per_byte > 0
    for name, mask in masks.items():
        assert (NM(2, 4) if "down" in name else NM(2, 4, "out")).holds(mask)
        assert torch.equal(mask, again.get_submodule(name).weight != 0)


def test_only_the_named_layers_change():
    model, dense = made(), weights(made())
    report = prune_model(model, NM(2, 4), wanda, tokens(), modules=("gate_proj", "down_proj"),
                         exclude=("model.layers.0.*", "*.2.mlp.down_proj"), progress=False)
    assert [layer.name for layer in report.layers] == ["model.layers.1.mlp.gate_proj", "model.layers.1.mlp.down_proj",
                                                       "model.layers.2.mlp.gate_proj"]
    assert set(report.excluded) == {"model.layers.0.mlp.gate_proj", "model.layers.0.mlp.down_proj", "model.layers.2.mlp.down_proj"}
    changed = {name for name, weight in weights(model).items() if not torch.equal(weight, dense[name])}
    assert changed == {f"{layer.name}.weight" for layer in report.layers}
    assert report.tokens == 8 * 32 and list(report.table()["density"]) == [0.5] * 3


def test_nothing_propagated_is_what_one_pass_on_the_dense_model_gives():
    model, dense = made(), made()
    inputs = calibrate(dense, tokens(), progress=False)
    prune_model(model, Balanced(1, 0.5), wanda, tokens(), propagate=False, progress=False)
    for name, seen in inputs.items():
        assert torch.equal(model.get_submodule(name).weight, pruned_weight(dense.get_submodule(name).weight, Balanced(1, 0.5), wanda, seen))


def test_propagated_blocks_see_what_pruned_ones_give():
    """Each block against a pass over a model whose earlier blocks are pruned already."""
    model, step = made(), made()
    prune_model(model, NM(2, 4), wanda, tokens(), progress=False)
    for block in step.model.layers:
        inputs = calibrate(step, tokens(), progress=False)
        for part in ("gate_proj", "up_proj", "down_proj"):
            layer = getattr(block.mlp, part)
            name = next(name for name, found in step.named_modules() if found is layer)
            layer.weight.data.copy_(pruned_weight(layer.weight, NM(2, 4), wanda, inputs[name]))
    for ours, theirs in zip(weights(model).values(), weights(step).values()):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("method", [wanda, sparsegpt])
@pytest.mark.parametrize("propagate", [True, False])
@pytest.mark.parametrize("after", [0, 1, 3, 5, 8, 9])
def test_killed_and_resumed_is_as_never_stopped(method, propagate, after, tmp_path, monkeypatch):
    """``after`` layers are finished; the fourth is the first of the second block."""
    whole = made()
    report = prune_model(whole, NM(2, 4), method, tokens(), propagate=propagate, progress=False)
    count = 0

    def save(self, *args, own=Finished.save):
        nonlocal count
        if count == after:
            raise KeyboardInterrupt
        count += 1
        own(self, *args)

    options = {"propagate": propagate, "folder": tmp_path / "run", "progress": False}
    with monkeypatch.context() as patch:
        patch.setattr(Finished, "save", save)
        if after < 9:
            with pytest.raises(KeyboardInterrupt):
                prune_model(made(), NM(2, 4), method, tokens(), **options)
        else:
            prune_model(made(), NM(2, 4), method, tokens(), **options)
    visited = []
    monkeypatch.setattr(models, "pruned_weight", lambda *args, own=pruned_weight: visited.append(args) or own(*args))
    resumed = made()
    assert prune_model(resumed, NM(2, 4), method, tokens(), **options) == report
    assert same(weights(resumed), weights(whole)) and len(visited) == 9 - after // 3 * 3


def test_a_process_that_is_killed(tmp_path):
    script = f"""
import sys; sys.path.insert(0, {str(os.path.dirname(__file__))!r})
import os, signal, torch, test_prune_model as here
torch.set_num_threads({torch.get_num_threads()})
from sparsesurvey.finished import Finished
own, count = Finished.save, []
def save(self, *args):
    own(self, *args); count.append(1)
    if len(count) == 4: os.kill(os.getpid(), signal.SIGKILL)
Finished.save = save
here.prune_model(here.made(), here.NM(2, 4), here.wanda, here.tokens(), folder={str(tmp_path / "run")!r}, progress=False)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    whole, resumed = made(), made()
    prune_model(whole, NM(2, 4), wanda, tokens(), progress=False)
    prune_model(resumed, NM(2, 4), wanda, tokens(), folder=tmp_path / "run", progress=False)
    assert same(weights(whole), weights(resumed))


def test_the_folder_of_another_run_is_refused(tmp_path):
    run = partial(prune_model, batches=tokens(), folder=tmp_path / "run", progress=False)
    run(made(), NM(2, 4), wanda)
    changed = made()
    changed.model.layers[0].mlp.gate_proj.weight.data[0, 0] += 1
    for call, what in ((lambda: run(made(), NM(1, 4), wanda), "layers"), (lambda: run(made(), NM(2, 4), magnitude), "layers"),
                       (lambda: run(made(), NM(2, 4), wanda, batches=tokens(seed=2)), "batches"),
                       (lambda: run(changed, NM(2, 4), wanda), "weights"),
                       (lambda: run(made(), NM(2, 4), wanda, propagate=False), "propagate")):
        with pytest.raises(BadCheckpoint, match=f"another run: its {what} differ"):
            call()
    file = next((tmp_path / "run").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(BadCheckpoint, match="damaged"):
        run(made(), NM(2, 4), wanda)
    (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(BadCheckpoint, match="run.json is damaged"):
        run(made(), NM(2, 4), wanda)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(BadCheckpoint, match="must be empty"):
        run(made(), NM(2, 4), wanda, folder=tmp_path / "other")


def test_int4_after_two_of_four():
    """Four bits a kept weight, two for its place, and a scale of 16 for each group of 128 kept, here 16 in a row of 32."""
    model = made()
    report = prune_model(model, NM(2, 4), wanda, tokens(), then=QuantisedNM(2, 4), progress=False)
    assert [layer.bits for layer in report.layers[:2]] == [0.5 * (4 + 2) + 16 / 32] * 2
    for layer in report.layers:
        weight = model.get_submodule(layer.name).weight.detach()
        assert NM(2, 4).holds(weight != 0) and layer.structure == "int4 2:4"
        torch.testing.assert_close(QuantisedNM(2, 4).project(weight), weight)
    wide = prune_model(made(), NM(2, 4), wanda, tokens(), progress=False)
    assert wide.layers[0].bits == 0.5 * (16 + 2)


def test_a_pruner_and_its_error():
    report = prune_model(made(), NM(2, 4), sparsegpt, tokens(), progress=False)
    assert all(0 < layer.error < 1 and layer.method == "sparsegpt" for layer in report.layers)
    assert prune_model(made(), NM(2, 4), wanda, tokens(), progress=False).layers[0].error is None


def test_partials_tell_their_parameters():
    report = prune_model(made(), NM(2, 4), partial(dass, power=1.0), tokens(), progress=False)
    assert report.layers[0].method == "dass(power=1.0)"


def test_a_structure_without_a_mask():
    model = made()
    report = prune_model(model, Monarch(4), modules="gate_proj", progress=False)
    assert len(report.layers) == 3 and report.layers[0].error is None
    with pytest.raises(ValueError, match="must be magnitude"):
        prune_model(made(), Monarch(4), wanda, tokens(), modules="gate_proj", progress=False)


def test_half_precision_stays_half():
    model = made().bfloat16()
    prune_model(model, NM(2, 4), sparsegpt, tokens(), progress=False)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert NM(2, 4).holds(model.model.layers[1].mlp.down_proj.weight != 0)


def poisoned():
    model = made()
    model.model.layers[1].input_layernorm.weight.data[3] = float("nan")
    return model


def nan_weight():
    model = made()
    model.model.layers[2].mlp.up_proj.weight.data[0, 0] = float("nan")
    return model


def dead():
    model = made()
    model.model.layers[0].mlp.up_proj.weight.data[5] = 0
    return model


@pytest.mark.parametrize("model, call, message", [
    (made, {"batches": tokens(1, 8)}, "at least 64 tokens .* got 8"),
    (made, {"method": sparsegpt, "batches": tokens(2, 31)}, "at least 64 tokens"),
    (made, {"batches": ()}, "batches must hold calibration data for wanda"),
    (made, {"batches": [torch.full((4, 32), 256)]}, "tokens below 256"),
    (made, {"batches": [torch.zeros(4, 32)]}, "token ids"),
    (made, {"structure": NM(3, 5)}, r"layers.0.mlp.gate_proj cannot be pruned: 3:5 needs"),
    (made, {"then": QuantisedNM(3, 5, 12)}, "cannot be pruned"),
    (made, {"modules": ("fc1",)}, "modules must name linear layers of the model, got fc1"),
    (made, {"modules": ("up_proj", "fc1")}, "got fc1"),
    (made, {"exclude": ("*.head",)}, "matches none"),
    (made, {"exclude": ("*",)}, "must leave some layer"),
    (made, {"structure": {"up_proj": (2, wanda)}}, "structure must be"),
    (lambda: nn.Sequential(nn.Linear(4, 4)), {}, "modules must name linear layers of the model, got gate_proj, up_proj, down_proj"),
    (poisoned, {}, "finite activations"),
    (nan_weight, {}, "layers.2.mlp.up_proj holds NaN"),
])
def test_bad_input_is_one_error_and_changes_nothing(model, call, message):
    model = model()
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        prune_model(model, **{"structure": NM(2, 4), "method": wanda, "batches": tokens(), "progress": False, **call})
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before.values(), weights(model).values()))


@pytest.mark.parametrize("method", [wanda, sparsegpt])
def test_a_dead_channel_is_refused_or_kept(method):
    with pytest.raises(ValueError, match="1 of 64 input channels of model.layers.0.mlp.down_proj at zero, the first is 5"):
        prune_model(dead(), NM(2, 4), method, tokens(), progress=False)
    model = dead()
    prune_model(model, NM(2, 4), method, tokens(), dead="keep", progress=False)
    assert all(weight.isfinite().all() for weight in model.parameters())


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    model = made()
    report = prune_model(model, NM(2, 4), progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(hub, "save_file", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError):
            hub.save(model, report, tmp_path / "out" / "model")
    assert not list((tmp_path / "out").iterdir())
    hub.save(model, report, tmp_path / "out" / "model")
    with pytest.raises(ValueError, match="must not exist yet"):
        hub.save(model, report, tmp_path / "out" / "model")


def test_a_saved_model_whose_mask_does_not_fit_is_refused(tmp_path):
    model = made()
    report = prune_model(model, NM(2, 4), progress=False)
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(BadCheckpoint, match="holds no pruned model"):
        hub.load(tmp_path / "plain")
    hub.save(model, report, tmp_path / "model")
    made().save_pretrained(tmp_path / "model")
    with pytest.raises(BadCheckpoint, match="does not fit its weight"):
        hub.load(tmp_path / "model")
    about = json.loads((tmp_path / "model" / "pruning.json").read_text())
    assert about["layers"][0]["density"] == 0.5


def test_a_hub_name_without_a_network(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="model 'nobody/no-such-model' is no folder, and the hub did not give it"):
        hub.open_model("nobody/no-such-model")


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(ValueError, match="is a folder but no whole model"):
        hub.open_model(tmp_path)


def test_samples():
    text = encode(TEXT).to(torch.uint8).numpy()
    batches = samples(text, 8, 16, seed=3, size=2)
    assert [tuple(part.shape) for part in batches] == [(2, 16)] * 4
    assert all(torch.equal(a, b) for a, b in zip(batches, samples(text, 8, 16, seed=3, size=2)))
    with pytest.raises(ValueError, match="at least"):
        samples(text[:10], 8, 16)
    with pytest.raises(ValueError, match="multiple"):
        samples(text, 3, 16, size=2)


def test_the_models_of_the_survey_are_such_models():
    model = build("markov")
    ids = list(torch.randint(32, (4, 2, 32)))
    assert prune_model(model, Unstructured(0.25), dass, ids, progress=False).density == pytest.approx(0.25)
