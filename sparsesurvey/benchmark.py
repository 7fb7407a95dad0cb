"""Benchmarks: a structure's kernels against the dense product, and what the machine can do at most.

Structures are handed in. Every kernel is checked against float64 before it is timed; what is already recorded for
the same machine and code is not measured again, so a chapter that is executed twice is quick and says the same.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsesurvey import measure, nvml
from sparsesurvey.cuda import graphed
from sparsesurvey.measure import Machine, Measurement, Timing
from sparsesurvey.probes import copy_run, last_cache_bytes, launch_run, matmul_run
from sparsesurvey.roofline import A100, COPY, H100, H200, LAUNCH, MATMUL, Roofline
from sparsesurvey.scores import magnitude
from sparsesurvey.structure import PRODUCTS, Pattern, Plan, Shape, Structure, Unavailable, check_int
from sparsesurvey.tables import table

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["A100", "H100", "H200", "Benchmark", "How", "Roofline", "WrongProduct", "calibrate", "noise",
           "products", "show"]

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
METRICS = {"relative error": "1", "time": "s", "speedup": "x"}  # of every kernel; dense itself has only a time
ENERGY = "energy"  # J a call, where it is asked for and the GPU counts it


class WrongProduct(RuntimeError):
    """A kernel's result is not the product; it is not timed."""


class BrokenDevice(RuntimeError):
    """A kernel left the GPU in a state that only another process gets out of; ``kernel`` is its name."""

    def __init__(self, kernel: str, why: object):
        super().__init__(f"kernel {kernel} broke the device: {str(why).splitlines()[0]}")
        self.kernel = kernel


@dataclass(frozen=True)
class Benchmark:
    """What ``products`` found: rows of this machine, and why a kernel has none."""

    structure: str
    rows: list[Measurement]
    unavailable: dict[str, str]  # kernel: reason
    failed: dict[str, str] = field(default_factory=dict)  # kernel: what went wrong, where that is forgiven

    def table(self, metric: str | None = None) -> "pd.DataFrame":
        """The rows (of one metric if given) and the kernels that cannot run here, for a page."""
        return show([self], metric)


def products(structure: Structure, shape: Shape, tokens: int, chapter: str, *, dtype: str = "float32",
             device: str = "cpu", threads: int = 1, product: str = "spmm", record: str = "",
             kernels: Iterable[str] | None = None, rounds: int = 15, min_seconds: float = 0.02,
             flush_l2: bool = False, **more: Any) -> Benchmark:
    """Time the kernels of ``structure`` for one product against dense, in one ``compare``.

    The weight ``[out, in]`` is random, made a member by magnitude; dense multiplies the weight before that. Rows,
    kept in ``chapter`` of the folder ``record`` (empty: the live rows): each kernel's "relative error" (the largest
    difference from float64 over the largest result), "time" (s) and "speedup" (x, dense's time over this one's, round
    by round), and dense's time as method "dense". ``kernels`` is by default all but the reference, which multiplies
    the dense weight again. ``more`` are the other fields of ``How``. WrongProduct if a kernel's result is off by more
    than rounding; ValueError for bad input.
    """
    runs = _check(structure, shape, tokens, dtype, threads, product, kernels)
    how = How(rounds, min_seconds, flush_l2, **more)
    where = measure.check_device(device)
    at = {"out": shape[0], "in": shape[1], "tokens": tokens, "dtype": dtype, "threads": threads, "product": product,
          **how.settings(where)}
    with cpu_threads(threads):
        book = Book(str(structure), type(structure).__module__, at, Machine.current(device), chapter, record)
        case = _Case(structure, shape, tokens, DTYPES[dtype], where, product)
        makers = {name: lambda run=run: run(case.packed) for name, run in runs.items()}
        makers |= {name: lambda run=run: run(case.weight) for name, run in how.against.items()}
        return book.fill(case, makers, how, where)


@dataclass(frozen=True)
class How:
    """How kernels are timed: see ``measure.compare`` for the first three.

    With few tokens a GPU waits for the launches that Python makes. ``graph`` records those of a call once (a CUDA graph,
    as who serves a model does) and times the replay; without it they count. ``against`` are dense products to time in the
    same rounds, each made from the dense weight. ``energy``: seconds that each run's energy is measured over, 0 for not.
    ``timed=False`` finds the errors alone. ``forgiving`` goes on without a kernel that fails, and tells why.
    """

    rounds: int = 15
    min_seconds: float = 0.02
    flush_l2: bool = False
    graph: bool = False
    against: Mapping[str, Callable[[Tensor], Plan]] = field(default_factory=dict)
    energy: float = 0.0
    timed: bool = True
    forgiving: bool = False

    def settings(self, device: torch.device) -> dict[str, str]:
        """What of it stands in a row."""
        if self.graph and device.type != "cuda":
            raise ValueError("graph is for device='cuda', got a CPU")
        if device.type != "cuda":
            return {}
        return {"cache": "flushed" if self.flush_l2 else "warm", **({"launch": "graph"} if self.graph else {})}


def show(results: Iterable[Benchmark], metric: str | None = None) -> "pd.DataFrame":
    """Several structures in one table, with the kernels that cannot run here and why."""
    results = list(results)
    unavailable = {(result.structure, name): why for result in results for name, why in result.unavailable.items()}
    return table([row for result in results for row in result.rows], metric, unavailable)


def noise(shape: Shape, tokens: int, *, dtype: str = "float32", device: str = "cpu", threads: int = 1,
          rounds: int = 25, min_seconds: float = 0.02) -> dict[str, Timing]:
    """Dense against itself: how far raw times stray (``spread``) and their paired ratio from 1 (``speedup_spread``)."""
    _check_case(shape, tokens, dtype, threads, "spmm")
    where = measure.check_device(device)
    with cpu_threads(threads):
        weight, inputs = _operands(shape, tokens, DTYPES[dtype], where, "spmm")
        run = _call(_dense("spmm", weight), inputs)
        return measure.compare({"dense": run, "dense again": run}, "dense", rounds, min_seconds, device)


def calibrate(device: str = "cpu", threads: int = 1, record: str = "", rounds: int = 5,
              min_seconds: float = 0.02) -> list[Measurement]:
    """Copy bandwidth (bytes read + written), dense matmul rate and the smallest call, as rows of "measuring".

    On a CPU fp32 at 2048 x 2048, on a GPU bf16 at 8192 x 8192. Copied are two buffers that fit a cache, and two that
    together are four times the last one (at most 1 GiB on a CPU: a virtual machine is told of caches that it shares).
    """
    check_int("threads", threads, 1)
    where = measure.check_device(device)
    with cpu_threads(threads):
        machine, books = Machine.current(device), {}
        for name, (metric, settings, _) in _probes(where).items():
            at = {**settings, "threads": threads}
            source = "sparsesurvey.probes" + ",sparsesurvey.cuda" * (where.type == "cuda")
            books[name] = metric, Book("dense", source, at, machine, "measuring", record)
        if not all(book.rows(["torch"], metric) for metric, book in books.values()):
            made = {name: make() for name, (_, _, make) in _probes(where).items()}
            runs = {name: run for name, (run, _) in made.items()}
            times = measure.compare(runs, MATMUL, rounds, min_seconds, device)
            for name, (metric, book) in books.items():
                time, work = times[name], made[name][1]
                if metric == LAUNCH:
                    book.add("torch", metric, "s", time.seconds / work, time.low / work, time.high / work)
                else:
                    unit = "B/s" if metric == COPY else "FLOP/s"
                    book.add("torch", metric, unit, work / time.seconds, work / time.high, work / time.low)
    return [row for metric, book in books.values() for row in book.rows(["torch"], metric)]


def _probes(device: torch.device) -> dict[str, tuple[str, dict, Callable[[], tuple]]]:
    """By name: the metric, its settings, and what makes the run and the work (bytes or FLOP) that one call does."""
    gpu = device.type == "cuda"
    side, dtype = (8192, "bfloat16") if gpu else (2048, "float32")
    near = 2**24 if gpu else 2**19  # bytes of each of the two buffers
    far = min(max(2 * last_cache_bytes(device), 2**26), 2**30 if gpu else 2**29)
    graph = {"launch in a graph": (LAUNCH, {"by": "graph"}, lambda: _repeated(launch_run(device), device))} if gpu else {}
    return {
        "near": (COPY, {"bytes": 2 * near, "level": "cache"},
                 lambda: _repeated(copy_run(near, device), device) if gpu else copy_run(near, device)),
        "far": (COPY, {"bytes": 2 * far, "level": "memory"}, lambda: copy_run(far, device)),
        MATMUL: (MATMUL, {"side": side, "dtype": dtype}, lambda: matmul_run(side, DTYPES[dtype], device)),
        LAUNCH: (LAUNCH, {}, lambda: launch_run(device)),
        **graph,
    }


def _repeated(probe: tuple[Callable[[], object], int], device: torch.device, times: int = 20) -> tuple[Callable[[], object], int]:
    """A probe that is shorter than its launch, so many times in one CUDA graph."""
    run, work = probe
    return graphed(run, device, times), work * times


class Book:
    """The rows of one structure under the same settings on this machine: what is there, and how to add to it."""

    metrics = {**METRICS, ENERGY: "J"}

    def __init__(self, structure: str, source: str, at: dict[str, Any], machine: Machine, chapter: str, folder: str):
        self.structure, self.source, self.at, self.machine = structure, source, at, machine
        self.chapter, self.folder = chapter, folder
        self.code = measure.code_of(source, device=machine.device)  # before anything is timed: the code that runs, not what it is edited to

    def add(self, method: str, metric: str, unit: str, value: float, low: float, high: float) -> None:
        row = Measurement.now(
            metric, unit, value, structure=self.structure, method=method, at=self.at, source=self.source,
            low=min(low, value), high=max(high, value), machine=self.machine, code=self.code)
        measure.record(row, self.chapter, self.folder)

    def fill(self, case: Any, makers: Mapping[str, Callable[[], Plan]], how: "How", device: torch.device) -> Benchmark:
        """Find and write what is missing of these kernels; ``case`` has ``dense``, ``inputs`` and ``error(name, plan)``."""
        done = self.complete if how.timed else lambda name: bool(self.rows([name], "relative error"))
        missing, plans, errors = [name for name in makers if not done(name)], {}, {}
        unavailable: dict[str, str] = {}
        failed: dict[str, str] = {}
        for name in missing:
            try:
                plan = makers[name]()
                errors[name] = case.error(name, plan)
                plans[name] = graphed(_call(plan, case.inputs), device) if how.graph and how.timed else _call(plan, case.inputs)
            except Unavailable as reason:
                unavailable[name] = str(reason)
            except Exception as error:
                if not how.forgiving:
                    raise
                failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
                check_alive(name, device)
        for name in plans:
            self.add(name, "relative error", "1", *[errors[name]] * 3)
        if plans and how.timed:
            dense = _call(case.dense, case.inputs)
            calls = {"dense": graphed(dense, device) if how.graph else dense, **plans}
            times = measure.compare(calls, "dense", how.rounds, how.min_seconds, device, how.flush_l2)
            joules = {name: nvml.energy(call, device, how.energy) for name, call in calls.items()} if how.energy else {}
            self.write(times, joules)
        return Benchmark(self.structure, self.rows(["dense", *makers]), unavailable, failed)

    def write(self, times: Mapping[str, Timing], joules: Mapping[str, float | None]) -> None:
        """The kernel's speed-up goes last, so that a kernel with a speed-up is complete whenever we are killed."""
        for name, time in times.items():
            self.add(name, "time", "s", time.seconds, time.low, time.high)
            if joules.get(name) is not None:
                self.add(name, ENERGY, "J", *[joules[name]] * 3)
        for name, time in times.items():
            if name != "dense":
                self.add(name, "speedup", "x", time.speedup, time.speedup_low, time.speedup_high)

    def rows(self, methods: Iterable[str], metric: str | None = None) -> list[Measurement]:
        """What is recorded of these methods with this code, in their order and that of ``metrics``."""
        order = {name: rank for rank, name in enumerate(methods)}
        metrics = [metric] if metric else list(self.metrics)
        mine = [row for row in measure.live(self.chapter, self.folder)
                if row.structure == self.structure and row.method in order and row.metric in metrics
                and row.code == self.code and row.machine.slug == self.machine.slug and row.at == self.at]
        return sorted(mine, key=lambda row: (order[row.method], metrics.index(row.metric)))

    def complete(self, kernel: str) -> bool:
        return set(METRICS) <= {row.metric for row in self.rows([kernel])}


class _Case:
    """The operands of one product, made when they are needed, and how far from the right result rounding may lead."""

    def __init__(self, structure: Structure, shape: Shape, tokens: int, dtype: torch.dtype, device: torch.device,
                 product: str):
        self.structure, self.product = structure, product
        self.given = shape, tokens, dtype, device, product
        length = tokens if product == "sddmm" else shape[product == "spmm"]
        self.allowed = allowed(dtype, length)

    @cached_property
    def operands(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        return _operands(*self.given)

    @property
    def weight(self) -> Tensor:
        """The dense weight ``[out, in]``."""
        return self.operands[0]

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return self.operands[1]

    @cached_property
    def dense(self) -> Plan:
        return _dense(self.product, self.weight)

    @cached_property
    def packed(self) -> Any:
        weight = self.weight
        if isinstance(self.structure, Pattern):
            weight = weight * self.structure.mask(magnitude(weight))
        return self.structure.pack(weight)

    @cached_property
    def right(self) -> Tensor:
        """The product in float64; the weight gradient at the stored weights, as ``packed.values`` are."""
        if self.product == "sddmm":
            exact = self.structure.sddmm_reference(self.packed._replace(values=self.packed.values.double()))
        else:
            unpack = self.structure.forward_weight if self.product == "spmm" else self.structure.backward_weight
            exact = _dense(self.product, unpack(self.packed).double())
        return exact(*(operand.double() for operand in self.inputs))

    @cached_property
    def right_dense(self) -> Tensor:
        return _dense(self.product, self.weight.double())(*(operand.double() for operand in self.inputs))

    def error(self, name: str, plan: Plan) -> float:
        """Largest difference from float64 over the largest result; WrongProduct if that is more than rounding."""
        right = self.right_dense if name.startswith("dense ") else self.right
        return relative_error(name, plan(*self.inputs), right, self.inputs[0].dtype, self.allowed)


def allowed(dtype: torch.dtype, length: int) -> float:
    """How far rounding may lead off, as a share of the largest result, in a sum of ``length`` terms.

    In fp32 or fp64 it strays by about sqrt(length) roundings; fp16 and bf16 are summed in fp32 and rounded at the end, or
    a few times where a library splits the sum.
    """
    rounding = torch.finfo(dtype).eps
    return 4 * rounding * (length**0.5 if rounding < 1e-4 else 1)


def relative_error(name: str, result: Tensor, right: Tensor, dtype: torch.dtype, most: float) -> float:
    """Largest difference from ``right`` over its largest entry; WrongProduct if that is above ``most``, or not this kind."""
    if result.shape != right.shape or result.dtype != dtype:
        raise WrongProduct(f"kernel {name} gave {result.dtype} {tuple(result.shape)}, not {dtype} {tuple(right.shape)}")
    if not right.numel():
        return 0.0
    scale = float(right.abs().max()) or 1.0
    error = float((result.double() - right).abs().max()) / scale
    if not error <= most:
        raise WrongProduct(f"kernel {name} is off by {error:.2g} of the largest result, allowed {most:.2g}")
    return error


def _operands(shape: Shape, tokens: int, dtype: torch.dtype, device: torch.device,
              product: str) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A random weight ``[out, in]`` and the product's inputs ``[tokens, ...]``, the same on every CPU and on every GPU."""
    generator = torch.Generator(device).manual_seed(0)
    out, inn = shape
    draw = lambda *size: torch.randn(*size, generator=generator, device=device).to(dtype)
    weight, x, dy = draw(out, inn) / inn**0.5, draw(tokens, inn), draw(tokens, out)
    return weight, {"spmm": (x,), "spmmt": (dy,), "sddmm": (dy, x)}[product]


def _dense(product: str, weight: Tensor) -> Plan:
    if product == "spmm":
        return lambda x: torch.nn.functional.linear(x, weight)
    if product == "spmmt":
        return lambda dy: dy @ weight
    return lambda dy, x: dy.T @ x


def _call(plan: Plan, inputs: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    return lambda: plan(*inputs)


def check_alive(kernel: str, device: torch.device) -> None:
    """BrokenDevice if the GPU takes no more work after a kernel's failure."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError as error:
        raise BrokenDevice(kernel, error) from None


def _check(structure: Structure, shape: Shape, tokens: int, dtype: str, threads: int, product: str,
           kernels: Iterable[str] | None) -> dict[str, Callable[[Any], Plan]]:
    """The kernels to run, by name; ValueError names the argument that is wrong."""
    if not isinstance(structure, Structure):
        raise ValueError(f"structure must be a Structure such as Block(32, 32, 0.5), got {structure!r}")
    _check_case(shape, tokens, dtype, threads, product)
    structure.check_shape(shape)
    known = structure.kernels(product)
    chosen = [name for name in known if name != "reference"] if kernels is None else list(kernels)
    for name in chosen:
        if name not in known or name == "dense":
            raise ValueError(f"kernels of {structure} for {product} are {', '.join(known)}, got {name!r}")
    return {name: known[name] for name in chosen}


def _check_case(shape: Shape, tokens: int, dtype: str, threads: int, product: str) -> None:
    if len(shape) != 2:
        raise ValueError(f"shape must be (out, in), got {tuple(shape)}")
    for name, size in (("out", shape[0]), ("in", shape[1]), ("tokens", tokens), ("threads", threads)):
        check_int(name, size, 1)
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if product not in PRODUCTS:
        raise ValueError(f"product must be one of {', '.join(PRODUCTS)}, got {product!r}")


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """torch's threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
