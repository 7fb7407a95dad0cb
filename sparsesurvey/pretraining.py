"""The 162M Mistral trained under every structure, most telling runs first, in so many minutes.

``python -m sparsesurvey.pretraining --help``; on several GPUs of a machine ``torchrun --nproc-per-node N -m
sparsesurvey.pretraining``. First the time of a step and of its parts, then runs to their end, each recorded once. What is
not finished in time has a checkpoint and goes on when the command is given again. The text is English Wikipedia in 32,000
tokens: a folder with the files of ``FILES``, named by ``--corpus`` or in the environment by ``SPARSESURVEY_CORPUS``.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from time import monotonic

import torch
from transformers import MistralConfig

from sparsesurvey import benchmark, data, measure, mistral, oneshot, parallel, speed, steptime, targets, trainer
from sparsesurvey.benchmark import BrokenDevice
from sparsesurvey.compressed import KERNEL, can_compress
from sparsesurvey.data import Language
from sparsesurvey.deadline import OutOfTime, timed_out
from sparsesurvey.experiments import run
from sparsesurvey.job import CHAPTER, FUSED, Job
from sparsesurvey.machine import PACKAGE, Machine
from sparsesurvey.mlp import can_fuse
from sparsesurvey.models import Method
from sparsesurvey.packed import has_all_three
from sparsesurvey.records import live_folder
from sparsesurvey.recipe import Recipe
from sparsesurvey.recipes import FST, SRSTE, SSTE, DenseLast, PruneAndGrow, RigL, Static
from sparsesurvey.scores import magnitude, wanda
from sparsesurvey.structure import Structure, Unavailable
from sparsesurvey.structures import NM, VNM, Block, Butterfly, Diagonal, TileWise, Transposable, Unstructured
from sparsesurvey.train import Diverged, History, TrainConfig

CORPUS = "SPARSESURVEY_CORPUS"
FILES = ("wiki-en.train.txt.xz", "wiki-en.valid.txt.xz", "wiki-en.bpe32000.json")  # text to train on, to validate on, tokenizer
CONFIG = TrainConfig(
    steps=1000, batch=64, seq=1024, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, clip=1.0, warmup=100, schedule="wsd", cooldown=0.35,
    eval_every=50, eval_batches=4, checkpoint_every=1000, device="cuda", precision="bfloat16", chunk=16384, compile=True)
MUON = {"optimizer": "muon", "muon_lr": 0.02, "lr": 3e-3}
REHEARSAL = replace(CONFIG, steps=4, batch=2, seq=16, warmup=1, eval_every=2, eval_batches=1, checkpoint_every=2, device="cpu",
                    precision="float32", chunk=16, compile=False)
FIRST = 5  # runs before more steps are taken apart
STEPS, PRUNING = "steps", "pruning"  # what taking them apart is called where it fails, and pruning the dense model
DIVERGED = "diverged"  # the metric of a run that has no loss any more: the steps after which it was last validated
WARM = 90  # seconds that a compiled run takes before its first step
DISK = 2e8  # bytes a second of a checkpoint that is written


# ---- what there is to train


def wikipedia(folder: str | Path = "") -> Language:
    """The campaign's text as tokens, made once, from a folder with ``FILES``; by default that of ``SPARSESURVEY_CORPUS``.

    ValueError if no folder is named, FileNotFoundError if it has not the files.
    """
    chosen = folder or os.environ.get(CORPUS)
    if not chosen:
        raise ValueError(f"corpus must be a folder with {', '.join(FILES)}: give --corpus, or set {CORPUS}; got none")
    train, valid, tokenizer = (Path(chosen) / name for name in FILES)
    read = partial(data.text, train, valid, tokenizer, progress=parallel.first())
    if parallel.first():
        read()
    parallel.wait()  # one makes the tokens, the others find them
    return read()


def best_kernel(structure: Structure | None, recipe: Recipe, device: str) -> str:
    """The kernel to train with: on a GPU ours or cuSPARSELt's, fused if it can be, on a CPU "gather"; else "masked".

    A kernel must have all three products, and the recipe one mask for the whole run; but 2:4 is compressed anew in every step
    where it has not, see ``compressed``.
    """
    if structure is None:
        return "masked"
    words = ("gather",) if device == "cpu" else (*targets.OURS, KERNEL)
    name = next((name for name in words if recipe.fixed_mask and has_all_three(structure, name)), "masked")
    if name == "masked" and device != "cpu" and can_compress(structure, recipe):
        return KERNEL
    return name + FUSED if can_fuse(structure, name) else name


def runs(language: Language, model: str = "162m", config: TrainConfig = CONFIG) -> list[Job]:
    """Every run of the campaign, most telling first.

    A structure with kernels for all three products is trained with them, and 2:4 compressed anew in every step; any other, and
    every other mask that moves, by masked dense products: exact losses, and no speed. The runs of twice the steps have about the time of the dense one, if blocks are twice as fast.
    """
    def job(structure: Structure | None, recipe: Recipe = Static(), seed: int = 0, **changes) -> Job:
        made = Job(structure, seed, language, model, replace(config, **changes), recipe if structure else Recipe(),
                   best_kernel(structure, recipe, config.device))
        muon = changes.get("optimizer") == "muon"  # it wants matrices, not the kept weights alone
        return replace(made, kernel="masked", code="") if muon and not made.compressed else made

    block = {(side, sparse): Block(side, side, 1 - sparse / 100) for side in (128, 64, 32) for sparse in (50, 75, 90)}
    tall, free, pairs, both = block[128, 90], Unstructured(0.1), NM(2, 4), Transposable(2, 4)
    longer = {"steps": 2 * config.steps}
    rates = [{"lr": config.lr / 3}, {"lr": 3 * config.lr}]
    return [
        job(None), job(tall), job(both), job(pairs), job(tall, **longer),
        job(block[64, 90]), job(free), job(VNM(64, 2, 8)), job(pairs, SRSTE()), job(free, RigL(every=50)),
        job(block[64, 90], PruneAndGrow(every=50)), job(None, seed=1), job(pairs, seed=1),
        job(both, DenseLast(FST())), job(both, FST()), job(pairs, SSTE()),
        job(block[128, 75]), job(block[128, 75], **longer), job(block[64, 75]), job(block[64, 50]), job(block[128, 50]),
        job(block[32, 90]), job(block[32, 75]), job(block[32, 50]),
        job(TileWise(128, 0.1)), job(Diagonal(0.1)), job(Butterfly(32, 2)),
        *(job(structure, **rate) for structure in (None, free, tall) for rate in rates),
        *(job(structure, **MUON) for structure in (None, pairs, free, tall)),
        *(job(block[side, sparse], PruneAndGrow(every=50)) for side, sparse in ((64, 75), (32, 90), (32, 75), (64, 50), (32, 50))),
    ]


def timed(jobs: Sequence[Job]) -> tuple[list[Job], list[Job]]:
    """The runs whose steps are taken apart, dense first: those that the targets name, and later one of each kind of product."""
    dense, tall, both, *_ = jobs
    panels = next(job for job in jobs if isinstance(job.structure, VNM))
    apart, masked = (replace(tall, kernel=kernel) for kernel in (tall.kernel.removesuffix(FUSED), "masked"))
    first = [dense, tall, both]
    return first, [dense, *(job for job in dict.fromkeys([apart, panels, masked]) if job not in first)]


def wide(language: Language) -> MistralConfig:
    """A model that is MLP above all, for what a CPU gains: 512 x 3072, two layers, 82 % of whose matrices are in the MLP."""
    shape = mistral.config("5m", vocab=language.vocab)
    shape.update({"hidden_size": 512, "intermediate_size": 3072, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 8,
                  "head_dim": 64})
    return shape


def on_a_cpu(record: str = "", rounds: int = 9) -> list[measure.Measurement]:
    """What training gains on one thread of a CPU, as rows of "speed": blocks in a wide model, and our loop beside the Trainer of
    transformers, where its package accelerate is."""
    language, config = data.stdlib(), TrainConfig(batch=4, seq=128)
    job = lambda model, structure: Job(structure, 0, language, model, config, Static() if structure else Recipe(),
                                       best_kernel(structure, Static(), "cpu"))
    rows = steptime.step_times([job(wide(language), structure) for structure in (None, Block(64, 64, 0.1))], record, rounds)
    try:
        return [*rows, *trainer.against_trainer(job("1m", None), record, rounds)]
    except Unavailable as why:
        print(f"not here: the Trainer {why}")
        return rows


# ---- training them


@dataclass
class Pretraining:
    """Training runs until a moment of ``monotonic``; what went wrong is told at the end."""

    record: str
    deadline: float
    problems: dict[str, str] = field(default_factory=dict)

    @property
    def left(self) -> float:
        return self.deadline - monotonic()

    def go_through(self, jobs: Iterable[Job]) -> None:
        """Train what is not recorded and has time enough to leave something behind."""
        for job in jobs:
            wanted = not (job.done(self.record) or diverged(job, self.record)) and self.left > least(job)
            if parallel.agreed(wanted):
                self.train(job)

    def train(self, job: Job) -> None:
        if parallel.first():
            print(f"{named(job)}: {max(0, self.left):.0f} s left", flush=True)
        seen: list[int] = [0]
        try:
            run(job, self.record, progress=True, watch=stopping(job, self.deadline, seen))
        except Diverged as error:
            self.problems[named(job)] = str(error)
            if parallel.first():
                write_diverged(job, seen[-1], self.record)
        except Exception as error:
            self.problems[named(job)] = f"{type(error).__name__}: {error}".splitlines()[0]
            check_device(job, named(job))
            if parallel.world()[1] > 1:
                raise  # the other processes wait for this one
        else:
            if parallel.first() and not (job.dense and job.seed == 0):  # others want the weights of that one; each is 2 GB
                job.checkpoint.unlink(missing_ok=True)
        forget()

    def take_apart(self, jobs: Sequence[Job], **how) -> None:
        """The time of steps and of their parts."""
        try:
            steptime.step_times(jobs, self.record, **how)
        except Exception as error:
            self.problems[STEPS] = f"{type(error).__name__}: {error}".splitlines()[0]
            check_device(jobs[0], STEPS)
        forget()


    def prune(self, job: Job, methods: Mapping[str, Method] = oneshot.METHODS, sequences: int = 128) -> None:
        """What one-shot pruning costs the dense model that ``job`` has trained, at 2:4 and at 4:8: rows of "pruning"."""
        if not (job.done(self.record) and job.checkpoint.exists()):
            return
        print(f"{PRUNING}: {max(0, self.left):.0f} s left", flush=True)
        try:
            oneshot.losses([NM(2, 4), NM(4, 8)], methods, (job.seed,), language=job.language, model=job.model, config=job.config,
                           sequences=sequences, record=self.record)
        except Exception as error:
            self.problems[PRUNING] = f"{type(error).__name__}: {error}".splitlines()[0]
            check_device(job, PRUNING)
        forget()


def least(job: Job) -> float:
    """Seconds below which a run is not worth starting, for it would leave no checkpoint."""
    if not job.config.compile:
        return 1.0
    return WARM + min(job.config.checkpoint_seconds, 60) + saving(job)


def saving(job: Job) -> float:
    """Seconds that writing a checkpoint may take: weights and two moments in float32."""
    shape = mistral.config(job.model) if isinstance(job.model, str) else job.model
    return 12 * sum(mistral.parameters(shape).values()) / DISK


def stopping(job: Job, deadline: float, seen: list[int]) -> Callable[[History], None]:
    """A ``watch`` of ``train`` that raises OutOfTime after a validation if the run cannot end in time, and no further
    checkpoint would be in time either: all that is trained then would be trained again. ``seen`` gets the steps done."""
    begun: list[float] = []

    def watch(history: History) -> None:
        begun.append(time.time())
        step = history.valid[-1][0]
        seen.append(step)
        written = max(begun[0], job.checkpoint.stat().st_mtime if job.checkpoint.exists() else 0)
        late = too_late(job, step, history.seconds, deadline - monotonic(), time.time() - written)
        if parallel.agreed(late):
            raise OutOfTime

    return watch


def too_late(job: Job, step: int, seconds: float, left: float, age: float) -> bool:
    """Whether a run after ``step`` steps that took ``seconds`` can neither end nor write another checkpoint in the time that
    is left; ``age`` is that of its last one, in seconds."""
    config, save = job.config, saving(job)
    rest = 1.2 * (config.steps - step) * seconds / max(step, 1)  # with its validations
    by_clock = config.checkpoint_seconds - age
    by_count = (config.checkpoint_every - step % config.checkpoint_every) % config.checkpoint_every * seconds / max(step, 1)
    return rest > 0 and rest + save > left and max(0.0, min(by_clock, by_count)) + save > left


def named(job: Job) -> str:
    longer = f", {job.config.steps} steps" if job.config.steps != CONFIG.steps else ""
    return f"{job.name}, {job.method}, {job.config.optimizer} {job.at()['lr']:.2g}{longer}, seed {job.seed}"


def write_diverged(job: Job, step: int, folder: str) -> None:
    measure.record(measure.Measurement.now(DIVERGED, "1", step, structure=job.name, method=job.method, at=job.at(), source=job.source,
                                           machine=Machine.current(job.config.device), code=job.code), job.chapter, folder)


def diverged(job: Job, folder: str) -> bool:
    """Whether this run is known to lose its loss: it would again."""
    return any(row.metric == DIVERGED and (row.structure, row.method, row.code) == (job.name, job.method, job.code)
               and row.at == job.at() and row.machine.device == Machine.current(job.config.device).device
               for row in measure.live(job.chapter, folder))


def check_device(job: Job, label: str) -> None:
    """BrokenDevice if the GPU takes no more work after a failure."""
    try:
        benchmark.check_alive(label, torch.device(job.config.device))
    except BrokenDevice as broken:
        broken.label = label
        raise


def forget() -> None:
    """Memory and compiled code of what is done: torch.compile keeps no more than a few versions of one function."""
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---- the command


def options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m sparsesurvey.pretraining", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="when to stop (default 9)")
    parser.add_argument("--device", default="cuda", help="cuda or cuda:0 (default cuda); cpu: the two targets for a CPU, no more")
    parser.add_argument("--record", default="", help="folder of the rows; by default that of the live rows")
    parser.add_argument("--corpus", default="", help=f"folder with {', '.join(FILES)} (default ${CORPUS})")
    parser.add_argument("--only", default="", help="train the runs with this in their name, see --list")
    parser.add_argument("--skip", action="append", default=[], help="leave out the run of this name, \"steps\" or \"pruning\"; may be repeated")
    parser.add_argument("--list", action="store_true", help="say what there is to train, and what of it is recorded")
    parser.add_argument("--dry-run", action="store_true", help="a few steps of the 5M model on the CPU: does all of it run?")
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
    return given


def jobs_of(device: str, record: str, corpus: str = "", rehearsal: bool = False) -> list[Job]:
    """The campaign's runs, or those of its rehearsal: the 5M model on the bytes of the standard library, with checkpoints
    beside the rows."""
    if rehearsal:
        os.environ.setdefault("SPARSESURVEY_RUNS", str(Path(record) / "runs"))
        return runs(data.stdlib(), "5m", REHEARSAL)
    return runs(wikipedia(corpus), "162m", replace(CONFIG, device=device))


def work(made: Pretraining, jobs: Sequence[Job], only: str = "", skip: Sequence[str] = (), rehearsal: bool = False) -> None:
    """Take steps apart, train, and prune what was trained dense, until the deadline; without what is named in ``skip``, because it broke the device."""
    chosen = [job for job in jobs if only in named(job) and named(job) not in skip]
    apart = not only and STEPS not in skip and parallel.world()[1] == 1
    how = {"rounds": 3, "min_seconds": 1e-3} if rehearsal else {}
    first, later = timed(jobs) if apart else ([], [])
    if apart:
        made.take_apart(first, **how)
    made.go_through(chosen[:FIRST])
    if not only and PRUNING not in skip and parallel.world()[1] == 1:
        made.prune(jobs[0], *(({"magnitude": magnitude, "Wanda": wanda}, 2 * jobs[0].config.batch) if rehearsal else ()))
    if apart:
        made.take_apart(later, **how)
    made.go_through(chosen[FIRST:])


def report(made: Pretraining, jobs: Sequence[Job]) -> None:
    """What went wrong, what is recorded, and the targets."""
    for what, why in made.problems.items():
        print(f"FAILED {what}: {why}")
    done = [job for job in jobs if job.done(made.record)]
    print(f"{len(done)} of {len(jobs)} runs are recorded in {live_folder(made.record)}\n")
    slug = Machine.current(jobs[0].config.device).slug
    rows = [row for chapter in (CHAPTER, steptime.CHAPTER) for row in measure.live(chapter, made.record) if row.machine.slug == slug]
    print(targets.table(speed.verdicts(rows)), flush=True)


def main(arguments: list[str] | None = None) -> None:
    start = monotonic()
    given = options(arguments)
    if given.device == "cpu" and not given.dry_run:
        print(targets.table(speed.verdicts(on_a_cpu(given.record))))
        return
    device = parallel.start(given.device)
    jobs = jobs_of(device, given.record, given.corpus, given.dry_run)
    if given.list:
        for job in jobs:
            print(f"{'recorded' if job.done(given.record) else 'open':9}{named(job)}")
        return
    made = Pretraining(given.record, start + 60 * given.minutes)
    try:
        with timed_out(made.left):
            work(made, jobs, given.only, given.skip, given.dry_run)
    except OutOfTime:
        if parallel.first():
            print("The time is over; run the same command again to go on.", flush=True)
    except BrokenDevice as broken:
        print(f"{broken}; to go on without it: --skip {broken.label!r}", flush=True)
    except KeyboardInterrupt:
        print("Stopped; run the same command again to go on from the last checkpoint.", flush=True)
    if parallel.first():
        report(made, jobs)


if __name__ == "__main__":
    main(sys.argv[1:])
