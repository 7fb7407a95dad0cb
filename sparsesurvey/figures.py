"""Arrays and rows to matplotlib axes. A structure has the same colour in every figure of the book."""

import re
from collections.abc import Iterable, Mapping, Sequence
from zlib import crc32

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from torch import Tensor

from sparsesurvey.measure import Timing
from sparsesurvey.records import Measurement
from sparsesurvey.roofline import Roofline
from sparsesurvey.structure import Shape, Structure
from sparsesurvey.tables import above_dense, called

# The families that most figures show have Okabe and Ito's palette, which readers with any colour vision tell apart; nobody
# tells twenty colours apart, so figures of all structures name every line.
COLOURS = {
    "dense": "#555555", "unstructured": "#0072B2", "N:M": "#E69F00", "V:N:M": "#D55E00", "block": "#009E73",
    "balanced": "#56B4E9", "vector": "#66C2A5", "TW": "#CC79A7", "HiNM": "#A50F15", "hierarchical": "#006D2C",
    "transposable": "#A6761D", "double-pruned": "#E7298A", "permuted": "#66A61E", "TASD": "#8C6BB1", "int4": "#BC80BD",
    "diagonal": "#B5A100", "butterfly": "#3F007D", "monarch": "#08519C", "low-rank": "#808000", "neurons": "#111111",
}
OTHERS = ("#CC79A7", "#56B4E9", "#8C6BB1", "#A6761D", "#66A61E")


def style() -> None:
    """Set the book's look: crisp images in a notebook, thin axes, a light grid, tables whose text is not cut."""
    pd.set_option("display.max_colwidth", None)
    pd.set_option("display.max_rows", 250)
    plt.rcParams.update({
        "figure.constrained_layout.use": True, "figure.dpi": 100, "figure.figsize": (7.2, 3.4), "font.size": 10,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
        "grid.alpha": 0.25, "legend.frameon": False, "axes.titlesize": 10, "axes.titlelocation": "left",
    })
    try:
        from matplotlib_inline.backend_inline import set_matplotlib_formats
        set_matplotlib_formats("retina")
    except (ImportError, AttributeError):  # outside IPython there is no inline backend to set
        pass


def family(structure: str) -> str:
    """The family that a notation belongs to: ``2:4`` is N:M, ``2:4+2:8`` is TASD, ``block 8x8 50%`` is block.

    What stands behind a comma, a recipe's name, does not count.
    """
    structure = structure.partition(", ")[0]
    if re.fullmatch(r"\d+:\d+( out)?", structure):
        return "N:M"
    if re.fullmatch(r"\d+:\d+(\+\d+:\d+)+", structure):
        return "TASD"
    if re.fullmatch(r"\d+:\d+:\d+", structure):
        return "V:N:M"
    return structure.split()[0]


def colour(structure: str) -> str:
    """The colour of a structure's family; new families get one of their own from their name."""
    name = family(str(structure))
    return COLOURS.get(name) or OTHERS[crc32(name.encode()) % len(OTHERS)]


def shades(structures: Iterable[object]) -> list[tuple[float, float, float]]:
    """A colour for each, lighter from one member of a family to the next."""
    seen: dict[str, int] = {}
    found = []
    for structure in structures:
        rank = seen[family(str(structure))] = seen.get(family(str(structure)), -1) + 1
        found.append(tuple(1 - (1 - part) * 0.68**rank for part in to_rgb(colour(str(structure)))))
    return found


def pattern(structure: Structure, mask: Tensor, weight: Tensor | None = None, ax: Axes | None = None) -> Axes:
    """Draw a mask ``[out, in]``: kept weights coloured (darker = larger where ``weight`` is given), pruned ones empty."""
    ax = ax or plt.figure(figsize=(3.4, 3.4)).add_subplot()
    strength = np.ones(tuple(mask.shape)) if weight is None else _strength(weight)
    image = np.where(mask.numpy(), strength, 0.0)
    shades = LinearSegmentedColormap.from_list("kept", [(1, 1, 1), to_rgb(colour(str(structure)))])
    ax.imshow(image, cmap=shades, vmin=0, vmax=1, interpolation="nearest", aspect="equal")
    _draw_tiles(ax, mask.shape, structure.tile)
    ax.set(xticks=[], yticks=[], xlabel="in", ylabel="out", title=f"{structure}")
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set(visible=True, color="#999999", linewidth=0.6)
    return ax


def _strength(weight: Tensor) -> np.ndarray:
    """Magnitudes as 0.25 to 1 by rank, so that one outlier does not bleach the rest."""
    rank = weight.abs().flatten().argsort().argsort().double() / max(weight.numel() - 1, 1)
    return (0.25 + 0.75 * rank).view(weight.shape).numpy()


def _draw_tiles(ax: Axes, shape: Sequence[int], tile: Shape) -> None:
    """Thin lines between the structure's tiles, where they are wide enough to be told apart."""
    for step, size, line in ((tile[0], shape[0], ax.axhline), (tile[1], shape[1], ax.axvline)):
        if step > 1 and size / step <= 40:
            for edge in range(step, size, step):
                line(edge - 0.5, color="#888888", linewidth=0.5, alpha=0.7)


def patterns(structures: Sequence[Structure], weight: Tensor) -> Figure:
    """The masks that each structure chooses by magnitude from the same weight, side by side."""
    figure, axes = plt.subplots(1, len(structures), figsize=(2.5 * len(structures), 2.9), squeeze=False)
    for ax, structure in zip(axes[0], structures):
        mask = structure.mask(weight.abs())
        pattern(structure, mask, weight, ax)
        ax.set_xlabel(f"density {mask.double().mean():.3g}")
    for ax in axes[0, 1:]:
        ax.set_ylabel("")
    return figure


def factors(structure: Structure, parts: Mapping[str, Tensor]) -> Figure:
    """The matrices that a structure without a mask is made of, and what they make, at one scale: darker = larger, zeros empty."""
    widths = [part.shape[1] for part in parts.values()]
    most = max(part.shape[0] for part in parts.values())
    figure, axes = plt.subplots(1, len(parts), figsize=(8, 0.6 + 7.6 * most / (sum(widths) + 8 * len(parts))), width_ratios=widths)
    shades = LinearSegmentedColormap.from_list("kept", [(1, 1, 1), to_rgb(colour(str(structure)))])
    for ax, (name, part) in zip(axes, parts.items()):
        image = np.zeros(tuple(part.shape))
        image[(part != 0).numpy()] = _strength(part[part != 0])
        ax.imshow(image, cmap=shades, vmin=0, vmax=1, interpolation="nearest", aspect="equal")
        ax.set(xticks=[], yticks=[], title=name, xlabel=f"{part.shape[0]} x {part.shape[1]}")
        ax.grid(False)
        for spine in ax.spines.values():
            spine.set(visible=True, color="#999999", linewidth=0.6)
    return figure


def retention(tables: dict[str, pd.DataFrame], ax: Axes | None = None) -> Axes:
    """Share of the best unstructured choice's energy that each structure keeps; one table of ``pruning.retention`` a weight."""
    ax = ax or plt.figure().add_subplot()
    height = 0.8 / len(tables)
    names = list(dict.fromkeys(name for table in tables.values() for name in table["structure"]))
    for number, (label, table) in enumerate(tables.items()):
        shares = table.set_index("structure")["share of best"].reindex(names)
        place = np.arange(len(names)) + (number - (len(tables) - 1) / 2) * height
        bars = ax.barh(place, shares, height * 0.92, color=[colour(name) for name in names],
                       alpha=1 - 0.6 * number / len(tables), label=label)
        ax.bar_label(bars, [f"{share:.2f} {label}" for share in shares], padding=3, fontsize=8)
    ax.set(yticks=range(len(names)), yticklabels=names, xlim=(0, 1.25), xticks=np.arange(0, 1.01, 0.25),
           xlabel="energy kept, as a share of the best unstructured choice at equal density")
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    return ax


def storage(structures: Sequence[Structure], shape: Shape, itemsize: int = 2, ax: Axes | None = None) -> Axes:
    """Stored bits per weight position: values below, everything else above, from the structures' cost model."""
    ax = ax or plt.figure().add_subplot()
    names = [str(structure) for structure in structures]
    size = shape[0] * shape[1]
    values = np.array([structure.value_bits(shape, itemsize) / size for structure in structures])
    index = np.array([structure.index_bits(shape) / size for structure in structures])
    ax.bar(names, values, color=[colour(name) for name in names])
    bars = ax.bar(names, index, bottom=values, color=[colour(name) for name in names], alpha=0.45, hatch="///", edgecolor="white")
    ax.bar_label(bars, [f"{total:.2f}" for total in values + index], padding=2, fontsize=9)
    ax.set(ylabel="bits per weight", ylim=(0, 1.12 * max(values + index)),
           title=f"values (solid) and index (hatched), {8 * itemsize}-bit values, {shape[0]} x {shape[1]}")
    ax.grid(axis="x", visible=False)
    if max(map(len, names)) > 8:
        ax.tick_params(axis="x", rotation=20)
    return ax


def shares(table: pd.DataFrame, unit: str, highlight: Sequence[str] = (), ax: Axes | None = None) -> Axes:
    """Stacked bars: one bar a column of ``table``, one segment a row as a share of its column; ``highlight`` in colour."""
    ax = ax or plt.figure(figsize=(7.2, 2.6)).add_subplot()
    left = np.zeros(table.shape[1])
    tints = iter((COLOURS["unstructured"], "#3E93C4", "#7DB9DD", *OTHERS))
    greys = iter(np.resize(["#777777", "#999999", "#bbbbbb", "#d5d5d5"], len(table)))
    for part, amounts in (table / table.sum()).iterrows():
        tint = next(tints) if part in highlight else next(greys)
        bars = ax.barh(table.columns, amounts, left=left, color=tint, label=part, edgecolor="white", linewidth=0.5)
        ink = "white" if np.dot(to_rgb(tint), (0.3, 0.6, 0.1)) < 0.62 else "black"
        ax.bar_label(bars, [f"{amount:.0%}" if amount > 0.035 else "" for amount in amounts], label_type="center", color=ink, fontsize=9)
        left += amounts.to_numpy()
    ax.set(xlim=(0, 1), xlabel=f"share of {unit}")
    ax.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.legend(ncols=len(table), loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=8, handlelength=1, columnspacing=1)
    return ax


def bounds(structures: Sequence[Structure], shape: Shape, roofline: Roofline, itemsize: int = 2, ax: Axes | None = None) -> Axes:
    """Roofline bound on the speed-up over dense against tokens: solid with the arithmetic that tensor cores must still do,
    dotted (where that differs) as if all arithmetic saved were time saved.
    """
    ax = ax or plt.figure(figsize=(7.4, 3.4)).add_subplot()
    tokens = np.unique(np.logspace(0, 15, 61, base=2).round().astype(int)).tolist()
    for number, (structure, tint) in enumerate(zip(structures, shades(structures))):
        usable, ideal = ([roofline.over_dense(structure, shape, count, itemsize, ideal=ideal) for count in tokens]
                         for ideal in (False, True))
        if not np.allclose(usable, ideal):
            ax.plot(tokens, ideal, color=tint, linestyle=":", linewidth=1.2)
        # Later lines are thinner, so that one that runs along another does not hide it.
        ax.plot(tokens, usable, color=tint, linewidth=max(4.5 - number, 1.2), label=str(structure))
    ax.set(xlabel="tokens", ylabel="bound on speed-up over dense", title=f"a bound, not a measurement: {roofline.source}")
    ax.set_xscale("log", base=4)
    ax.set_yscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda count, _: f"{count:g}")
    ax.yaxis.set_major_formatter(lambda ratio, _: f"{ratio:g}x")
    ax.title.set_fontsize(8)
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return ax


def speedups(rows: Iterable[Measurement], bound: Mapping[str, float] | None = None) -> Figure:
    """Measured ratios to dense, one panel a machine, one line a structure and product, one marker a kernel.

    Whiskers run from the 20th to the 80th percentile, hollow markers are stale rows. ``bound`` maps notations to the
    roofline bound on the machine of the live rows, drawn there as a tick.
    """
    rows = [row for row in rows if row.metric == "speedup" and row.structure != "dense" and row.method != "dense"]
    panels = by_machine(rows)
    if not panels:
        return empty("no speed-up has been measured yet")
    lines = {title: list(dict.fromkeys(map(_line, group))) for title, group in panels.items()}
    counts = [len(names) + 1 for names in lines.values()]
    figure, axes = plt.subplots(len(panels), 1, figsize=(7.4, 0.8 + 0.42 * sum(counts)), squeeze=False, sharex=True, height_ratios=counts)
    kernels = list(dict.fromkeys(row.method for row in rows))
    for ax, (title, group) in zip(axes[:, 0], panels.items()):
        for row in group:
            _draw_ratio(ax, row, lines[title].index(_line(row)), kernels.index(row.method), len(kernels))
            if bound and row.origin == "live" and row.structure in bound:
                place = lines[title].index(_line(row))
                ax.plot([bound[row.structure]] * 2, [place - 0.3, place + 0.3], color="black", linewidth=1.5)
        ax.axvline(1, color=COLOURS["dense"], linewidth=1, linestyle=":")
        ax.set(yticks=range(len(lines[title])), yticklabels=lines[title], ylim=(len(lines[title]) - 0.4, -0.6), title=title)
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(lambda ratio, _: f"{ratio:g}" if ratio >= 1 else f"1/{1 / ratio:g}")
    axes[-1, 0].set_xlabel("times as fast as dense, log scale" + (" (tick: roofline bound here)" if bound else ""))
    handles = [plt.Line2D([], [], color="#333333", marker=MARKERS[number % len(MARKERS)], linestyle="", label=name)
               for number, name in enumerate(kernels)]
    figure.legend(handles=handles, loc="outside upper right", ncols=4, fontsize=8)
    return figure


MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")


def by_machine(rows: Iterable[Measurement]) -> dict[str, list[Measurement]]:
    """Rows by what a figure must say of them: machine, live or recorded, and the day; live ones first."""
    found: dict[tuple, list[Measurement]] = {}
    for row in sorted(rows, key=lambda row: row.origin):
        found.setdefault((row.origin, row.machine.slug), []).append(row)
    return {f"{group[0].machine}, {origin} {max(row.date for row in group)[:10]}": group
            for (origin, _), group in found.items()}


def empty(message: str) -> Figure:
    """A figure that says in words why there is nothing to draw."""
    figure = plt.figure(figsize=(7.2, 0.8))
    figure.text(0.5, 0.5, message, ha="center", va="center", color="#555555")
    figure.add_subplot().set_axis_off()  # IPython shows no figure that has no axes
    return figure


def _line(row: Measurement) -> str:
    product = {"spmm": "forward", "spmmt": "input grad", "sddmm": "weight grad"}.get(row.at.get("product"), "")
    return f"{row.structure}, {product}\n[{row.at.get('tokens')}] x [{row.at.get('out')} x {row.at.get('in')}]"


def _draw_ratio(ax: Axes, row: Measurement, line: int, number: int, count: int) -> None:
    place = line + (number - (count - 1) / 2) * min(0.16, 0.7 / count)
    tint = colour(row.structure)
    ax.errorbar(row.value, place, xerr=[[row.value - row.low], [row.high - row.value]], color=tint, elinewidth=1, capsize=2,
                marker=MARKERS[number % len(MARKERS)], markersize=6, markerfacecolor="white" if row.stale else tint)


def curves(rows: Iterable[Measurement], floor: float | None = None, ax: Axes | None = None) -> Axes:
    """Loss against training tokens: a line a structure and recipe (the mean over its seeds), a band from its lowest to
    highest seed; the loss before any training is off the scale.

    ``floor`` is a loss that nothing can go below (the entropy of the language), drawn as a line.
    """
    rows = list(rows)
    ax = traces(rows, ax)
    if not rows:
        return ax
    if floor is not None:
        ax.axhline(floor, color="black", linewidth=1, linestyle=":")
        ax.annotate("entropy of the language", (0, floor), xycoords=("axes fraction", "data"), xytext=(4, 3),
                    textcoords="offset points", fontsize=8)
    early = min((row.at["tokens"] for row in rows if row.at["tokens"]), default=0)  # before it is the fall from guessing, which hides the rest
    ax.set_ylim(top=1.02 * max(row.value for row in rows if row.at["tokens"] >= early))
    return ax


def traces(rows: Iterable[Measurement], ax: Axes | None = None) -> Axes:
    """Any one metric of training runs against training tokens, drawn like ``curves``."""
    ax = ax or plt.figure(figsize=(7.2, 3.8)).add_subplot()
    rows = list(rows)
    if not rows:
        ax.text(0.5, 0.5, "no run is recorded yet", ha="center", color="#555555")
        return ax
    for name, (shade, dashes) in looks(called(row) for row in rows).items():
        mine = pd.DataFrame([{"tokens": row.at["tokens"], "seed": row.at["seed"], "loss": row.value}
                             for row in rows if called(row) == name])
        loss = mine.groupby("tokens")["loss"].agg(["mean", "min", "max"])
        ax.plot(loss.index, loss["mean"], color=shade, linestyle=dashes, label=f"{name} ({mine['seed'].nunique()})")
        ax.fill_between(loss.index, loss["min"], loss["max"], color=shade, alpha=0.15, linewidth=0)
    unit = "" if rows[0].unit == "1" else f", {rows[0].unit}"
    ax.set(xlabel="training tokens", ylabel=f"{rows[0].metric}{unit}", title="; ".join(by_machine(rows)))
    ax.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1e3:g}k" if tokens < 1e6 else f"{tokens / 1e6:g}M")
    ax.legend(title="structure (seeds)", title_fontsize=8, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return ax


def looks(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """A colour and a line style for each name: those of a family share its colour, but where one has many, each has its own."""
    names = list(dict.fromkeys(names))
    found: dict[str, tuple[str, str]] = {}
    for name in names:
        rank = sum(family(other) == family(name) for other in found)
        found[name] = colour(name), ("-", "--", ":", "-.")[rank % 4]
    sizes = [sum(family(name) == kind for name in names) for kind in {family(name) for name in names}]
    if max(sizes, default=0) > 4:
        palette = [shade for kind, shade in COLOURS.items() if kind != "dense"]
        for rank, name in enumerate(name for name in names if family(name) != "dense"):
            found[name] = palette[rank % len(palette)], ("-", "--")[rank % 2]
    return found


def final_losses(rows: Iterable[Measurement], ax: Axes | None = None) -> Axes:
    """The loss at the end of each run: a dot a seed, a bar at the mean, the dense seeds' range shaded."""
    rows = list(rows)
    last = max(row.at["step"] for row in rows)
    names = list(dict.fromkeys(called(row) for row in rows))
    ax = ax or plt.figure(figsize=(7.2, 0.9 + 0.34 * len(names))).add_subplot()
    for place, name in enumerate(names):
        ends = np.array([row.value for row in rows if called(row) == name and row.at["step"] == last])
        if name == "dense":
            ax.axvspan(ends.min(), ends.max(), color=colour(name), alpha=0.15, linewidth=0)
        ax.plot(ends, np.full(len(ends), place), "o", color=colour(name), alpha=0.7, markersize=5)
        ax.plot([ends.mean()] * 2, [place - 0.3, place + 0.3], color=colour(name), linewidth=2)
    ax.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.4, -0.6), xlabel=f"validation loss, {rows[0].unit}",
           title=f"after {last} steps: a dot a seed, a bar at the mean, grey the range of dense\n{'; '.join(by_machine(rows))}")
    return ax


def increases(rows: Iterable[Measurement]) -> np.ndarray:
    """What pruning by each method costs, from rows of ``oneshot.losses``: a panel a structure, a dot a run, a bar at the mean."""
    rows = list(rows)
    pruned = above_dense(rows)
    if not pruned:
        return np.array(empty("no rows of pruned models").axes)
    structures, methods = (list(dict.fromkeys(names)) for names in zip(*((row.structure, row.method) for row, _ in pruned)))
    figure, axes = plt.subplots(1, len(structures), figsize=(8, 1.2 + 0.3 * len(methods)), sharey=True, squeeze=False)
    for ax, structure in zip(axes[0], structures):
        for place, method in enumerate(methods):
            values = [above for row, above in pruned if (row.structure, row.method) == (structure, method)]
            ax.plot(values, np.full(len(values), place), "o", color=colour(structure), alpha=0.7, markersize=5)
            if values:
                ax.plot([np.mean(values)] * 2, [place - 0.3, place + 0.3], color=colour(structure), linewidth=2)
        ax.set(yticks=range(len(methods)), yticklabels=methods, ylim=(len(methods) - 0.4, -0.6), title=structure,
               xlabel=f"increase of the loss, {rows[0].unit}")
        ax.set_xlim(min(0, ax.get_xlim()[0]), None)
        ax.locator_params("x", nbins=4)  # their labels would touch
    figure.suptitle("; ".join(by_machine(rows)), fontsize=9)
    return axes[0]


def noise(timings: Mapping[str, Timing]) -> Figure:
    """Two timings of the same product, round by round: raw times left, the ratio within each round right."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.2, 2.9))
    for (name, timing), tint in zip(timings.items(), (COLOURS["dense"], COLOURS["unstructured"])):
        left.plot(range(1, len(timing.samples) + 1), [1e3 * sample for sample in timing.samples], ".-", color=tint, label=name)
    again = list(timings.values())[-1]
    right.plot(range(1, len(again.ratios) + 1), again.ratios, ".-", color=COLOURS["block"])
    right.axhspan(again.speedup_low, again.speedup_high, color=COLOURS["block"], alpha=0.15, linewidth=0)
    right.axhline(1, color=COLOURS["dense"], linewidth=1, linestyle=":")
    left.set(xlabel="round", ylabel="milliseconds a call", ylim=(0, None), title="raw times")
    right.set(xlabel="round", ylabel="ratio", title="ratio within the round (band: 20th to 80th percentile)")
    left.legend(fontsize=8)
    return figure
