"""A GPU campaign: record what is missing, most valuable first, in so many minutes. ``python -m sparsesurvey.campaign --help``.

First the machine's limits, then whether every kernel of the targets is right (error against float64), then times: those of
the targets, then a grid of shapes, tokens and densities. Rows are appended as they are measured, what is there already
(with the same code) is skipped, so that an interrupted campaign goes on where it was. It ends with a table of the targets.
With time left when all products are measured, or at once with ``--training``, the 162M model is trained: see ``pretraining``.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import prod
from pathlib import Path
from time import monotonic

import torch
from tqdm import tqdm

from sparsesurvey import benchmark, gated, measure, targets
from sparsesurvey.benchmark import Benchmark, BrokenDevice
from sparsesurvey.deadline import OutOfTime, timed_out
from sparsesurvey.machine import PACKAGE, Machine
from sparsesurvey.records import live_folder
from sparsesurvey.structure import Shape, Structure
from sparsesurvey.structures import Block, Dense, Unstructured, all_structures
from sparsesurvey.tables import amount
from sparsesurvey.targets import DOWN, FEW, GATE, OURS, SMALL, Case

CHAPTER, REHEARSAL = "gpu", "dry-run"
BUILT = ("spinfer", "spatha", "sputnik", "macko")  # by the reader, in float16 (kernels/built.py)
LIBRARIES = ("torch", "cublaslt", "cusparselt", "cutlass", "cupy", "stk", *BUILT)
SPARSE = ("cusparselt", "cutlass")  # libraries for which a structure without a kernel of ours is worth a case
DENSITIES = (0.1, 0.25, 0.5, 0.05, 0.01)
TOKENS = (8192, 1, 16, 1024, 32768, 256, 64, 4096)
SHAPES = (GATE, DOWN, SMALL, SMALL[::-1], (4096, 4096), (8192, 8192), (16384, 16384))
SHORT = 0.5  # seconds that are too few for any case


# ---- what there is to measure


def kernels(case: Case, skip: Iterable[str] = ()) -> list[str]:
    """The kernels of a case that are for a GPU, ours and those of libraries, by name; CSR for unstructured matrices only.

    ``skip``: kernels of one structure's product ("<structure> <product> <kernel>"), or one by whomever ("<kernel>").
    """
    names = [name for name in case.structure.kernels(case.product) if name.split("_")[0] in (*OURS, *LIBRARIES)
             and (not name.endswith("_csr") or isinstance(case.structure, Unstructured))]
    return [name for name in names if not {name, f"{case.structure} {case.product} {name}"} & set(skip)]


def worth(structure: Structure) -> bool:
    """Whether a GPU may win with it: there is a kernel of ours, or sparse tensor cores; unstructured is what all compare with."""
    words = {name.split("_")[0] for name in structure.kernels()}
    return bool(words & {*OURS, *SPARSE}) or isinstance(structure, Unstructured)


@lru_cache(maxsize=None)
def at_density(density: float, shape: Shape) -> tuple[Structure, ...]:
    """The structures that divide ``shape`` and store this share of it, within 3 %: high blocks, then all that are found."""
    found = [Block(side, side, density) for side in (128, 64)] + [Unstructured(density)]
    found += [item for kind in all_structures().values() for item in kind.variants() if not isinstance(item, (Dense, Unstructured))]
    return tuple(item for item in dict.fromkeys(found) if worth(item) and stores(item, density, shape))


def stores(structure: Structure, density: float, shape: Shape) -> bool:
    try:
        return abs(structure.nnz(shape) / prod(shape) - density) <= 0.03 * density
    except ValueError:
        return False


def cases() -> list[Case]:
    """Everything that is worth measuring, most valuable first: the targets, dense by itself, then the grid."""
    aimed = [case for target in targets.targets() for case in target.cases]
    forward = [replace(case, product="spmm") for case in aimed if case.product not in ("spmm", "mlp")]
    dense = [Case(Dense(), shape, 8192) for shape in (GATE, DOWN)]
    mlps = [Case(Block(128, 128, density), shape, 32768, "mlp") for shape in (SMALL, GATE) for density in (0.1, 0.25, 0.5)]
    return list(dict.fromkeys([*aimed, *forward, *dense, *mlps, *rivals(aimed), *grid()]))


def rivals(aimed: Iterable[Case]) -> list[Case]:
    """The targets' forward products in float16 where a peer that the reader has built takes them."""
    here = {name for name in BUILT if os.environ.get(f"SPARSESURVEY_{name.upper()}")}
    return [replace(case, dtype="float16") for case in aimed if case.product == "spmm" and here & set(case.structure.kernels())]


def grid() -> Iterator[Case]:
    """Shapes, tokens and densities in an order in which each step is a little less telling than the last."""
    places = [(shape, tokens, density) for shape in SHAPES for tokens in TOKENS for density in DENSITIES]
    rank = lambda place: SHAPES.index(place[0]) + TOKENS.index(place[1]) + 2 * DENSITIES.index(place[2])
    for dtype in ("bfloat16", "float16"):
        for shape, tokens, density in sorted(places, key=rank):
            for structure in at_density(density, shape):
                case = Case(structure, shape, tokens, dtype=dtype, flushed=tokens <= FEW)
                yield case
                if isinstance(structure, Block) and tokens > FEW:
                    yield from (replace(case, product=product) for product in ("spmmt", "sddmm"))
        yield from (Case(structure, shape, tokens, dtype=dtype, flushed=tokens > FEW)  # the other state of the cache
                    for shape, tokens, density in sorted(places, key=rank) for structure in at_density(density, shape))
    for shape, tokens, density in sorted(places, key=rank):  # CuPy has no 16-bit sparse matrices
        yield Case(Unstructured(density), shape, tokens, dtype="float32", flushed=tokens <= FEW)


# ---- measuring


@dataclass
class Pace:
    """How long a case takes: a rough model, times how much longer than it the last cases took."""

    recent: list[float] = field(default_factory=list)
    kept: int = 5

    @staticmethod
    def model(case: Case, count: int) -> float:
        """Seconds on an H200: operands, the product in float64, and ``count`` kernels in 12 rounds of at least 5 ms."""
        flops, share = 2 * case.tokens * prod(case.shape), 1 + 5 * (case.product == "mlp")
        return 0.5 + share * (flops / 3e13 + (count + 2) * 12 * max(0.007, 2 * flops / 5e14))

    def expected(self, case: Case, count: int) -> float:
        return self.model(case, count) * max(self.recent[-self.kept:], default=2.0)

    def learn(self, case: Case, count: int, seconds: float) -> None:
        if seconds > 0.2:  # else it was all recorded already
            self.recent.append(seconds / self.model(case, count))


@dataclass
class Campaign:
    device: str
    record: str
    deadline: float  # of ``monotonic``
    rehearsal: bool = False
    skip: tuple[str, ...] = ()
    pace: Pace = field(default_factory=Pace)
    problems: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, set[str]] = field(default_factory=dict)  # why a kernel cannot run: for which structures
    too_long: bool = False  # was there a case that no longer fitted into the time?

    @property
    def chapter(self) -> str:
        return REHEARSAL if self.rehearsal else CHAPTER

    @property
    def left(self) -> float:
        return self.deadline - monotonic()

    def measure(self, case: Case, timed: bool = True) -> Benchmark:
        """One case: the rows of its kernels, in the same rounds as torch's dense product and the best that cuBLASLt has."""
        quick = {"rounds": 3, "min_seconds": 1e-4} if self.rehearsal else {"rounds": 12, "min_seconds": 5e-3}
        how = {**quick, "dtype": case.dtype, "device": self.device, "record": self.record, "timed": timed, "forgiving": True}
        if not self.rehearsal:
            energy = 0.5 if case.shape == GATE and case.tokens >= 8192 else 0.0
            how |= {"flush_l2": case.flushed, "graph": case.graph, "energy": energy}
        if case.product == "mlp":
            full = replace(case.structure, density=1.0)
            return gated.mlp(case.structure, case.shape, case.tokens, self.chapter, full=full, **how)
        if not isinstance(case.structure, Dense):
            how["against"] = {"dense cublaslt": lambda weight: Dense().kernels(case.product)["cublaslt"](Dense().pack(weight))}
        chosen = kernels(case, self.skip)
        return benchmark.products(case.structure, case.shape, case.tokens, self.chapter, product=case.product, kernels=chosen, **how)

    def go_through(self, queue: list[Case], title: str, timed: bool = True) -> None:
        """Measure what still fits into the time; a case that fails is told at the end."""
        with tqdm(queue, desc=title, unit="case", mininterval=0.5) as bar:
            for case in bar:
                if self.left < SHORT:
                    raise OutOfTime
                bar.set_postfix_str(f"{max(0, self.left):.0f} s left, {case}", refresh=False)
                count = 4 if case.product == "mlp" else len(kernels(case, self.skip))
                if not count or str(case) in self.skip:
                    continue
                if self.pace.expected(case, count) < self.left:
                    start = monotonic()
                    self.try_case(case, timed)
                    self.pace.learn(case, count, monotonic() - start)
                else:
                    self.too_long = True

    def try_case(self, case: Case, timed: bool) -> None:
        try:
            found = self.measure(case, timed)
        except BrokenDevice as broken:
            whole = broken.kernel in (*BUILT, "stk")  # a peer that breaks one case is not tried on others
            broken.label = broken.kernel if whole else f"{case.structure} {case.product} {broken.kernel}"
            raise
        except Exception as error:  # while all kernels are timed: out of memory, say
            self.problems[str(case)] = f"{type(error).__name__}: {error}".splitlines()[0]
            try:
                benchmark.check_alive("of unknown name", torch.device(self.device))
            except BrokenDevice as broken:
                broken.label = str(case)
                raise
        else:
            for name, why in found.failed.items():
                self.problems[f"{case} {name}"] = why
            for name, why in found.unavailable.items():
                self.reasons.setdefault(f"{name}: {why}", set()).add(str(case.structure))


def tiny(case: Case) -> Case:
    """A case of the same kind that the interpreter gets through in a second or two, in the CPU's terms."""
    out, inn = (max(64, 4 * step) for step in case.structure.tile)  # enough tiles that a tenth of them is some
    return replace(case, shape=(out, inn), tokens=min(case.tokens, 24), flushed=False)


# ---- the command


def prepare(workers: int, arguments: list[str], seconds: float) -> None:
    """Let processes compile and search the targets' kernels at once, each some of them, into Triton's cache on disk."""
    command = [sys.executable, "-m", "sparsesurvey.campaign", *arguments]
    started = [subprocess.Popen([*command, "--part", f"{number}/{workers}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
               for number in range(workers)]
    limit = monotonic() + seconds
    try:
        for process in tqdm(started, desc="compiling", unit="process"):
            try:
                process.wait(max(0.1, limit - monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
    finally:
        for process in started:
            process.poll() is None and process.kill()


def options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m sparsesurvey.campaign", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="when to stop (default 9)")
    parser.add_argument("--device", default="cuda", help="cuda or cuda:0 (default cuda)")
    parser.add_argument("--record", default="", help="folder of the rows; by default that of the live rows")
    parser.add_argument("--dry-run", action="store_true", help="tiny cases on the CPU, kernels interpreted: does all of it run?")
    parser.add_argument("--training", action="store_true", help="train the 162M model instead (needs transformers and the corpus)")
    parser.add_argument("--corpus", default="", help="folder of the text to train on (default $SPARSESURVEY_CORPUS)")
    parser.add_argument("--workers", type=int, default=None, help="processes that compile beforehand (default: half the cores, at most 6)")
    parser.add_argument("--skip", action="append", default=[], help=argparse.SUPPRESS)  # kernels that broke the device
    parser.add_argument("--part", default="", help=argparse.SUPPRESS)  # of the targets, to compile only
    given = parser.parse_args(arguments)
    if not 0 < given.minutes < 1e4:
        parser.error(f"--minutes must be a number above 0, got {given.minutes}")
    if given.dry_run and given.record and Path(given.record).resolve() == (PACKAGE / "recorded").resolve():
        parser.error("--dry-run measures nothing: give its rows another folder than that of the package")
    if given.dry_run:
        given.device, given.record = "cpu", given.record or tempfile.mkdtemp(prefix="sparsesurvey-")
    try:
        measure.check_device(given.device)
    except ValueError as error:
        parser.error(f"{error}; --dry-run needs no GPU")
    if given.device == "cpu" and not given.dry_run:
        parser.error("a campaign is for a GPU; on a CPU there is --dry-run")
    return given


def limits(rows: Iterable[measure.Measurement]) -> str:
    """What the machine can do, in a line."""
    return ", ".join(f"{row.metric} {' '.join(str(value) for name, value in row.at.items() if name in ('level', 'by'))} "
                     f"{amount(row.value, row.unit)}".replace("  ", " ") for row in rows)


def work(given: argparse.Namespace, start: float) -> None:
    """The campaign itself, in its order."""
    made = Campaign(given.device, given.record, start + 60 * given.minutes, given.dry_run, tuple(given.skip))
    queue = cases()
    aimed = list(dict.fromkeys(case for target in targets.targets() for case in target.cases))
    if given.dry_run:
        queue, aimed = (list(dict.fromkeys(map(tiny, some))) for some in (queue, aimed))
    if given.part:
        number, parts = map(int, given.part.split("/"))
        return made.go_through(aimed[number::parts], "compiling", timed=False)
    machine = Machine.current(given.device)
    print(f"{machine}, torch {machine.torch}, triton {machine.triton or 'none'}, cupy {machine.cupy or 'none'}, "
          f"{given.minutes:g} minutes, rows in {live_folder(given.record)}", flush=True)
    try:
        with timed_out(made.left):
            quick = {"rounds": 3, "min_seconds": 1e-4} if given.dry_run else {}
            print(limits(benchmark.calibrate(given.device, record=given.record, **quick)), flush=True)
            workers = min(6, (os.cpu_count() or 2) // 2) if given.workers is None else given.workers
            if workers > 0 and not (given.dry_run or given.skip or given.training):
                with tempfile.TemporaryDirectory() as folder:
                    minutes = min(2.0, given.minutes / 4)
                    prepare(workers, ["--device", given.device, "--record", folder, "--minutes", str(minutes)], 60 * minutes)
            if not given.training:
                made.go_through(aimed, "right?", timed=False)
                made.go_through(queue, "how fast?")
            if given.training or not given.dry_run:
                pretrain(made, given)
            if made.too_long:
                raise OutOfTime
    except OutOfTime:
        print("The time is over; run the same command again to go on.", flush=True)
    except KeyboardInterrupt:
        print("Stopped; what was measured is recorded. Run the same command again to go on.", flush=True)
    if not given.training:
        report(made)


def pretrain(made: Campaign, given: argparse.Namespace) -> None:
    """Train in the time that is left. Products need none of what training needs: it is not imported before."""
    if not (given.training or given.corpus or os.environ.get("SPARSESURVEY_CORPUS")):
        return
    from sparsesurvey import pretraining

    training = pretraining.Pretraining(given.record, made.deadline)
    jobs = pretraining.jobs_of(given.device, given.record, given.corpus, given.dry_run)
    try:
        pretraining.work(training, jobs, skip=made.skip, rehearsal=given.dry_run)
    finally:
        pretraining.report(training, jobs)


def report(made: Campaign) -> None:
    """What went wrong, what cannot run here, and the targets."""
    for what, why in made.problems.items():
        print(f"FAILED {what}: {why}")
    for why, structures in sorted(made.reasons.items()):
        print(f"not here: {why} ({len(structures)} structure{'s' * (len(structures) > 1)})")
    slug = Machine.current(made.device).slug
    rows = [row for row in measure.live(made.chapter, made.record) if row.machine.slug == slug]
    print(f"{len(rows)} rows of {slug}, {len({row.key for row in rows if row.stale})} of them stale\n")
    print(targets.table(targets.verdicts(rows)), flush=True)


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    start = monotonic()
    if "--dry-run" in arguments:
        os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported
    given = options(arguments)
    try:
        work(given, start)
    except BrokenDevice as broken:  # only a new process can go on: with what is left of the time, without that kernel
        print(f"{broken}; going on without {broken.label}", flush=True)
        left = given.minutes - (monotonic() - start) / 60
        if left > 0.2 and not given.part:
            again = ["--minutes", f"{left:.3f}", "--device", given.device, "--record", given.record, "--corpus", given.corpus]
            again += ["--training"] * given.training
            skip = [part for label in (*given.skip, broken.label) for part in ("--skip", label)]
            os.execv(sys.executable, [sys.executable, "-m", "sparsesurvey.campaign", *again, *skip])


if __name__ == "__main__":
    main()
