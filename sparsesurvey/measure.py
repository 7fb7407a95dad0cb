"""Measuring: runs timed side by side in interleaved rounds, and (from their own files) machines and rows.

One machine's speed drifts by more than the effects looked for: clocks, neighbours, temperature. So every round times
every run once, in a shuffled order, and what is reported is the ratio to the baseline *within* a round.
"""

import gc
import random
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch

from sparsesurvey.machine import Machine, check_device
from sparsesurvey.records import CorruptRecord, Measurement, latest, live, record, recorded, rows
from sparsesurvey.source import code_of
from sparsesurvey.tables import table

__all__ = [
    "CorruptRecord", "Machine", "Measurement", "Timing", "check_device", "code_of", "compare", "latest", "live",
    "record", "recorded", "rows", "table",
]

Run = Callable[[], Any]
FLUSHED_CALLS = 50  # a flush takes longer than many a kernel: do not wait for min_seconds of kernel time


@dataclass(frozen=True)
class Timing:
    """What ``compare`` saw of one run; ``low`` and ``high`` are the 20th and 80th percentile over rounds."""

    samples: tuple[float, ...]  # seconds per call, one a round
    ratios: tuple[float, ...]  # the baseline's seconds over these, round by round

    @property
    def seconds(self) -> float:
        return median(self.samples)

    @property
    def low(self) -> float:
        return float(np.quantile(self.samples, 0.2))

    @property
    def high(self) -> float:
        return float(np.quantile(self.samples, 0.8))

    @property
    def speedup(self) -> float:
        """Above 1 is faster than the baseline."""
        return median(self.ratios)

    @property
    def speedup_low(self) -> float:
        return float(np.quantile(self.ratios, 0.2))

    @property
    def speedup_high(self) -> float:
        return float(np.quantile(self.ratios, 0.8))

    @property
    def spread(self) -> float:
        """Width of the times between their percentiles, as a fraction of the median."""
        return (self.high - self.low) / self.seconds

    @property
    def speedup_spread(self) -> float:
        """The same of the paired ratios: what is left when the machine's drift has cancelled."""
        return (self.speedup_high - self.speedup_low) / self.speedup


def compare(runs: dict[str, Run], baseline: str, rounds: int = 15, min_seconds: float = 0.02,
            device: str | torch.device = "cpu", flush_l2: bool = False, seed: int = 0) -> dict[str, Timing]:
    """Time runs (functions of no argument) against the one named ``baseline``, which is one of them.

    After a warm-up, each of ``rounds`` rounds calls every run, in an order shuffled anew, as often as fills
    ``min_seconds`` (at least once) and takes the mean. On a GPU the clock is that of CUDA events; what launches faster
    than it computes is timed by its computing, else by its launching. ``flush_l2`` empties the GPU's cache
    before each call: weights come from memory, as they do where a layer is one of many. Call what may be
    ``Unavailable`` once before: here, any error passes through.
    """
    where = _check(runs, baseline, rounds, min_seconds, device, flush_l2)
    sample = _sample_cpu if where.type == "cpu" else _sample_cuda
    flush = _cache_filler(where) if flush_l2 else None
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        calls = {name: _calls(run, min_seconds, sample, where, flush) for name, run in runs.items()}
        samples: dict[str, list[float]] = {name: [] for name in runs}
        order = list(runs)
        shuffle = random.Random(seed).shuffle
        for _ in range(rounds):
            shuffle(order)
            for name in order:
                samples[name].append(sample(runs[name], calls[name], where, flush))
    finally:
        if collecting:
            gc.enable()
    base = samples[baseline]
    return {name: Timing(tuple(mine), tuple(b / s for b, s in zip(base, mine))) for name, mine in samples.items()}


def _check(runs: dict[str, Run], baseline: str, rounds: int, min_seconds: float, device: str | torch.device,
           flush_l2: bool) -> torch.device:
    if not runs:
        raise ValueError("runs is empty: give at least the baseline")
    for name, run in runs.items():
        if not callable(run):
            raise ValueError(f"runs[{name!r}] must be a function of no argument, got {type(run).__name__}")
    if baseline not in runs:
        raise ValueError(f"baseline must be one of {', '.join(map(repr, runs))}, got {baseline!r}")
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 3:
        raise ValueError(f"rounds must be an integer of at least 3, or percentiles mean nothing, got {rounds!r}")
    if not 0 < min_seconds < float("inf"):
        raise ValueError(f"min_seconds must be a number above 0, got {min_seconds!r}")
    where = check_device(device)
    if flush_l2 and where.type == "cpu":
        raise ValueError("flush_l2 is for device='cuda'; on a CPU give operands that are larger than its cache")
    return where


def _calls(run: Run, min_seconds: float, sample: Callable[..., float], device: torch.device, flush: Run | None) -> int:
    """How many calls fill ``min_seconds``; the search is the warm-up, and the first call (compiling) does not count."""
    sample(run, 1, device, flush)
    calls = 1
    while True:
        seconds = sample(run, calls, device, flush)
        if seconds * calls >= min_seconds or (flush and calls >= FLUSHED_CALLS):
            return calls
        # By at most 10 at a time: a first estimate is of a cold run.
        calls = max(calls + 1, min(10 * calls, round(1.1 * min_seconds / max(seconds, 1e-9))))


def _sample_cpu(run: Run, calls: int, device: torch.device, flush: None) -> float:
    """Mean seconds of one call."""
    start = perf_counter()
    for _ in range(calls):
        run()
    return max(perf_counter() - start, 1e-9) / calls


def _sample_cuda(run: Run, calls: int, device: torch.device, flush: Run | None) -> float:
    """Mean seconds of one call by the GPU's clock, the time of the flushes left out."""
    with torch.cuda.device(device):
        pairs = 1 if flush is None else calls
        starts = [torch.cuda.Event(enable_timing=True) for _ in range(pairs)]
        ends = [torch.cuda.Event(enable_timing=True) for _ in range(pairs)]
        torch.cuda.synchronize()
        for start, end in zip(starts, ends):
            if flush is not None:
                flush()  # longer than a launch, so that the run's launch waits in the queue and is not timed
            start.record()
            for _ in range(calls // pairs):
                run()
            end.record()
        torch.cuda.synchronize()
        return max(sum(start.elapsed_time(end) for start, end in zip(starts, ends)) / 1e3, 1e-9) / calls


def _cache_filler(device: torch.device) -> Run:
    """A function that overwrites several times what the GPU's L2 cache holds."""
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
    return torch.empty(max(4 * cache, 2**28), dtype=torch.int8, device=device).zero_
