"""Choosing and packing are timed beside a read of the weight, once; targets are judged from rows. No time is asserted."""

from dataclasses import dataclass, replace
from time import sleep

import pytest
import torch

from sparsesurvey import measure, selection
from sparsesurvey.roofline import Roofline
from sparsesurvey.structure import Unavailable
from sparsesurvey.structures import NM, Block, Dense, QuantisedNM, Transposable
from sparsesurvey.structures.transposable import exhaustive, row_then_column
from sparsesurvey.tables import measured

QUICK = {"rounds": 3, "min_seconds": 1e-4}
READS, TOPK, SELECTING = "reads of the weight", "times topk", "times selecting"


@dataclass(frozen=True)
class Slow(Dense):
    """Takes its time to choose."""

    def __str__(self):
        return "slow"

    def select(self, scores):
        sleep(0.3)
        return super().select(scores)


def found(rows):
    return {(row.method, row.metric) for row in rows}


def test_what_is_timed_of_a_pattern(tmp_path):
    rows = selection.times(NM(2, 4), (16, 32), record=str(tmp_path), **QUICK)
    timed = {(method, "time") for method in ("read", "topk", "select", "mask", "pack")}
    assert found(rows) == timed | {("select", TOPK), ("pack", SELECTING), ("select", READS), ("mask", READS), ("pack", READS)}
    for row in rows:
        assert row.at == {"out": 16, "in": 32, "dtype": "float32", "threads": 1} and row.structure == "2:4"
        assert 0 < row.low <= row.value <= row.high and row.source == "sparsesurvey.structures.nm"
        assert row.unit == ("s" if row.metric == "time" else "1")
    assert found(measure.live("choosing", str(tmp_path))) == found(rows)


def test_topk_only_where_it_chooses_from_the_same_groups(tmp_path):
    rows = selection.times(Block(4, 4), (16, 32), record=str(tmp_path), **QUICK)
    assert ("topk", "time") not in found(rows) and ("select", READS) in found(rows)


def test_without_a_mask_packing_chooses(tmp_path):
    rows = selection.times(QuantisedNM(), (16, 32), record=str(tmp_path), **QUICK)
    assert found(rows) == {("read", "time"), ("pack", "time"), ("pack", READS)}


def test_what_is_recorded_is_not_timed_again(tmp_path, monkeypatch):
    rows = selection.times(NM(2, 4), (16, 32), record=str(tmp_path), **QUICK)
    monkeypatch.setattr(measure, "compare", None)
    assert selection.times(NM(2, 4), (16, 32), record=str(tmp_path), **QUICK) == rows


def test_what_takes_too_long_is_named_and_left_out(tmp_path):
    with pytest.raises(Unavailable, match="^needs more than 0.001 s to choose and pack .16 x 32. once"):
        selection.times(Slow(), (16, 32), record=str(tmp_path), patience=0.001, **QUICK)
    rows, slow = selection.survey([Slow(), NM(2, 4)], shape=(16, 32), record=str(tmp_path), patience=1.0, **QUICK)
    assert list(slow) == ["slow"] and {row.structure for row in rows} == {"2:4"}


def test_first_of_each_kind_that_divides_the_shape():
    kinds = {"NM": NM, "Block": Block, "Transposable": Transposable}
    assert list(map(str, selection.first(kinds, (48, 48)))) == ["2:4", "block 16x16 50%", "transposable 2:4"]
    assert list(map(str, selection.first(kinds, (2, 5)))) == ["3:5"]


def test_against_an_exact_solver(tmp_path):
    rows = selection.against_optimum(Transposable(2, 4), exhaustive, (32, 32), sample=5, record=str(tmp_path))
    by = {(row.method, row.metric): row for row in rows}
    assert by["select", "below the optimum"].value == 0, "the structure tries all masks as well"
    assert by["optimum", "time"].value > 0 and all(row.at["tiles"] == 5 for row in rows)
    assert by["select", "times as fast as the optimum"].value > 0
    again = selection.against_optimum(Transposable(2, 4), exhaustive, (32, 32), sample=5, record=str(tmp_path))
    assert again == rows


def test_less_than_the_optimum_is_a_negative_shortfall(tmp_path):
    """The solver is handed over: with one that is no better than a heuristic, the sign says so."""
    rows = selection.against_optimum(Transposable(2, 4), row_then_column, (32, 32), record=str(tmp_path))
    assert next(row.value for row in rows if row.metric == "below the optimum") < 0
    assert rows[0].at["tiles"] == 64


def row(structure="2:4", method="select", metric=TOPK, value=1.0, **at):
    at = {"out": 4096, "in": 14336, "dtype": "float32", "threads": 1} | at
    return measure.Measurement.now(metric, "1", value, low=0.9 * value, high=1.1 * value, structure=structure, method=method, at=at,
                                   source="sparsesurvey.structures.nm")


def test_targets_are_judged_from_rows():
    wanted = [selection.Target("2:4", "select", TOPK, most=2), selection.Target("2:4", "select", READS, least=3)]
    table = selection.targets([row(value=1.5), row(metric=READS, value=2.0)], wanted)
    assert table["met"].tolist() == ["yes", "no"] and table["target"].tolist() == ["at most 2", "at least 3"]
    assert table["found"].tolist() == ["1.5 (1.35 to 1.65)", "2 (1.8 to 2.2)"]
    assert table["measured"].tolist()[0].startswith(measured(row())[:20])


def test_another_shape_dtype_thread_count_or_device_is_no_answer():
    wanted = [selection.Target("2:4", "select", TOPK, most=2)]
    gpu = replace(row(), machine=replace(row().machine, device="cuda"))
    for other in [row(out=1024)], [row(dtype="float16")], [row(threads=2)], [row(structure="4:8")], [gpu], []:
        assert selection.targets(other, wanted)["met"].tolist() == ["not measured"]


def test_the_targets_are_those_of_the_survey():
    assert len(selection.TARGETS) == 8 and all(target.most < 31 or target.least == 10 for target in selection.TARGETS)


def test_table_has_a_line_a_structure(tmp_path):
    rows = selection.survey([NM(2, 4), QuantisedNM()], shape=(16, 32), record=str(tmp_path), **QUICK).rows
    table = selection.table(rows)
    assert table["structure"].tolist() == ["2:4", "int4 2:4"]
    assert table["select"].tolist()[1] == "" and table["pack"].tolist()[1] and table["select / topk"].tolist()[0]


@pytest.mark.parametrize("change, message", [
    ({"structure": "2:4"}, "structure must be a Structure"), ({"shape": (16, 30)}, "needs a shape whose in is a multiple of 4"),
    ({"shape": (16,)}, "shape must be"), ({"dtype": "int8"}, "dtype must be one of"), ({"threads": 0}, "threads must be"),
    ({"device": "cuda:99"}, "device is|device must be"), ({"rounds": 2}, "rounds must be"),
])
def test_bad_input(change, message, tmp_path):
    good = {"structure": NM(2, 4), "shape": (16, 32), "record": str(tmp_path)}
    with pytest.raises(ValueError, match=message):
        selection.times(**{**good, **change})


def test_a_sample_has_a_tile():
    with pytest.raises(ValueError, match="sample must be"):
        selection.against_optimum(Transposable(2, 4), exhaustive, (32, 32), sample=0)


def test_presets_are_those_of_the_chapters():
    assert list(selection.PRESETS) == ["quick", "default", "full"]
    assert selection.PRESETS["full"][0]["shape"] == selection.FULL
    assert torch.get_num_threads() >= 1


def test_figure_has_a_panel_a_shape_and_a_line_a_structure():
    rows = [row(metric=READS, value=9.0), row("4:8", metric=READS), row(metric=READS, method="pack", out=256), row(metric=TOPK)]
    figure = selection.draw(rows)
    assert len(figure.axes) == 2 and [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["4:8", "2:4"]
    assert "[4096 x 14336] float32, 1 thread" in figure.axes[0].get_title()
    assert selection.draw([]).texts[0].get_text() == "choosing has not been timed yet"


def test_share_of_a_training_step():
    """6 * 10 * 4096 * 14336 FLOP at 6e9 FLOP/s take 0.587 s."""
    rows = [row(method=method, metric="time", value=0.587) for method in ("pack", "select")] + [
        row("monarch 16", method="pack", metric="time", value=5.87)]
    table = selection.shares(rows, Roofline("here", 6e9, 1e9, "a test"), tokens=10, every=[1, 10])
    assert table.index.tolist() == ["2:4", "monarch 16"] and table.columns.tolist() == ["every step", "every 10"]
    assert table.to_numpy().flatten().tolist() == pytest.approx([1, 0.1, 10, 1], rel=1e-3)
    assert selection.shares([], Roofline("here", 6e9, 1e9, "a test")).empty


def test_select_counts_and_not_pack_where_both_are_there():
    rows = [row(method="select", metric="time", value=1.0), row(method="pack", metric="time", value=2.0)]
    here = Roofline("here", 6e9, 1e9, "a test")
    for order in rows, rows[::-1]:
        assert selection.shares(order, here)["every step"].tolist() == selection.shares(rows[:1], here)["every step"].tolist()
