"""Training and pruning experiments as rows: what a chapter asks for, trained if it is not recorded yet.

A run is one structure and one seed. Its checkpoints are kept in a folder named by everything that its numbers depend
on, the code included, so that an interrupted notebook goes on where it stopped, and a chapter that prunes finds the
model that another one trained. A lock per run keeps two notebooks from training the same one.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import MistralConfig

from sparsesurvey import checkpoint, parallel, pruning
from sparsesurvey.causal import without_mask
from sparsesurvey.compressed import KERNEL, compress_layers
from sparsesurvey.data import Language, markov, windows
from sparsesurvey.diagnose import DIVERGENCE, EXPLORED, FLIPS
from sparsesurvey.factored import factorise
from sparsesurvey.initial import OURS, WAYS, initialise
from sparsesurvey.linear import densify, sparsify
from sparsesurvey.measure import Machine, Measurement, code_of, live
from sparsesurvey.measure import record as write_row
from sparsesurvey.measure import recorded as shipped
from sparsesurvey.mistral import build
from sparsesurvey.packed import has_all_three, pack_layers
from sparsesurvey.recipe import Recipe, Score, spelled
from sparsesurvey.recipes.static import Static
from sparsesurvey.scores import magnitude
from sparsesurvey.structure import Pattern, Structure
from sparsesurvey.train import ENERGY, FREE, NORM, TIME, History, TrainConfig, evaluate, train

CHAPTER = "training"
LOOK = 5.0  # seconds between two looks at the runs under way
FUSED = " fused"  # behind the name of a kernel
LOSS = "validation loss"
UNITS = {TIME: "s", NORM: "1", ENERGY: "J", FLIPS: "1", DIVERGENCE: "1", EXPLORED: "1"}
# The structures are not among the code whose change makes a curve stale: what a mask of theirs is, is fixed by
# ``holds`` and its tests, and another kernel or a new helper does not change the loss of a masked run. A structure without
# a mask is: what it stores and what it makes of that is what is trained.
SOURCE = ",".join(f"sparsesurvey.{module}" for module in ("data", "linear", "mistral", "recipe", "train"))


@dataclass(frozen=True)
class Job:
    """One run: what is trained, on what, how. ``structure`` None is the plain dense model, as is one named "dense".

    The model has the vocabulary of the language. A structure without a mask is trained by the values that
    it stores, see ``factored``; its recipe must be ``Static()``.
    ``kernel`` is "masked", dense products with a mask, or one of the structure's kernels, see ``packed`` and for 2:4 masks that
    move ``compressed``; with " fused" behind
    its name gate, up and activation are one kernel, and gate and up have one mask, see ``mlp``.
    ``initial`` is how its first weights are drawn, see ``initial.initialise``.
    """

    structure: Structure | None
    seed: int  # of the weights, the mask and the order of the data
    language: Language
    model: str | MistralConfig = field(hash=False)  # by name, or one of your own
    config: TrainConfig
    recipe: Recipe
    kernel: str = "masked"
    chapter: str = CHAPTER  # in whose record its rows are
    code: str = ""  # of ``source``, before anything runs
    initial: str = OURS

    def __post_init__(self) -> None:
        if self.initial not in WAYS:
            raise ValueError(f"initial must be one of {', '.join(WAYS)}, got {self.initial!r}")
        device = str(self.config.device).partition(":")[0]
        object.__setattr__(self, "code", self.code or code_of(self.source, device=device))

    @property
    def dense(self) -> bool:
        return self.structure is None or str(self.structure) == "dense"

    @property
    def name(self) -> str:
        return "dense" if self.dense else str(self.structure)

    @property
    def size(self) -> str:
        """The model's name, or what it is like."""
        if isinstance(self.model, str):
            return self.model
        return f"{self.model.hidden_size} x {self.model.intermediate_size}, {self.model.num_hidden_layers} layers"

    @property
    def factored(self) -> bool:
        return not (self.dense or isinstance(self.structure, Pattern))

    @property
    def method(self) -> str:
        """What stands in a row: the recipe, and the kernel if it is not the masked one."""
        if self.dense or self.factored:
            return "dense" if self.dense else "factored"
        return str(self.recipe) if self.kernel == "masked" else f"{self.recipe}, {self.kernel}"

    @property
    def source(self) -> str:
        """The modules whose change makes a curve stale."""
        base = SOURCE if self.initial == OURS else f"{SOURCE},sparsesurvey.initial"
        if self.dense:
            return base
        if self.factored:
            return f"{base},sparsesurvey.factored,{type(self.structure).__module__}"
        recipe = "".join(f",{module}" for module in sorted(_modules(self.recipe)))
        if self.kernel == "masked":
            return base + recipe
        layer = "compressed" if self.compressed else "mlp" if self.fused else "packed"
        return f"{base}{recipe},sparsesurvey.{layer},{type(self.structure).__module__}"

    @property
    def compressed(self) -> bool:
        """Is a dense weight kept, and compressed anew in every step?"""
        return self.kernel == KERNEL and not (self.recipe.fixed_mask and has_all_three(self.structure, self.kernel))

    @property
    def fused(self) -> bool:
        return self.kernel.endswith(FUSED)

    @property
    def settings(self) -> TrainConfig:
        return replace(self.config, seed=self.seed)

    @property
    def evaluations(self) -> list[int]:
        """The steps after which the loss is validated."""
        steps, every = self.config.steps, self.config.eval_every
        return sorted({*range(0, steps, every), steps})

    @property
    def unit(self) -> str:
        """Of its losses."""
        return "nats/byte" if self.language.bytes_per_token == 1 else "nats/token"

    def at(self, step: int | None = None) -> dict[str, str | int | float]:
        """The settings that stand in a row. ``settings`` is a hash that covers those without a column of their own."""
        config = {key: value for key, value in asdict(self.settings).items() if key not in FREE}
        shown = {key: config[key] for key in ("seed", "steps", "batch", "seq", "optimizer")}
        shown["lr"] = config["muon_lr" if self.config.optimizer == "muon" else "lr"]
        if self.config.precision != "float32":
            shown["precision"] = self.config.precision
        if self.initial != OURS:
            shown["initial"] = self.initial
        when = {} if step is None else {"step": step, "tokens": step * self.config.batch * self.config.seq}
        return {"model": self.size, "language": self.language.name, "corpus": self.language.digest[:12],
                **shown, **when, "settings": _hash([config, "" if self.dense else spelled(self.recipe)], 8)}

    @property
    def folder(self) -> Path:
        """Where this run's checkpoint is kept."""
        words = " ".join([self.size, self.language.name, self.name, self.method, f"seed {self.seed}"])
        slug = re.sub("[^a-z0-9]+", "-", words.lower()).strip("-")
        return runs_folder() / f"{slug}-{_hash([self.name, self.method, self.code, self.at()], 10)}"

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    def show(self, history: History) -> None:
        """Let others watch: what the run has seen so far, in ``history.json`` of its folder, never half there."""
        part = self.folder / "history.tmp"
        part.write_text(json.dumps({"name": self.name, "method": self.method, "seed": self.seed, **asdict(history)}))
        part.replace(self.folder / "history.json")

    def under_way(self) -> list[Measurement]:
        """The validation losses that a run which is not finished has shown so far."""
        try:
            told = json.loads((self.folder / "history.json").read_text())
        except FileNotFoundError:
            return []
        return [row for row in self.rows(History.told(told)) if row.metric == LOSS]

    def rows(self, history: History, beside: int = 1) -> Iterator[Measurement]:
        """What a run saw as rows: losses, also as bits per byte where tokens stand for bytes, and the rest of its trace.

        ``beside``: how many runs shared the machine, which stands in the rows of time and energy, as does how many processes
        of torchrun one run had, if it had several; their energy is not known, each counts its own GPU's.
        """
        machine = Machine.current(self.config.device)
        row = lambda metric, of, value, step, **more: Measurement.now(
            metric, of, value, structure=self.name, method=self.method, at={**self.at(step), **more}, source=self.source,
            machine=machine, code=self.code)
        processes = parallel.world()[1]
        shared = {"beside": beside, **({"processes": processes} if processes > 1 else {})}
        for metric, lines in history.trace.items():
            if metric == ENERGY and processes > 1:
                continue
            more = shared if metric in (TIME, ENERGY) else {}
            yield from (row(metric, UNITS[metric], value, step, **more) for step, value in lines)
        for step, loss in history.valid:
            bits = self.language.bits_per_byte(loss)
            if bits is not None:
                yield row("bits per byte", "bits/byte", bits, step)
            yield row(LOSS, self.unit, loss, step)

    def recorded(self, folder: str | Path | None) -> list[Measurement]:
        """The validation losses of this run on this machine that are in the record, by step."""
        slug = _slug(self.config.device)
        return self._mine(row for row in live(self.chapter, folder) if row.machine.slug == slug)

    def shipped(self) -> list[Measurement]:
        """The validation losses of this run that come with the package, of one machine that recorded all of them, or none."""
        found: dict[str, list[Measurement]] = {}
        for row in self._mine(shipped(self.chapter)):
            found.setdefault(row.machine.slug, []).append(row)
        return next((rows for rows in found.values() if len(rows) == len(self.evaluations)), [])

    def _mine(self, rows: Iterable[Measurement]) -> list[Measurement]:
        settings, steps = self.at().items(), set(self.evaluations)
        mine = (LOSS, self.name, self.method, self.code)
        found = [row for row in rows if (row.metric, row.structure, row.method, row.code) == mine
                 and settings <= row.at.items() and row.at.get("step") in steps]
        return sorted(found, key=lambda row: row.at["step"])

    def done(self, folder: str | Path | None) -> bool:
        return len(self.recorded(folder)) == len(self.evaluations)

    def start(self) -> nn.Module:
        """The model before its first step."""
        named = {"vocab": self.language.vocab} if isinstance(self.model, str) else {}
        model = initialise(build(self.model, self.seed, **named), self.initial, self.seed)
        if self.config.compile:
            without_mask(model)
        if self.factored:
            if self.recipe != Static() or self.kernel != "masked":
                raise ValueError(f"recipe must be Static() for {self.structure}, which has no mask; got {self.recipe}")
            return factorise(model, self.structure)
        if self.dense:
            return model
        if self.fused:
            from sparsesurvey.mlp import sparse_mlps

            return sparse_mlps(model, self.structure, self.kernel.removesuffix(FUSED), self.recipe, self.seed, fused=True)
        sparsify(model, self.structure, self.recipe, seed=self.seed)
        if self.kernel == "masked":
            return model
        return compress_layers(model) if self.compressed else pack_layers(model, self.kernel)


def _modules(recipe: Recipe) -> set[str]:
    """The modules of a recipe and of those that it is made of."""
    inner = (getattr(recipe, field.name) for field in fields(recipe))
    return {type(recipe).__module__}.union(*(_modules(part) for part in inner if isinstance(part, Recipe)))


@lru_cache(maxsize=8)
def _slug(device: str) -> str:
    return Machine.current(device).slug


def _hash(data: object, digits: int) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:digits]


TEXT = TrainConfig(steps=1500, batch=8, seq=128, optimizer="muon", lr=3e-3, warmup=50, eval_every=150, eval_batches=32,
                   checkpoint_every=150)
PRESETS = {
    "quick": ("markov", TrainConfig(steps=80, warmup=10, eval_every=20), 1),
    "default": ("markov", TrainConfig(), 3),
    "full": ("markov", TrainConfig(steps=1200, warmup=40, eval_every=100), 5),
    "text quick": ("bytes", replace(TEXT, steps=300, warmup=20, eval_every=50), 1),
    "text": ("bytes", TEXT, 2),
}


def preset(name: str = "default", device: str = "cpu") -> dict[str, object]:
    """Model, configuration and seeds that the chapters train with: ``loss_curves(structures, **preset("quick"))``.

    "quick", "default" and "full" are for the Markov language, "text quick" and "text" for bytes of text.

    A run of "default" takes 10 core-seconds (Xeon with AVX-512, 2026), so 8 structures and 3 seeds two to three
    minutes on two cores. Its 320 steps at a learning rate of 0.01 were chosen because there dense, 50 % and 25 % come
    apart: excess over the entropy 0.34 to 0.36, 0.40 to 0.49 and 0.53 to 0.80 nats over three seeds and all structures
    of a density. Structures of one density do not come apart: their seeds differ by 0.04 to 0.25. At 400 steps and
    0.005 dense and 50 % overlap; 0.02, shorter sequences and Muon at equal time separate less.
    """
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    model, config, seeds = PRESETS[name]
    return {"model": model, "config": replace(config, device=device), "seeds": tuple(range(seeds))}


def runs_folder() -> Path:
    """``$SPARSESURVEY_RUNS``, or ``sparsesurvey/runs`` in the user's cache."""
    if os.environ.get("SPARSESURVEY_RUNS"):
        return Path(os.environ["SPARSESURVEY_RUNS"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsesurvey" / "runs"


def loss_curves(structures: Iterable[Structure], seeds: Sequence[int] = (0, 1, 2), language: Language | None = None,
                model: str = "markov", config: TrainConfig = TrainConfig(), recipe: Recipe = Static(), record: str = "",
                kernel: str = "masked", chapter: str = CHAPTER, **how: Any) -> list[Measurement]:
    """Validation loss against steps of every structure and seed: rows, trained now unless they are in the record.

    All structures of a seed start from the same dense weights and see the same batches and validation windows, so
    their losses compare in pairs.

    Args:
        language: what is learnt, ``markov()`` by default.
        record: the folder that rows are looked for in and added to; empty for the live one.
        how: see ``train_all``.

    Raises:
        ValueError: no structure or seed, a model that a structure does not divide, a structure that cannot be trained.
        Diverged: a run whose loss is no number.
    """
    language = markov() if language is None else language
    return train_all([Job(structure, seed, language, model, config, recipe, kernel, chapter)
                      for structure in structures for seed in seeds], record, **how)


def recipe_curves(pairs: Iterable[tuple[Structure, Recipe]], seeds: Sequence[int] = (0, 1, 2), language: Language | None = None,
                  model: str = "markov", config: TrainConfig = TrainConfig(), record: str = "", chapter: str = "recipes",
                  **how: Any) -> list[Measurement]:
    """As ``loss_curves``, of structures each with a recipe of its own."""
    language = markov() if language is None else language
    return train_all([Job(structure, seed, language, model, config, recipe, chapter=chapter)
                      for structure, recipe in pairs for seed in seeds], record, **how)


def train_all(jobs: Sequence[Job], record: str = "", workers: int | None = None, progress: bool = True, reuse: bool = False,
              watch: Callable[[list[Measurement]], None] | None = None) -> list[Measurement]:
    """The validation losses of all jobs, trained now unless they are in the record.

    Runs go side by side in processes of one thread each: on a small model that is worth more than threads. In a script,
    call this under ``if __name__ == "__main__"``.

    Args:
        workers: processes; by default a core each, at most 8. One, or a GPU, trains in this process.
        reuse: be content with the rows of a run that come with the package, whichever machine they are of.
        watch: is handed the rows so far, of finished runs and of those under way, every few seconds; see ``watching``.
    """
    if not jobs:
        raise ValueError("structures and seeds must not be empty")
    held = {job: job.shipped() for job in jobs if reuse and not job.done(record)}
    todo = [job for job in jobs if not job.done(record) and not held.get(job)]
    for job in {(job.structure, job.recipe): job for job in todo}.values():
        job.start()  # a structure that does not divide the model is an error now, not after minutes
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(8, cores, len(todo)) if workers is None else workers
    so_far = lambda: [row for job in jobs for row in held.get(job) or job.recorded(record) or job.under_way()]
    tell = (lambda: watch(so_far())) if watch else lambda: None
    if workers <= 1 or jobs[0].config.device != "cpu":
        for job in tqdm(todo, desc="runs", disable=not progress or not todo):
            run(job, record, watch=lambda history: tell())
    else:
        _side_by_side(todo, record, workers, progress, tell)
    tell()
    return [row for job in jobs for row in held.get(job) or job.recorded(record)]


def _side_by_side(jobs: list[Job], folder: str, workers: int, progress: bool, tell: Callable[[], None]) -> None:
    """Train in processes. They are spawned: a forked torch with threads may hang."""
    with ProcessPoolExecutor(workers, get_context("spawn"), _begin_process) as pool:
        try:
            waiting = {pool.submit(run, job, folder, workers) for job in jobs}
            with tqdm(total=len(jobs), desc="runs", unit="run", disable=not progress) as bar:
                while waiting:
                    done, waiting = wait(waiting, LOOK, FIRST_COMPLETED)
                    for run_ in done:
                        run_.result()
                    bar.update(len(done))
                    tell()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _begin_process() -> None:
    """One thread, and no life after the notebook's: a kernel that is killed cannot end its processes itself."""
    torch.set_num_threads(1)

    def follow() -> None:
        parent_process().join()
        os._exit(1)

    Thread(target=follow, daemon=True).start()


def run(job: Job, folder: str | Path | None = None, beside: int = 1, progress: bool = False,
        watch: Callable[[History], None] | None = None) -> None:
    """Train one run to its end and record it, unless another process has done so meanwhile; ``beside`` as in ``rows``.

    ``watch`` as in ``train``: what it raises ends the run, which goes on from its checkpoint when it is asked for again. Under
    torchrun all processes call this, and the first one writes.
    """
    def seen(history: History) -> None:
        if parallel.first():
            job.show(history)
        if watch:
            watch(history)

    threads = torch.get_num_threads()
    if job.config.device == "cpu":
        torch.set_num_threads(1)  # the same sums in the same order, wherever it is trained
    try:
        with _lock(job.folder) if parallel.first() else nullcontext():
            parallel.wait()  # none looks for a checkpoint before the first one has the run for itself
            history = train(job.start(), job.language, job.settings, job.folder, progress=progress, watch=seen)
            for row in job.rows(history, beside) if parallel.first() else ():
                write_row(row, job.chapter, folder)
            parallel.wait()
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Only one process at a time; the system lets go of it when the process ends, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def trained(structure: Structure | None = None, seed: int = 0, language: Language | None = None, model: str = "markov",
            config: TrainConfig = TrainConfig(), recipe: Recipe = Static(), record: str = "", initial: str = OURS) -> nn.Module:
    """The model at the end of a run of ``loss_curves``, with plain linear layers; trained now if it is not kept.

    Without a structure it is the dense one. ``initial``: how its first weights are drawn, see ``initial.initialise``.
    """
    job = Job(structure, seed, markov() if language is None else language, model, config, recipe, initial=initial)
    if not (job.checkpoint.exists() and job.done(record)):
        run(job, record)
    made = job.start()
    checkpoint.load_model(job.checkpoint, made)
    return densify(made).eval()


def pruned_loss(structure: Structure, score: Score = magnitude, seed: int = 0, language: Language | None = None,
                model: str = "markov", config: TrainConfig = TrainConfig(), record: str = "") -> Measurement:
    """Validation loss of the trained dense model after its MLP is pruned at once to ``structure``: a row.

    It is compared with the last loss of the dense curve of this seed: same model, same validation windows.
    """
    language = markov() if language is None else language
    job = Job(None, seed, language, model, config, Recipe())
    pruned = trained(None, seed, language, model, config, record=record)
    density = pruning.prune(pruned, structure, score)
    loss = evaluate(pruned, *windows(language.valid, config.batch * config.eval_batches, config.seq), config.batch)
    at = {**job.at(), "density": round(sum(density.values()) / len(density), 6)}
    row = Measurement.now(LOSS, job.unit, loss, structure=structure,
                          method=f"{score.__name__}, one shot", at=at,
                          source=f"{SOURCE},sparsesurvey.pruning,{score.__module__},{type(structure).__module__}")
    write_row(row, CHAPTER, record)
    return row
