"""The speed of choosing: how long a structure takes to select a mask and to pack, beside one read of the weight.

Masks are chosen inside training loops, so that choosing is a product of its own. Structures are handed in; what is
recorded for the same machine and code is not measured again.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import inf
from time import perf_counter
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from sparsesurvey import measure
from sparsesurvey.benchmark import DTYPES, Book, cpu_threads
from sparsesurvey.figures import by_machine, colour, empty
from sparsesurvey.measure import Machine, Measurement, Timing
from sparsesurvey.packing import tiles
from sparsesurvey.roofline import Roofline
from sparsesurvey.structure import Pattern, Shape, Structure, Unavailable, check_int
from sparsesurvey.tables import measured, unnumbered

CHAPTER = "choosing"
READ, TOPK, SELECT, MASK, PACK, OPTIMUM = "read", "topk", "select", "mask", "pack", "optimum"
OVER = {READ: "reads of the weight", TOPK: "times topk", SELECT: "times selecting"}  # metric, by what is divided by
SHORTFALL, FASTER = "below the optimum", "times as fast as the optimum"

FULL = (4096, 14336)  # a down projection of a Mistral 7B: what the targets are stated for
PRESETS = {  # by the chapters' presets: of the survey, and of the comparison with an exact solver
    "quick": ({"shape": (256, 1792), "rounds": 3, "min_seconds": 1e-3, "patience": 0.15}, {"shape": (128, 128), "sample": 16}),
    "default": ({"shape": (256, 1792), "rounds": 3, "min_seconds": 1e-3, "patience": 0.15}, {"shape": (128, 128), "sample": 16}),
    "full": ({"shape": FULL, "rounds": 5, "min_seconds": 0.01, "patience": 20.0}, {"shape": (1024, 1024)}),
}


class _Times(Book):
    metrics = {"time": "s", **{metric: "1" for metric in OVER.values()}}


class _Gap(Book):
    metrics = {"time": "s", SHORTFALL: "fraction", FASTER: "1"}


class Survey(NamedTuple):
    """What ``survey`` found: rows, and the structures that have none with the reason."""

    rows: list[Measurement]
    slow: dict[str, str]


def first(kinds: Mapping[str, type[Structure]], shape: Shape) -> list[Structure]:
    """Of every kind the first of ``variants`` that divides a weight ``[out, in]`` of this shape."""
    return [item for kind in kinds.values() for item in [item for item in kind.variants() if _fits(item, shape)][:1]]


def _fits(structure: Structure, shape: Shape) -> bool:
    try:
        return structure.nnz(shape) > 0
    except ValueError:
        return False


def survey(structures: Iterable[Structure], **settings: object) -> Survey:
    """``times`` of several structures; those for which its ``patience`` is not enough are named."""
    rows, slow = [], {}
    for structure in structures:
        try:
            rows += times(structure, **settings)
        except Unavailable as reason:
            slow[str(structure)] = str(reason)
    return Survey(rows, slow)


def times(structure: Structure, shape: Shape, *, dtype: str = "float32", device: str = "cpu", threads: int = 1, record: str = "",
          rounds: int = 5, min_seconds: float = 0.01, patience: float = inf) -> list[Measurement]:
    """Time what chooses and stores a random weight ``[out, in]``, in the same rounds as what it is compared with: rows.

    Methods: "select" (on scores that are there), "mask" (with its checks), "pack" (of a member; where there is no mask,
    "pack" chooses as well, and is alone); and as baselines "read" (``weight.sum()``) and, for n of every m inputs of
    one output, "topk" (``torch.topk`` over the same groups). Metrics: "time" (s); "reads of the weight", "times topk",
    "times selecting" (1): the time over that of "read", "topk" or "select", round by round.

    A structure that needs more than ``patience`` seconds to choose and pack once is Unavailable; parts of the weight
    are tried before, so that finding this out is quick. ValueError for a shape that the structure does not divide, and
    for other bad input.
    """
    shape, where, at = _check(structure, shape, dtype, device, threads)
    with cpu_threads(threads), torch.no_grad():
        book = _Times(str(structure), type(structure).__module__, at, Machine.current(device), CHAPTER, record)
        if not book.rows([PACK], OVER[READ]):  # written last
            weight = _weight(shape, dtype, where)
            _try(structure, weight, patience)
            _write(book, measure.compare(_runs(structure, weight), READ, rounds, min_seconds, device))
        return book.rows([READ, TOPK, SELECT, MASK, PACK])


def _check(structure: Structure, shape: Shape, dtype: str, device: str, threads: int) -> tuple[Shape, torch.device, dict]:
    if not isinstance(structure, Structure):
        raise ValueError(f"structure must be a Structure such as NM(2, 4), got {structure!r}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    check_int("threads", threads, 1)
    shape = structure.check_shape(shape)
    return shape, measure.check_device(device), {"out": shape[0], "in": shape[1], "dtype": dtype, "threads": threads}


@lru_cache(maxsize=1)
def _weight(shape: Shape, dtype: str, device: torch.device) -> Tensor:
    """A random weight ``[out, in]``, the same on every machine."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, DTYPES[dtype])


def _try(structure: Structure, weight: Tensor, patience: float) -> None:
    """Raise Unavailable if choosing and packing once takes longer, by parts of the weight first; the first warms up."""
    for number, part in enumerate((8, 8, 4, 2, 1) if patience < inf else ()):
        rows, cols = (max(step, size // part // step * step) for size, step in zip(weight.shape, structure.tile))
        start, some = perf_counter(), weight[:rows, :cols]
        structure.pack(structure.project(some) if isinstance(structure, Pattern) else some)
        if weight.is_cuda:
            torch.cuda.synchronize(weight.device)
        if number and (perf_counter() - start) * part > patience:
            raise Unavailable(f"needs more than {patience:g} s to choose and pack [{weight.shape[0]} x {weight.shape[1]}] once")


def _runs(structure: Structure, weight: Tensor) -> dict[str, Callable[[], object]]:
    """What is timed, by name, on operands that are made here."""
    if not isinstance(structure, Pattern):
        return {READ: weight.sum, PACK: lambda: structure.pack(weight)}
    scores = weight.abs()
    member = weight * structure.select(scores)
    runs = {READ: weight.sum, SELECT: lambda: structure.select(scores), MASK: lambda: structure.mask(scores),
            PACK: lambda: structure.pack(member)}
    n, m = getattr(structure, "n", None), getattr(structure, "m", None)
    if n and structure.tile == (1, m):
        runs[TOPK] = lambda: scores.view(-1, m).topk(n)
    return runs


def _write(book: Book, found: Mapping[str, Timing]) -> None:
    """Rows of every run; the one that says that all are there goes last."""
    for method, timing in found.items():
        book.add(method, "time", "s", timing.seconds, timing.low, timing.high)
    pairs = [(SELECT, TOPK), (PACK, SELECT), *((method, READ) for method in (SELECT, MASK, PACK))]
    for method, over in pairs:
        if method in found and over in found:
            _add_ratio(book, method, OVER[over], found[method].samples, found[over].samples)


def _add_ratio(book: Book, method: str, metric: str, above: Iterable[float], below: Iterable[float], scale: float = 1) -> None:
    ratios = scale * np.divide(above, below)
    book.add(method, metric, "1", *np.quantile(ratios, (0.5, 0.2, 0.8)).tolist())


def against_optimum(structure: Pattern, optimum: Callable[[Tensor, int], Tensor], shape: Shape, *, sample: int | None = None,
                    threads: int = 1, record: str = "", rounds: int = 3) -> list[Measurement]:
    """What a structure's choice misses of an exact solver's, tile by tile, and how much faster it is: rows, on the CPU.

    ``optimum`` takes tiles ``[tiles, m, m]`` and n, as ``transposable.linear_program`` does. It is slow, so that it is
    given ``sample`` of the tiles of an fp32 weight ``[out, in]``, evenly spread (None: all), and its time is scaled to all of
    them. Rows: "time" (s) of method "select" for all tiles, and of "optimum" for the sample; "below the optimum"
    (fraction), 1 minus what is kept of the sample over what can be; "times as fast as the optimum" (1).
    """
    shape, where, at = _check(structure, shape, "float32", "cpu", threads)
    scores = _weight(shape, "float32", where).abs()
    tiled = tiles(scores, *structure.tile).flatten(0, 1)
    count = len(tiled) if sample is None else min(sample, len(tiled))
    check_int("sample", count, 1)
    chosen = torch.linspace(0, len(tiled) - 1, count).round().long()
    with cpu_threads(threads), torch.no_grad():
        source = f"{type(structure).__module__},{optimum.__module__}"
        book = _Gap(str(structure), source, {**at, "tiles": count}, Machine.current("cpu"), CHAPTER, record)
        if not book.rows([SELECT], FASTER):
            some, best = tiled[chosen], {}
            runs = {SELECT: lambda: structure.select(scores), OPTIMUM: lambda: best.update(mask=optimum(some, structure.n))}
            found = measure.compare(runs, OPTIMUM, rounds, 1e-3)
            for method, timing in found.items():
                book.add(method, "time", "s", timing.seconds, timing.low, timing.high)
            mine = tiles(structure.select(scores), *structure.tile).flatten(0, 1)[chosen]
            kept, most = (float((some.double() * mask).sum()) for mask in (mine, best["mask"]))
            book.add(SELECT, SHORTFALL, "fraction", *[1 - kept / most] * 3)
            _add_ratio(book, SELECT, FASTER, found[OPTIMUM].samples, found[SELECT].samples, len(tiled) / count)
        return book.rows([SELECT, OPTIMUM])


@dataclass(frozen=True)
class Target:
    """A bound that this survey sets itself, for a row at this shape in fp32 on one thread of a CPU."""

    structure: str
    method: str
    metric: str
    most: float = inf
    least: float = -inf
    shape: Shape = FULL

    def fits(self, row: Measurement) -> bool:
        where = {"out": self.shape[0], "in": self.shape[1], "dtype": "float32", "threads": 1}
        return row.machine.device == "cpu" and where.items() <= row.at.items() and (
            row.structure, row.method, row.metric) == (self.structure, self.method, self.metric)


TARGETS = (
    Target("2:4", SELECT, OVER[TOPK], 2), Target("4:8", SELECT, OVER[TOPK], 2),
    Target("2:4", PACK, OVER[SELECT], 2), Target("4:8", PACK, OVER[SELECT], 2),
    Target("block 32x32 50%", SELECT, OVER[READ], 10), Target("64:2:8", SELECT, OVER[READ], 30),
    Target("transposable 8:16", SELECT, SHORTFALL, most=0.005, shape=(1024, 1024)),
    Target("transposable 8:16", SELECT, FASTER, least=10, shape=(1024, 1024)),
)


def targets(rows: Iterable[Measurement], wanted: Iterable[Target] = TARGETS) -> pd.DataFrame:
    """Which targets the rows meet: what was allowed, what was found, where."""
    rows, lines = list(rows), []
    for target in wanted:
        limit = f"at most {target.most:g}" if target.most < inf else f"at least {target.least:g}"
        common = {"structure": target.structure, "what": target.method, "in": target.metric, "target": limit}
        lines += [{**common, "found": spread(row), "met": "yes" if target.least <= row.value <= target.most else "no",
                   "measured": measured(row)} for row in rows if target.fits(row)] or [
                       {**common, "found": "", "met": "not measured", "measured": ""}]
    return unnumbered(pd.DataFrame(lines))


def spread(row: Measurement) -> str:
    """A ratio with its range.

    >>> from types import SimpleNamespace
    >>> spread(SimpleNamespace(value=12.345, low=11.9, high=13.04)), spread(SimpleNamespace(value=2, low=2, high=2))
    ('12.3 (11.9 to 13)', '2')
    """
    return f"{row.value:.3g}" + f" ({row.low:.3g} to {row.high:.3g})" * (row.low < row.high)


COLUMNS = {(SELECT, OVER[READ]): "select", (PACK, OVER[READ]): "pack", (SELECT, OVER[TOPK]): "select / topk",
           (PACK, OVER[SELECT]): "pack / select"}


def table(rows: Iterable[Measurement]) -> pd.DataFrame:
    """One line a structure and machine: selecting and packing in reads of the weight, beside topk and beside each other."""
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        if (row.method, row.metric) in COLUMNS:
            line = lines.setdefault((row.structure, measured(row)), dict.fromkeys(COLUMNS.values(), ""))
            line[COLUMNS[row.method, row.metric]] = f"{row.value:.3g}"
    return unnumbered(pd.DataFrame([{"structure": name, **line, "measured": where} for (name, where), line in lines.items()]))


def shares(rows: Iterable[Measurement], roofline: Roofline, tokens: int = 8192, every: Iterable[int] = (1, 10, 100)) -> pd.DataFrame:
    """What choosing adds to a training step that refreshes the mask every so many steps, one line a structure.

    It is the time to select (without a mask: to pack) over the least that the dense layer's three products take,
    6 * tokens * out * in FLOP at the roofline's peak, which should be that of the machine and threads of the rows.
    """
    every, lines = list(every), {}
    for row in rows:
        if row.metric == "time" and row.method in (SELECT, PACK) and (row.method == SELECT or row.structure not in lines):
            step = 6 * tokens * row.at["out"] * row.at["in"] / roofline.flops_per_second
            lines[row.structure] = {f"every {count}" if count > 1 else "every step": row.value / count / step for count in every}
    frame = pd.DataFrame.from_dict(lines, orient="index")
    return frame.sort_values(frame.columns[0]) if lines else frame


def draw(rows: Iterable[Measurement]) -> Figure:
    """What choosing and packing cost, in reads of the weight: a line a structure, a panel a machine and shape.

    A circle to select, a square to pack (of a structure without a mask: to choose and pack), hollow where the row is stale.
    """
    rows = [row for row in rows if row.metric == OVER[READ] and row.method in (SELECT, PACK)]
    panels = {f"{', '.join(title.split(', ')[:-1])}\n{title.split(', ')[-1]}\n[{shape[0]} x {shape[1]}] {shape[2]}, {shape[3]} thread{'s' * (shape[3] > 1)}": mine
              for title, group in by_machine(rows).items() for shape, mine in _by_shape(group).items()}
    if not panels:
        return empty("choosing has not been timed yet")
    cost: dict[str, tuple[int, float]] = {}  # on the largest weight
    for row in rows:
        cost[row.structure] = max((row.at["out"] * row.at["in"], row.value), cost.get(row.structure, (0, 0.0)))
    names = sorted(cost, key=lambda name: cost[name][1])
    figure, axes = plt.subplots(1, len(panels), figsize=(7.4, 1.3 + 0.235 * len(names)), sharex=True, sharey=True, squeeze=False)
    for ax, (title, mine) in zip(axes[0], panels.items()):
        _draw_panel(ax, mine, names)
        ax.set_title(title, fontsize=8)
    axes[0, 0].set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.4, -0.6))
    axes[0, 0].tick_params(axis="y", labelsize=8)
    figure.supxlabel("reads of the weight, log scale (one read: weight.sum())", fontsize=9)
    handles = [plt.Line2D([], [], color="#333333", marker=MARKS[method], linestyle="", label=method) for method in MARKS]
    figure.legend(handles=handles, loc="outside upper right", ncols=2, fontsize=8)
    return figure


MARKS = {SELECT: "o", PACK: "s"}


def _by_shape(rows: Iterable[Measurement]) -> dict[tuple, list[Measurement]]:
    found: dict[tuple, list[Measurement]] = {}
    for row in rows:
        found.setdefault(tuple(row.at[key] for key in ("out", "in", "dtype", "threads")), []).append(row)
    return found


def _draw_panel(ax: Axes, rows: Iterable[Measurement], names: list[str]) -> None:
    for row in rows:
        place, tint = names.index(row.structure), colour(row.structure)
        ax.errorbar(row.value, place, xerr=[[row.value - row.low], [row.high - row.value]], color=tint, elinewidth=1, capsize=2,
                    marker=MARKS[row.method], markersize=5, markerfacecolor="white" if row.stale else tint)
    ax.axvline(1, color="#555555", linewidth=1, linestyle=":")
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(lambda reads, _: f"{reads:g}")
