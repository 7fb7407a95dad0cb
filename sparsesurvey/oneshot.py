"""What one-shot pruning costs a trained model: rows of method by structure, over seeds of the model and of the calibration.

The models are those of ``experiments``, trained by us; each is pruned in its MLPs by ``models.prune_model``, block after
block on inputs that pruned blocks give, and evaluated on the validation windows that its training was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from resource import RUSAGE_SELF, getrusage
from statistics import median
from time import perf_counter, process_time
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from sparsesurvey.alps import alps
from sparsesurvey.calibration import calibrate
from sparsesurvey.data import Language, markov, stdlib, windows
from sparsesurvey.experiments import TEXT, trained
from sparsesurvey.initial import OURS, TRANSFORMERS
from sparsesurvey.job import LOSS, SOURCE, Job
from sparsesurvey.measure import Machine, Measurement, code_of, live, recorded
from sparsesurvey.measure import record as write_row
from sparsesurvey.mistral import build, weight_bytes
from sparsesurvey.mistral import config as shape_of
from sparsesurvey.models import Method, Plan, describe, prune_model, samples
from sparsesurvey.recipe import Recipe
from sparsesurvey.scores import dass, e_sparse, magnitude, ria, wanda
from sparsesurvey.sparsegpt import sparsegpt
from sparsesurvey.structure import Structure, check_int
from sparsesurvey.tables import above_dense, unnumbered
from sparsesurvey.train import TrainConfig, evaluate

if TYPE_CHECKING:
    import pandas as pd

CHAPTER = "pruning"
COSTS = {"time to prune": "s", "processor time to prune": "s", "peak memory": "B"}


def released(structure: Structure, power: float = 0.5) -> Plan:
    """DaSS as its code has it: groups of gate_proj and up_proj along the outputs, of down_proj along the inputs by Wanda.

    ``structure`` is one with an ``axis``, such as N:M along the inputs. With ``power=0`` gate and up are chosen by
    magnitude: what of the gain is the grouping's.
    """
    across, score = replace(structure, axis="out"), partial(dass, power=power)
    return {"gate_proj": (across, score), "up_proj": (across, score), "down_proj": (structure, wanda)}


METHODS: dict[str, Method] = {
    "magnitude": magnitude, "Wanda": wanda, "E-Sparse": e_sparse, "RIA": ria, "DaSS along the inputs": dass,
    "DaSS as released": released, "SparseGPT": sparsegpt, "ALPS": alps}
LADDER: dict[str, Method] = {  # from Wanda to DaSS, one change at a time
    "Wanda": wanda, "DaSS along the inputs": dass, "DaSS as released, power 0": partial(released, power=0.0),
    "DaSS as released": released, "DaSS as released, power 1": partial(released, power=1.0)}



class Way(NamedTuple):
    """How the models of bytes came to be: their training, and how their first weights were drawn (``initial.initialise``)."""

    config: TrainConfig
    initial: str = OURS


ADAMW = replace(TEXT, optimizer="adamw", eval_every=750, eval_batches=48)
PLAIN = replace(ADAMW, weight_decay=0.01)  # torch's own decay of AdamW; that of TrainConfig is 0.1
WAYS = {
    "AdamW at 0.0045, as transformers": Way(replace(PLAIN, lr=4.5e-3), TRANSFORMERS),
    "AdamW at 0.003, as transformers": Way(PLAIN, TRANSFORMERS),
    "AdamW, width-scaled": Way(ADAMW), "Muon, width-scaled": Way(TEXT)}


def losses(structures: Iterable[Structure], methods: Mapping[str, Method] = METHODS, seeds: Sequence[int] = (0,),
           calibrations: Sequence[int] = (0,), language: Language | None = None, model: str = "markov",
           config: TrainConfig = TrainConfig(), sequences: int = 128, record: str = "", reuse: bool = False,
           progress: bool = True, initial: str = OURS) -> list[Measurement]:
    """Validation loss of the trained model, dense and after pruning by each method under each structure: rows.

    Args:
        methods: by the name that stands in the row.
        seeds: of the model. calibrations: seeds of the ``sequences`` pieces of training text it is calibrated on, each as
            long as the ones it was trained on.
        reuse: be content with the rows that come with the package, whichever machine they are of; otherwise what is not in
            the live ones (``record``) is measured, and the model trained if need be.
        initial: how the model's first weights are drawn.
    """
    language = markov() if language is None else language
    known = [*live(CHAPTER, record), *(recorded(CHAPTER) if reuse else ())]
    structures = list(structures)
    todo = [(seed, 0, "dense", None, magnitude) for seed in seeds]
    todo += [(seed, calibration, name, structure, method) for seed in seeds for structure in structures
             for name, method in methods.items() for calibration in calibrations]
    dense: dict[int, nn.Module] = {}
    rows = []
    for seed, calibration, name, structure, method in tqdm(todo, "prune", disable=not progress):
        job = Job(None, seed, language, model, config, Recipe(), initial=initial)
        at = {**job.at(), "decay": config.weight_decay}
        at |= {"sequences": sequences, "calibration": calibration} if structure else {}
        source = _source(structure, method, job.source)
        row = _known(known, str(structure or "dense"), name, at, code_of(source, device=config.device))
        if row is None:
            if seed not in dense:
                dense = {seed: trained(None, seed, language, model, config, record=record, initial=initial)}  # one at a time
            row = _measure(job, deepcopy(dense[seed]).to(config.device), structure, name, method, at, source)
            write_row(row, CHAPTER, record)
        rows.append(row)
    return rows


def text_losses(structures: Iterable[Structure], methods: Mapping[str, Method] = METHODS, ways: Iterable[str] = tuple(WAYS),
                seeds: Sequence[int] = (0, 1, 2), calibrations: Sequence[int] = (0,), record: str = "",
                progress: bool = True) -> list[Measurement]:
    """``losses`` of models of 357,024 parameters that read the bytes of Python's standard library, trained in some of ``WAYS``.

    Calibrated on 128 pieces of 128 bytes. A model takes about two core-minutes to train, a case two core-seconds.
    """
    language, structures = stdlib(), list(structures)
    return [row for way in ways for row in losses(structures, methods, seeds, calibrations, language, "bytes", WAYS[way].config,
                                                  record=record, progress=progress, initial=WAYS[way].initial)]


def trained_as(rows: Iterable[Measurement], way: str) -> list[Measurement]:
    """Those of models that were trained in one of ``WAYS``; rows from before the decay stood in them are of models with 0.1."""
    config, initial = WAYS[way]
    mine = config.optimizer, config.muon_lr if config.optimizer == "muon" else config.lr, config.weight_decay, initial
    of = lambda row: (row.at["optimizer"], row.at["lr"], row.at.get("decay", 0.1), row.at.get("initial", OURS))
    return [row for row in rows if of(row) == mine]


def _source(structure: Structure | None, method: Method, base: str = SOURCE) -> str:
    if structure is None:
        return base
    module = "sparsesurvey.scores" if _is_plan(method) else getattr(method, "func", method).__module__
    return f"{base},sparsesurvey.models,{module},{type(structure).__module__}"


def _is_plan(method: Method) -> bool:
    """Is it a function from a structure to what becomes of each module?"""
    return getattr(method, "func", method) is released


def _known(rows: Iterable[Measurement], structure: str, method: str, at: Mapping, code: str) -> Measurement | None:
    mine = (LOSS, structure, method, code)
    return next((row for row in rows if (row.metric, row.structure, row.method, row.code) == mine
                 and at.items() <= row.at.items()), None)


def _measure(job: Job, model: nn.Module, structure: Structure | None, name: str, method: Method | Callable[[Structure], Plan],
             at: Mapping, source: str) -> Measurement:
    config, language = job.config, job.language
    if structure is not None:
        batches = samples(language.train, at["sequences"], config.seq, at["calibration"], config.batch)
        plan, how = (method(structure), magnitude) if _is_plan(method) else (structure, method)
        at = {**at, "density": round(prune_model(model, plan, how, batches, progress=False).density, 6)}
    x, y = windows(language.valid, config.batch * config.eval_batches, config.seq)
    loss = evaluate(model, x, y, config.batch, config.device)
    return Measurement.now(LOSS, job.unit, loss, structure=str(structure or "dense"), method=name, at=at, source=source,
                           machine=Machine.current(config.device))


def spreads(seeds: Sequence[int] = (0,), language: Language | None = None, model: str = "markov",
            config: TrainConfig = TrainConfig(), sequences: int = 128, record: str = "", initial: str = OURS) -> list[Measurement]:
    """How much norms differ within a layer, over calibration tokens: standard deviation over mean, averaged over layers; rows.

    Of "inputs", the channels that gate_proj reads, and of "neurons", what it and up_proj make: down_proj's input.
    """
    language = markov() if language is None else language
    rows = []
    for seed in seeds:
        job = Job(None, seed, language, model, config, Recipe(), initial=initial)
        dense = trained(None, seed, language, model, config, record=record, initial=initial).to(config.device)
        seen = calibrate(dense, samples(language.train, sequences, config.seq, 0, config.batch), ("gate_proj",),
                         ("output_square",), progress=False)
        for what in ("norms", "output_norms"):
            each = [float(norms.std() / norms.mean()) for norms in (getattr(one, what)() for one in seen.values())]
            at = {**job.at(), "decay": config.weight_decay, "sequences": sequences}
            row = Measurement.now("spread", "1", sum(each) / len(each), low=min(each), high=max(each), structure="dense",
                                  method="inputs" if what == "norms" else "neurons", at=at,
                                  source=f"{job.source},sparsesurvey.calibration", machine=Machine.current(config.device))
            write_row(row, CHAPTER, record)
            rows.append(row)
    return rows


def pruning_time(method: Method, structure: Structure, model: str = "162m", sequences: int = 16, length: int = 512,
                 threads: int | None = None, tries: int = 1, record: str = "") -> tuple[Measurement, ...]:
    """Time to prune a model of random weights on random tokens, by the clock and of the processor (all cores together), and
    the most memory that it takes, in a process of its own: rows, the median of ``tries`` with the least and the most.

    None of it depends on what the weights are. On a machine with other work the processor's time tells more: over the
    cores, it is the clock's on a quiet one at best.
    """
    check_int("tries", tries, 1)
    threads = torch.get_num_threads() if threads is None else threads
    at = {"model": model, "sequences": sequences, "length": length, "threads": threads, "tries": tries,
          "weights": sum(weight_bytes(shape_of(model), itemsize=4).values())}
    found = []
    for _ in range(tries):
        with ProcessPoolExecutor(1, get_context("spawn")) as alone:
            found.append(alone.submit(_pruning_costs, method, structure, model, sequences, length, threads).result())
    rows = tuple(Measurement.now(metric, unit, median(values), low=min(values), high=max(values), structure=structure,
                                 method=describe(method), at=at, source=_source(structure, method))
                 for (metric, unit), values in zip(COSTS.items(), zip(*found)))
    for row in rows:
        write_row(row, CHAPTER, record)
    return rows


def _pruning_costs(method: Method, structure: Structure, model: str, sequences: int, length: int, threads: int) -> tuple[float, float, float]:
    """The values of ``COSTS``, once."""
    torch.set_num_threads(threads)
    made = build(model).eval()
    generator = torch.Generator().manual_seed(0)
    batches = list(torch.randint(made.config.vocab_size, (sequences, 1, length), generator=generator))
    plan, how = (method(structure), magnitude) if _is_plan(method) else (structure, method)
    start, busy = perf_counter(), process_time()
    prune_model(made, plan, how, batches, progress=False)
    return perf_counter() - start, process_time() - busy, getrusage(RUSAGE_SELF).ru_maxrss * 1024


def increases(rows: Iterable[Measurement]) -> dict[tuple[str, str], dict[tuple[int, int], float]]:
    """By (method, structure), then by (seed of the model, of the calibration): the loss above the same model's, dense."""
    found: dict[tuple[str, str], dict[tuple[int, int], float]] = {}
    for row, above in above_dense(row for row in rows if row.metric == LOSS):
        found.setdefault((row.method, row.structure), {})[row.at["seed"], row.at["calibration"]] = above
    return found


def table(rows: Iterable[Measurement]) -> pd.DataFrame:
    """Method by structure: mean increase of the loss over the seeds of the model, first calibration; in brackets the range."""
    import pandas as pd

    rows = list(rows)
    cells: dict[str, dict[str, str]] = {}
    for (method, structure), values in increases(rows).items():
        mine = list(_first(values).values())
        spread = f" ({min(mine):.4f} to {max(mine):.4f})" if len(mine) > 1 else ""
        cells.setdefault(method, {})[structure] = f"{sum(mine) / len(mine):.4f}{spread}"
    stale = ", stale rows among them" if any(row.stale for row in rows) else ""
    unit = rows[0].unit if rows else "no rows"
    return pd.DataFrame(cells).T.rename_axis(f"increase of the loss, {unit}{stale}")


def noise(rows: Iterable[Measurement]) -> pd.DataFrame:
    """By method and structure: the widest range over calibration seeds with the model fixed, and over models with it fixed."""
    import pandas as pd

    lines = []
    for (method, structure), values in increases(rows).items():
        of_calibration, of_model = _range(values, 0), _range(values, 1)
        lines.append({"structure": structure, "method": method, "over calibrations": of_calibration, "over models": of_model})
    return unnumbered(pd.DataFrame(lines).round(4))


def in_order(rows: Iterable[Measurement], methods: Sequence[str]) -> pd.DataFrame:
    """For each structure and pair of neighbours in ``methods``: in how many models the later one loses less, first calibration."""
    import pandas as pd

    found = increases(rows)
    lines = []
    for structure in dict.fromkeys(structure for _, structure in found):
        for worse, better in zip(methods, methods[1:]):
            one, other = _first(found[worse, structure]), _first(found[better, structure])
            gains = [one[seed] - other[seed] for seed in one if seed in other]
            lines.append({"structure": structure, "worse": worse, "better": better, "models": len(gains),
                          "as expected": sum(gain > 0 for gain in gains), "least gain": min(gains), "largest gain": max(gains)})
    return unnumbered(pd.DataFrame(lines).round(4))


def _first(values: Mapping[tuple[int, int], float]) -> dict[int, float]:
    """By the seed of the model, for the first calibration."""
    first = min(calibration for _, calibration in values)
    return {seed: value for (seed, calibration), value in values.items() if calibration == first}


def _range(values: Mapping[tuple[int, int], float], fixed: int) -> float:
    groups: dict[int, list[float]] = {}
    for place, value in values.items():
        groups.setdefault(place[fixed], []).append(value)
    return max(max(group) - min(group) for group in groups.values())
