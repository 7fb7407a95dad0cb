"""Rows survive whatever happens to the process that writes them, and say when they are stale or corrupt."""

import json
import multiprocessing
import os
import random
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from sparsesurvey import records
from sparsesurvey.machine import Machine
from sparsesurvey.measure import CorruptRecord, Measurement, code_of, latest, live, record, recorded, rows
from sparsesurvey.structures.dense import Dense

MACHINE = Machine(
    "cpu", "Test(R) Processor", 2, 1, 8, "Linux x86_64", "", "", "3.11.7", "2.13.0", "", "", "0123456789ab",
)
ROW = Measurement(
    "time", "s", 2e-3, 1e-3, 3e-3, "block 32x32 50%", "gather", {"out": 64, "tokens": 8, "dtype": "float32"}, MACHINE,
    "2026-01-31T09:30:00Z", "sparsesurvey.structures.dense", "0123456789ab",
)


def row(number: int, **changes) -> Measurement:
    return replace(ROW, at={"step": number}, **changes)


# ---- one row ---------------------------------------------------------------------------------------------------------

def test_row_goes_to_json_and_back():
    line = ROW.to_json()
    again = Measurement.from_json(line)
    assert again == ROW and again.key == ROW.key and hash(again) == hash(ROW) and "\n" not in line
    assert "origin" not in json.loads(line)
    odd = replace(ROW, at={"language": "Ἀθῆναι\u2028\n", "none": None, "seed": 3, "rate": 0.1, "tied": True})
    assert "\n" not in odd.to_json() and Measurement.from_json(odd.to_json()) == odd


def test_origin_is_not_compared():
    assert replace(ROW, origin="recorded") == ROW


@pytest.mark.parametrize("changes, named", [
    ({"value": float("nan")}, "value"),
    ({"value": "fast"}, "value"),
    ({"value": True}, "value"),
    ({"value": 10**400}, "value"),
    ({"high": float("inf")}, "high"),
    ({"low": 2.5e-3}, "low <= value <= high"),
    ({"high": 1.5e-3}, "low <= value <= high"),
    ({"metric": ""}, "metric"),
    ({"unit": " "}, "unit"),
    ({"structure": None}, "structure"),
    ({"method": 3}, "method"),
    ({"at": {"shape": [1, 2]}}, "shape"),
    ({"at": {"lr": float("nan")}}, "lr"),
    ({"at": {3: 1}}, "at"),
    ({"at": [1]}, "at"),
    ({"machine": "h200"}, "machine"),
    ({"date": "2026-01-31"}, "date"),
    ({"date": "2026-02-31T09:30:00Z"}, "date"),
    ({"date": "2026-01-31T09:30:00+01:00"}, "date"),
    ({"code": "0123"}, "code"),
    ({"code": "0123456789AB"}, "code"),
    ({"origin": "guessed"}, "origin"),
])
def test_bad_field_is_named(changes, named):
    with pytest.raises(ValueError, match=named):
        replace(ROW, **changes)


@pytest.mark.parametrize("edit, named", [
    (lambda data: data.pop("value"), "no field 'value'"),
    (lambda data: data.update(colour="red"), "unknown field 'colour'"),
    (lambda data: data.update(value=None), "value must be a finite number"),
    (lambda data: data["machine"].pop("name"), "machine has no field 'name'"),
    (lambda data: data["machine"].update(host="x"), "machine has the unknown field 'host'"),
    (lambda data: data["machine"].update(cores=0), "machine.cores"),
    (lambda data: data["machine"].update(device="tpu"), "machine.device"),
    (lambda data: data["machine"].update(name=""), "machine.name"),
    (lambda data: data["machine"].update(torch=2.13), "machine.torch"),
    (lambda data: data.update(machine=3), "machine must be a JSON object"),
])
def test_corrupt_row_is_named_by_file_line_and_field(tmp_path, edit, named):
    data = json.loads(ROW.to_json())
    edit(data)
    path = tmp_path / "m" / "block.jsonl"
    path.parent.mkdir()
    path.write_text(ROW.to_json() + "\n" + json.dumps(data) + "\n")
    with pytest.raises(CorruptRecord, match="block.jsonl:2: .*" + named):
        live(folder=tmp_path)


@pytest.mark.parametrize("garbage", [b"", b"{", b"\xff\xfe", b"3", b"[]", b"{} trailing", b"[" * 100_000, b"\0" * 8])
def test_garbage_in_the_middle_is_refused(tmp_path, garbage):
    path = tmp_path / MACHINE.slug / "block.jsonl"
    path.parent.mkdir()
    path.write_bytes(garbage + b"\n" + ROW.to_json().encode() + b"\n")
    with pytest.raises(CorruptRecord, match="block.jsonl:1"):
        live(folder=tmp_path)
    with pytest.raises(CorruptRecord, match="block.jsonl:1"):
        record(ROW, "block", tmp_path)


def test_now_hashes_the_code_and_dates_the_row():
    made = Measurement.now("time", "s", 3, structure="dense", method="torch", at={}, machine=MACHINE,
                           source="sparsesurvey.structure")
    assert made.low == made.value == made.high == 3.0 and made.code == code_of("sparsesurvey.structure")
    assert not made.stale and replace(made, code="0" * 12).stale
    assert replace(made, source="sparsesurvey.gone").stale


# ---- the file --------------------------------------------------------------------------------------------------------

def test_record_skips_what_is_there(tmp_path):
    assert record(row(1), "block", tmp_path)
    assert not record(row(1), "block", tmp_path)
    assert not record(row(1, value=1.5e-3, date="2026-02-01T00:00:00Z"), "block", tmp_path)
    assert record(row(1, code="f" * 12), "block", tmp_path)
    assert record(row(1, machine=replace(MACHINE, cores=4)), "block", tmp_path)
    assert record(row(1), "nm", tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*.jsonl"))] == [
        "test-processor-2-cores/block.jsonl", "test-processor-2-cores/nm.jsonl", "test-processor-4-cores/block.jsonl"]
    assert len(live("block", tmp_path)) == 3 and len(live(folder=tmp_path)) == 4
    assert all(item.origin == "live" for item in live(folder=tmp_path))


@pytest.mark.parametrize("chapter", ["", "../up", "a/b", "a.b", None])
def test_chapter_is_a_plain_name(tmp_path, chapter):
    with pytest.raises(ValueError, match="chapter"):
        record(ROW, chapter, tmp_path)


def test_live_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSESURVEY_ROWS", str(tmp_path / "env"))
    assert live() == [] and record(ROW, "block") and live() == live("block", "") == [ROW]
    monkeypatch.delenv("SPARSESURVEY_ROWS")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert live() == [] and record(ROW, "block", "")
    assert (tmp_path / "cache" / "sparsesurvey" / "rows" / MACHINE.slug / "block.jsonl").is_file()


def test_truncated_at_every_byte(tmp_path):
    for number in range(3):
        record(row(number), "block", tmp_path / "whole")
    data = (tmp_path / "whole" / MACHINE.slug / "block.jsonl").read_bytes()
    path = tmp_path / "cut" / MACHINE.slug / "block.jsonl"
    path.parent.mkdir(parents=True)
    for size in range(len(data) + 1):
        path.write_bytes(data[:size])
        whole = data[:size].count(b"\n")
        assert [item.at["step"] for item in live(folder=tmp_path / "cut")] == list(range(whole))
        assert record(row(9), "block", tmp_path / "cut")
        assert [item.at["step"] for item in live(folder=tmp_path / "cut")] == [*range(whole), 9]
        assert path.read_bytes() == data[:size][:data[:size].rfind(b"\n") + 1] + row(9).to_json().encode() + b"\n"


def _append_forever(folder: str, first: int) -> None:
    for number in range(first, first + 1_000_000):
        record(row(number), "block", folder)


def test_killed_in_mid_append(tmp_path):
    path = tmp_path / MACHINE.slug / "block.jsonl"
    spawn = multiprocessing.get_context("fork")
    before, torn = 0, random.Random(0)
    for trial in range(12):
        child = spawn.Process(target=_append_forever, args=(str(tmp_path), trial * 1_000_000))
        child.start()
        deadline = time.monotonic() + 20
        while len(live(folder=tmp_path)) <= before and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(torn.uniform(0, 0.02))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        found = live(folder=tmp_path)
        mine = [item.at["step"] for item in found if item.at["step"] >= trial * 1_000_000]
        assert mine == list(range(trial * 1_000_000, trial * 1_000_000 + len(mine)))
        assert len(found) == before + len(mine)
        if trial % 2:  # and as if the kernel had written only a part of the line
            with path.open("ab") as file:
                file.write(row(-1).to_json().encode()[:torn.randrange(1, 300)])
        before = len(found)
    assert before > 0
    assert record(row(-2), "block", tmp_path) and len(live(folder=tmp_path)) == before + 1


def _append_many(folder: str, numbers: list[int]) -> None:
    for number in numbers:
        record(row(number), "block", folder)


def test_several_processes_and_threads_append_at_once(tmp_path):
    spawn = multiprocessing.get_context("fork")
    orders = [random.Random(seed).sample(range(60), 60) for seed in range(3)]
    writers = [spawn.Process(target=_append_many, args=(str(tmp_path), order)) for order in orders]
    for writer in writers:
        writer.start()
    threads = [threading.Thread(target=_append_many, args=(str(tmp_path), order)) for order in orders[:2]]
    for thread in threads:
        thread.start()
    for writer in [*threads, *writers]:
        writer.join()
    assert all(writer.exitcode == 0 for writer in writers)
    assert sorted(item.at["step"] for item in live(folder=tmp_path)) == list(range(60))
    lines = (tmp_path / MACHINE.slug / "block.jsonl").read_text().splitlines()
    assert len(lines) == 60


def test_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    record(row(1), "block", tmp_path)
    path = tmp_path / MACHINE.slug / "block.jsonl"
    data, write = path.read_bytes(), os.write
    monkeypatch.setattr(records.os, "write", lambda handle, line: write(handle, line[:20]))
    with pytest.raises(OSError, match="no room"):
        record(row(2), "block", tmp_path)
    assert path.read_bytes() == data
    monkeypatch.undo()
    assert record(row(2), "block", tmp_path) and len(live(folder=tmp_path)) == 2


def test_thousands_of_rows_are_parsed_once(tmp_path, monkeypatch):
    path = tmp_path / MACHINE.slug / "block.jsonl"
    path.parent.mkdir()
    path.write_text("".join(row(number).to_json() + "\n" for number in range(3000)))
    parsed, parse = [], Measurement.from_json.__func__
    monkeypatch.setattr(Measurement, "from_json",
                        classmethod(lambda cls, *given: parsed.append(1) or parse(cls, *given)))
    assert len(live(folder=tmp_path)) == 3000 and len(parsed) == 3000
    for number in range(3000, 3010):
        assert record(row(number), "block", tmp_path)
    assert len(live(folder=tmp_path)) == 3010 and len(parsed) == 3000
    with path.open("a") as file:  # by another process
        file.write(row(5000).to_json() + "\n")
    assert not record(row(5000), "block", tmp_path) and len(parsed) == 3001


# ---- all rows --------------------------------------------------------------------------------------------------------

def test_rows_filter(tmp_path):
    for item in (row(1), row(2), row(1, metric="speedup", unit="x"), row(1, structure="dense", method="torch")):
        record(item, "test-filter", tmp_path)
    find = lambda **wanted: len(rows("test-filter", folder=tmp_path, **wanted))
    assert find() == 4 and find(metric="time") == 3 and find(step=1) == 3 and find(step=3) == find(tokens=1) == 0
    assert find(structure="dense") == 1 and find(structure=["dense", "block 32x32 50%"], metric=("time",)) == 3
    assert find(structure=Dense()) == 1 and find(method="gather", step=2) == 1


def test_latest_prefers_current_code_then_the_younger():
    now = code_of(ROW.source)
    old, current = row(1, date="2026-03-01T00:00:00Z"), row(1, code=now)
    older = row(1, date="2026-01-01T00:00:00Z", code="f" * 12)
    assert latest([older, current, old]) == [current] and latest([old, older]) == [old]
    assert len(latest([current, replace(old, origin="recorded")])) == 2
    assert len(latest([current, replace(current, origin="recorded")])) == 1


def test_every_recorded_row_is_valid_and_in_its_place():
    folder = Path(records.__file__).parent / "recorded"
    found = recorded()
    assert all(item.origin == "recorded" for item in found)
    lines = 0
    for path in folder.rglob("*.jsonl"):
        data = path.read_bytes()
        assert data.endswith(b"\n") and path.parent.parent == folder, f"{path} is torn or misplaced"
        items = [Measurement.from_json(line) for line in data.splitlines()]
        assert {item.machine.slug for item in items} == {path.parent.name}
        assert len({item.key for item in items}) == len(items)
        lines += len(items)
    assert len(found) == lines
