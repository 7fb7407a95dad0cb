"""What is known of training runs beside their losses: rows, measured now unless they are in the record.

Runs are those of ``experiments.recipe_curves``; their models are found by their checkpoints, or trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sparsesurvey import checkpoint
from sparsesurvey.data import Language, markov, windows
from sparsesurvey.directions import directions
from sparsesurvey.experiments import run
from sparsesurvey.job import Job
from sparsesurvey.linear import sparse_layers
from sparsesurvey.measure import Machine, Measurement, code_of, live, recorded, rows
from sparsesurvey.measure import record as write_row
from sparsesurvey.orders import order_state
from sparsesurvey.recipe import Recipe
from sparsesurvey.structure import Structure
from sparsesurvey.tables import called
from sparsesurvey.train import History, TrainConfig, train

if TYPE_CHECKING:
    import pandas as pd

CHAPTER = "recipes"
COSINE = "cosine"
Pairs = Iterable[tuple[Structure, Recipe]]


def with_seeds(plan: dict[str, Any], pairs: Pairs, language: Language | None = None, record: str = "") -> dict[str, Any]:
    """``experiments.preset`` with those of its seeds of which every run is recorded or comes with the package, with the code as it
    is; with all of them if there is no such seed, which are then trained.
    """
    language, pairs = markov() if language is None else language, list(pairs)
    jobs = {seed: [Job(structure, seed, language, plan["model"], plan["config"], recipe, chapter=CHAPTER)
                   for structure, recipe in pairs] for seed in plan["seeds"]}
    known = tuple(seed for seed, mine in jobs.items() if all(job.done(record) or job.shipped() for job in mine))
    return {**plan, "seeds": known or tuple(plan["seeds"])}


def traced(losses: Iterable[Measurement], metric: str, chapter: str = CHAPTER, record: str = "") -> list[Measurement]:
    """Rows of another metric, "flip rate" say, of the runs that ``losses`` are of."""
    runs = {_run(row) for row in losses}
    return [row for row in rows(chapter, metric=metric, folder=record or None) if _run(row) in runs]


def _run(row: Measurement) -> tuple:
    """What is the same for all rows of one run."""
    return (row.structure, row.method, row.code, row.machine.slug, row.origin,
            *(row.at.get(key) for key in ("model", "language", "corpus", "seed", "steps", "settings")))


def bearings(pairs: Pairs, seeds: Sequence[int] = (0, 1, 2), language: Language | None = None, model: str = "markov",
             config: TrainConfig = TrainConfig(), record: str = "", reuse: bool = False) -> list[Measurement]:
    """Cosines of ``directions`` at the start of each run and in its last step, on the first validation batch: rows.

    ``at["of"]`` says of what; ``reuse`` as in ``experiments.train_all``.
    """
    language = markov() if language is None else language
    found = []
    for structure, recipe in pairs:
        for seed in seeds:
            job = Job(structure, seed, language, model, config, recipe, chapter=CHAPTER)
            source = f"{job.source},sparsesurvey.directions"
            held = _held(job, COSINE, source, record, reuse)
            found += held or _record(job, source, record, _bearings(job, record))
    return found


def _bearings(job: Job, record: str) -> list[tuple[str, int, float, dict[str, str]]]:
    x, y = windows(job.language.valid, job.config.batch, job.config.seq)
    lines = []
    for step in (0, job.config.steps - 1):
        made = job.start() if step == 0 else _at_the_end(job, record)
        for layer in sparse_layers(made).values():
            layer.prepare(step, job.config.steps)
        lines += [(COSINE, step, value, {"of": of}) for of, value in directions(made, x, y).items()]
    return lines


def _at_the_end(job: Job, record: str) -> nn.Module:
    if not (job.checkpoint.exists() and job.done(record)):
        run(job, record)
    made = job.start()
    checkpoint.load_model(job.checkpoint, made)
    return made


def orderings(pairs: Pairs, seeds: Sequence[int] = (0,), language: Language | None = None, model: str = "markov",
              config: TrainConfig = TrainConfig(), looks: int = 32, record: str = "", reuse: bool = False) -> list[Measurement]:
    """The state of learned orders, as ``order_state`` tells it, ``looks`` times while a model is trained: rows.

    These are runs of their own, one after the other; their losses are not recorded.
    """
    language = markov() if language is None else language
    config = replace(config, eval_every=max(1, config.steps // looks), eval_batches=1)
    found = []
    for structure, recipe in pairs:
        for seed in seeds:
            job = Job(structure, seed, language, model, config, recipe, chapter=CHAPTER)
            source = f"{job.source},sparsesurvey.orders"
            held = [row for metric in ("order penalty", "orders found") for row in _held(job, metric, source, record, reuse)]
            found += held or _record(job, source, record, _orderings(job))
    return found


def _orderings(job: Job) -> list[tuple[str, int, float, dict[str, str]]]:
    made, lines = job.start(), []

    def look(history: History) -> None:
        step = history.valid[-1][0] if history else 0
        lines.extend((metric, step, value, {}) for metric, value in order_state(made).items())

    look(None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train(made, job.language, job.settings, progress=False, watch=look)
    finally:
        torch.set_num_threads(threads)
    return lines


def _held(job: Job, metric: str, source: str, record: str, reuse: bool) -> list[Measurement]:
    """The rows of a run with the code as it is, of this machine, or else of the first one that comes with the package."""
    code, slug = code_of(source, device=job.config.device), Machine.current(job.config.device).slug
    fits = lambda row: ((row.metric, row.structure, row.method, row.code) == (metric, job.name, job.method, code)
                        and job.at().items() <= row.at.items())
    here = [row for row in live(CHAPTER, record) if row.machine.slug == slug and fits(row)]
    there = [row for row in recorded(CHAPTER) if fits(row)] if reuse and not here else []
    return here or [row for row in there if row.machine.slug == there[0].machine.slug]


def _record(job: Job, source: str, record: str, lines: Iterable[tuple[str, int, float, dict[str, str]]]) -> list[Measurement]:
    machine = Machine.current(job.config.device)
    made = [Measurement.now(metric, "1", value, structure=job.name, method=job.method, at={**job.at(step), **more}, source=source,
                            machine=machine) for metric, step, value, more in lines]
    for row in made:
        write_row(row, CHAPTER, record)
    return made


def compass(found: Iterable[Measurement]) -> pd.DataFrame:
    """Rows of ``bearings`` as a table: a line a structure and recipe, the mean over the seeds at the start and in the last step."""
    import pandas as pd

    lines = [{"": called(row), "of": row.at["of"], "when": "at the start" if row.at["step"] == 0 else "last step",
              "cosine": row.value} for row in found]
    table = pd.DataFrame(lines, columns=["", "of", "when", "cosine"])
    return table.pivot_table(index="", columns=["of", "when"], values="cosine", sort=False).round(3)
