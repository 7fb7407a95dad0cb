"""What a page says of the speed of training: steps and their parts, and the time until a loss is reached."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparsesurvey import figures
from sparsesurvey.records import Measurement, Scalar
from sparsesurvey.roofline import A100, H100, H200, MATMUL, Roofline
from sparsesurvey.steptime import GAIN, PARTS, STEP, STORED, TIME, WORK
from sparsesurvey.tables import amount, measured, unnumbered
from sparsesurvey.targets import Verdict

LOSS, SECONDS = "validation loss", "training time"
TRAINER = "transformers Trainer"  # a method, beside "dense"
NAMEPLATES = {"H200": H200, "H100": H100, "A100": A100}
TINTS = dict(zip(PARTS, ("#0072B2", "#009E73", "#E69F00", "#CC79A7", "#bbbbbb")))


# ---- steps


def steps(rows: Iterable[Measurement]) -> list[dict[str, Measurement]]:
    """The rows of each kind of step that was taken apart, by metric, and by part where that is a time; the dense ones first."""
    found: dict[tuple, dict[str, Measurement]] = {}
    for row in rows:
        if row.metric in (TIME, GAIN, WORK, STORED):
            at = tuple(sorted((name, value) for name, value in row.at.items() if name != "part"))
            mine = found.setdefault((row.origin, row.machine.slug, row.structure, row.method, at), {})
            mine[row.at["part"] if row.metric == TIME else row.metric] = row
    whole = [mine for mine in found.values() if STEP in mine]
    return sorted(whole, key=lambda mine: (mine[STEP].origin, mine[STEP].machine.slug, mine[STEP].method != "dense"))


def rate(mine: Mapping[str, Measurement]) -> float:
    """Tokens a second."""
    row = mine[STEP]
    return row.at["batch"] * row.at["seq"] / row.value


def nameplate(row: Measurement) -> Roofline | None:
    """The datasheet of the row's GPU, quoted, where we know it."""
    return next((sheet for name, sheet in NAMEPLATES.items() if name in row.machine.name), None) if row.machine.device == "cuda" else None


def utilisation(mine: Mapping[str, Measurement], peak: float) -> float | None:
    """Model FLOP utilisation: the arithmetic of the stored weights over what ``peak`` FLOP/s would do in that time."""
    return mine[STORED].value / mine[STEP].value / peak if STORED in mine else None


def step_table(rows: Iterable[Measurement], peaks: Iterable[Measurement] = ()) -> pd.DataFrame:
    """One line a kind of step: tokens a second, over dense, what its parts take, and the share of the machine's peak.

    ``peaks``: rows of ``benchmark.calibrate``, of which the best matmul rate of a machine is its own peak; a datasheet's is
    named as such.
    """
    best: dict[str, float] = {}
    for row in peaks:
        if row.metric == MATMUL:
            best[row.machine.slug] = max(best.get(row.machine.slug, 0.0), row.high)
    lines = []
    for mine in steps(rows):
        row, sheet = mine[STEP], nameplate(mine[STEP])
        share = lambda peak: "" if peak is None or utilisation(mine, peak) is None else f"{utilisation(mine, peak):.1%}"
        lines.append({
            "structure": row.structure, "method": row.method, "model": row.at["model"],
            "tokens/s": f"{rate(mine):,.0f}", "over dense": amount(mine[GAIN].value, "x", mine[GAIN].low, mine[GAIN].high) if GAIN in mine else "",
            **{part: amount(mine[part].value, "s") if part in mine else "" for part in (STEP, *PARTS)},
            "of the datasheet's peak": share(sheet and sheet.flops_per_second), "of the measured peak": share(best.get(row.machine.slug)),
            "measured": measured(row)})
    frame = unnumbered(pd.DataFrame(lines))
    empty = [name for name in frame.columns if name.startswith("of the") and not frame[name].any()]
    return frame.drop(columns=empty)


def draw_steps(rows: Iterable[Measurement]) -> Figure:
    """Milliseconds of a step by part, a bar a kind of step, a panel a machine and model."""
    panels: dict[str, list[Mapping[str, Measurement]]] = {}
    for mine in steps(rows):
        row = mine[STEP]
        if all(part in mine for part in PARTS):
            panels.setdefault(f"{row.machine}, {row.origin} {row.date[:10]}: {row.at['model']}, {row.at['batch']} x {row.at['seq']} tokens",
                              []).append(mine)
    if not panels:
        return figures.empty("no step has been taken apart yet")
    heights = [1.2 + len(group) for group in panels.values()]
    figure, axes = plt.subplots(len(panels), 1, figsize=(7.6, 0.6 + 0.42 * sum(heights)), squeeze=False, height_ratios=heights)
    for ax, (title, group) in zip(axes[:, 0], panels.items()):
        names = [f"{mine[STEP].structure}\n{mine[STEP].method}" if mine[STEP].method != "dense" else "dense" for mine in group]
        left = np.zeros(len(group))
        for part in PARTS:
            widths = 1e3 * np.array([max(0.0, mine[part].value) for mine in group])  # the rest may be below zero by noise
            ax.barh(range(len(group)), widths, left=left, color=TINTS[part], edgecolor="white", linewidth=0.5, label=part)
            left += widths
        for place, (mine, end) in enumerate(zip(group, left)):
            stale = ", stale" if mine[STEP].stale else ""
            ax.annotate(f"{rate(mine):,.0f} tokens/s{stale}", (end, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
        ax.set(yticks=range(len(group)), yticklabels=names, xlabel="milliseconds of a step", title=title, xlim=(0, 1.3 * left.max()))
        ax.tick_params(axis="y", labelsize=8)
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(PARTS), fontsize=8)
    return figure


# ---- time to a loss


@dataclass(frozen=True)
class Course:
    """What one run had reached when: seconds of training, and the validation loss then."""

    row: Measurement  # of its last loss
    seconds: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def name(self) -> str:
        return "dense" if self.row.method == "dense" else f"{self.row.structure}, {self.row.method}"

    @property
    def masked(self) -> bool:
        """Are its products dense ones with a mask? Then its time is no structure's."""
        return self.row.method != "dense" and not KERNELS.intersection(self.row.method.replace(",", "").split())

    @property
    def task(self) -> tuple[Scalar, ...]:
        """Runs with the same compare: machine, model, text."""
        row = self.row
        return row.origin, row.machine.slug, row.at["model"], row.at["language"], row.at["corpus"]

    def seconds_to(self, loss: float) -> float:
        """Seconds until the loss was at most so large, straight between two validations; infinite if it never was."""
        for number, value in enumerate(self.losses):
            if value <= loss:
                if number == 0:
                    return self.seconds[0]
                before = self.losses[number - 1]
                share = (before - loss) / (before - value) if before > value else 1.0
                return self.seconds[number - 1] + share * (self.seconds[number] - self.seconds[number - 1])
        return inf


KERNELS = {"triton", "cuda", "cusparselt", "gather"}  # words of the methods that multiply by the stored weights alone


def courses(rows: Iterable[Measurement]) -> list[Course]:
    """The runs whose losses and times are both known; those that shared their machine with others are left out, for they had
    less of it than they seem to have."""
    found: dict[tuple, tuple[dict, dict]] = {}
    for row in rows:
        if row.metric in (LOSS, SECONDS) and row.at.get("beside", 1) == 1 and row.at.get("processes", 1) == 1 and "step" in row.at:
            at = tuple(sorted((name, value) for name, value in row.at.items() if name not in ("step", "tokens", "beside")))
            losses, times = found.setdefault((row.origin, row.machine.slug, row.structure, row.method, row.code, at), ({}, {}))
            (losses if row.metric == LOSS else times)[row.at["step"]] = row
    made = []
    for losses, times in found.values():
        at = sorted(step for step in losses if step == 0 or step in times)
        if len(at) > 1:
            made.append(Course(losses[at[-1]], tuple(times[step].value if step else 0.0 for step in at),
                               tuple(losses[step].value for step in at)))
    return made


def references(found: Iterable[Course]) -> dict[tuple, Course]:
    """Of each task the dense run that ends at the least loss."""
    best: dict[tuple, Course] = {}
    for course in found:
        if course.row.method == "dense" and (course.task not in best or course.losses[-1] < best[course.task].losses[-1]):
            best[course.task] = course
    return best


def frontier(rows: Iterable[Measurement]) -> pd.DataFrame:
    """One line a run: its last loss, its seconds, those to the last loss of the best dense run, and how many times faster
    than dense it was there; empty where it never was there."""
    found = courses(rows)
    best, lines = references(found), []
    for course in sorted(found, key=lambda course: (course.task, course.seconds[-1])):
        dense, row = best.get(course.task), course.row
        goal = dense.losses[-1] if dense else None
        there = course.seconds_to(goal) if dense else inf
        lines.append({
            "run": course.name, "model": row.at["model"], "optimizer": f"{row.at['optimizer']} {row.at['lr']:.2g}", "seed": row.at["seed"],
            "steps": row.at["step"], f"loss, {row.unit}": round(course.losses[-1], 4), "after": amount(course.seconds[-1], "s"),
            "to dense's loss": amount(there, "s") if there < inf else "",
            "over dense": amount(dense.seconds_to(goal) / there, "x") if there < inf else "",
            "": "masked: no structure's time" if course.masked else "", "measured": measured(row)})
    return unnumbered(pd.DataFrame(lines))


def draw_frontier(rows: Iterable[Measurement], ax: Axes | None = None) -> Axes:
    """Validation loss against seconds of training, a line a run; dotted what is masked, and level the last loss of the best
    dense run: who crosses that line left of where dense ends is ahead. One task (machine, model, text), that with most runs."""
    by_task: dict[tuple, list[Course]] = {}
    for course in courses(rows):
        by_task.setdefault(course.task, []).append(course)
    ax = ax or plt.figure(figsize=(7.4, 4)).add_subplot()
    if not by_task:
        ax.text(0.5, 0.5, "no run with its time is recorded yet", ha="center", color="#555555")
        return ax
    group = max(by_task.values(), key=len)
    names = list(dict.fromkeys(course.name for course in group))
    tints = dict(zip(names, figures.shades(name.split(",")[0] for name in names)))
    for course in group:
        label = course.name if course.name in names else None
        names = [name for name in names if name != course.name]  # seeds share a line in the legend
        ax.plot(course.seconds[1:], course.losses[1:], ":" if course.masked else "-", color=tints[course.name], label=label,
                marker=".", markersize=3, linewidth=1 if course.masked else 1.6)
    dense = references(group).get(group[0].task)
    if dense:
        ax.axhline(dense.losses[-1], color=figures.COLOURS["dense"], linewidth=0.8, linestyle="--")
        ax.axvline(dense.seconds_to(dense.losses[-1]), color=figures.COLOURS["dense"], linewidth=0.8, linestyle="--")
    row = group[0].row
    ax.set(xlabel="seconds of training", ylabel=f"{LOSS}, {row.unit}", xscale="log",
           title=f"{'; '.join(figures.by_machine([course.row for course in group]))}: {row.at['model']}, {row.at['language']}")
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return ax


# ---- what must be reached


def verdicts(rows: Iterable[Measurement]) -> list[Verdict]:
    """The targets of training, from rows of one machine of the chapters "speed" and "training"; stale rows do not count."""
    rows = [row for row in rows if not row.stale]
    kinds = steps(rows)
    gpu = [mine for mine in kinds if mine[STEP].machine.device == "cuda" and mine[STEP].at["model"] == "162m"]
    cpu = [mine for mine in kinds if mine[STEP].machine.device == "cpu"]
    dense = [utilisation(mine, sheet.flops_per_second) for mine in gpu if mine[STEP].method == "dense" and (sheet := nameplate(mine[STEP]))]
    trainer = [1 / mine[GAIN].value for mine in cpu if mine[STEP].method == TRAINER]
    return [
        one("162M, dense: share of the datasheet's bf16 peak", 0.35, dense),
        one("162M, block 128, 90% sparse, fused: tokens/s over dense", 1.4, gains(gpu, ("block 128x128 10%",), ("fused",))),
        one("162M, 2:4 with sparse tensor cores: tokens/s over dense", 1.1, gains(gpu, ("2:4", "transposable 2:4"), ("cusparselt", "cuda"))),
        one("162M, time to dense's last loss over that of a sparse run", 1.0, ahead(rows, "162m")),
        one("CPU, block 64, 90% sparse, wide MLP: steps/s over dense", 1.5, gains(cpu, ("block 64x64 10%",), ("gather",))),
        one("CPU, dense: steps/s over transformers' Trainer", 0.9, trainer),
    ]


def one(what: str, least: float, values: Sequence[float]) -> Verdict:
    """The best of several: the target is that there is one."""
    return Verdict(what, least, max(values, default=None), len(values[:1]), 1)


def gains(kinds: Iterable[Mapping[str, Measurement]], structures: Iterable[str], words: Iterable[str]) -> list[float]:
    """Speed-ups over the dense step of these structures whose method has one of these words."""
    return [mine[GAIN].value for mine in kinds if GAIN in mine and mine[STEP].structure in structures
            and set(words) & set(mine[STEP].method.replace(",", "").split())]


def ahead(rows: Iterable[Measurement], model: str) -> list[float]:
    """How many times sooner sparse runs were at the last loss of dense; 0 for one that never was."""
    found = [course for course in courses(rows) if course.row.at["model"] == model and course.row.machine.device == "cuda"]
    best = references(found)
    goals = {task: dense.losses[-1] for task, dense in best.items()}
    return [best[course.task].seconds_to(goals[course.task]) / course.seconds_to(goals[course.task])
            for course in found if course.row.method != "dense" and course.task in best]
