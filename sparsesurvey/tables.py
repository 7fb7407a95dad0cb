"""Rows as a table for a page: values in units that a person reads, and only those settings that differ."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from sparsesurvey.records import Measurement

if TYPE_CHECKING:
    import pandas as pd

TRAINING = ("model", "language", "steps", "batch", "seq", "optimizer", "lr")  # settings that runs share if their losses compare
SCALES = {  # unit: steps of (size, name), the largest that fits is taken
    "s": ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns")),
    "B/s": ((1e12, "TB/s"), (1e9, "GB/s"), (1e6, "MB/s"), (1.0, "B/s")),
    "FLOP/s": ((1e15, "PFLOP/s"), (1e12, "TFLOP/s"), (1e9, "GFLOP/s"), (1e6, "MFLOP/s"), (1.0, "FLOP/s")),
    "B": ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1.0, "B")),
    "J": ((1.0, "J"), (1e-3, "mJ"), (1e-6, "uJ")),
    "fraction": ((0.01, "%"),),
    "x": ((1.0, "x"),),
    "1": ((1.0, ""),),
}


def amount(value: float, unit: str, low: float | None = None, high: float | None = None) -> str:
    """A value with its range, in a unit near its size.

    >>> amount(0.00123, "s", 0.0012, 0.00131), amount(0.5, "fraction"), amount(27.4e9, "B/s"), amount(2.5, "nats/token")
    ('1.23 ms (1.2 to 1.31)', '50 %', '27.4 GB/s', '2.5000 nats/token')
    """
    if unit not in SCALES:  # a loss, of which the fourth digit still tells runs apart
        return f"{value:.4f} {unit}" if low in (None, value) else f"{value:.4f} {unit} ({low:.4f} to {high:.4f})"
    steps = SCALES[unit]
    size, name = next((step for step in steps if abs(value) >= step[0]), steps[-1])
    text = f"{_digits(value / size)} {name}".rstrip()
    if low is None or high is None or low == high:
        return text
    return f"{text} ({_digits(low / size)} to {_digits(high / size)})"


def table(rows: Iterable[Measurement], metric: str | None = None,
          unavailable: Mapping[tuple[str, str], str] | None = None) -> "pd.DataFrame":
    """One line a row (of one metric if given), settings that differ between the rows as columns of their own.

    ``unavailable`` adds a line for each ``(structure, method)`` that could not run here, with the reason.
    Settings that all rows share are in ``.attrs``.
    """
    import pandas as pd  # half a second that a kernel test need not wait for

    rows = [row for row in rows if metric is None or row.metric == metric]
    keys = list(dict.fromkeys(key for row in rows for key in row.at))
    shared = {key: rows[0].at[key] for key in keys if len({(key in row.at, row.at.get(key)) for row in rows}) == 1}
    varying = [key for key in keys if key not in shared]
    name = metric or "value"
    lines = [{
        "structure": row.structure, "method": row.method, "metric": row.metric,
        **{key: row.at.get(key, "") for key in varying}, name: amount(row.value, row.unit, row.low, row.high),
        "measured": measured(row),
    } for row in rows]
    columns = ["structure", "method", *(() if metric else ("metric",)), *varying, name, "measured"]
    lines += [{**dict.fromkeys(columns, ""), "structure": structure, "method": method, name: f"not here: {reason}"}
              for (structure, method), reason in (unavailable or {}).items()]
    frame = pd.DataFrame(lines, columns=columns)
    frame.attrs = shared
    return unnumbered(frame)


def unnumbered(frame: "pd.DataFrame") -> "pd.DataFrame":
    """The same with empty line labels: 0, 1, 2 would only take room on a page."""
    return frame.set_axis([""] * len(frame), axis=0)


def _digits(value: float) -> str:
    """Three significant digits, with no power of ten where a person would write none."""
    return f"{value:.0f}" if 999.5 <= abs(value) < 1e6 else f"{value:.3g}"


def measured(row: Measurement) -> str:
    """Where and when a row was measured, and whether its code has changed since."""
    return f"{row.machine}, {row.origin} {row.date.replace('T', ' ')[:16]}{', stale' if row.stale else ''}"


def called(row: Measurement) -> str:
    """The name of a training run's line: its structure, and its recipe unless that is the usual one of a fixed mask."""
    return row.structure if row.method in ("dense", "static", "factored") else f"{row.structure}, {row.method}"


def above_dense(rows: Iterable[Measurement]) -> list[tuple[Measurement, float]]:
    """Each row of a pruned model with how far its loss is above that of the same model, dense, among the rows."""
    rows = list(rows)
    model = lambda row: (row.machine.slug, row.at["settings"])  # a hash that covers the seed
    dense = {model(row): row.value for row in rows if row.structure == "dense"}
    return [(row, row.value - dense[model(row)]) for row in rows if row.structure != "dense"]


def gaps(rows: Iterable[Measurement]) -> "pd.DataFrame":
    """How far each structure ends above dense, seed by seed: one line a structure and recipe, from rows of ``loss_curves``.

    Runs of one seed share their start and their batches, so the gap is taken within a seed: its mean, lowest and
    highest over the seeds. "resolved" says whether every seed's gap has the same sign and exceeds the range of dense
    over its seeds; with one seed nothing is resolved. No rows, no lines.

    Raises:
        ValueError: no dense run, or runs of several trainings (``TRAINING``), whose losses do not compare.
    """
    import pandas as pd

    rows = list(rows)
    for name in TRAINING:
        kinds = {row.at.get(name) for row in rows}
        if len(kinds) > 1:
            raise ValueError(f"rows must be of one training, got {name} = {', '.join(sorted(map(str, kinds)))}")
    ends: dict[str, dict[int, Measurement]] = {}
    for row in rows:
        held = ends.setdefault(called(row), {}).get(row.at["seed"])
        if held is None or row.at["step"] > held.at["step"]:
            ends[called(row)][row.at["seed"]] = row
    if ends and "dense" not in ends:
        raise ValueError(f"rows must hold a dense run to compare with, got {', '.join(ends) or 'none'}")
    dense = {seed: row.value for seed, row in ends.get("dense", {}).items()}
    noise = max(dense.values(), default=0.0) - min(dense.values(), default=0.0)
    lines = []
    for name, runs in ends.items():
        mine = [row.value - dense[seed] for seed, row in runs.items() if seed in dense]
        losses = [row.value for row in runs.values()]
        resolved = name != "dense" and len(mine) > 1 and (min(mine) > noise or max(mine) < -noise)
        lines.append({"structure": name, "seeds": len(losses), "loss": sum(losses) / len(losses), "gap": sum(mine) / len(mine),
                      "lowest": min(mine), "highest": max(mine), "resolved": "yes" if resolved else "" if name == "dense" else "no"})
    frame = pd.DataFrame(lines, columns=["structure", "seeds", "loss", "gap", "lowest", "highest", "resolved"]).round(4)
    frame.attrs = {"range of dense": noise}
    return unnumbered(frame)
