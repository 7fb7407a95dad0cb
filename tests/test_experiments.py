"""A chapter asks for curves: what is missing is trained once, what is there is read, and the rest can be pruned."""

import fcntl
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch

from sparsesurvey import experiments
from sparsesurvey.checkpoint import load
from sparsesurvey.data import Language, markov
from sparsesurvey.experiments import TOGETHER, loss_curves, pruned_loss, recipe_curves, trained
from sparsesurvey.job import Job
from sparsesurvey.linear import sparse_layers
from sparsesurvey.measure import live
from sparsesurvey.pruning import prune
from sparsesurvey.recipes import STE, Recipe, Static
from sparsesurvey.scores import magnitude
from sparsesurvey.structures import NM, Block, Dense
from sparsesurvey.tables import called
from sparsesurvey.train import Diverged, TrainConfig
from sparsesurvey.watching import Falling

CONFIG = TrainConfig(steps=6, batch=4, seq=16, warmup=2, eval_every=3, eval_batches=2, checkpoint_every=3)


@pytest.fixture(scope="module")
def language():
    return markov(length=1 << 14, valid=1 << 12)


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSESURVEY_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("SPARSESURVEY_ROWS", str(tmp_path / "rows"))
    return tmp_path


def curves(structures, language, seeds=(0,), **options):
    return loss_curves(structures, seeds, language, config=CONFIG, workers=1, progress=False, **options)


def test_rows_of_a_curve(language):
    rows = curves([Dense(), NM(2, 4)], language, seeds=(0, 1))
    assert [(row.structure, row.method, row.at["seed"], row.at["step"]) for row in rows] == [
        (name, method, seed, step) for name, method in (("dense", "dense"), ("2:4", "static")) for seed in (0, 1)
        for step in (0, 3, 6)]
    assert {(row.metric, row.unit, row.machine.threads) for row in rows} == {("validation loss", "nats/token", 1)}
    assert not any(row.stale for row in rows)
    assert rows[1].at["tokens"] == 3 * 4 * 16 and rows[0].at["corpus"] == language.digest[:12]
    beside = {row.metric: row for row in live("training") if row.metric != "validation loss"}
    assert {row.key for row in live("training") if row.metric == "validation loss"} == {row.key for row in rows}
    assert {metric: row.unit for metric, row in beside.items()} == {"training time": "s", "gradient norm": "1", TOGETHER: "s"}
    assert beside["training time"].at["beside"] == 1 and "beside" not in beside["gradient norm"].at


def test_the_time_of_all_runs_is_recorded_once_they_were_all_trained(language):
    begun = time.perf_counter()
    curves([Dense(), NM(2, 4)], language)
    most = time.perf_counter() - begun
    curves([Dense(), NM(2, 4), NM(1, 4)], language)  # one of three
    waited, = (row for row in live("training") if row.metric == TOGETHER)
    steps = sum(row.value for row in live("training") if row.metric == "training time" and row.at["step"] == 6
                and row.structure != "1:4")
    assert (waited.structure, waited.at["runs"], waited.at["beside"]) == ("2 structures", 2, 1) and steps < waited.value < most


@pytest.mark.parametrize("name", ["quick", "default", "full"])
def test_each_preset_has_a_live_one(name):
    live_one, other = experiments.preset(f"live {name}"), experiments.preset(name)
    tokens = [plan["config"].steps * plan["config"].batch * plan["config"].seq for plan in (live_one, other)]
    assert (live_one["model"], live_one["seeds"]) == (other["model"], other["seeds"]) and tokens[0] <= tokens[1]


def test_rows_of_recipes_have_a_record_of_their_own(language):
    pairs = [(Dense(), Recipe()), (NM(2, 4), Static()), (NM(2, 4), STE(every=2))]
    seen = []
    rows = recipe_curves(pairs, (0,), language, config=CONFIG, workers=1, progress=False, watch=lambda rows: seen.append(len(rows)))
    assert [called(row) for row in rows[::3]] == ["dense", "2:4", f"2:4, {STE(every=2)}"]
    assert seen == sorted(seen) and seen[-1] == len(rows) == 9 and len(seen) == 7  # two looks at each run, one at the end
    assert not live("training")
    assert {"flip rate", "mask divergence", "explored share"} <= {row.metric for row in live("recipes") if row.method.startswith("ste")}
    assert not any(row.metric == "flip rate" for row in live("recipes") if row.method == "static")


def test_falling_curves_are_one_figure(language, monkeypatch):
    shown = []

    class Handle:
        def update(self, figure):
            shown.append(("again", figure))

    monkeypatch.setattr("sparsesurvey.watching.display", lambda figure, display_id: shown.append(("new", figure)) or Handle())
    falling = Falling(language.entropy)
    loss_curves([Dense()], (0, 1), language, config=CONFIG, workers=1, progress=False, watch=falling)
    assert [what for what, _ in shown] == ["new", "again", "again", "again"]
    assert shown[-1][1].axes[0].get_ylabel() == "validation loss, nats/token"


def test_what_is_recorded_is_not_trained_again(language, folders, monkeypatch):
    rows = curves([NM(2, 4)], language)
    monkeypatch.setattr(experiments, "train", lambda *_, **__: pytest.fail("trained again"))
    assert curves([NM(2, 4)], language) == rows
    with pytest.raises(pytest.fail.Exception):
        curves([NM(2, 4)], language, seeds=(1,))
    with pytest.raises(pytest.fail.Exception):
        curves([NM(2, 4)], language, record=str(folders / "elsewhere"))


def test_record_elsewhere_takes_the_run_that_is_kept(language, folders, monkeypatch):
    rows = curves([NM(2, 4)], language)
    monkeypatch.setattr("sparsesurvey.train.batch", lambda *_: pytest.fail("trained again"))
    again = curves([NM(2, 4)], language, record=str(folders / "elsewhere"))
    assert [row.value for row in again] == [row.value for row in rows]
    assert list((folders / "elsewhere").glob("*/training.jsonl"))


def test_changed_code_or_settings_is_another_run(language):
    job = Job(NM(2, 4), 0, language, "markov", CONFIG, Static())
    changes = [{"code": "0" * 12}, {"config": TrainConfig()}, {"seed": 1}, {"model": "bytes"},
               {"recipe": Static(scale_lr=True)}, {"structure": Block(8, 8)}, {"structure": None}]
    others = [replace(job, **change) for change in changes]
    assert len({each.folder for each in [job, *others]}) == len(others) + 1


def test_bits_per_byte_of_a_byte_language(language):
    text = Language("text bytes", language.train, language.valid, 256, "1" * 64, bytes_per_token=1.0)
    rows = curves([NM(2, 4)], text, model="bytes")
    assert {row.unit for row in rows} == {"nats/byte"}
    bits = [row for row in live("training") if row.metric == "bits per byte"]
    assert [row.value for row in bits] == pytest.approx([row.value / 0.6931471805599453 for row in rows])


SCRIPT = """
from dataclasses import replace
from sparsesurvey.data import markov
from sparsesurvey.experiments import loss_curves
from sparsesurvey.structures import NM, Dense
from test_experiments import CONFIG
if __name__ == "__main__":
    language = markov(length=1 << 14, valid=1 << 12)
    loss_curves([Dense(), NM(2, 4)], (0,), language, config=replace(CONFIG, steps=STEPS), workers=2)
"""


def script(folder, steps):
    path = folder / "script.py"
    path.write_text(SCRIPT.replace("STEPS", str(steps)))
    here = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.path.dirname(__file__)}
    return subprocess.Popen([sys.executable, path], env=here, stderr=subprocess.PIPE, text=True)


def test_processes_give_the_same_numbers(language, folders):
    """Trained side by side in spawned processes, from a script as from a notebook."""
    with script(folders, steps=6) as started:
        _, told = started.communicate(timeout=120)
    assert started.returncode == 0, told
    assert "runs: 100%" in told
    spawned = [row for row in live("training") if row.metric == "validation loss"]
    assert len(spawned) == 6
    shutil.rmtree(folders / "runs")
    own = curves([Dense(), NM(2, 4)], language, record=str(folders / "own"))
    assert len(own) == 6
    assert sorted(row.value for row in own) == sorted(row.value for row in spawned)


def test_processes_end_with_the_one_that_started_them(folders):
    """A notebook's kernel that is killed leaves nobody training, and what was trained is kept."""
    deadline = time.monotonic() + 120
    with script(folders, steps=1_000_000) as started:
        found = []
        while len(found) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
            found = list((folders / "runs").glob("*/checkpoint.safetensors"))
        started.kill()
    assert len(found) == 2
    for path in found:
        with (path.parent / "lock").open("w") as file:
            while time.monotonic() < deadline:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(0.1)
            else:
                pytest.fail("a process still trains")
        assert load(path)[1]["step"] > 0


def test_a_run_waits_for_the_one_that_trains_it(language):
    job = Job(NM(2, 4), 0, language, "markov", CONFIG, Static())
    job.folder.mkdir(parents=True)
    with (job.folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        thread = threading.Thread(target=experiments.run, args=(job,))
        thread.start()
        time.sleep(0.5)
        assert not job.checkpoint.exists()
    thread.join(30)
    assert job.done(None)


def test_error_in_a_process_reaches_the_caller(language):
    bad = TrainConfig(steps=6, batch=4, seq=16, warmup=2, eval_every=3, device="cuda:77")
    with pytest.raises(ValueError, match="device"):
        loss_curves([NM(2, 4)], (0,), language, config=bad, progress=False)
    assert issubclass(Diverged, RuntimeError)


def test_trained_model_and_its_pruned_loss(language):
    [*_, last] = curves([Dense()], language)
    model = trained(language=language, config=CONFIG)
    assert not model.training and not sparse_layers(model)
    assert pruned_loss(Dense(), language=language, config=CONFIG).value == last.value
    row = pruned_loss(NM(2, 4), language=language, config=CONFIG)
    assert (row.structure, row.method, row.at["density"]) == ("2:4", "magnitude, one shot", 0.5)
    assert row.value != last.value and not row.stale
    assert row.key in {other.key for other in live("training")}
    assert set(prune(model, NM(2, 4), magnitude).values()) == {0.5}


def test_another_start_is_another_run(language):
    ours, theirs = (Job(None, 0, language, "markov", CONFIG, Recipe(), initial=way) for way in ("ours", "transformers"))
    assert ours.folder != theirs.folder and "initial" not in ours.at() and theirs.at()["initial"] == "transformers"
    assert ours.code != theirs.code and theirs.source.endswith("sparsesurvey.initial")
    assert theirs.start().lm_head.weight.std() < 0.5 * ours.start().lm_head.weight.std()
    assert trained(None, 0, language, config=CONFIG, initial="transformers").lm_head.weight.std() < 0.05
    with pytest.raises(ValueError, match="initial must be one of"):
        Job(None, 0, language, "markov", CONFIG, Recipe(), initial="zeros")


def test_trained_sparse_model_is_plain(language):
    model = trained(Block(8, 8, 0.5), language=language, config=CONFIG)
    assert not sparse_layers(model)
    gate = model.model.layers[0].mlp.gate_proj.weight
    assert isinstance(model.model.layers[0].mlp.gate_proj, torch.nn.Linear) and Block(8, 8, 0.5).holds(gate != 0)


@pytest.mark.parametrize("structures, message", [([], "must not be empty"), ([NM(2, 5)], "cannot be made sparse: 2:5")])
def test_bad_input(language, structures, message):
    with pytest.raises(ValueError, match=message):
        curves(structures, language)
