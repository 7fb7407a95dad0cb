"""The 162M campaign, at a size that a test can wait for: what it trains first, that it stops in time, goes on, and is read right."""

import os
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from math import inf
from pathlib import Path

import pytest
import torch

from sparsesurvey import experiments, mistral, pretraining, speed, steptime, targets, timetoloss
from sparsesurvey.data import Language, markov
from sparsesurvey.deadline import OutOfTime
from sparsesurvey.job import Job
from sparsesurvey.machine import Machine
from sparsesurvey.measure import Measurement, live
from sparsesurvey.pretraining import CONFIG, Pretraining
from sparsesurvey.recipe import Recipe
from sparsesurvey.recipes import Static
from sparsesurvey.structures import NM, Block, Transposable, Unstructured
from sparsesurvey.train import TrainConfig, train

SHORT = TrainConfig(steps=8, batch=4, seq=16, warmup=2, eval_every=2, eval_batches=2, checkpoint_every=2)
CARD = replace(Machine.current(), device="cuda", name="NVIDIA H200")


@pytest.fixture(scope="module")
def language():
    return markov(length=1 << 14, valid=1 << 12)


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSESURVEY_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("SPARSESURVEY_ROWS", str(tmp_path / "rows"))
    return tmp_path


def job(language, structure=None, kernel="masked", recipe=None, **changes):
    recipe = recipe or (Static() if structure else Recipe())
    return Job(structure, 0, language, "markov", replace(SHORT, **changes), recipe, kernel)


# ---- what there is to train


def test_runs_most_telling_first_and_each_once(language):
    words = Language("words", language.train, language.valid, 32000, "0" * 64)
    runs = pretraining.runs(words)
    names = [pretraining.named(job) for job in runs]
    assert len(set(names)) == len({job.folder for job in runs}) == len(runs) > 35
    assert names[0] == "dense, dense, adamw 0.001, seed 0" and names[1].startswith("block 128x128 10%, static, triton")
    shapes = mistral.config("162m")
    for each in runs:
        if each.structure:
            for shape in ((shapes.intermediate_size, shapes.hidden_size), (shapes.hidden_size, shapes.intermediate_size)):
                assert each.structure.check_shape(shape) == shape and each.structure.nnz(shape) > 0
            each.recipe.check(each.structure)
        settings = each.config
        assert (settings.batch * settings.seq, settings.precision, settings.compile, settings.clip) == (65536, "bfloat16", True, 1.0)
        assert settings.steps * settings.batch * settings.seq < 4 * 42_656_973, "more than four epochs of wiki-en"
        assert each.kernel == "masked" or each.compressed or each.recipe.fixed_mask and settings.optimizer == "adamw"
    assert sum(each.dense and each.config == CONFIG for each in runs) == 2, "two seeds of the dense model"
    rates = {(each.name, round(each.config.lr / CONFIG.lr, 3)) for each in runs if each.config.optimizer == "adamw"}
    assert {(name, rate) for name in ("dense", "unstructured 10%", "block 128x128 10%") for rate in (0.333, 1.0, 3.0)} <= rates


def test_a_rehearsal_trains_the_same_runs_small(language):
    small, large = (pretraining.runs(language, model, config) for model, config in (("5m", pretraining.REHEARSAL), ("162m", CONFIG)))
    assert [(each.structure, each.recipe, each.seed) for each in small] == [(each.structure, each.recipe, each.seed) for each in large]
    assert {each.kernel for each in small} == {"masked", "gather"}
    for structure in {each.structure for each in small} - {None}:
        assert structure.nnz((768, 256)) > 0 and structure.nnz((256, 768)) > 0


@pytest.mark.parametrize("structure, recipe, device, kernel", [
    (None, Recipe(), "cuda", "masked"), (Block(128, 128, 0.1), Static(), "cpu", "gather"), (NM(2, 4), Static(), "cuda", "cusparselt"),
    (NM(2, 4), pretraining.SRSTE(), "cuda", "cusparselt"), (NM(2, 4), pretraining.SRSTE(), "cpu", "masked"),
    (pretraining.Transposable(2, 4), pretraining.DenseLast(pretraining.FST()), "cuda", "masked"),
    (Unstructured(0.1), Static(), "cuda", "masked"), (Block(64, 64, 0.1), pretraining.PruneAndGrow(), "cuda", "masked"),
])
def test_best_kernel(structure, recipe, device, kernel):
    assert pretraining.best_kernel(structure, recipe, device) == kernel


def test_blocks_are_fused_on_a_gpu():
    assert pretraining.best_kernel(Block(128, 128, 0.1), Static(), "cuda") == "triton fused"
    assert pretraining.best_kernel(pretraining.VNM(64, 2, 8), Static(), "cuda") == "triton"


@pytest.mark.parametrize("given, error, said", [("", ValueError, "corpus must be a folder"), ("nowhere", FileNotFoundError, "wiki-en.bpe32000.json")])
def test_corpus_that_is_not_there(given, error, said, monkeypatch, tmp_path):
    monkeypatch.delenv(pretraining.CORPUS, raising=False)
    with pytest.raises(error, match=said):
        pretraining.wikipedia(given and tmp_path / given)


def test_corpus_by_environment(monkeypatch, tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    monkeypatch.setenv(pretraining.CORPUS, str(tmp_path))
    monkeypatch.setenv("SPARSESURVEY_TOKENS", str(tmp_path / "tokens"))
    monkeypatch.setattr(pretraining, "FILES", ("a.txt", "b.txt", "words.json"))
    text = "some words here\n"
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"{text}<|endoftext|>\n" * 20)
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.train_from_iterator([text], trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False))
    made.save(str(tmp_path / "words.json"))
    found = pretraining.wikipedia()
    assert found.name == "a" and found.bytes_per_token > 1 and len(found.train) == len(found.valid)


# ---- stopping and going on


@pytest.mark.parametrize("step, seconds, left, age, late", [
    (2, 2.0, 1e3, 0.0, False),  # there is time for all of it
    (2, 2.0, 3.0, 0.0, False),  # and for a checkpoint after this very step
    (3, 3.0, 0.5, 0.0, True),  # the next one would come after a second
    (8, 8.0, 0.1, 0.0, False),  # it is over, and is to be written
])
def test_it_is_too_late_when_no_checkpoint_would_be_in_time(language, step, seconds, left, age, late):
    assert pretraining.too_late(job(language), step, seconds, left, age) is late


def test_by_the_clock_it_is_too_late_when_the_last_checkpoint_is_young(language):
    slow = job(language, steps=1000, checkpoint_every=1000, warmup=2, checkpoint_seconds=60)
    assert pretraining.too_late(slow, 100, 100.0, 50.0, 5.0) and not pretraining.too_late(slow, 100, 100.0, 50.0, 30.0)


def test_a_run_stops_and_goes_on_as_if_it_had_not(language, folders):
    """The deadline falls after the third validation; a second call ends the run with the losses of one that was never stopped."""
    it = job(language, NM(2, 4))
    made = Pretraining("", time.monotonic() + 1e4)
    seen = []
    watch = pretraining.stopping(it, made.deadline, seen)

    def soon(history):
        if history.valid[-1][0] == 5:
            raise OutOfTime
        watch(history)

    five = replace(it, config=replace(it.config, eval_every=5))  # eval_every changes no loss of training
    with pytest.raises(OutOfTime):
        experiments.run(five, watch=soon)
    assert five.checkpoint.exists() and not five.done("")
    made.go_through([five, five])
    assert not made.problems and five.done("") and not five.checkpoint.exists(), "checkpoints of finished runs go"
    alone = train(five.start(), language, five.settings, progress=False)
    assert [row.value for row in five.recorded("")] == [loss for _, loss in alone.valid]


def test_what_is_recorded_or_has_no_time_is_not_trained(language, monkeypatch):
    it = job(language)
    made = Pretraining("", time.monotonic() + 1e4)
    made.go_through([it])
    assert it.done("") and it.checkpoint.exists(), "the dense model's is kept"
    monkeypatch.setattr(pretraining, "run", lambda *_, **__: pytest.fail("trained again"))
    made.go_through([it])
    Pretraining("", time.monotonic() + 0.5).go_through([job(language, NM(2, 4))])
    compiled = job(language, NM(2, 4), compile=True)
    assert pretraining.least(compiled) > 100
    Pretraining("", time.monotonic() + 100).go_through([compiled])


def test_a_run_that_loses_its_loss_is_told_and_not_tried_again(language, monkeypatch):
    wild, calm = job(language, NM(2, 4), lr=1e30, clip=1e30), job(language)
    made = Pretraining("", time.monotonic() + 1e4)
    made.go_through([wild, calm])
    assert "Try a lower lr" in made.problems[pretraining.named(wild)] and calm.done("")
    assert pretraining.diverged(wild, "") and not pretraining.diverged(replace(wild, config=SHORT), "")
    monkeypatch.setattr(pretraining, "run", lambda *_, **__: pytest.fail("tried again"))
    made.go_through([wild])


def test_a_failure_costs_its_run_alone(language):
    broken, fine = job(language, Block(7, 7, 0.5)), job(language)
    made = Pretraining("", time.monotonic() + 1e4)
    made.go_through([broken, fine])
    assert "ValueError" in made.problems[pretraining.named(broken)] and fine.done("")


# ---- steps taken apart


def test_steps_and_their_parts(language, monkeypatch):
    jobs = [job(language), job(language, Block(16, 16, 0.25), "gather"), job(language, NM(2, 4))]
    rows = steptime.step_times(jobs, rounds=3, min_seconds=1e-4)
    kinds = speed.steps(rows)
    assert [mine["step"].method for mine in kinds] == ["dense", "static, gather", "static"]
    for mine in kinds:
        assert set(mine) == {"step", *steptime.PARTS, "step speedup", "step work", "stored work"}
        assert mine["MLP"].value > 0 and mine["attention"].value > 0 and mine["head"].value > 0
    dense, block, pairs = kinds
    assert dense["step speedup"].value == 1 and dense["step work"].value == dense["stored work"].value
    by_part = mistral.flops(mistral.config("markov"), 16, training=True)
    assert dense["step work"].value == 64 * sum(by_part.values())
    in_mlp = 64 * sum(by_part[part] for part in ("gate_proj", "up_proj", "down_proj"))
    assert dense["step work"].value - block["stored work"].value == pytest.approx(0.75 * in_mlp)
    assert dense["step work"].value - pairs["stored work"].value == pytest.approx(0.5 * in_mlp)
    monkeypatch.setattr(steptime, "_measure", lambda *_: pytest.fail("measured again"))
    assert steptime.step_times(jobs) == rows
    table = timetoloss.step_table(rows)
    assert list(table["structure"]) == ["dense", "block 16x16 25%", "2:4"] and "of the datasheet's peak" not in table
    assert len(timetoloss.draw_steps(rows).axes) == 1


def test_parts_add_up_to_the_step_in_every_round():
    samples = {"step": [10.0, 12.0], "both passes": [8.0, 9.0], "attention": [1.0, 2.0], "MLP": [4.0, 3.0], "head": [1.0, 1.0]}
    found = steptime.parts(samples)
    assert found["optimizer"] == [2.0, 3.0] and found["rest"] == [2.0, 3.0]
    assert [sum(found[part][number] for part in steptime.PARTS) for number in (0, 1)] == samples["step"]


def test_compiled_steps_in_pieces(language, monkeypatch):
    """The compiler looks into all of it; what it makes of it is not what is tested."""
    compiled = []

    def compile_(what, **options):
        compiled.append(what)
        return torch_compile(what, backend="eager", fullgraph=True)

    torch_compile = torch.compile
    monkeypatch.setattr(torch, "compile", compile_)
    rows = steptime.step_times([job(language, compile=True, micro=2, chunk=16)], rounds=3, min_seconds=1e-4)
    assert len(compiled) == 3 and len(rows) == 9 and rows[0].at["compile"] is True
    torch.compiler.reset()


@pytest.mark.parametrize("change, message", [({"batch": 2}, "jobs must have one model, batch"), (None, "jobs must begin with a dense one")])
def test_steps_that_do_not_compare(language, change, message):
    jobs = [job(language), job(language, NM(2, 4), **change)] if change else [job(language, NM(2, 4))]
    with pytest.raises(ValueError, match=message):
        steptime.step_times(jobs)


# ---- reading rows


def row(metric, value, structure="dense", method="dense", step=None, machine=CARD, source="sparsesurvey.measure", **at):
    when = {} if step is None else {"step": step, "tokens": 64 * step}
    settings = {"model": "162m", "language": "wiki-en", "corpus": "0" * 12, "seed": 0, "optimizer": "adamw", "lr": 1e-3, **when, **at}
    return Measurement.now(metric, "1", value, structure=structure, method=method, at=settings, source=source, machine=machine)


def course(losses, seconds, **about):
    beside = about.pop("beside", 1)
    return [*(row("validation loss", loss, step=step, **about) for step, loss in enumerate(losses)),
            *(row("training time", each, step=step, beside=beside, **about) for step, each in enumerate(seconds, 1))]


def test_seconds_to_a_loss_are_straight_between_validations():
    [found] = speed.courses(course([8.0, 4.0, 3.0], [10.0, 20.0]))
    assert found.seconds == (0.0, 10.0, 20.0) and found.losses == (8.0, 4.0, 3.0)
    assert [found.seconds_to(loss) for loss in (9, 8, 6, 4, 3.5, 3, 2.9)] == [0, 0, 5, 10, 15, 20, inf]


def test_the_frontier_is_against_the_best_dense_run():
    block = {"structure": "block 128x128 10%", "method": "static, triton fused"}
    rows = [*course([8.0, 4.0, 3.0], [10.0, 20.0]), *course([8.0, 4.5, 3.5], [10.0, 20.0], seed=1),
            *course([8.0, 5.0, 3.0, 2.5], [5.0, 10.0, 15.0], **block), *course([8.0, 5.0, 3.5], [30.0, 60.0], structure="2:4", method="static")]
    table = timetoloss.frontier(rows).set_index("run")
    assert table.loc["block 128x128 10%, static, triton fused", "over dense"] == "2 x" and table.loc["2:4, static", "over dense"] == ""
    assert table.loc["2:4, static", ""].startswith("masked")
    assert speed.ahead(rows, "162m") == [2.0, 0.0]
    assert timetoloss.draw_frontier(rows).get_xlabel() == "seconds of training"


def test_who_shared_the_machine_has_no_time():
    assert not speed.courses(course([8.0, 4.0], [10.0], beside=2)) and not speed.courses(course([8.0, 4.0], [10.0], processes=2))


def test_verdicts_of_training():
    part = {"part": "step", "batch": 64, "seq": 1024}
    rows = [row("step time", 0.2, **part), row("stored work", 0.4 * 0.2 * 989e12, **part), row("step speedup", 1.0, **part)]
    for structure, method, gain in (("block 128x128 10%", "static, triton fused", 1.5), ("transposable 2:4", "static, cusparselt", 1.05),
                                    ("2:4", "static", 9.0)):
        rows += [row(metric, value, structure, method, **part) for metric, value in (("step time", 0.1), ("step speedup", gain))]
    here = {"machine": Machine.current(), "model": "512 x 3072, 2 layers"}
    rows += [row(metric, value, structure, method, **part, **here) for structure, method, gain in (
        ("block 64x64 10%", "static, gather", 1.8), ("dense", speed.TRAINER, 1.25)) for metric, value in (("step time", 1.0), ("step speedup", gain))]
    found = speed.verdicts(rows)
    assert [(round(item.value, 3) if item.value else None, item.word) for item in found] == [
        (0.4, "met"), (1.5, "met"), (1.05, "not met"), (None, "not measured"), (1.8, "met"), (0.8, "not met")]
    assert "met (1 of 1)" in targets.table(found)
    assert all(item.value is None for item in speed.verdicts([replace(each, code="0" * 12) for each in rows])), "stale rows do not count"


# ---- the command


@pytest.mark.parametrize("arguments, said", [
    (["--minutes", "0"], "--minutes must be a number above 0"), (["--device", "tpu"], "device must be cpu, cuda"),
    (["--dry-run", "--record", str(pretraining.PACKAGE / "recorded")], "give its rows another folder"),
])
def test_bad_arguments(capsys, arguments, said):
    with pytest.raises(SystemExit):
        pretraining.main(arguments)
    assert said in capsys.readouterr().err


SCRIPT = """
import sys, torch
sys.path.insert(0, {here!r})
from sparsesurvey import pretraining
from test_pretraining import SHORT, job
from sparsesurvey.data import markov
torch.set_num_threads(1)
pretraining.jobs_of = lambda *_: [job(markov(length=1 << 14, valid=1 << 12), **some) for some in ({{}}, {{"steps": 4}})]
pretraining.main(["--dry-run", "--record", sys.argv[1], "--only", "dense", "--minutes", "5"])
"""


def test_two_processes_train_the_runs_together(tmp_path, language):
    """Under torchrun: each run once, by both, with the losses of one process, and the first one's rows."""
    file = tmp_path / "script.py"
    file.write_text(SCRIPT.format(here=str(Path(__file__).parent)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(file), str(tmp_path / "both")]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0 and "2 of 2 runs are recorded" in done.stdout and "FAILED" not in done.stdout, done.stdout + done.stderr[-3000:]
    rows = live("training", tmp_path / "both")
    assert len({each.key for each in rows}) == len(rows)
    assert {each.at.get("processes") for each in rows if each.metric == "training time"} == {2}
    alone = train(job(language).start(), language, SHORT, progress=False)
    assert [each.value for each in job(language).recorded(tmp_path / "both")] == pytest.approx([loss for _, loss in alone.valid], rel=1e-5)


def test_the_command_from_end_to_end(tmp_path, monkeypatch, capsys, language):
    runs = pretraining.runs(language, "markov", pretraining.REHEARSAL)
    monkeypatch.setattr(pretraining, "jobs_of", lambda *_: [runs[0], runs[3]])
    monkeypatch.setattr(pretraining, "timed", lambda jobs: (jobs[:1], jobs))
    monkeypatch.setattr(pretraining, "timed_out", lambda seconds: nullcontext())  # it writes to a file that is none here
    command = ["--dry-run", "--record", str(tmp_path / "rows")]
    pretraining.main([*command, "--minutes", "5"])
    said = capsys.readouterr().out
    assert "FAILED" not in said and "2 of 2 runs are recorded" in said and "162M, dense" in said
    pretraining.main([*command, "--list"])
    assert "open" not in capsys.readouterr().out
    rows = live("speed", tmp_path / "rows")
    assert {each.metric for each in rows} == {"step time", "step speedup", "step work", "stored work"}
    assert {each.structure for each in rows} == {"dense", "2:4"}
    pruned = {(each.structure, each.method): each for each in live("pruning", tmp_path / "rows")}
    assert set(pruned) == {("dense", "dense"), *((structure, method) for structure in ("2:4", "4:8") for method in ("magnitude", "Wanda"))}
    trained = [each for each in live("training", tmp_path / "rows") if each.structure == "dense" and each.metric == "validation loss"]
    assert pruned["dense", "dense"].value == pytest.approx(trained[-1].value, rel=1e-5), "the model that was trained is what is pruned"
    pretraining.main([*command, "--skip", "steps", "--skip", "pruning", "--skip", pretraining.named(runs[0])])
    assert "2 of 2 runs are recorded" in capsys.readouterr().out
