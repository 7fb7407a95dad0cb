"""Rooflines (Williams et al. 2009): what no product can beat on a machine, from measured rows or from a datasheet.

>>> from sparsesurvey.structure import Cost, Shape, Structure
>>> dense = Cost(flops=989 * 10**9, weight_bytes=0, io_bytes=1)
>>> sparse = Cost(flops=989 * 10**8, weight_bytes=0, io_bytes=1)
>>> H200.bound(dense), round(H200.speedup(sparse, dense), 3)  # seconds, and how many times faster
(0.001, 10.0)
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite

from sparsesurvey.records import Measurement
from sparsesurvey.structure import Cost, Shape, Structure


@dataclass(frozen=True)
class Roofline:
    """Peak arithmetic and peak memory traffic of a machine, and the least time that any call takes."""

    machine: str
    flops_per_second: float
    bytes_per_second: float
    source: str  # what the numbers rest on: dated rows, or a datasheet that is quoted
    floor: float = 0.0  # seconds

    def __post_init__(self) -> None:
        for name in ("flops_per_second", "bytes_per_second"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not isfinite(value) or value <= 0:
                raise ValueError(f"{name} must be a finite number above 0, got {value!r}")
        if not isinstance(self.floor, (int, float)) or not 0 <= self.floor < float("inf"):
            raise ValueError(f"floor must be seconds of at least 0, got {self.floor!r}")
        if not self.source:
            raise ValueError("source must say where the numbers come from")

    @property
    def ridge(self) -> float:
        """FLOP per byte above which arithmetic is the limit, below which memory is."""
        return self.flops_per_second / self.bytes_per_second

    def bound(self, cost: Cost) -> float:
        """Seconds below which no product of this cost can get."""
        return max(self.floor, cost.seconds(self.flops_per_second, self.bytes_per_second))

    def speedup(self, cost: Cost, dense: Cost) -> float:
        """How many times faster than dense the structure's bound is."""
        return self.bound(dense) / self.bound(cost)

    def over_dense(self, structure: Structure, shape: Shape, tokens: int, itemsize: int = 2, *, ideal: bool = False,
                   product: str = "spmm") -> float:
        """Bound on the speed-up of one of ``PRODUCTS`` over dense, with the arithmetic that ``structure.facts()`` knows of.

        All three move the same bytes: two matrices of activations, and the weight or its gradient with the index.
        Where nothing is known, and always with ``ideal``, as if all the arithmetic saved were time saved.
        """
        least, size = structure.cost(shape, tokens, itemsize), shape[0] * shape[1]
        dense = Cost(2 * tokens * size, size * itemsize, least.io_bytes)
        share = structure.facts().share(product)
        work = least.flops if ideal or share is None else max(least.flops, round(share * dense.flops))
        return self.speedup(Cost(work, least.weight_bytes, least.io_bytes), dense)

    def bounds(self, structures: Iterable[Structure], shape: Shape, tokens: int, itemsize: int = 2, *,
               ideal: bool = True) -> dict[str, float]:
        """``over_dense`` of several structures, by their notation."""
        return {str(item): self.over_dense(item, shape, tokens, itemsize, ideal=ideal) for item in structures}

    @classmethod
    def measured(cls, rows: Iterable[Measurement]) -> "Roofline":
        """Of one machine's rows of ``benchmark.calibrate``: the best that it was seen to do, not its median.

        Bytes move as fast as the fastest copy, the one within a cache: kernels are timed on operands that they have
        just touched. ValueError if a row is missing or the rows are of several machines.
        """
        rows = [row for row in rows if row.metric in (COPY, MATMUL, LAUNCH)]
        missing = {COPY, MATMUL, LAUNCH} - {row.metric for row in rows}
        machines = {row.machine.slug for row in rows}
        if missing or len(machines) > 1:
            what = f"no row of {', '.join(sorted(missing))}" if missing else f"rows of {', '.join(sorted(machines))}"
            raise ValueError(f"rows must be those of calibrate() on one machine, got {what}")
        rows.sort(key=lambda row: -row.low if row.metric == LAUNCH else row.high)  # the best of a metric comes last
        best = {row.metric: row for row in rows}
        fast = best[MATMUL]
        source = f"measured {fast.date[:10]}, {fast.at.get('dtype')}, {fast.at.get('threads')} thread(s)"
        return cls(str(fast.machine), fast.high, best[COPY].high, source, best[LAUNCH].low)


COPY, MATMUL, LAUNCH = "copy bandwidth", "matmul rate", "launch time"

# Quoted, never measured by us: bf16 dense tensor cores (half of the figure that the sheets print "with sparsity").
H200 = Roofline("NVIDIA H200 SXM", 989e12, 4.8e12, "NVIDIA H200 datasheet: 989 TFLOP/s bf16 dense, 4.8 TB/s (quoted)")
H100 = Roofline("NVIDIA H100 SXM", 989e12, 3.35e12, "NVIDIA H100 datasheet: 989 TFLOP/s bf16 dense, 3.35 TB/s (quoted)")
A100 = Roofline("NVIDIA A100 SXM 80 GB", 312e12, 2.039e12,
                "NVIDIA A100 datasheet: 312 TFLOP/s bf16 dense, 2,039 GB/s (quoted)")
