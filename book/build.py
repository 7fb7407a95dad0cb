"""Build the book: execute each chapter of _toc.yml into _build/stage, then let jupyter-book render that tree.

    python book/build.py --device cpu --preset default --threads 1

`make book` calls this. The repository itself is only read. What fails a build: an error, a time-out or an unknown
parameter in a chapter, an output that must not be published (see execute.py), any warning of Sphinx, a page that is
in the table of contents and was not written.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

import status
from chapters import BookError, Chapter, Outcome, Runner, chapters, digest, pages
from execute import ChapterError

REPOSITORY = Path(__file__).resolve().parent.parent
LIMITS = {"quick": 600, "default": 1800, "full": 24 * 3600}  # seconds for one chapter
SKIP = {"__pycache__", ".ipynb_checkpoints", ".DS_Store"}


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Execute the chapters and build the book.")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:<number> (default cpu)")
    parser.add_argument("--preset", default="default", choices=tuple(LIMITS), help="how much each chapter does")
    parser.add_argument("--threads", type=int, default=1, help="threads of each chapter (default 1)")
    parser.add_argument("--jobs", type=int, help="chapters at a time (default 2 on a CPU with room for them, else 1)")
    parser.add_argument("--timeout", type=float, help="seconds for one chapter (default by preset: %s)" % LIMITS)
    parser.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
                        help="another papermill parameter for the chapters that have it")
    parser.add_argument("--root", type=Path, default=REPOSITORY, help="folder of _toc.yml (default this repository)")
    parser.add_argument("--output", type=Path, help="folder in which _build appears (default the root)")
    options = parser.parse_args(words)
    if not re.fullmatch(r"cpu|cuda(:\d+)?", options.device):
        parser.error(f"--device must be cpu, cuda or cuda:<number>, got {options.device}")
    for name in ("threads", "jobs", "timeout"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    return options


def check_device(device: str) -> None:
    """BookError if there is no such GPU, before every chapter says so."""
    if device != "cpu":
        from sparsesurvey.measure import check_device as check

        try:
            check(device)
        except ValueError as error:
            raise BookError(str(error))


def parameters(options: argparse.Namespace, every: list[Chapter]) -> dict[str, Any]:
    """The papermill parameters of this build; BookError for one that no chapter has."""
    chosen = {"device": options.device, "preset": options.preset, "threads": options.threads}
    for name, value in options.parameter:
        if not any(name in chapter.defaults for chapter in every):
            raise BookError(f"unknown parameter {name!r}: no chapter has it")
        try:
            chosen[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            chosen[name] = value
    return chosen


def jobs(options: argparse.Namespace) -> int:
    """Two chapters at a time where that does not disturb the measurements: not on one GPU, not beyond the cores."""
    if options.jobs:
        return options.jobs
    return max(1, min(2, (os.cpu_count() or 1) // options.threads)) if options.device == "cpu" else 1


def keep(target: Path, data: bytes) -> None:
    """Write a file of the stage unless it already has this content: Sphinx reads again what has a new time."""
    if target.is_file() and target.read_bytes() == data:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)


def sources(root: Path, toc: list[str]) -> set[Path]:
    """The files of the stage that are copied: everything in book/ and notebooks/ but notebooks and this driver."""
    found = {Path("_toc.yml")} | {Path(f"{page}.md") for page in toc if (root / f"{page}.md").is_file()}
    for folder in ("book", "notebooks"):
        for path in (root / folder).rglob("*"):
            name = path.relative_to(root)
            driver = name.suffix == ".py" and name.parent == Path("book")
            hidden = any(part in SKIP or part.startswith(".") for part in name.parts)
            if path.is_file() and not (driver or hidden or name.suffix == ".ipynb"):
                found.add(name)
    return found


def stage(root: Path, target: Path, toc: list[str], written: dict[str, str]) -> None:
    """Mirror the book's sources in ``target`` beside the executed notebooks; ``written`` replaces some of them."""
    copied = sources(root, toc)
    for name in copied:
        keep(target / name, written.get(str(name), "").encode() or (root / name).read_bytes())
    config = yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8"))
    config.setdefault("execute", {})["execute_notebooks"] = "off"
    keep(target / "_config.yml", yaml.safe_dump(config, sort_keys=False).encode())
    wanted = copied | {Path("_config.yml")} | {Path(f"{page}.ipynb") for page in toc}
    for path in target.rglob("*"):
        if path.is_file() and path.relative_to(target) not in wanted:
            path.unlink()


def render(build: Path, toc: list[str]) -> None:
    """Run jupyter-book on the stage. Sphinx reads only what changed, unless that could hide a warning.

    It warns about a page when it reads it, so after a build that failed, or one with another table of contents or
    configuration, everything is read again.
    """
    staged, html, mark = build / "stage", build / "html", build / "rendered.txt"
    common = [path for path in staged.rglob("*") if path.suffix in (".py", ".yml", ".bib") and path.is_file()]
    common += [path for path in staged.rglob("vendor/*") if path.is_file()]
    tools = [f"{name}=={version(name)}" for name in ("jupyter-book", "sphinx", "myst-nb", "sphinx-book-theme")]
    wanted = hashlib.sha256("\n".join([digest(common, staged), *tools, *toc]).encode()).hexdigest()
    if not mark.is_file() or mark.read_text() != wanted:
        shutil.rmtree(build / ".doctrees", ignore_errors=True)
        shutil.rmtree(html, ignore_errors=True)
    mark.unlink(missing_ok=True)
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build", str(staged)]
    options = ["--quiet", "--path-output", str(build.parent), "-W", "--keep-going", "-n"]
    code = subprocess.run([*command, *options]).returncode
    if code:
        raise BookError(f"jupyter-book ended with code {code}; its warnings are above")
    absent = [f"{page}.html" for page in toc if not (html / f"{page}.html").is_file()]
    if absent or not (html / "index.html").is_file():
        raise BookError(f"jupyter-book wrote no {', '.join(absent) or 'index.html'}")
    mark.write_text(wanted)


def table(outcomes: list[Outcome]) -> str:
    """One line per chapter: what happened and how long it took."""
    width = max([len(outcome.chapter.name) for outcome in outcomes] + [7])
    lines = [f"{'chapter':{width}}  seconds  peak MiB  this build"]
    for outcome in outcomes:
        word = "failed" if outcome.error else "unchanged" if outcome.cached else "executed"
        seconds, peak = outcome.report.get("seconds", ""), outcome.report.get("peak_mib", "")
        lines.append(f"{outcome.chapter.name:{width}}  {seconds:>7}  {peak:>8}  {word}")
    return "\n".join(lines)


def build(options: argparse.Namespace) -> Path:
    """Build the book and return its first page; BookError says what is wrong."""
    root, start = options.root.resolve(), time.monotonic()
    check_device(options.device)
    folder = (options.output or root).resolve() / "_build"
    toc, every = pages(root), chapters(root)
    limit = options.timeout or LIMITS[options.preset]
    runner = Runner(root, folder, parameters(options, every), jobs(options), limit)
    runner.rows.mkdir(parents=True, exist_ok=True)
    outcomes = runner.all(every)
    executed = time.monotonic()
    print(table(outcomes), flush=True)
    failed = [f"{outcome.chapter.name}: {outcome.error}" for outcome in outcomes if outcome.error]
    if failed:
        raise BookError("\n".join(failed))
    os.environ["SPARSESURVEY_ROWS"] = str(runner.rows)
    stage(root, folder / "stage", toc, status.pages(root, options.device, runner.parameters, outcomes))
    render(folder, toc)
    done = time.monotonic()
    print(f"chapters {executed - start:.1f} s, pages {done - executed:.1f} s", flush=True)
    return folder / "html" / "index.html"


def main(words: list[str] | None = None) -> int:
    options = arguments(words)
    try:
        print(f"The book: {build(options)}")
    except (BookError, ChapterError) as error:
        print(f"The book was not built.\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("The book was not built: interrupted.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the chapters as Ctrl-C does
    sys.exit(main())
