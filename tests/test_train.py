"""Training goes on where it stopped, bit for bit; it learns, keeps its masks, and stops with a reason."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsesurvey import checkpoint
from sparsesurvey.checkpoint import BadCheckpoint
from sparsesurvey.data import batch, markov, windows
from sparsesurvey.linear import densities, sparse_layers, sparsify
from sparsesurvey.mistral import build
from sparsesurvey.optim import learning_rate, optimizers
from sparsesurvey.packed import pack_layers
from sparsesurvey.recipes import Recipe, Static
from sparsesurvey.structure import PRODUCTS, Pattern
from sparsesurvey.structures import NM, VNM, Block, Unstructured, all_structures
from sparsesurvey.train import Diverged, TrainConfig, evaluate, loss_of, train

SHORT = TrainConfig(steps=12, batch=4, seq=16, warmup=2, eval_every=6, eval_batches=2, checkpoint_every=5)
STRUCTURES = [variant for kind in all_structures().values() for variant in kind.variants()
              if isinstance(variant, Pattern)
              and all(size % step == 0 for shape in ((192, 64), (64, 192)) for size, step in zip(shape, variant.tile))
              and variant.nnz((192, 64))]  # 10 % of three large blocks is none


@pytest.fixture(scope="module")
def language():
    return markov(length=1 << 14, valid=1 << 12)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def model(structure=NM(2, 4), recipe=Static(), kernel="masked", seed=0):
    made = sparsify(build("markov", seed), structure, recipe, seed=seed)
    return made if kernel == "masked" else pack_layers(made, kernel)


def same(one, two):
    one, two = one.state_dict(), two.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# ---- it learns ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_loss_falls(language, optimizer):
    config = TrainConfig(steps=80, batch=16, seq=32, optimizer=optimizer, warmup=5, eval_every=80, eval_batches=4)
    history = train(model(), language, config, progress=False)
    (first, before), (last, after) = history.valid
    assert (first, last) == (0, 80) and len(history.train) == 80
    assert after < before - 0.25
    assert after > language.entropy


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_mask_holds_at_the_end(language, structure, optimizer):
    trained = model(structure)
    start = {name: layer.dense() for name, layer in sparse_layers(trained).items()}
    train(trained, language, replace(SHORT, optimizer=optimizer, steps=4), progress=False)
    for name, layer in sparse_layers(trained).items():
        assert structure.holds(layer.weight != 0)
        assert not (layer.weight[~layer.mask] != 0).any()
        assert not torch.equal(layer.dense(), start[name])
        structure.pack(layer.weight.detach())


@pytest.mark.parametrize("structure", [NM(2, 4), VNM(16, 2, 8), Block(8, 8, 0.5), Unstructured(0.5)], ids=str)
def test_real_kernels_train_like_masks(language, structure):
    able = set.intersection(*(set(structure.kernels(product)) for product in PRODUCTS))
    names = {"reference"} | ({"gather"} & able)
    masked = model(structure)
    expected = train(masked, language, SHORT, progress=False)
    for name in names:
        packed = model(structure, kernel=name)
        history = train(packed, language, SHORT, progress=False)
        assert history.train == pytest.approx(expected.train, rel=1e-5)
        for one, two in zip(sparse_layers(packed).values(), sparse_layers(masked).values()):
            torch.testing.assert_close(one.dense(), two.dense(), rtol=1e-3, atol=1e-4)
        assert densities(packed) == densities(masked)


def test_training_is_reproducible_and_leaves_the_global_generator_alone(language):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = model()
    train(first, language, SHORT, progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    second, other = model(), model()
    train(second, language, SHORT, progress=False)
    train(other, language, replace(SHORT, seed=1), progress=False)
    assert same(first, second) and not same(first, other)


def test_evaluation_changes_nothing(language):
    here = model()
    before = {name: tensor.clone() for name, tensor in here.state_dict().items()}
    x, y = windows(language.valid, 7, 16)
    whole = evaluate(here, x, y, batch=7)
    assert evaluate(here, x, y, batch=3) == pytest.approx(whole, rel=1e-6)
    assert here.training and all(torch.equal(before[name], tensor) for name, tensor in here.state_dict().items())


# ---- optimizer and schedule -----------------------------------------------------------------------------------------

def test_decay_is_on_matrices_only():
    [adamw] = optimizers(model(), SHORT)
    decay = {p: group["weight_decay"] for group in adamw.param_groups for p in group["params"]}
    assert {p.dim() for p, value in decay.items() if value} == {2}
    assert {p.dim() for p, value in decay.items() if not value} == {1}
    [adamw] = optimizers(model(Unstructured(0.5), kernel="reference"), SHORT)
    decayed = [p for group in adamw.param_groups if group["weight_decay"] for p in group["params"]]
    assert any(p.dim() == 1 and p.numel() == 6144 for p in decayed)  # packed values are a matrix as well


def test_muon_takes_the_hidden_matrices():
    here = model()
    adamw, muon = optimizers(here, replace(SHORT, optimizer="muon"))
    assert len(muon.param_groups[0]["params"]) == 2 * 7
    assert here.lm_head.weight in set(adamw.param_groups[0]["params"]) | set(adamw.param_groups[1]["params"])
    with pytest.raises(ValueError, match="muon needs matrices, but model.layers.0.mlp.gate_proj.values is packed"):
        optimizers(model(kernel="reference"), replace(SHORT, optimizer="muon"))


def test_recipe_scales_the_learning_rate():
    here = model(NM(1, 4), Static(scale_lr=True))
    rates = {id(p): group["base"] for optimizer in optimizers(here, SHORT) for group in optimizer.param_groups
             for p in group["params"]}
    layer = next(iter(sparse_layers(here).values()))
    assert rates[id(layer.weight)] == pytest.approx(4 * SHORT.lr)
    assert rates[id(here.lm_head.weight)] == SHORT.lr


def test_schedules():
    wsd = TrainConfig(steps=100, warmup=10, schedule="wsd", cooldown=0.3)
    rates = [learning_rate(wsd, step) for step in range(100)]
    assert rates[0] == 0.1 and rates[9:70] == [1.0] * 61
    assert rates[85] == pytest.approx(0.5) and rates[99] == pytest.approx(1 / 30)
    cosine = [learning_rate(replace(wsd, schedule="cosine", final_lr=0.1), step) for step in range(101)]
    assert cosine[10] == 1 and cosine[55] == pytest.approx(0.55) and cosine[100] == pytest.approx(0.1)
    assert all(later <= earlier for earlier, later in zip(cosine[10:], cosine[11:]))


# ---- checkpoints ----------------------------------------------------------------------------------------------------

class Stopped(Exception):
    pass


@pytest.mark.parametrize("optimizer, kernel", [("adamw", "masked"), ("muon", "masked"), ("adamw", "reference")])
def test_resumed_run_equals_an_uninterrupted_one(language, tmp_path, monkeypatch, optimizer, kernel):
    config = replace(SHORT, optimizer=optimizer)
    whole = model(kernel=kernel)
    expected = train(whole, language, config, progress=False)

    def stop_at_8(array, step, *rest):
        if step == 8:
            raise Stopped
        return batch(array, step, *rest)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr("sparsesurvey.train.batch", stop_at_8)
        train(model(kernel=kernel), language, config, tmp_path, progress=False)
    assert checkpoint.load(tmp_path / "checkpoint.safetensors")[1]["step"] == 5
    again = model(kernel=kernel, seed=7)  # other weights and masks: all that counts is in the checkpoint
    history = train(again, language, config, tmp_path, progress=False)
    assert same(again, whole)
    assert (history.train, history.valid) == (expected.train, expected.valid)
    assert history.seconds > 0


def test_a_checkpoint_is_never_older_than_it_may_be(language, tmp_path, monkeypatch):
    """However rare the steps after which one is due: so a killed run loses at most a minute."""
    assert TrainConfig().checkpoint_seconds <= 60
    saved = []
    monkeypatch.setattr("sparsesurvey.train._Run.save", lambda run: saved.append(run.step))
    train(model(), language, replace(SHORT, checkpoint_every=1000, checkpoint_seconds=1e-9), tmp_path, progress=False)
    assert saved == list(range(1, 13))


def test_a_packed_run_keeps_nothing_dense(language):
    """Weights, gradients and what the optimizer remembers, in bytes: those of the stored values and of the rest of the model."""
    def held(made):
        [adamw] = optimizers(made, SHORT)
        x, y = (part[:4] for part in windows(language.valid, 4, 16))
        loss_of(made, x, y).backward()
        adamw.step()
        state = sum(value.nbytes for p in made.parameters() for name, value in adamw.state[p].items() if value.dim())
        return sum(p.nbytes + p.grad.nbytes for p in made.parameters()) + state

    structure = Block(8, 8, 0.125)
    whole, packed = held(build("markov")), held(model(structure, kernel="gather"))
    mlp = 2 * 3 * 192 * 64 * 4 * 4  # two layers, three matrices, float32, of each number: itself, its gradient, two moments
    assert whole - packed == mlp - mlp // 8


SCRIPT = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from test_train import KILLED, model
from sparsesurvey.data import markov
from sparsesurvey.train import train
train(model(), markov(length=1 << 14, valid=1 << 12), KILLED, sys.argv[2], progress=False)
"""
KILLED = replace(SHORT, steps=150, eval_every=50, checkpoint_every=1)


def test_killed_run_resumes_bit_for_bit(language, tmp_path):
    whole = model()
    expected = train(whole, language, KILLED, progress=False)
    path = tmp_path / "checkpoint.safetensors"
    worker = subprocess.Popen([sys.executable, "-c", SCRIPT, os.path.dirname(__file__), str(tmp_path)],
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        deadline = time.monotonic() + 90
        while not path.exists() and worker.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        os.kill(worker.pid, signal.SIGKILL)
    finally:
        worker.wait()
    assert worker.returncode == -signal.SIGKILL, "it ended before it was killed"
    done = checkpoint.load(path)[1]["step"]
    assert 0 < done < KILLED.steps
    again = model(seed=7)
    history = train(again, language, KILLED, tmp_path, progress=False)
    assert same(again, whole) and (history.train, history.valid) == (expected.train, expected.valid)


def test_finished_run_is_only_loaded(language, tmp_path, monkeypatch):
    first = model()
    history = train(first, language, SHORT, tmp_path, progress=False)
    monkeypatch.setattr("sparsesurvey.train.batch", lambda *_: pytest.fail("trained again"))
    again = model(seed=7)
    loaded = train(again, language, replace(SHORT, checkpoint_every=7), tmp_path, progress=False)
    assert same(first, again) and asdict(loaded) == asdict(history)
    plain = model(seed=8)
    assert checkpoint.load_model(tmp_path / "checkpoint.safetensors", plain)["step"] == SHORT.steps
    assert same(first, plain)


@pytest.fixture
def saved(language, tmp_path):
    train(model(), language, SHORT, tmp_path, progress=False)
    return tmp_path / "checkpoint.safetensors"


def test_a_failed_write_leaves_the_last_checkpoint(saved, monkeypatch):
    before = saved.read_bytes()

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(saved, {"a": torch.ones(2)}, {})
    assert saved.read_bytes() == before and list(saved.parent.iterdir()) == [saved]


def flip(path):
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def foreign(path):
    save_file({"a": torch.ones(2)}, path)


@pytest.mark.parametrize("damage, message", [
    (lambda path: path.write_bytes(b""), "is damaged"),
    (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is damaged"),
    (lambda path: path.write_bytes(path.read_bytes()[:2000]), "is damaged"),
    (lambda path: path.write_bytes(os.urandom(5000)), "is damaged"),
    (flip, "its tensors changed after it was written"),
    (foreign, "has the format None, not 'sparsesurvey checkpoint 1'"),
])
def test_damaged_checkpoint(language, saved, damage, message):
    damage(saved)
    with pytest.raises(BadCheckpoint, match=f"checkpoint {saved} .*{message}.*allowed: a file written by"):
        train(model(), language, SHORT, saved.parent, progress=False)


@pytest.mark.parametrize("make, changes, message", [
    (model, {"lr": 1e-3}, "its config has lr = 0.01, this run 0.001"),
    (model, {"steps": 20}, "its config has steps = 12, this run 20"),
    (lambda: model(NM(1, 4)), {}, r"its layers has .*_proj = .NM\(n=2, m=4.*\) Static\(score=None.* masked., this run .NM\(n=1"),
    (lambda: build("markov"), {}, "its layers has .* this run None"),
])
def test_checkpoint_of_another_run(language, saved, make, changes, message):
    with pytest.raises(BadCheckpoint, match=f"{message}.*; allowed: the same, or another folder"):
        train(make(), language, replace(SHORT, **changes), saved.parent, progress=False)


def test_checkpoint_of_another_corpus_or_shape(language, saved):
    with pytest.raises(BadCheckpoint, match="its corpus has digest"):
        train(model(), markov(length=1 << 14, valid=1 << 12, seed=1), SHORT, saved.parent, progress=False)
    with pytest.raises(BadCheckpoint, match=r"model: it has float32 \[32, 64\] for .*, not float32 \[256, 96\]"):
        checkpoint.load_model(saved, build("bytes"))
    with pytest.raises(FileNotFoundError, match="none does not exist"):
        checkpoint.load(saved.parent / "none")


def test_checkpoint_is_plain_safetensors(saved):
    tensors = load_file(saved)
    assert tensors["model.model.layers.0.mlp.gate_proj.mask"].dtype == torch.bool
    assert "model.lm_head.weight" not in tensors  # tied: saved once
    assert "optimizer.model.norm.weight.exp_avg_sq" in tensors


# ---- bad input ------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Poison(Recipe):
    at: int = 0

    def update(self, layer, step, steps, state):
        if step == self.at:
            layer.weight.fill_(float("nan"))


def test_not_a_number_stops_and_keeps_the_last_checkpoint(language, tmp_path):
    with pytest.raises(Diverged, match="loss is nan in step 8 of 12, .*; the checkpoint of step 5 is kept in "):
        train(model(recipe=Poison(7)), language, SHORT, tmp_path, progress=False)
    tensors, about = checkpoint.load(tmp_path / "checkpoint.safetensors")
    assert about["step"] == 5 and all(t.isfinite().all() for t in tensors.values() if t.is_floating_point())


def test_weights_that_are_not_finite_are_not_saved(language, tmp_path):
    with pytest.raises(Diverged, match="gate_proj.weight is nan .*no checkpoint was written"):
        train(model(recipe=Poison(5)), language, SHORT, tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("device", ["tpu", "cuda:99", "gpu"])
def test_unknown_device(language, device):
    with pytest.raises(ValueError, match=f"device .*{device}.*|device must be cpu"):
        train(model(), language, replace(SHORT, device=device), progress=False)


def test_more_tokens_than_the_model_knows():
    with pytest.raises(ValueError, match="model must know the 40 tokens of markov 40 0.1 0, got a vocabulary of 32"):
        train(model(), markov(40, length=2000, valid=200), SHORT, progress=False)


def test_corpus_shorter_than_a_batch():
    with pytest.raises(ValueError, match="corpus must have at least 65 tokens for one batch of 4 x 16, got 40"):
        train(model(), markov(length=40, valid=200), SHORT, progress=False)


@pytest.mark.parametrize("name, value, allowed", [
    ("steps", 0, "an integer of at least 1"), ("batch", 2.5, "an integer"), ("lr", -1.0, "a number above 0"),
    ("lr", float("nan"), "a number above 0"), ("clip", True, "a number above 0"),
    ("warmup", 500, "an integer from 0 to 320"), ("schedule", "linear", "one of cosine, wsd"),
    ("optimizer", "sgd", "one of adamw, muon"), ("cooldown", 2, "from 0 to 1"), ("weight_decay", -0.1, "at least 0"),
    ("precision", "float16", "one of float32, bfloat16"), ("seed", -1, "at least 0"),
])
def test_bad_configuration(name, value, allowed):
    with pytest.raises(ValueError, match=f"{name} must be .*{allowed}.*, got {value!r}"):
        TrainConfig(**{name: value})
