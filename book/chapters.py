"""The chapters of the book: which ones, what they wait for, what their result depends on, and running them."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import execute

GRACE = 60  # seconds that a chapter gets to end its kernel after its limit, before it is killed


class BookError(Exception):
    """The book cannot be built; the message says what to mend."""


@dataclass(frozen=True)
class Chapter:
    """A notebook in the table of contents.

    ``after`` names the chapters whose rows it shows, or is ``("all",)``. One that is ``alone`` uses every core itself, so
    that nothing is executed beside it.
    """

    page: str
    source: Path
    after: tuple[str, ...] = ()
    alone: bool = False
    defaults: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def name(self) -> str:
        return Path(self.page).name


@dataclass
class Outcome:
    """What happened to a chapter: ``report`` as execute.py gives it, or ``error``."""

    chapter: Chapter
    cached: bool = False
    report: dict[str, Any] = field(default_factory=dict)
    error: str = ""


def pages(root: Path) -> list[str]:
    """The pages of ``_toc.yml`` in reading order, without suffix; BookError if one has no file."""
    from sphinx_external_toc.parsing import MalformedError, parse_toc_yaml

    try:
        site = parse_toc_yaml(root / "_toc.yml")
    except (OSError, MalformedError) as error:
        raise BookError(f"_toc.yml: {error}")
    if site.globs():
        raise BookError("_toc.yml: name each file; a glob has no reading order")
    found, todo = [], [site.root.docname]
    while todo:
        page = todo.pop(0)
        if not any((root / f"{page}{suffix}").is_file() for suffix in (".md", ".ipynb")):
            raise BookError(f"_toc.yml names {page}, but there is no {page}.md and no {page}.ipynb")
        found.append(page)
        todo = [item for tree in site[page].subtrees for item in tree.items if item in site] + todo
    return found


def chapters(root: Path) -> list[Chapter]:
    """The notebooks of the table of contents, in reading order."""
    found = []
    for page in pages(root):
        source = root / f"{page}.ipynb"
        if source.is_file():
            after, alone = _wishes(source)
            found.append(Chapter(page, source, after, alone, execute.defaults(source)))
    _check_order(found)
    return found


def _wishes(source: Path) -> tuple[tuple[str, ...], bool]:
    """What a notebook says about its execution: ``after`` and ``alone`` of a ``Chapter``."""
    try:
        wishes = json.loads(source.read_text(encoding="utf-8"))["metadata"].get("sparsesurvey", {})
        after, alone = wishes.get("after", ()), wishes.get("alone", False)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BookError(f"{source.name} is no notebook: {error!r}")
    if not isinstance(alone, bool):
        raise BookError(f"{source.name}: alone must be true or false, got {alone!r}")
    return (after,) if isinstance(after, str) else tuple(after), alone


def _check_order(found: list[Chapter]) -> None:
    names = {chapter.name for chapter in found}
    if len(names) < len(found):
        raise BookError("_toc.yml: two notebooks of the same name; rows and pages share one stem")
    for chapter in found:
        unknown = set(chapter.after) - names - {"all"}
        if unknown:
            raise BookError(f"{chapter.name} is to run after {', '.join(sorted(unknown))}: no such chapter")
    done: set[str] = set()
    while len(done) < len(found):
        ready = {chapter.name for chapter in found if waits_for(chapter, found) <= done} - done
        if not ready:
            raise BookError(f"these chapters wait for each other: {', '.join(sorted(names - done))}")
        done |= ready


def waits_for(chapter: Chapter, every: list[Chapter]) -> set[str]:
    """The names of the chapters that must be done before this one starts."""
    if "all" in chapter.after:
        return {other.name for other in every if "all" not in other.after}
    return set(chapter.after)


def digest(files: list[Path], root: Path) -> str:
    """Hash of the names and contents of files."""
    total = hashlib.sha256()
    for path in sorted(files):
        total.update(f"{path.relative_to(root)}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


def foundation(root: Path) -> str:
    """Hash of what every chapter depends on: library, recorded rows, lock, installed versions, Python, this driver."""
    package = (root / "sparsesurvey").rglob("*")
    library = [path for path in package if path.is_file() and "__pycache__" not in path.parts]
    locks = [path for name in ("pyproject.toml", "constraints.txt") if (path := root / name).is_file()]
    installed = sorted(f"{dist.name}=={dist.version}" for dist in metadata.distributions())
    here = [platform.python_version(), platform.machine(), str(os.cpu_count()), *installed]
    driver = Path(execute.__file__).parent
    runner = digest([driver / "execute.py", driver / "pictures.py"], driver)
    return hashlib.sha256("\n".join([digest(library + locks, root), runner, *here]).encode()).hexdigest()


def key(chapter: Chapter, parameters: dict[str, Any], base: str, rows: Path, waited: list[str]) -> str:
    """Hash of everything that the executed chapter depends on.

    ``waited`` are the keys of the chapters that it waits for. One after all also depends on the live rows of the
    others; one after some does not, because chapters that run beside it may still add to them.
    """
    everywhere = rows.rglob("*.jsonl") if "all" in chapter.after else ()
    seen = digest([path for path in everywhere if path.stem != chapter.name], rows)
    own = hashlib.sha256(chapter.source.read_bytes()).hexdigest()
    parts = [own, json.dumps(parameters, sort_keys=True), base, seen, *waited]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def finished(target: Path, wanted: str) -> dict[str, Any] | None:
    """The report inside the executed notebook at ``target``, if it was executed under this key."""
    try:
        report = json.loads(target.read_text(encoding="utf-8"))["metadata"]["sparsesurvey"]["build"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return report if report.get("key") == wanted else None


@dataclass
class Runner:
    """Executes chapters, ``jobs`` at a time, into ``build/stage``; what is unchanged is not executed again."""

    root: Path
    build: Path
    parameters: dict[str, Any]
    jobs: int = 2
    limit: float = 1800
    running: dict[str, tuple[Chapter, subprocess.Popen, float]] = field(default_factory=dict)

    @property
    def rows(self) -> Path:
        return self.build / "rows"

    def environment(self) -> dict[str, str]:
        """What a chapter's kernel sees: paths only here, so that none enters a notebook; no progress bars."""
        threads = str(self.parameters.get("threads", 1))
        quiet = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
        ours = {"SPARSESURVEY_ROWS": str(self.rows), "SPARSESURVEY_RUNS": str(self.build / "runs")}
        one = {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
        return {**os.environ, **quiet, **ours, **one, "IPYTHONDIR": str(self.build / "ipython")}

    def private(self) -> list[str]:
        """Texts that no page may show: where the repository, the environment and the user's home are."""
        places = {self.root, self.build, Path(sys.prefix), Path.home()}
        return sorted(f"{place}/" for place in places if len(place.parts) > 1)

    def given(self, chapter: Chapter) -> dict[str, Any]:
        """A chapter is only given the parameters that it has."""
        return {name: value for name, value in self.parameters.items() if name in chapter.defaults}

    def job(self, chapter: Chapter, wanted: str) -> dict[str, Any]:
        """What execute.py reads."""
        return {
            "source": str(chapter.source),
            "target": str(self.target(chapter)),
            "scratch": str(self.build / "work" / chapter.name),
            "parameters": self.given(chapter),
            "limit": self.limit,
            "key": wanted,
            "private": self.private(),
        }

    def target(self, chapter: Chapter) -> Path:
        return self.build / "stage" / f"{chapter.page}.ipynb"

    def start(self, chapter: Chapter, wanted: str) -> None:
        folder = self.build / "work" / chapter.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "job.json").write_text(json.dumps(self.job(chapter, wanted)), encoding="utf-8")
        print(f"{chapter.name}: executing", flush=True)
        command = [sys.executable, execute.__file__, "job.json"]
        with (folder / "log.txt").open("wb") as log, (folder / "report.txt").open("wb") as out:
            process = subprocess.Popen(  # a session of its own: Ctrl-C reaches the driver, which ends it in order
                command, stdout=out, stderr=log, env=self.environment(), cwd=folder, start_new_session=True
            )
        self.running[chapter.name] = (chapter, process, time.monotonic())

    def end(self, name: str) -> Outcome:
        """Read the report of a process that has ended."""
        chapter, process, begun = self.running.pop(name)
        folder = self.build / "work" / name
        try:
            report = json.loads((folder / "report.txt").read_text(encoding="utf-8").splitlines()[-1])
        except (ValueError, IndexError):
            tail = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            late = f" after the limit of {self.limit:g} s" if time.monotonic() - begun > self.limit else ""
            report = {"error": f"ended with code {process.returncode} and no report{late}: {' '.join(tail)}"}
        error = report.pop("error", "")
        seconds = time.monotonic() - begun
        print(f"{name}: {'failed' if error else 'executed'} after {seconds:.1f} s", flush=True)
        return Outcome(chapter, report=report, error=error)

    def stop(self, names: list[str]) -> None:
        """End chapters that are still running, with their kernels and whatever those started."""
        alive = [self.running[name][1] for name in names if self.running[name][1].poll() is None]
        family = [child for process in alive for child in execute.descendants(process.pid)]
        for process in alive:
            process.terminate()
        deadline = time.monotonic() + 10
        while any(process.poll() is None for process in alive) and time.monotonic() < deadline:
            time.sleep(0.1)
        execute.kill(family)
        for process in alive:
            process.kill()
            process.wait()

    def all(self, every: list[Chapter]) -> list[Outcome]:
        """Bring every chapter up to date; failures do not stop the others, only those that wait for them."""
        base, outcomes = foundation(self.root), {}
        try:
            while len(outcomes) < len(every):
                self._begin(every, outcomes, base)
                for name, (chapter, process, begun) in list(self.running.items()):
                    if process.poll() is None and time.monotonic() - begun > self.limit + GRACE:
                        self.stop([name])
                    if process.poll() is not None:
                        outcomes[name] = self.end(name)
                if self.running:
                    time.sleep(0.1)
        finally:
            self.stop(list(self.running))
        return [outcomes[chapter.name] for chapter in every]

    def _begin(self, every: list[Chapter], outcomes: dict[str, Outcome], base: str) -> None:
        """Settle the chapters that are cached or cannot run, and start as many others as there is room for.

        Those that run alone come first: others would have to end before they start.
        """
        for chapter in sorted(every, key=lambda chapter: not chapter.alone):
            waits = waits_for(chapter, every)
            if chapter.name in outcomes or chapter.name in self.running or not waits <= set(outcomes):
                continue
            failed = sorted(name for name in waits if outcomes[name].error)
            if failed:
                outcomes[chapter.name] = Outcome(chapter, error=f"not executed: waits for {', '.join(failed)}")
                continue
            waited = [outcomes[name].report["key"] for name in sorted(waits)]
            wanted = key(chapter, self.given(chapter), base, self.rows, waited)
            report = finished(self.target(chapter), wanted)
            if report:
                outcomes[chapter.name] = Outcome(chapter, cached=True, report=report)
            elif self._room(chapter):
                self.start(chapter, wanted)
            elif chapter.alone:
                return  # nothing else is started until it has the machine for itself

    def _room(self, chapter: Chapter) -> bool:
        """May it start beside those that run now?"""
        alone = chapter.alone or any(other.alone for other, *_ in self.running.values())
        return not self.running if alone else len(self.running) < self.jobs

