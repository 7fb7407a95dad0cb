"""One line a structure: what the definition fixes, what a bound permits, and what rows have measured."""

from collections.abc import Iterable, Mapping, Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from sparsesurvey import figures
from sparsesurvey.comparing import fits
from sparsesurvey.pruning import channel_scaled, density, gaussian, retention
from sparsesurvey.records import Measurement
from sparsesurvey.roofline import Roofline
from sparsesurvey.structure import Shape, Structure

LIBRARIES = ("torch", "scipy", "cusparselt", "cusparse", "cutlass")  # a kernel that only calls one bears its name


def entries(kinds: Mapping[str, type[Structure]], each: int = 2, shape: Shape = (512, 512)) -> list[Structure]:
    """The first ``variants`` of every structure that fit ``shape``, densest first: whoever adds a structure is here too."""
    found = [item for kind in kinds.values() for item in [item for item in kind.variants() if fits(item, shape)][:each]]
    return sorted(found, key=lambda item: (-round(density(item, shape), 4), figures.family(str(item))))


def definition(structures: Iterable[Structure], shape: Shape = (4096, 14336), itemsize: int = 2) -> pd.DataFrame:
    """What needs no measurement: density, bits a weight, share of the best energy on two kinds of weights.

    ``shape`` is that of the stored matrix ``[out, in]``; density and energies are of 512 x 512 matrices.
    """
    structures = list(structures)
    frame = pd.DataFrame([{
        "structure": str(item), "density": density(item, (512, 512)),
        "bits a weight": 8 * item.cost(shape, 1, itemsize).weight_bytes / (shape[0] * shape[1]) if fits(item, shape) else None,
    } for item in structures]).set_index("structure")
    for label, weight in (("Gaussian", gaussian((512, 512))), ("scaled", channel_scaled((512, 512)))):
        frame[f"kept, {label}"] = retention(weight, structures).set_index("structure")["share of best"]
    return frame.rename_axis(None)


def permitted(structures: Iterable[Structure], roofline: Roofline, tokens: Sequence[int] = (1, 8192), shape: Shape = (4096, 14336),
              itemsize: int = 2) -> pd.DataFrame:
    """Bound on the speed-up over dense for few and for many tokens, with the arithmetic that tensor cores must still do."""
    lines = [{"structure": str(item), **{f"bound, {count} token{'s' * (count > 1)}": roofline.over_dense(item, shape, count, itemsize)
                                         for count in tokens}} for item in structures if fits(item, shape)]
    return pd.DataFrame(lines).set_index("structure").rename_axis(None)


def fastest(rows: Iterable[Measurement], product: str = "spmm") -> pd.DataFrame:
    """The fastest kernel of ours and the fastest of a library, as times dense with its range, by machine and structure."""
    best: dict[tuple, dict[bool, Measurement]] = {}
    for row in rows:
        if row.metric == "speedup" and row.at.get("product") == product and row.structure != "dense":
            where = f"{row.machine}, {row.origin} {row.date[:10]}"
            case = (where, row.structure, f"{row.at['tokens']}, {row.at['out']} x {row.at['in']}")
            library = row.method.split("_")[0] in LIBRARIES
            held = best.setdefault(case, {}).get(library)
            if held is None or row.value > held.value:
                best[case][library] = row
    columns = ["measured", "structure", "tokens, weight", "ours", "library"]
    lines = [(*case, *(_times(found.get(library)) for library in (False, True))) for case, found in best.items()]
    return pd.DataFrame(lines, columns=columns).set_index(["measured", "structure"]).rename_axis([None, None])


def _times(row: Measurement | None) -> str:
    return "" if row is None else f"{row.value:.2g} ({row.low:.2g} to {row.high:.2g}) {row.method}{' stale' * row.stale}"


def price(gaps: pd.DataFrame) -> Figure:
    """Loss above dense by structure, from ``tables.gaps``: a dot at the mean, a whisker from the lowest to the highest seed."""
    if gaps.empty:
        return figures.empty("no run with this code is recorded")
    gaps = gaps.sort_values("gap")
    figure, ax = plt.subplots(figsize=(7.2, 0.9 + 0.28 * len(gaps)))
    for place, line in enumerate(gaps.itertuples()):
        ax.errorbar(line.gap, place, xerr=[[line.gap - line.lowest], [line.highest - line.gap]], fmt="o", capsize=3,
                    color=figures.colour(line.structure))
    ax.axvline(0, color=figures.COLOURS["dense"], linewidth=1, linestyle=":")
    ax.set(yticks=range(len(gaps)), yticklabels=gaps["structure"], ylim=(len(gaps) - 0.4, -0.6),
           xlabel=f"loss above dense of the same seed, mean and range of up to {gaps['seeds'].max()} seeds")
    return figure
