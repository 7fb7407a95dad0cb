"""Rows: one number each with everything needed to doubt it, kept as JSON lines ``<folder>/<machine>/<chapter>.jsonl``.

A row is appended as it is measured and never edited. Two places hold rows: the live folder (``live``, this reader's
machine) and the package (``recorded``, machines elsewhere). A row's fields are exactly those of ``Measurement``: a
row with a field that this version does not know is refused, never half read; a later version may add a field if it
gives it a default, and then still reads these rows.
"""

import fcntl
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime, timezone
from functools import cached_property
from importlib.resources import as_file, files
from pathlib import Path
from typing import NamedTuple

from sparsesurvey.machine import Machine, check_fields
from sparsesurvey.source import code_of

Scalar = str | int | float | bool | None


class CorruptRecord(ValueError):
    """A line of a record is no valid row; the message says file, line, field, what it is and what is allowed."""


@dataclass(frozen=True)
class Measurement:
    """One number. ``low`` and ``high`` are its 20th and 80th percentile where it has a spread (of a few
    values the least and the most), else equal to it.

    Units: ``s``, ``x`` (ratio to dense), ``FLOP/s``, ``B/s``, ``B``, ``fraction``, ``1``, or the field's own, such as
    ``nats/token``. Treat ``at`` as read-only.
    """

    metric: str  # "time", "speedup", "validation loss" ...
    unit: str
    value: float
    low: float
    high: float
    structure: str  # str(structure)
    method: str  # kernel, pruner or recipe
    at: Mapping[str, Scalar] = field(hash=False)  # shape, tokens, dtype, step ...
    machine: Machine
    date: str  # UTC, "2026-01-31T09:30:00Z"
    source: str  # dotted modules whose code was measured, comma separated
    code: str  # code_of(source) at that time, for the machine's device
    origin: str = field(default="live", compare=False)  # "live" or "recorded": where it was read, not stored

    def __post_init__(self) -> None:
        for name in ("metric", "unit", "structure", "method", "source"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f"{name} must be text that is not empty, got {value!r}")
        for name in ("value", "low", "high"):
            object.__setattr__(self, name, _finite(name, getattr(self, name)))
        if not self.low <= self.value <= self.high:
            raise ValueError(f"low <= value <= high must hold, got {self.low}, {self.value}, {self.high}")
        object.__setattr__(self, "at", _settings(self.at))
        if not isinstance(self.machine, Machine):
            raise ValueError(f"machine must be a Machine, got {type(self.machine).__name__}")
        if not isinstance(self.date, str) or not _is_utc(self.date):
            raise ValueError(f"date must be UTC like 2026-01-31T09:30:00Z, got {self.date!r}")
        if not isinstance(self.code, str) or not re.fullmatch("[0-9a-f]{12}", self.code):
            raise ValueError(f"code must be 12 hexadecimal digits, got {self.code!r}")
        if self.origin not in ("live", "recorded"):
            raise ValueError(f"origin must be live or recorded, got {self.origin!r}")

    @classmethod
    def now(cls, metric: str, unit: str, value: float, *, structure: object, method: str, at: Mapping[str, Scalar],
            source: str, low: float | None = None, high: float | None = None, machine: Machine | None = None,
            code: str = "") -> "Measurement":
        """A number measured now, here, on the code as it is (give ``code`` if it was hashed before a long run)."""
        machine = machine or Machine.current()
        return cls(metric, unit, value, value if low is None else low, value if high is None else high,
                   str(structure), method, at, machine, utc_now(), source, code or code_of(source, device=machine.device))

    @cached_property
    def subject(self) -> tuple:
        """What was measured where, whatever the state of the code."""
        return (self.metric, self.structure, self.method, tuple(sorted(self.at.items())), self.machine.slug)

    @cached_property
    def key(self) -> tuple:
        """What a rerun skips when it is already recorded."""
        return (*self.subject, self.code)

    @property
    def stale(self) -> bool:
        """Whether the measured code has changed since, or is gone."""
        try:
            return self.code != code_of(self.source, device=self.machine.device)
        except ValueError:
            return True

    def to_json(self) -> str:
        """One line, ASCII, without the line end."""
        data = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "origin"}
        return json.dumps({**data, "machine": self.machine.to_dict()}, allow_nan=False)

    @classmethod
    def from_json(cls, line: str | bytes, origin: str = "live", where: str = "row") -> "Measurement":
        """Inverse of ``to_json``; CorruptRecord starts with ``where`` and names the field."""
        try:
            data = json.loads(line if isinstance(line, str) else line.decode())
            check_fields(data, {item.name for item in fields(cls)} - {"origin"}, "the row")
            return cls(**{**data, "machine": Machine.from_dict(data["machine"])}, origin=origin)
        except (ValueError, RecursionError) as error:
            raise CorruptRecord(f"{where}: {error}") from None


def utc_now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def record(row: Measurement, chapter: str, folder: str | Path | None = None) -> bool:
    """Append a row to ``<folder>/<machine>/<chapter>.jsonl``; False if a row with its key is already there.

    ``folder`` empty or None is the live folder. Safe with several processes and threads at once. A process killed at
    any moment leaves whole lines and at most one torn last line, which readers ignore and the next append cuts off.
    OSError when the disk is full leaves the file as it was.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w-]*", chapter or ""):
        raise ValueError(f"chapter must be letters, digits, - and _, got {chapter!r}")
    path = live_folder(folder) / row.machine.slug / f"{chapter}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)  # of this open file, so it holds between threads too; closing releases it
        index = _index(path)
        if row.key in index.keys:
            return False
        os.ftruncate(handle, index.whole)  # cuts off the torn line of a process that was killed
        line = row.to_json().encode()
        try:
            if os.write(handle, line + b"\n") != len(line) + 1:
                raise OSError(f"no room to append a row to {path}")
            os.fsync(handle)
        except OSError:
            os.ftruncate(handle, index.whole)
            raise
        if index.whole == 0:
            _sync(path.parent, path.parent.parent)
        index.rows[line] = row  # what is known of the file grows with it; nobody else appends under the lock
        index.keys.add(row.key)
        _INDEXES[path, "live"] = index._replace(stamp=_stamp(path), whole=index.whole + len(line) + 1)
        return True
    finally:
        os.close(handle)


def live_folder(folder: str | Path | None = None) -> Path:
    """``folder``, or if it is empty or None ``$SPARSESURVEY_ROWS``, or ``sparsesurvey/rows`` in the user's cache."""
    if folder:
        return Path(folder)
    if os.environ.get("SPARSESURVEY_ROWS"):
        return Path(os.environ["SPARSESURVEY_ROWS"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsesurvey" / "rows"


def live(chapter: str | None = None, folder: str | Path | None = None) -> list[Measurement]:
    """Every row of the live folder (see ``live_folder``), of one chapter if given; none if there is no folder."""
    return _folder_rows(live_folder(folder), chapter, "live")


def recorded(chapter: str | None = None) -> list[Measurement]:
    """Every row that ships with the package: measured elsewhere, named by machine and date."""
    with as_file(files("sparsesurvey") / "recorded") as folder:
        return _folder_rows(folder, chapter, "recorded")


def rows(chapter: str | None = None, *, metric: object = None, structure: object = None, method: object = None,
         folder: str | Path | None = None, **at: Scalar) -> list[Measurement]:
    """Live and recorded rows, each the latest of its subject, filtered: ``rows("block", metric="time", tokens=512)``.

    ``metric``, ``structure`` and ``method`` take a value (a structure as an object or its notation) or a collection
    of them; further keywords are settings that ``at`` must have. ``folder`` replaces the live folder.
    """
    found = latest([*live(chapter, folder), *recorded(chapter)])
    wanted = {"metric": metric, "structure": structure, "method": method}
    return [row for row in found
            if all(choice is None or getattr(row, name) in _texts(choice) for name, choice in wanted.items())
            and all(name in row.at and row.at[name] == value for name, value in at.items())]


def latest(rows: Iterable[Measurement]) -> list[Measurement]:
    """Of the rows of each subject and origin, the one whose code is current, else the youngest; in their order."""
    best: dict[tuple, Measurement] = {}
    for row in rows:
        other = best.get((row.subject, row.origin))
        if other is None or (not row.stale, row.date) >= (not other.stale, other.date):
            best[row.subject, row.origin] = row
    return list(dict.fromkeys(best.values()))  # a live folder that is the package's shows its rows once


class _Index(NamedTuple):
    """What is known of one file; built again when the file is no longer the one of ``stamp``."""

    stamp: tuple[int, ...]
    rows: dict[bytes, Measurement]  # by the line that each was read from
    keys: set[tuple]
    whole: int  # bytes up to the end of the last whole line


_INDEXES: dict[tuple[Path, str], _Index] = {}


def _stamp(path: Path) -> tuple[int, ...]:
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _index(path: Path, origin: str = "live") -> _Index:
    """The rows of one file. Only lines not seen before are parsed, so that following a growing file is quick."""
    stamp = _stamp(path)
    known = _INDEXES.get((path, origin))
    if known is None or known.stamp != stamp:
        seen = known.rows if known else {}
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1  # behind it, a line whose writer was killed
        parsed = {line: seen.get(line) or Measurement.from_json(line, origin, f"{path}:{number}")
                  for number, line in enumerate(data[:whole].split(b"\n")[:-1], start=1)}
        known = _Index(stamp, parsed, {row.key for row in parsed.values()}, whole)
        _INDEXES[path, origin] = known
    return known


def _folder_rows(folder: Path, chapter: str | None, origin: str) -> list[Measurement]:
    paths = sorted(folder.glob(f"*/{chapter or '*'}.jsonl"))
    return [row for path in paths for row in _index(path, origin).rows.values()]


def _sync(*folders: Path) -> None:
    """A new file is safe only when the folders that name it are."""
    for folder in folders:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _texts(choice: object) -> set[str]:
    return {str(item) for item in choice} if isinstance(choice, (list, tuple, set, frozenset)) else {str(choice)}


def _finite(name: str, value: object) -> float:
    try:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except OverflowError:
        pass
    raise ValueError(f"{name} must be a finite number, got {value!r}")


def _settings(at: object) -> dict[str, Scalar]:
    if not isinstance(at, Mapping):
        raise ValueError(f"at must be a mapping of settings, got {type(at).__name__}")
    for name, value in at.items():
        if not isinstance(name, str) or not name:
            raise ValueError(f"at must have names of text, got {name!r}")
        if not isinstance(value, Scalar) or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"at[{name!r}] must be text, a finite number, true, false or null, got {value!r}")
    return dict(at)


def _is_utc(date: str) -> bool:
    try:
        return datetime.strptime(date, "%Y-%m-%dT%H:%M:%SZ").strftime("%Y-%m-%dT%H:%M:%SZ") == date
    except ValueError:
        return False
