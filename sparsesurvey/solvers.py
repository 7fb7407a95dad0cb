"""Solvers of one problem side by side: how far each is from the optimum on the same tiles, and how long it takes.

Structures and solvers are handed in; a solver takes tiles ``[tiles, m, m]`` and n, and returns a mask of that shape.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from time import perf_counter

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from sparsesurvey import measure
from sparsesurvey.figures import MARKERS, OTHERS, by_machine, empty
from sparsesurvey.measure import Machine, Measurement
from sparsesurvey.structure import Pattern, check_int

GAP, TIME = "below the optimum", "time a tile"

Solver = Callable[[Tensor, int], Tensor]


def contest(solvers: Mapping[str, Solver], optimum: str, structures: Iterable[Pattern], chapter: str, *,
            tiles: int = 64, threads: int = 1, record: str = "", rounds: int = 3) -> list[Measurement]:
    """Rows of each solver and structure: "below the optimum" (fraction) of the scores kept, and "time a tile" (s).

    The tiles are Gaussian magnitudes, and all are given to a solver at once, on the CPU. ``optimum`` names the solver
    that the others are measured against; it is slow, so that its time is that of one call. What is recorded with the
    same code is not measured again.
    """
    check_int("tiles", tiles, 1)
    check_int("threads", threads, 1)
    if optimum not in solvers:
        raise ValueError(f"optimum must be one of {', '.join(solvers)}, got {optimum!r}")
    before, found = torch.get_num_threads(), []
    torch.set_num_threads(threads)
    try:
        for structure in structures:
            at = {"tiles": tiles, "threads": threads}
            rows = _recorded(structure, solvers, at, chapter, record)
            found += rows or _measure(structure, solvers, optimum, at, chapter, record, rounds)
    finally:
        torch.set_num_threads(before)
    return found


def _recorded(structure: Pattern, solvers: Mapping[str, Solver], at: dict, chapter: str,
              record: str) -> list[Measurement]:
    """What is there of this structure on this machine with this code, or nothing if anything is missing."""
    code, slug = measure.code_of(_source(structure)), Machine.current("cpu").slug
    rows = [row for row in measure.live(chapter, record)
            if (row.structure, row.code, row.machine.slug, row.at) == (str(structure), code, slug, at)
            and row.metric in (GAP, TIME) and row.method in solvers]
    return rows if len(rows) == 2 * len(solvers) else []


def _source(structure: Pattern) -> str:
    return f"{__name__},{type(structure).__module__}"


def _measure(structure: Pattern, solvers: Mapping[str, Solver], optimum: str, at: dict, chapter: str, record: str,
             rounds: int) -> list[Measurement]:
    n, m, count = structure.n, structure.m, at["tiles"]
    scores = torch.randn(count, m, m, generator=torch.Generator().manual_seed(0)).abs()
    start = perf_counter()
    masks = {optimum: solvers[optimum](scores, n)}
    times = {optimum: [perf_counter() - start] * 3}
    others = {name: partial(solve, scores, n) for name, solve in solvers.items() if name != optimum}
    masks |= {name: run() for name, run in others.items()}
    for name, time in measure.compare(others, next(iter(others)), rounds, 1e-3).items() if others else ():
        times[name] = [time.seconds, time.low, time.high]
    kept = {name: float((scores.double() * mask).sum()) for name, mask in masks.items()}
    common = {"structure": structure, "at": at, "source": _source(structure), "machine": Machine.current("cpu")}
    rows = []
    for name in solvers:
        value, low, high = (seconds / count for seconds in times[name])
        rows += [Measurement.now(GAP, "fraction", 1 - kept[name] / kept[optimum], method=name, **common),
                 Measurement.now(TIME, "s", value, low=min(low, value), high=max(high, value), method=name, **common)]
    for row in rows:
        measure.record(row, chapter, record)
    return rows


def draw(rows: Iterable[Measurement]) -> Figure:
    """Left how far below the optimum each solver is, right its time a tile, against the structures in their order."""
    rows = list(rows)
    if not rows:
        return empty("no solver has been measured yet")
    names, structures = (list(dict.fromkeys(getattr(row, part) for row in rows)) for part in ("method", "structure"))
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.3))
    tints = ("#0072B2", "#D55E00", "#009E73", "#E69F00", *OTHERS)
    for ax, metric, scale in zip(axes, (GAP, TIME), (100, 1e6)):
        for number, name in enumerate(names):
            mine = {row.structure: row.value for row in rows if (row.method, row.metric) == (name, metric)}
            least = 1e-6 if metric == GAP else 0  # a rounding error is no gap
            places = [place for place, structure in enumerate(structures) if mine.get(structure, 0) > least]
            ax.plot(places, [scale * mine[structures[place]] for place in places], color=tints[number % len(tints)],
                    marker=MARKERS[number % len(MARKERS)], label=name)
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.set_xticks(range(len(structures)), [structure.split()[-1] for structure in structures])
    axes[0].set(ylabel="% below the optimum", title="what is given away (none: not drawn)")
    axes[1].set(ylabel="microseconds a tile", title=f"time, {rows[0].at['tiles']} tiles at once")
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.supxlabel("; ".join(by_machine(rows)), fontsize=8)
    return figure
