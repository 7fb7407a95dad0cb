"""What a page says of products on a GPU: bounds, kernels and whether they ever ran on one, and rows against a roofline."""

import re
from collections.abc import Iterable, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from sparsesurvey import figures
from sparsesurvey.benchmark import DTYPES, ENERGY
from sparsesurvey.records import Measurement
from sparsesurvey.roofline import COPY, LAUNCH, MATMUL, Roofline
from sparsesurvey.structure import PRODUCTS, Cost, Shape, Structure
from sparsesurvey.tables import amount, measured, unnumbered
from sparsesurvey.targets import OURS, Target, Verdict, verdicts

NAMES = {"spmm": "forward", "spmmt": "input gradient", "sddmm": "weight gradient"}
NEVER = "never run on a GPU"


def is_ours(kernel: str) -> bool:
    return kernel.split("_")[0] in OURS


def worth_timing(structure: Structure, device: str) -> list[str]:
    """The kernels of a forward product that a page times live: for a GPU those of ours and torch's, on a CPU the best and torch's."""
    words = (*OURS, "torch") if device != "cpu" else ("gather", "torch")
    return [name for name in structure.kernels() if name.split("_")[0] in words and not name.endswith(("_csr", "_searched"))]


def bounds(structures: Sequence[Structure], shape: Shape, tokens: Sequence[int], roofline: Roofline) -> pd.DataFrame:
    """Bound on the speed-up over dense in bf16 by structure and number of tokens: what tensor cores can skip, or bytes."""
    lines = {str(item): {f"{count} token{'s' * (count > 1)}": roofline.over_dense(item, shape, count) for count in tokens}
             for item in structures}
    return pd.DataFrame.from_dict(lines, orient="index")


def fusion(shape: Shape, tokens: int, densities: Iterable[float], roofline: Roofline, itemsize: int = 2) -> pd.DataFrame:
    """Least microseconds of a gated MLP with gate and up ``[hidden, in]`` in blocks, by how much of it is one kernel.

    Apart: three products, and the activation reads two matrices and writes one. First half: gate, up and activation are one
    kernel, which reads x once and writes the hidden activations once. Whole: these are never written.
    """
    (hidden, inn), lines = shape, {}
    for density in densities:
        weight = round(density * hidden * inn)
        step = lambda weights, read, written: roofline.bound(
            Cost(2 * tokens * weights * weight, weights * weight * itemsize, tokens * (read + written) * itemsize))
        apart = 3 * step(1, inn, hidden) + step(0, 2 * hidden, hidden)
        lines[f"{density:.0%} kept"] = {"apart": apart, "first half": step(2, inn, hidden) + step(1, hidden, inn),
                                        "whole": step(3, inn, inn)}
    return 1e6 * pd.DataFrame.from_dict(lines, orient="index")


def one_kernel(shape: Shape, tokens: int, densities: Iterable[float], roofline: Roofline, side: int = 128, l2: float = 5.5e12,
               itemsize: int = 2) -> pd.DataFrame:
    """Least microseconds of a gated MLP in blocks of ``side``, in two kernels and in one, when fetching from L2 counts as well.

    Every block is fetched anew for each tile of tokens, with its piece of the activations where these are not in registers:
    for 128 tokens in the first half and 256 in down; for 64 where one kernel has the sums of all outputs in registers.
    """
    (hidden, inn), lines = shape, {}
    for density in densities:
        weight = round(density * hidden * inn)
        least = lambda weights, moved: roofline.bound(
            Cost(2 * tokens * weights * weight, weights * weight * itemsize, tokens * moved * itemsize))
        fetched = lambda tile, weights: tokens / tile * weight / side**2 * (tile * side + weights * side**2) * itemsize / l2
        two = max(least(2, inn + hidden), fetched(128, 2)) + max(least(1, hidden + inn), fetched(256, 1))
        one = max(least(3, 2 * inn), fetched(64, 3))
        lines[f"{density:.0%} kept"] = {"two kernels": 1e6 * two, "one kernel": 1e6 * one, "times faster": two / one}
    return pd.DataFrame.from_dict(lines, orient="index")


def reuse(heights: Iterable[int], tile: int = 256, shared: float = 30e12, l2: float = 5.5e12, peak: float = 790e12) -> pd.DataFrame:
    """FLOP/s that on-chip memory permits where a kept piece is so many rows high, and the sparsity at which it equals dense.

    An activation that is read from shared memory serves the rows of its piece, 2 FLOP each for 2 bytes: at most height x
    ``shared``. A tile of height x ``tile`` fetches height + tile numbers a step from L2 for 2 x height x tile FLOP.
    """
    lines = {}
    for height in heights:
        rate = min(height * shared, l2 * height * tile / (height + tile), peak)
        lines[f"{height} rows"] = {"shared memory": height * shared, "L2": l2 * height * tile / (height + tile), "both": rate,
                                   "breaks even at": max(0.0, 1 - rate / peak)}
    frame = pd.DataFrame.from_dict(lines, orient="index")
    return frame.assign(**{name: [amount(value, "FLOP/s") for value in frame[name]] for name in ("shared memory", "L2", "both")},
                        **{"breaks even at": [f"{value:.0%} sparse" for value in frame["breaks even at"]]})


# ---- which kernels there are


def kernels(kinds: Mapping[str, type[Structure]], rows: Iterable[Measurement]) -> pd.DataFrame:
    """One line a kind of structure with kernels of ours for a GPU: by product, and whether each was ever right on one."""
    passed, lines = passes(rows), {}
    for name, kind in kinds.items():
        structure, line = kind(), {}
        for product in PRODUCTS:
            ours = [kernel for kernel in structure.kernels(product) if is_ours(kernel)]
            line[NAMES[product]] = ", ".join(f"{kernel}: {passed.get((kind.__module__, product, kernel), NEVER)}" for kernel in ours)
        if any(line.values()):
            lines[name] = line
    return pd.DataFrame.from_dict(lines, orient="index", columns=list(NAMES.values()))


def passes(rows: Iterable[Measurement]) -> dict[tuple[str, str, str], str]:
    """By module, product and kernel: where and when a GPU was last found to give the right numbers, from "relative error"."""
    found: dict[tuple[str, str, str], Measurement] = {}
    for row in sorted(rows, key=lambda row: row.date):
        if row.metric == "relative error" and row.machine.device == "cuda":
            for module in row.source.split(","):
                found[module, row.at.get("product", ""), row.method] = row
    return {key: f"right on {row.machine} {row.date[:10]}{', stale' if row.stale else ''}" for key, row in found.items()}


def aims(rows: Iterable[Measurement]) -> pd.DataFrame:
    """The targets, machine by machine; without a row of a GPU, each as not measured."""
    by_machine: dict[str, list[Measurement]] = {}
    for row in rows:
        if row.machine.device == "cuda":
            by_machine.setdefault(str(row.machine), []).append(row)
    if not by_machine:
        return verdict_table("", verdicts([]))
    return pd.concat([verdict_table(name, verdicts(mine)) for name, mine in by_machine.items()])


def verdict_table(machine: str, found: Iterable[Verdict]) -> pd.DataFrame:
    """A line a target: what, at least, measured, met or not."""
    lines = [{"target": item.what, "at least": f"{item.least:g}", "measured": "" if item.value is None else f"{item.value:.2f}",
              "": item.word, **({"machine": machine} if machine else {})} for item in found]
    return unnumbered(pd.DataFrame(lines))


def plan(queue: Sequence, aimed: Iterable[Target]) -> pd.DataFrame:
    """How many cases a campaign has by kind; ``queue`` is ``campaign.cases()``."""
    first = {case for target in aimed for case in target.cases}
    kind = lambda case: "targets" if case in first else "gated MLP" if case.product == "mlp" else f"grid, {case.dtype}"
    counts = pd.Series([kind(case) for case in queue]).value_counts(sort=False)
    return counts.to_frame("cases").rename_axis(None)


# ---- rows against a roofline


def efficiency(rows: Iterable[Measurement], structures: Iterable[Structure], rooflines: Mapping[str, Roofline]) -> pd.DataFrame:
    """One line a timed kernel: useful and dense-equivalent rate, speed-up, share of the bound's speed, joules.

    Useful counts the arithmetic of the stored weights, dense-equivalent that of all. ``rooflines`` by machine slug.
    """
    known, groups = {str(item): item for item in structures}, _groups(rows)
    lines = []
    for metrics in groups.values():
        row, structure = metrics["time"], known.get(metrics["time"].structure)
        if structure is None or row.at.get("product") not in PRODUCTS:
            continue
        cost, whole = _costs(row, structure)
        roofline = rooflines.get(row.machine.slug)
        line = {"structure": row.structure, "kernel": row.method, "product": NAMES[row.at["product"]],
                "tokens x [out x in]": f"{row.at['tokens']} x [{row.at['out']} x {row.at['in']}]",
                "useful": amount(cost.flops / row.value, "FLOP/s"), "as dense": amount(whole.flops / row.value, "FLOP/s"),
                "over dense": amount(metrics["speedup"].value, "x") if "speedup" in metrics else "",
                "of the bound": f"{roofline.bound(cost) / row.value:.0%}" if roofline else "",
                "energy": amount(metrics[ENERGY].value, "J") if ENERGY in metrics else "", "measured": measured(row)}
        lines.append(line)
    frame = unnumbered(pd.DataFrame(lines))
    return frame if len(frame) == 0 or frame["energy"].any() else frame.drop(columns="energy")


def break_even(rows: Iterable[Measurement], structures: Iterable[Structure]) -> pd.DataFrame:
    """The density at which a kernel is as fast as dense, from its speed-ups at the densities around it (straight in logs)."""
    known, found = {str(item): item for item in structures}, {}
    for row in rows:
        if row.metric == "speedup" and row.structure in known and row.at.get("product") in PRODUCTS and row.method.split()[0] != "dense":
            item, shape = known[row.structure], (row.at["out"], row.at["in"])
            kind = re.sub(r" ?[\d.]+%$", "", row.structure)
            how = ", ".join(str(row.at[name]) for name in ("dtype", "cache") if name in row.at)
            where = f"{row.machine}, {row.origin} {row.date[:10]}"
            case = kind, row.method, NAMES[row.at["product"]], f"{row.at['tokens']} x [{shape[0]} x {shape[1]}] {how}", where
            found.setdefault(case, {})[item.nnz(shape) / (shape[0] * shape[1])] = row.value
    columns = ["structure", "kernel", "product", "tokens x [out x in]", "measured"]
    lines = [{**dict(zip(columns, case)), "breaks even at": _crossing(gains)} for case, gains in found.items()]
    return unnumbered(pd.DataFrame(lines, columns=[*columns, "breaks even at"]))


def _crossing(gains: Mapping[float, float]) -> str:
    """Where speed-ups by density fall through 1."""
    points = sorted(gains.items())
    for (low, fast), (high, slow) in zip(points, points[1:]):
        if fast >= 1 > slow:
            return f"{float(np.exp(np.interp(0, np.log([slow, fast]), np.log([high, low])))):.0%} kept"
    return f"above {points[-1][0]:.0%} kept" if points[-1][1] >= 1 else f"below {points[0][0]:.0%} kept"


def _groups(rows: Iterable[Measurement]) -> dict[tuple, dict[str, Measurement]]:
    """The rows of one kernel in one case, by metric; those without a time left out."""
    found: dict[tuple, dict[str, Measurement]] = {}
    for row in rows:
        if "product" in row.at:
            found.setdefault((row.origin, *row.subject[1:]), {})[row.metric] = row
    return {key: metrics for key, metrics in found.items() if "time" in metrics}


def _costs(row: Measurement, structure: Structure) -> tuple[Cost, Cost]:
    """What the row's product must do, and what the dense one must."""
    shape, tokens = (row.at["out"], row.at["in"]), row.at["tokens"]
    itemsize = DTYPES[row.at["dtype"]].itemsize
    cost = structure.cost(shape, tokens, itemsize)
    whole = Cost(2 * tokens * shape[0] * shape[1], shape[0] * shape[1] * itemsize, cost.io_bytes)
    return (whole if row.method.split()[0] == "dense" else cost), whole


def rooflines(rows: Iterable[Measurement]) -> dict[str, Roofline]:
    """The measured roofline of every machine that has rows of ``benchmark.calibrate``, by its slug."""
    found: dict[str, list[Measurement]] = {}
    for row in rows:
        if row.metric in (COPY, MATMUL, LAUNCH):
            found.setdefault(row.machine.slug, []).append(row)
    whole = {slug: mine for slug, mine in found.items() if {row.metric for row in mine} == {COPY, MATMUL, LAUNCH}}
    return {slug: Roofline.measured(mine) for slug, mine in whole.items()}


def draw_roofline(rows: Iterable[Measurement], structures: Iterable[Structure], measured_: Mapping[str, Roofline]) -> Figure:
    """Useful FLOP/s against FLOP a byte, a panel a machine, live and recorded: kernels as points below the machine's roof."""
    known = {str(item): item for item in structures}
    panels = figures.by_machine(row for row in rows if row.metric == "time" and row.structure in known and row.at.get("product") in PRODUCTS)
    if not panels:
        return figures.empty("no product has been timed yet")
    figure, axes = plt.subplots(1, len(panels), figsize=(3.6 + 3.6 * len(panels), 3.8), squeeze=False)
    for ax, (title, group) in zip(axes[0], panels.items()):
        roof, points = measured_.get(group[0].machine.slug), []
        for row in group:
            cost = _costs(row, known[row.structure])[0]
            name = "dense" if row.method.split()[0] == "dense" else row.structure
            points.append((cost.intensity, cost.flops / row.value))
            ax.plot(*points[-1], marker="o" if is_ours(row.method) or row.method == "gather" else "s", color=figures.colour(name),
                    markerfacecolor="white" if row.stale else figures.colour(name), linestyle="")
        if roof:
            seen = [roof.ridge, *(point[0] for point in points)]
            reach = np.geomspace(min(seen) / 3, 3 * max(seen), 60)
            ax.plot(reach, np.minimum(roof.flops_per_second, reach * roof.bytes_per_second), color="black", linewidth=1)
        ax.set(xscale="log", yscale="log", xlabel="FLOP per byte", title=title)
        ax.xaxis.set_major_formatter(lambda ratio, _: f"{ratio:g}")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(lambda rate, _: amount(rate, "FLOP/s"))
        ax.yaxis.set_minor_formatter(NullFormatter())
    axes[0, 0].set_ylabel("useful FLOP/s")
    names = list(dict.fromkeys(figures.family(row.structure) for group in panels.values() for row in group))
    handles = [plt.Line2D([], [], color=figures.colour(name), marker="P", linestyle="", label=name) for name in dict.fromkeys(["dense", *names])]
    handles += [plt.Line2D([], [], color="#333333", marker=mark, linestyle="", label=text) for mark, text in (("o", "ours"), ("s", "a library's"))]
    figure.legend(handles=handles, loc="outside upper right", ncols=5, fontsize=8)
    return figure
