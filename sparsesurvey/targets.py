"""What the kernels must reach on an H200 in bf16, as ratios of times in one run, and whether rows say that they do."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from sparsesurvey.records import Measurement
from sparsesurvey.structure import Shape, Structure
from sparsesurvey.structures import NM, VNM, Block, Unstructured

OURS = ("triton", "cuda")  # first words of the kernels that are ours; all others are a library's, or for a CPU
GATE, DOWN = (14336, 4096), (4096, 14336)  # [out, in] of the 7B Mistral
SMALL = (3072, 768)  # gate of the 162M one
FEW = 64  # tokens up to which a call is so short that its launches are recorded (a CUDA graph) and the cache is flushed
DENSE = "dense"


@dataclass(frozen=True)
class Case:
    """One product of one structure to be measured: ``product`` is one of ``structure.PRODUCTS``, or "mlp"."""

    structure: Structure
    shape: Shape
    tokens: int
    product: str = "spmm"
    dtype: str = "bfloat16"
    flushed: bool = False

    @property
    def graph(self) -> bool:
        return self.tokens <= FEW

    @property
    def settings(self) -> dict[str, str | int]:
        """What a row of this case has in ``at``, on a GPU."""
        launch = {"launch": "graph"} if self.graph else {}
        return {"out": self.shape[0], "in": self.shape[1], "tokens": self.tokens, "dtype": self.dtype, "product": self.product,
                "cache": "flushed" if self.flushed else "warm", **launch}

    @property
    def key(self) -> tuple:
        return _key(str(self.structure), self.settings)

    def __str__(self) -> str:
        out, inn = self.shape
        return f"{self.structure} {self.product} [{self.tokens}] x [{out} x {inn}] {self.dtype}{', flushed' * self.flushed}"


def few(structure: Structure, shape: Shape, tokens: int, **more: str) -> Case:
    """As in decoding: the weight comes from memory."""
    return Case(structure, shape, tokens, flushed=True, **more)


Speedups = Mapping[str, float]  # over torch's dense product of the same rounds, by method


class Target(NamedTuple):
    """``value`` of the speed-ups of each case must be at least ``least``; in no case of ``cases`` may it be less."""

    what: str
    least: float
    cases: tuple[Case, ...]
    value: Callable[[Case, Mapping[tuple, Speedups]], float | None]


class Verdict(NamedTuple):
    what: str
    least: float
    value: float | None  # the lowest that was measured
    measured: int
    cases: int

    @property
    def word(self) -> str:
        if self.value is None:
            return "not measured"
        if self.value < self.least:
            return "not met"
        return "met" if self.measured == self.cases else "met so far"


def over_dense(case: Case, gains: Mapping[tuple, Speedups], words: Iterable[str] = OURS) -> float | None:
    """The fastest kernel whose first word is one of ``words`` over the fastest dense product."""
    found = gains.get(case.key, {})
    dense = [gain for method, gain in found.items() if method.split()[0] == DENSE]
    ours = [gain for method, gain in found.items() if method.split()[0].split("_")[0] in words]
    return max(ours) / max(1.0, *dense, 0.0) if ours else None


def of_cusparselt(case: Case, gains: Mapping[tuple, Speedups]) -> float | None:
    return over_dense(case, gains, ("cusparselt",))


def over_torch(case: Case, gains: Mapping[tuple, Speedups]) -> float | None:
    """Ours over torch's block kernel, as shipped or searched, whichever is faster."""
    found = gains.get(case.key, {})
    theirs = [found[name] for name in ("torch_bsr", "torch_bsr_searched") if name in found]
    ours = [gain for method, gain in found.items() if method.split("_")[0] in OURS]
    return max(ours) / max(theirs) if theirs and ours else None


def of_forward(case: Case, gains: Mapping[tuple, Speedups]) -> float | None:
    """The speed-up of a gradient as a share of the forward product's."""
    gradient, forward = over_dense(case, gains), over_dense(replace(case, product="spmm"), gains)
    return gradient / forward if gradient and forward else None


def _both(structure: Structure, tokens: int = 8192, **more: str) -> tuple[Case, ...]:
    return tuple(Case(structure, shape, tokens, **more) for shape in (GATE, DOWN))


def _peers() -> tuple[Case, ...]:
    blocks = [Block(side, side, density) for side in (128, 64) for density in (0.5, 0.25, 0.1)]
    return tuple(case for block in blocks for case in _both(block))


def targets() -> list[Target]:
    """The list of issue 4, most telling first."""
    tall = {density: Block(128, 128, density) for density in (0.5, 0.25, 0.1)}
    low = {density: Block(64, 64, density) for density in (0.25, 0.1)}
    decode = lambda density: tuple(few(Unstructured(density), shape, tokens) for shape in (GATE, DOWN) for tokens in (1, 16))
    gradients = tuple(case for product in ("spmmt", "sddmm") for case in _both(tall[0.1], product=product))
    return [
        *(Target(f"block 128, 7B, 8192 tokens, {1 - density:.0%} sparse, over dense", least, _both(tall[density]), over_dense)
          for density, least in ((0.5, 1.35), (0.25, 2.7), (0.1, 6.0))),
        *(Target(f"block 64, 7B, 8192 tokens, {1 - density:.0%} sparse, over dense", least, _both(low[density]), over_dense)
          for density, least in ((0.25, 1.6), (0.1, 4.0))),
        Target("blocks over torch's bsr_dense_addmm, searched", 1.3, _peers(), over_torch),
        *(Target(f"V:N:M {structure}, 7B, 8192 tokens, over dense", least, _both(structure), over_dense)
          for structure, least in ((VNM(64, 2, 8), 2.0), (VNM(64, 2, 16), 3.5))),
        Target("gradients of block 128, 90% sparse, as a share of the forward speed-up", 0.8, gradients, of_forward),
        Target("fused SwiGLU MLP, 162M, 32768 tokens, block 128, 90% sparse, over fused dense", 3.5,
               (Case(tall[0.1], SMALL, 32768, "mlp"),), over_dense),
        *(Target(f"unstructured, 7B, 1 to 16 tokens, {1 - density:.0%} sparse, over dense", least, decode(density), over_dense)
          for density, least in ((0.5, 1.35), (0.1, 4.0))),
        Target("2:4, 7B, 8192 tokens, cuSPARSELt searched, over dense", 1.5, _both(NM(2, 4)), of_cusparselt),
    ]


def verdicts(rows: Iterable[Measurement]) -> list[Verdict]:
    """Each target with the lowest value that these rows (of one GPU) give it; stale rows do not count."""
    gains, found = by_case(rows), []
    for target in targets():
        values = [value for case in target.cases if (value := target.value(case, gains)) is not None]
        found.append(Verdict(target.what, target.least, min(values, default=None), len(values), len(target.cases)))
    return found


def by_case(rows: Iterable[Measurement]) -> dict[tuple, dict[str, float]]:
    """Speed-ups over dense by case and method: of several rows of one, the youngest; those whose code has changed left out."""
    found: dict[tuple, dict[str, float]] = {}
    for row in sorted(rows, key=lambda row: row.date):
        if row.metric == "speedup" and "product" in row.at and not row.stale:
            found.setdefault(_key(row.structure, row.at), {})[row.method] = row.value
    return found


def _key(structure: str, at: Mapping[str, object]) -> tuple:
    names = ("out", "in", "tokens", "dtype", "product", "cache", "launch")
    return (structure, *(at.get(name, "") for name in names))


def table(found: Iterable[Verdict]) -> str:
    """The verdicts as lines of text."""
    lines = [("what", "at least", "measured", "")]
    for item in found:
        value = "" if item.value is None else f"{item.value:.2f}"
        lines.append((item.what, f"{item.least:g}", value, f"{item.word} ({item.measured} of {item.cases})"))
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)
