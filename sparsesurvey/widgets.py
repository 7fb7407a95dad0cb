"""What a reader moves. Every number is computed here beforehand, so that a published page needs no kernel.

``PatternExplorer`` takes a list of structures, masks a small weight with each of them, and hands the front end
(``explorer.js``) bytes and one table: masks, what they keep, what they store, and a roofline bound on their speed-up.
A structure without a mask is drawn by where its approximation of the weight is not zero.
What the hardware can make of each structure it says itself, in ``facts``; the front end knows no structure.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from itertools import product
from pathlib import Path
from textwrap import fill

import anywidget
import matplotlib.pyplot as plt
import numpy as np
import torch
import traitlets
from matplotlib.figure import Figure
from torch import Tensor

from sparsesurvey import figures
from sparsesurvey.pruning import approximation, best_kept, captured, channel_scaled, density, gaussian
from sparsesurvey.roofline import H200, Roofline
from sparsesurvey.scores import magnitude
from sparsesurvey.structure import Pattern, Shape, Structure, check_weight

HERE = Path(__file__).parent
SHAPE = (64, 64)  # of the weight that is drawn
MATRIX = (4096, 14336)  # of the matrix whose bytes and bound are given: down_proj of a 7B Mistral
TOKENS = tuple(2**power for power in range(16))  # 1 to 32768
BF16 = 2  # bytes
TINY = 1e-30  # stands for a zero that is kept
LARGEST = 128  # rows or columns of the weight drawn: the page carries every mask of it
LABELS = {  # of a class whose name alone says too little; another is called by its name
    "NM": "N:M", "VNM": "V:N:M", "VectorNM": "vector N:M", "QuantisedNM": "N:M in 4-bit integers", "TASD": "TASD (a sum of N:M)",
    "HiNM": "HiNM (vectors, then N:M)", "Hierarchical": "hierarchical (blocks, then k a row)", "Diagonal": "diagonal (DynaDiag)",
    "TileWise": "tile-wise (TW)", "TEW": "tile-wise and single weights (TEW)", "TVW": "tile-wise, 2:4 inside (TVW)",
    "Butterfly": "flat block butterfly (Pixelfly)", "Neurons": "whole neurons", "LowRankSparse": "low rank + sparse",
    "DoublePruned": "double-pruned N:M",
}


def grid(structure: type[Structure], shape: Shape = SHAPE, **steps: Iterable) -> list[Structure]:
    """Instances of a class at every combination of its parameters' ``steps`` that is valid and fits ``shape``.

    To fit is to divide it and to reach its density there within a tenth. Combinations that prune nothing are dropped.
    Without steps the class's own ``variants()``. ValueError if nothing is left.

    >>> from sparsesurvey.structures import NM
    >>> [str(pattern) for pattern in grid(NM, n=[1, 2, 4], m=[2, 4])]
    ['1:2', '1:4', '2:4']
    """
    found = [] if steps else list(structure.variants())
    for values in product(*steps.values()) if steps else ():
        try:
            found.append(structure(**dict(zip(steps, values))))
        except ValueError:  # the class knows which combinations make sense
            continue
    found = [pattern for pattern in found if _fits(pattern, shape) and (density(pattern, shape) < 1 or not steps)]
    if not found:
        got = steps or "its variants"
        raise ValueError(f"steps must hold a valid {structure.__name__} that fits {tuple(shape)}, got {got}")
    return found


def grids(
    classes: Mapping[str, type], steps: Mapping[str, Mapping[str, Iterable]] | None = None, shape: Shape = SHAPE
) -> list[Structure]:
    """``grid`` of every class that has ``steps`` under its name, in their order, then the others' variants.

    Left out are variants that do not fit ``shape``.
    """
    steps = steps or {}
    wrong = set(steps) - set(classes)
    if wrong:
        raise ValueError(f"steps must be keyed by one of {', '.join(classes)}, got {', '.join(sorted(wrong))}")
    chosen = [pattern for name, values in steps.items() for pattern in grid(classes[name], shape, **values)]
    rest = [kind for name, kind in classes.items() if name not in steps]
    return chosen + [pattern for kind in rest for pattern in kind.variants() if _fits(pattern, shape)]


def _divides(structure: Structure, shape: Shape) -> bool:
    try:
        return bool(structure.check_shape(shape))
    except ValueError:
        return False


def _fits(structure: Structure, shape: Shape) -> bool:
    if not (_divides(structure, shape) and _divides(structure, MATRIX)):
        return False
    meant = structure.density if isinstance(structure, Pattern) else density(structure, shape)
    return 0 < density(structure, shape) <= 1 and abs(density(structure, shape) - meant) <= 0.1 * meant


class PatternExplorer(anywidget.AnyWidget):
    """Choose a pattern and see its mask, what it keeps, its bytes and its bound on speed.

    ``structures``: the structures to choose from (see ``grids``); each must divide the weights and ``matrix``.
    ``weights``: name to a float weight ``[out, in]`` of at most 128 x 128, all of one shape; masks are by magnitude.
    ``pins``: patterns that are in the comparison table from the start. A structure that states no ``facts`` is shown
    without a hardware curve. Python may read and set ``structure``, ``index``, ``kind`` and ``pins``.
    """

    _esm = HERE / "explorer.js"
    _css = HERE / "explorer.css"
    index = traitlets.Int(0).tag(sync=True)  # of the chosen pattern in ``structures``
    kind = traitlets.Int(0).tag(sync=True)  # of the chosen weight in ``weights``
    pins = traitlets.List(traitlets.Int()).tag(sync=True)
    data = traitlets.Dict().tag(sync=True)
    masks = traitlets.Bytes().tag(sync=True)  # [structures, weights, out * in] bits, lowest first
    levels = traitlets.Bytes().tag(sync=True)  # uint8 [structures without a mask, weights, out * in]: strength of each entry
    values = traitlets.Bytes().tag(sync=True)  # float32 [weights, out, in]

    def __init__(
        self, structures: Sequence[Structure], weights: Mapping[str, Tensor] | None = None, *,
        pins: Sequence[Structure] = (), matrix: Shape = MATRIX, gpu: Roofline = H200,
    ) -> None:
        self.weights = _check_weights(sample_weights() if weights is None else weights)
        self.structures = _check_structures(structures, next(iter(self.weights.values())).shape, matrix)
        self.matrix, self.gpu = matrix, gpu
        self._near = [[_near(pattern, weight) for weight in self.weights.values()] for pattern in self.structures]
        self._masks = [[(near != 0) for near in members] for members in self._near]
        bits = np.array([[mask.flatten().numpy() for mask in masks] for masks in self._masks])
        super().__init__(
            data=self._table(), pins=[self._place(pattern) for pattern in pins],
            masks=np.packbits(bits, axis=-1, bitorder="little").tobytes(),
            levels=b"".join(_levels(near, weight) for pattern, members in zip(self.structures, self._near)
                            if not isinstance(pattern, Pattern) for near, weight in zip(members, self.weights.values())),
            values=b"".join(weight.numpy().astype("<f4").tobytes() for weight in self.weights.values()),
        )

    @property
    def structure(self) -> Structure:
        """The pattern that is shown."""
        return self.structures[self.index]

    @structure.setter
    def structure(self, pattern: Structure) -> None:
        self.index = self._place(pattern)

    def _place(self, pattern: Structure) -> int:
        if pattern not in self.structures:
            raise ValueError(f"structure must be one of the explorer's {len(self.structures)}, got {pattern}")
        return self.structures.index(pattern)

    @traitlets.validate("index")
    def _index_is_known(self, proposal: dict) -> int:
        return _within("index", proposal["value"], len(self.structures))

    @traitlets.validate("kind")
    def _kind_is_known(self, proposal: dict) -> int:
        return _within("kind", proposal["value"], len(self.weights))

    @traitlets.validate("pins")
    def _pins_are_known(self, proposal: dict) -> list[int]:
        return [_within("pins", index, len(self.structures)) for index in proposal["value"]]

    def figure(self, structures: Sequence[Structure] | None = None, kind: int | None = None) -> Figure:
        """The same content on paper: masks, what is kept, bytes and bounds of a handful, the pinned ones by default."""
        chosen = list(structures or [self.structures[index] for index in self.pins] or [self.structure])
        kind = self.kind if kind is None else _within("kind", kind, len(self.weights))
        weight = list(self.weights.values())[kind]
        places = [self._place(pattern) for pattern in chosen]
        page, axes = plt.subplots(
            3, len(chosen), figsize=(1.7 * len(chosen) + 0.5, 5.6), squeeze=False, sharey="row",
            height_ratios=(2, 1, 1.3), layout="constrained",
        )
        for (above, middle, below), pattern, place in zip(axes.T, chosen, places):
            entry = self.data["configs"][place]
            values, index, _ = entry["bits"]
            drawn = weight if isinstance(pattern, Pattern) else self._near[place][kind]
            figures.pattern(pattern, self._masks[place][kind], drawn, above)
            parts = f"({values:.3g} values + {index:.3g} index)"
            verdict = self.data["notes"][entry["words"][0]]
            above.set_xlabel(f"{values + index:.3g} bits a weight\n{parts}", fontsize=7.5)
            _draw_kept(middle, entry["kept"][kind], entry["colour"])
            _draw_bound(below, *(self._curve(entry[name]) for name in ("ideal", "usable")), entry["colour"])
            below.set_xlabel(f"tokens\n{fill(verdict, 24)}", fontsize=7.5)
        axes[2, 0].set_ylabel("bound on speed-up", fontsize=8)
        for ax in axes[0, 1:]:
            ax.set_ylabel("")
        page.suptitle(
            f"{list(self.weights)[kind]}; bytes and bounds for [{self.matrix[0]} x {self.matrix[1]}] in bf16.\n"
            f"Bounds, not measurements: {self.gpu.source}.\n"
            "Dashed: if all arithmetic saved were time saved; solid: on tensor cores.", fontsize=8.5, x=0.01, ha="left",
        )
        return page

    def _curve(self, number: int | None) -> list[float] | None:
        return None if number is None else self.data["curves"][number]

    def _table(self) -> dict:
        """Everything but masks and weights, as JSON: see ``describe`` for a pattern's entry."""
        classes = list(dict.fromkeys(map(type, self.structures)))
        families = [_family(kind, [pattern for pattern in self.structures if type(pattern) is kind])
                    for kind in classes]
        configs, notes, curves, approximated = [], [], [], 0
        for pattern, members in zip(self.structures, self._near):
            fact = pattern.facts()
            family = classes.index(type(pattern))
            at = _at(pattern, self.structures)
            words = [fact.verdict, fact.hardware, fact.kept, fact.column, fact.pruned]
            notes.extend(word for word in words if word not in notes)
            numbers = self._numbers(pattern, members)
            for name in ("ideal", "usable"):  # many patterns share a curve
                curves.extend([numbers[name]] if numbers[name] and numbers[name] not in curves else [])
                numbers[name] = curves.index(numbers[name]) if numbers[name] else None
            places = [notes.index(word) for word in words]
            near = None if isinstance(pattern, Pattern) else approximated
            approximated += near is not None
            configs.append({**numbers, "family": family, "at": at, "words": places, "near": near})
        shape = next(iter(self.weights.values())).shape
        return {"shape": list(shape), "kinds": list(self.weights), "tokens": list(TOKENS), "gpu": {"name": self.gpu.machine, "source": self.gpu.source},
                "matrix": list(self.matrix), "families": families, "configs": configs, "notes": notes, "curves": curves}

    def _numbers(self, pattern: Structure, members: Sequence[Tensor]) -> dict:
        numbers = describe(pattern, list(zip(self.weights.values(), members)), self.matrix, self.gpu)
        return {"name": str(pattern), "colour": figures.colour(str(pattern)), "tile": list(pattern.tile), **numbers}


def describe(
    pattern: Structure, pairs: Sequence[tuple[Tensor, Tensor]], matrix: Shape = MATRIX, gpu: Roofline = H200,
) -> dict:
    """The numbers of one structure: for each (weight, member that stands for it) what is kept, then bytes and bounds on
    ``matrix`` in bf16.

    ``kept``: density, magnitude, energy, best magnitude and best energy at that density. ``bits``: value bits, index
    bits and least position bits (or None) a weight. ``ideal``, ``usable``: bounds at ``TOKENS``, the latter or None.
    """
    fact = pattern.facts()
    size = matrix[0] * matrix[1]
    shares = []
    for weight, near in pairs:
        here = captured(weight, near, density(pattern, tuple(weight.shape)))
        best = best_kept(weight, here.density)
        shares.append([_short(share) for share in (*here, best.magnitude, best.energy)])
    bits = [pattern.value_bits(matrix, BF16) / size, pattern.index_bits(matrix) / size, fact.positions]
    curve = [_short(gpu.over_dense(pattern, matrix, tokens, BF16, ideal=True)) for tokens in TOKENS]
    usable = None if fact.arithmetic is None else [
        _short(gpu.over_dense(pattern, matrix, tokens, BF16)) for tokens in TOKENS]
    return {"kept": shares, "bits": [_short(number) for number in bits], "ideal": curve, "usable": usable}


def sample_weights(shape: Shape = SHAPE) -> dict[str, Tensor]:
    """The two weights that the explorer masks unless it is given others."""
    return {"independent Gaussian": gaussian(shape), "channel-scaled Gaussian, σ 0.5": channel_scaled(shape)}


def _check_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not weights:
        raise ValueError("weights must name at least one weight [out, in], got none")
    for name, weight in weights.items():
        check_weight(weight, f"weights[{name!r}]")
    shapes = {tuple(weight.shape) for weight in weights.values()}
    if len(shapes) > 1 or max(max(shape) for shape in shapes) > LARGEST:
        raise ValueError(f"weights must all have one shape of at most {LARGEST} x {LARGEST}, got {sorted(shapes)}")
    return {name: weight.detach().cpu().float() for name, weight in weights.items()}


def _check_structures(structures: Sequence[Structure], shape: Shape, matrix: Shape) -> list[Structure]:
    found = list(dict.fromkeys(structures))
    wrong = [repr(pattern) for pattern in found if not isinstance(pattern, Structure)]
    if wrong or not found:
        raise ValueError(f"structures must be a list of structures, at least one, got {', '.join(wrong) or 'none'}")
    for pattern in found:
        for name, size in (("weights", shape), ("matrix", matrix)):
            if not _divides(pattern, size):
                tile = f"the tile of {pattern} is {pattern.tile}"
                raise ValueError(f"structures must divide the {name} {tuple(size)}; {tile}")
        if not pattern.nnz(shape):
            raise ValueError(f"structures must keep some of a weight of {tuple(shape)}; {pattern} keeps nothing there")
    return found


def _within(name: str, value: int, count: int) -> int:
    if not 0 <= value < count:
        raise ValueError(f"{name} must be from 0 to {count - 1}, got {value}")
    return value


def _near(pattern: Structure, weight: Tensor) -> Tensor:
    """The member that stands for the weight; a kept weight that happens to be zero still counts as kept."""
    if isinstance(pattern, Pattern):
        return torch.where(pattern.mask(magnitude(weight)), weight.where(weight != 0, TINY), 0)
    return approximation(pattern, weight)


def _levels(near: Tensor, weight: Tensor) -> bytes:
    """How strongly the entries of an approximation are drawn: by the rank that their magnitudes would have in the weight."""
    ordered = weight.abs().flatten().sort().values
    rank = torch.searchsorted(ordered, near.abs().flatten()).double() / weight.numel()
    return (255 * (0.25 + 0.75 * rank)).round().to(torch.uint8).numpy().tobytes()


def _steps(pattern: Structure, structures: Sequence[Structure]) -> dict[str, list]:
    """Parameter to the values that it has among the instances of this class, if several: numbers sorted, others as they come."""
    same = [other for other in structures if type(other) is type(pattern)]
    found = {field.name: list(dict.fromkeys(getattr(other, field.name) for other in same)) for field in fields(pattern)}
    numbers = lambda values: all(isinstance(value, (int, float)) for value in values)
    return {name: sorted(values) if numbers(values) else values for name, values in found.items() if len(values) > 1}


def _at(pattern: Structure, structures: Sequence[Structure]) -> list[int]:
    """The step of each parameter among those of ``_steps``."""
    return [values.index(getattr(pattern, name)) for name, values in _steps(pattern, structures).items()]


def _family(kind: type[Structure], members: Sequence[Structure]) -> dict:
    steps = {name: [_spelt(name, value) for value in values]
             for name, values in _steps(members[0], members).items()}
    about = " ".join((inspect.getdoc(kind) or "").split("\n\n")[0].replace("`", "").split())
    start = next((pattern for pattern in kind.variants() if pattern in members), members[0])
    return {"name": LABELS.get(kind.__name__) or re.sub("(?<=[a-z])(?=[A-Z])", " ", kind.__name__).lower(), "about": about, "start": _at(start, members),
            "fields": [{"name": name, "values": values} for name, values in steps.items()]}


def _spelt(name: str, value: object) -> str:
    """A parameter's value as a reader sees it on the slider."""
    if isinstance(value, float) and 0 < value <= 1:
        return f"{100 * value:g} %"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return _spelt_tuple(value)
    return str(value)


def _spelt_tuple(values: tuple) -> str:
    """At most four of its members, the rest as dots."""
    return " ".join(map(str, values[:4])) + (" …" if len(values) > 4 else "")


def _short(number: float | None) -> float | None:
    """Four significant digits: what a page can show, at a quarter of the bytes."""
    return None if number is None else float(f"{number:.4g}")


def _draw_kept(ax: plt.Axes, entry: Sequence[float], colour: str) -> None:
    density, size, energy, best_size, best_energy = entry
    ax.barh(["density", "magnitude", "energy"], [density, size, energy], color=[colour], alpha=0.85)
    ax.plot([best_size] * 2, [0.6, 1.4], [best_energy] * 2, [1.6, 2.4], color="black", linewidth=1.5)
    for row, share in enumerate((density, size, energy)):
        ax.text(0.02, row, f"{share:.0%}", va="center", fontsize=8, color="white" if share > 0.15 else "black")
    ax.set(xlim=(0, 1), xticks=[0, 0.5, 1])
    ax.tick_params(labelsize=8)
    ax.set_xlabel("kept; line: best", fontsize=7.5)
    if not ax.yaxis_inverted():
        ax.invert_yaxis()


def _draw_bound(ax: plt.Axes, ideal: Sequence[float], usable: Sequence[float] | None, colour: str) -> None:
    ax.plot(TOKENS, ideal, color=colour, linestyle="--")
    if usable:
        ax.plot(TOKENS, usable, color=colour)
    ax.axhline(1, color="#555555", linewidth=0.8, linestyle=":")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.set(xticks=[1, 64, 4096], xticklabels=["1", "64", "4096"])
    ax.yaxis.set_major_formatter(lambda gain, _: f"{gain:g}x")
    ax.tick_params(labelsize=8)
