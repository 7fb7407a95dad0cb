"""One-shot pruning as rows, and what is read off them."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from sparsesurvey import figures, oneshot
from sparsesurvey.data import markov
from sparsesurvey.job import LOSS
from sparsesurvey.measure import recorded
from sparsesurvey.mistral import build
from sparsesurvey.models import prune_model, samples
from sparsesurvey.oneshot import LADDER, in_order, increases, losses, noise, pruning_time, released, table
from sparsesurvey.scores import dass, magnitude, wanda
from sparsesurvey.structures import NM
from sparsesurvey.tables import above_dense
from sparsesurvey.train import TrainConfig

TINY = TrainConfig(steps=20, warmup=2, eval_every=20, eval_batches=2, batch=8, seq=32)
LANGUAGE = markov(length=1 << 14, valid=1 << 12)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSESURVEY_RUNS", str(folder / "runs"))
        options = {"seeds": (0, 1), "calibrations": (0, 1), "language": LANGUAGE, "config": TINY, "sequences": 16,
                   "record": str(folder), "progress": False}
        methods = {"magnitude": magnitude, "Wanda": wanda, "released": released}
        made = losses([NM(2, 4), NM(1, 4)], methods, **options)
        patch.setattr(oneshot, "_measure", lambda *_: pytest.fail("measured again"))
        assert losses([NM(2, 4), NM(1, 4)], methods, **options) == made
        return made


def test_a_row_for_every_case(rows):
    assert len(rows) == 2 + 2 * 2 * 3 * 2
    assert {row.structure for row in rows} == {"dense", "2:4", "1:4"}
    assert {row.at["density"] for row in rows if row.structure == "2:4"} == {0.5}
    assert not any(row.stale for row in rows)
    one = next(row for row in rows if row.method == "Wanda")
    assert "sparsesurvey.models" in one.source and one.at["calibration"] in (0, 1)


def test_increases_are_over_the_same_model(rows):
    found = increases(rows)
    dense = {row.at["seed"]: row.value for row in rows if row.structure == "dense"}
    assert set(found) == {(method, str(structure)) for method in ("magnitude", "Wanda", "released") for structure in ("2:4", "1:4")}
    row = next(row for row in rows if row.method == "released" and row.at["seed"] == 1 and row.at["calibration"] == 1)
    assert found["released", row.structure][1, 1] == row.value - dense[1]
    assert found["magnitude", "2:4"][0, 0] == found["magnitude", "2:4"][0, 1]


def test_a_model_of_another_machine_is_another_model(rows):
    elsewhere = [replace(row, value=row.value + 1, high=row.high + 1, machine=replace(row.machine, name="another")) for row in rows]
    both = {(row.machine.slug, row.key): above for row, above in above_dense([*rows, *elsewhere])}
    for here, there in zip(rows, elsewhere):
        if here.structure != "dense":
            assert both[here.machine.slug, here.key] == pytest.approx(both[there.machine.slug, there.key])


def test_tables(rows):
    assert list(table(rows).columns) == ["2:4", "1:4"] and list(table(rows).index) == ["magnitude", "Wanda", "released"]
    spread = noise(rows).set_index(["structure", "method"])
    assert spread.loc[("2:4", "magnitude"), "over calibrations"] == 0 < spread.loc[("2:4", "magnitude"), "over models"]
    order = in_order(rows, ["magnitude", "released"])
    assert list(order["models"]) == [2, 2] and (order["least gain"] <= order["largest gain"]).all()
    ax = figures.increases(rows)
    assert len(ax) == 2


def test_a_table_of_one_model_has_no_range(rows):
    assert "(" not in table([row for row in rows if row.at["seed"] == 0]).to_string()


def test_a_loss_of_bytes_is_in_nats(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSESURVEY_RUNS", str(tmp_path / "runs"))
    text = replace(LANGUAGE, bytes_per_token=1.0)
    made = losses([NM(2, 4)], {"magnitude": magnitude}, language=text, config=TINY, sequences=16, record=str(tmp_path), progress=False)
    assert {row.unit for row in made} == {"nats/byte"} and all(1 < row.value < 4 for row in made)


def test_dass_as_released():
    """Groups along the outputs in gate and up, along the inputs in down; along the inputs the factor of a row is common to all."""
    batches = samples(LANGUAGE.train, 16, 32)
    made = {}
    for name, plan in (("released", released(NM(2, 4))), ("power 0", released(NM(2, 4), 0.0)),
                       ("along the inputs", {part: (NM(2, 4), dass) for part in ("gate_proj", "up_proj", "down_proj")}),
                       ("magnitude", {part: (NM(2, 4), magnitude) for part in ("gate_proj", "up_proj")})):
        made[name] = build("markov")
        prune_model(made[name], plan, batches=batches, propagate=False, progress=False)
    kept = {name: [part.weight != 0 for part in (model.model.layers[0].mlp.gate_proj, model.model.layers[0].mlp.down_proj)]
            for name, model in made.items()}
    assert NM(2, 4, "out").holds(kept["released"][0]) and not NM(2, 4).holds(kept["released"][0])
    assert NM(2, 4).holds(kept["released"][1]) and not torch.equal(kept["released"][0], kept["power 0"][0])
    assert torch.equal(kept["along the inputs"][0], kept["magnitude"][0])


def test_the_ladder_changes_one_thing_at_a_time():
    assert list(LADDER)[0] == "Wanda" and LADDER["DaSS as released"] is released


def test_the_models_of_bytes_are_trained_as_said(monkeypatch):
    asked = []
    monkeypatch.setattr(oneshot, "losses", lambda *args, **options: asked.append((*args, options["initial"])) or [len(asked)])
    ways = "AdamW at 0.0045, as transformers", "Muon, width-scaled"
    assert oneshot.text_losses([NM(2, 4)], {"Wanda": wanda}, ways, record="here") == [1, 2]
    *rest, initial = map(list, zip(*asked))
    assert initial == ["transformers", "ours"]
    structures, methods, seeds, calibrations, languages, sizes, configs = rest
    assert structures == [[NM(2, 4)]] * 2 and seeds == [(0, 1, 2)] * 2 and calibrations == [(0,)] * 2 and sizes == ["bytes"] * 2
    assert [(config.optimizer, config.lr, config.weight_decay) for config in configs] == [("adamw", 4.5e-3, 0.01), ("muon", 3e-3, 0.1)]
    assert {config.steps for config in configs} == {1500} and languages[0].bytes_per_token == 1


def test_rows_are_told_apart_by_how_their_model_was_trained():
    rows = {}
    for way, (config, initial) in oneshot.WAYS.items():
        job = oneshot.Job(None, 0, LANGUAGE, "bytes", config, oneshot.Recipe(), initial=initial)
        rows[way] = SimpleNamespace(at={**job.at(), "decay": config.weight_decay})
    for way, row in rows.items():
        assert oneshot.trained_as(rows.values(), way) == [row]


def test_what_the_chapter_says_of_the_order_is_in_the_rows():
    """Each method loses less than the one before it, in every recorded model of the first way, at both patterns; E-Sparse
    and RIA in the first three of five only."""
    rows = [row for row in recorded("pruning") if row.at.get("model") == "bytes" and row.at.get("calibration", 0) == 0]
    mine = oneshot.trained_as([row for row in rows if row.metric == LOSS and row.structure in ("dense", "2:4", "4:8")], "AdamW at 0.0045, as transformers")
    order = ["magnitude", "Wanda", "E-Sparse", "RIA", "DaSS as released", "SparseGPT", "ALPS"]
    three = oneshot.in_order([row for row in mine if row.at["seed"] < 3], order)
    assert len(three) == 12 and (three["models"] == 3).all() and (three["as expected"] == 3).all()
    five = oneshot.in_order(mine, order)
    assert (five["models"] == 5).all() and (five["as expected"] == 5)[five["better"] != "RIA"].all()


def test_spreads_of_norms(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSESURVEY_RUNS", str(tmp_path / "runs"))
    inputs, neurons = oneshot.spreads((0,), LANGUAGE, config=TINY, sequences=16, record=str(tmp_path))
    assert (inputs.method, neurons.method) == ("inputs", "neurons")
    assert 0 < inputs.low <= inputs.value <= inputs.high and neurons.value > 0


def test_time_and_memory_are_rows(tmp_path):
    seconds, busy, memory = pruning_time(wanda, NM(2, 4), "markov", 4, 32, tries=2, record=str(tmp_path))
    assert seconds.low < seconds.value < seconds.high and seconds.at["tries"] == 2
    assert seconds.unit == busy.unit == "s" and memory.value > seconds.at["weights"] and seconds.method == "wanda"
    assert len(list(tmp_path.rglob("pruning.jsonl"))) == 1


def test_rows_of_another_code_are_not_taken(rows):
    row = rows[1]
    assert oneshot._known([row], row.structure, row.method, row.at, row.code) is row
    assert oneshot._known([replace(row, code="0" * 12)], row.structure, row.method, row.at, row.code) is None
