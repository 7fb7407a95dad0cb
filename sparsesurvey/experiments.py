"""Training and pruning experiments as rows: what a chapter asks for, trained if it is not recorded yet.

A run is one structure and one seed. Its checkpoints are kept in a folder named by everything that its numbers depend
on, the code included, so that an interrupted notebook goes on where it stopped, and a chapter that prunes finds the
model that another one trained. A lock per run keeps two notebooks from training the same one.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from time import perf_counter
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from sparsesurvey import checkpoint, parallel, pruning
from sparsesurvey.data import Language, markov, windows
from sparsesurvey.initial import OURS
from sparsesurvey.job import CHAPTER, LOSS, SOURCE, Job
from sparsesurvey.linear import densify
from sparsesurvey.measure import Machine, Measurement
from sparsesurvey.measure import record as write_row
from sparsesurvey.recipe import Recipe, Score
from sparsesurvey.recipes.static import Static
from sparsesurvey.scores import magnitude
from sparsesurvey.structure import Structure
from sparsesurvey.train import History, TrainConfig, evaluate, train

LOOK = 5.0  # seconds between two looks at the runs under way, at least
SHARE = 0.04  # of the time that looking may take: it takes a core from a run
TOGETHER = "time of all runs"
TEXT = TrainConfig(steps=1500, batch=8, seq=128, optimizer="muon", lr=3e-3, warmup=50, eval_every=150, eval_batches=32,
                   checkpoint_every=150)
LIVE = TrainConfig(steps=400, batch=16, lr=6e-3, eval_every=50, checkpoint_every=100)
QUICK = ("markov", TrainConfig(steps=80, warmup=10, eval_every=20), 1)
FULL = ("markov", TrainConfig(steps=1200, warmup=40, eval_every=100), 5)
PRESETS = {
    "quick": QUICK, "default": ("markov", TrainConfig(), 3), "full": FULL,
    "live quick": QUICK, "live default": ("markov", LIVE, 3), "live full": FULL,
    "text quick": ("bytes", replace(TEXT, steps=300, warmup=20, eval_every=50), 1),
    "text": ("bytes", TEXT, 2),
}


def preset(name: str = "default", device: str = "cpu") -> dict[str, object]:
    """Model, configuration and seeds that the chapters train with: ``loss_curves(structures, **preset("quick"))``.

    "quick", "default" and "full" are for the Markov language, "live ..." for it while somebody waits, "text quick" and
    "text" for bytes of text.

    A run of "default" takes 10 core-seconds (Xeon with AVX-512, 2026). Its 320 steps at a learning rate of 0.01 were
    chosen because there dense, 50 % and 25 % come apart: excess over the entropy 0.34 to 0.36, 0.40 to 0.49 and 0.53 to
    0.80 nats over three seeds and all structures of a density. Structures of one density do not come apart: their seeds
    differ by 0.04 to 0.25. At 400 steps and 0.005 dense and 50 % overlap; 0.02, shorter sequences and Muon at equal time
    separate less.

    "live default" sees 62 % of these tokens, in smaller batches, and tells densities apart as well. Over five seeds the
    excess was 0.42 to 0.48 dense, 0.49 to 0.56 under 2:4 and 50 %, 0.86 to 0.94 at 10 % unstructured and 1.04 to 1.14 in
    blocks of 8 x 8. Still fewer tokens do not: 320 steps leave 0.02 between groups, batches of 12 let them overlap.
    """
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    model, config, seeds = PRESETS[name]
    return {"model": model, "config": replace(config, device=device), "seeds": tuple(range(seeds))}


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
    begun, fresh = perf_counter(), len(todo) == len(jobs) and not any(job.checkpoint.exists() for job in jobs)
    if workers <= 1 or jobs[0].config.device != "cpu":
        for job in tqdm(todo, desc="runs", disable=not progress or not todo):
            run(job, record, watch=lambda history: tell())
    else:
        _side_by_side(todo, record, workers, progress, tell)
    if fresh and parallel.first():
        _write_together(jobs, perf_counter() - begun, workers, record)
    tell()
    return [row for job in jobs for row in held.get(job) or job.recorded(record)]


def _write_together(jobs: Sequence[Job], seconds: float, workers: int, folder: str) -> None:
    """Record what somebody waited for: all runs by the clock, the start of their processes included."""
    first, structures = jobs[0], {job.name for job in jobs}
    at = {**first.at(), "runs": len(jobs), "beside": max(1, workers)}
    del at["seed"]
    row = Measurement.now(TOGETHER, "s", seconds, structure=f"{len(structures)} structures" if len(structures) > 1 else first.name,
                          method="all", at=at, source=SOURCE, machine=Machine.current(first.config.device))
    write_row(row, first.chapter, folder)


def _side_by_side(jobs: list[Job], folder: str, workers: int, progress: bool, tell: Callable[[], None]) -> None:
    """Train in processes. They are spawned: a forked torch with threads may hang."""
    with ProcessPoolExecutor(workers, get_context("spawn"), _begin_process) as pool:
        try:
            waiting, next_look = {pool.submit(run, job, folder, workers) for job in jobs}, 0.0
            with tqdm(total=len(jobs), desc="runs", unit="run", disable=not progress) as bar:
                while waiting:
                    done, waiting = wait(waiting, LOOK, FIRST_COMPLETED)
                    for run_ in done:
                        run_.result()
                    bar.update(len(done))
                    if (begun := perf_counter()) >= next_look:
                        tell()
                        next_look = perf_counter() + (perf_counter() - begun) / SHARE
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
