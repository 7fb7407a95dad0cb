"""What the build says about itself: the status page, and the line on the front page."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from chapters import BookError, Outcome

MARK = "<!-- state of the build -->"
TOOLS = ("torch", "transformers", "numpy", "scipy", "papermill", "jupyter-book", "sphinx", "anywidget")


def pages(root: Path, device: str, parameters: dict[str, Any], outcomes: list[Outcome]) -> dict[str, str]:
    """The text of each page that the build writes: ``{path in the repository: text}``."""
    from sparsesurvey.measure import CorruptRecord, Machine

    try:
        machine, rows = Machine.current(device), rows_by_chapter(root)
    except (CorruptRecord, ValueError) as error:
        raise BookError(str(error))
    now = f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC"
    line = f"Built {now} from commit {commit_of(root)} on {machine}, with Python {machine.python}"
    line += f" and torch {machine.torch}"
    texts = {
        "book/index.md": f"{line}: {in_words(rows)}. [What was measured, where and when](status.md).",
        "book/status.md": status(line, machine, parameters, outcomes, rows),
    }
    here = {name: root / name for name in texts if (root / name).is_file()}
    return {name: path.read_text(encoding="utf-8").replace(MARK, texts[name]) for name, path in here.items()}


def rows_by_chapter(root: Path) -> dict[str, list[Any]]:
    """The latest rows of each chapter that has any, measured here or recorded elsewhere."""
    from sparsesurvey.measure import latest, live, recorded

    folders = Path(os.environ["SPARSESURVEY_ROWS"]), root / "sparsesurvey" / "recorded"
    names = sorted({path.stem for folder in folders for path in folder.rglob("*.jsonl")})
    found = {name: latest([*live(name), *recorded(name)]) for name in names}
    return {name: rows for name, rows in found.items() if rows}


def commit_of(root: Path) -> str:
    """The commit of the sources, in code quotes, and whether tracked files were edited."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "--short=10", "HEAD")
        edited = git("status", "--porcelain", "--untracked-files=no")
    except OSError:  # no git here
        commit = edited = ""
    return f"`{commit}`{' with uncommitted edits' if edited else ''}" if commit else "unknown"


def in_words(found: dict[str, list[Any]]) -> str:
    """How many numbers were measured by this build's machine and how many came with the book."""
    rows = [row for group in found.values() for row in group]
    here = sum(row.origin == "live" for row in rows)
    stale = sum(row.stale for row in rows)
    text = f"{here} numbers measured here, {len(rows) - here} recorded elsewhere"
    return f"{text}, {stale} of them with code that has changed since" if stale else text


def table(heads: Iterable[str], lines: Iterable[Iterable[Any]]) -> str:
    """A Markdown table."""
    heads = list(heads)
    shown = [heads, ["---"] * len(heads), *lines]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in shown)


def status(line: str, machine: Any, parameters: dict[str, Any], outcomes: list[Outcome],
           rows: dict[str, list[Any]]) -> str:
    """The status page below its title."""
    chosen = ", ".join(f"`{name} = {value!r}`" for name, value in parameters.items())
    return "\n\n".join([
        f"{line}. Parameters of the chapters: {chosen}.",
        "## Chapters",
        table(("chapter", "seconds", "largest process", "executed", "in this build"), map(chapter_line, outcomes)),
        "Seconds and memory are of the whole chapter, start of its kernel included. An unchanged chapter is not "
        "executed again: neither the notebook nor its parameters, the library, the recorded rows, an installed version "
        "or a chapter that it waits for changed.",
        "## Numbers",
        table(("chapter", "measured here", "recorded", "stale", "machines", "dates"), row_lines(rows)),
        "A row is stale when the code that it measured has changed since. Rows measured here are kept between builds "
        "and measured again when that code changes, or after `make clean`.",
        "## Machine and versions",
        table(("what", "value"), machine_lines(machine)),
    ])


def chapter_line(outcome: Outcome) -> list[str]:
    name, report = outcome.chapter.name, outcome.report
    peak = f"{report['peak_mib'] / 1024:.1f} GiB"
    when = "unchanged" if outcome.cached else "executed"
    link = f"[{name}](../{outcome.chapter.page}.ipynb)"
    return [link, f"{report['seconds']:.1f}", peak, moment(report["executed"]), when]


def moment(date: str) -> str:
    """``2026-11-22T03:21:09+00:00`` as ``2026-11-22 03:21``."""
    return date[:16].replace("T", " ")


def row_lines(found: dict[str, list[Any]]) -> list[list[str]]:
    """One line per chapter that has rows."""
    lines = []
    for chapter, group in found.items():
        here, stale = sum(row.origin == "live" for row in group), sum(row.stale for row in group)
        machines = "; ".join(sorted({str(row.machine) for row in group}))
        days = sorted(row.date[:10] for row in group)
        dates = days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"
        lines.append([chapter, str(here), str(len(group) - here), str(stale), machines, dates])
    return lines or [["none yet", "0", "0", "0", "", ""]]


def machine_lines(machine: Any) -> list[list[str]]:
    """What the machine is and which versions ran, without what does not apply to it or is said above."""
    told = {"commit", "threads", "memory_gib"}
    shown = {name: value for name, value in machine.to_dict().items() if name not in told and value != ""}
    shown["memory"] = f"{machine.memory_gib} GiB"
    shown |= {name: version(name) for name in TOOLS}
    return [[name, str(value)] for name, value in shown.items()]
