"""What pages show of the speed of training: steps and their parts, and the time until a loss is reached."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import inf

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from sparsesurvey import figures
from sparsesurvey.records import Measurement
from sparsesurvey.roofline import MATMUL
from sparsesurvey.speed import LOSS, Course, courses, nameplate, rate, references, steps, utilisation
from sparsesurvey.steptime import GAIN, PARTS, STEP
from sparsesurvey.tables import amount, measured, unnumbered

TINTS = dict(zip(PARTS, ("#0072B2", "#009E73", "#E69F00", "#CC79A7", "#bbbbbb")))


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
            "tokens/s": f"{rate(mine):,.0f}",
            "over dense": amount(mine[GAIN].value, "x", mine[GAIN].low, mine[GAIN].high) if GAIN in mine else "",
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
            ax.annotate(f"{rate(mine):,.0f} tokens/s{stale}", (end, place), xytext=(4, 0), textcoords="offset points", va="center",
                        fontsize=8)
        ax.set(yticks=range(len(group)), yticklabels=names, xlabel="milliseconds of a step", title=title, xlim=(0, 1.3 * left.max()))
        ax.tick_params(axis="y", labelsize=8)
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(PARTS), fontsize=8)
    return figure


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


def kind(course: Course) -> tuple[str, object]:
    """Runs of one kind, which have one colour: at other rates they are pale, as other seeds they are the same."""
    return course.name, course.row.at.get("steps")


def lined(group: Sequence[Course]) -> Callable[[Course], str]:
    """What a run is called among others: its name, with its rate and its steps where they differ between runs."""
    several = {key for key in ("lr", "steps") if len({course.row.at.get(key) for course in group}) > 1}

    def name(course: Course) -> str:
        at = course.row.at
        more = (f", rate {at['lr']:.2g}" if "lr" in several else "") + (f", {at['steps']} steps" if "steps" in several else "")
        return course.name + more

    return name


def draw_frontier(rows: Iterable[Measurement], ax: Axes | None = None) -> Axes:
    """Validation loss against seconds of training, a line a run; dotted what is masked, and level the last loss of the best
    dense run: who crosses that line left of where dense ends is ahead. Pale are other learning rates than that run's. One task
    (machine, model, text), that with most runs."""
    by_task: dict[tuple, list[Course]] = {}
    for course in courses(rows):
        by_task.setdefault(course.task, []).append(course)
    ax = ax or plt.figure(figsize=(7.4, 4)).add_subplot()
    if not by_task:
        ax.text(0.5, 0.5, "no run with its time is recorded yet", ha="center", color="#555555")
        return ax
    group = max(by_task.values(), key=len)
    dense = references(group).get(group[0].task)
    best = dense.row.at.get("lr") if dense else None
    group.sort(key=lambda course: course.row.at.get("lr") != best)
    kinds = list(dict.fromkeys(map(kind, group)))
    tints, told = dict(zip(kinds, figures.shades(name.split(",")[0] for name, _ in kinds))), set()
    for course, name in zip(group, map(lined(group), group)):
        ax.plot(course.seconds[1:], course.losses[1:], ":" if course.masked else "-", color=tints[kind(course)],
                label=None if name in told else name, marker=".", markersize=3, linewidth=1 if course.masked else 1.6,
                alpha=1 if best in (None, course.row.at.get("lr")) else 0.35)
        told.add(name)  # seeds share a line in the legend
    if dense:
        ax.axhline(dense.losses[-1], color=figures.COLOURS["dense"], linewidth=0.8, linestyle="--")
        ax.axvline(dense.seconds_to(dense.losses[-1]), color=figures.COLOURS["dense"], linewidth=0.8, linestyle="--")
    row = group[0].row
    ax.set(xlabel="seconds of training", ylabel=f"{LOSS}, {row.unit}", xscale="log",
           title=f"{'; '.join(figures.by_machine([course.row for course in group]))}: {row.at['model']}, {row.at['language']}")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(lambda seconds, _: f"{seconds:g}")
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return ax
