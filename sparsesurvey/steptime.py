"""What a training step spends its time on: attention, MLP, head, optimizer and the rest, forward and backward.

The parts of one model are timed by themselves, in the same interleaved rounds as its whole step: all attentions in a row, all
MLPs, the head with the loss, and both passes without the optimizer. What the optimizer takes (with the changes of gradients
and masks that the recipe makes, and gathering the batch) is the step less the passes; the rest (embedding, norms, sums of the
residual stream, and whatever a compiler joins across parts or a processor overlaps) is the passes less their parts. So the rest may come
out below zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn

from sparsesurvey import measure
from sparsesurvey.benchmark import cpu_threads
from sparsesurvey.data import batch
from sparsesurvey.device import check_device
from sparsesurvey.job import Job
from sparsesurvey.linear import densities
from sparsesurvey.measure import Machine, Measurement, Timing
from sparsesurvey.mistral import flops
from sparsesurvey.train import TrainConfig, _Run, loss_of

CHAPTER = "speed"
TIME, GAIN, WORK, STORED = "step time", "step speedup", "step work", "stored work"
STEP, PASSES = "step", "both passes"
ATTENTION, MLP, HEAD, OPTIMIZER, REST = "attention", "MLP", "head", "optimizer", "rest"
PARTS = (ATTENTION, MLP, HEAD, OPTIMIZER, REST)  # they add up to a step
OF_MODEL = (ATTENTION, MLP, HEAD)


def step_times(jobs: Sequence[Job], record: str = "", rounds: int = 9, min_seconds: float = 0.1, threads: int = 1) -> list[Measurement]:
    """Time the steps of several runs, the first of which is the dense one, and their parts: rows of "speed".

    All are in memory at once and in the same rounds, so that their steps compare in pairs. Of each there are "step time" rows (s)
    for the whole ("step") and for each of ``PARTS``, in ``at["part"]``, a "step speedup" (x), the dense step's time over this
    one's, and the arithmetic of a step (FLOP): "step work" that of the dense model, "stored work" that of the weights that the
    structure stores. The steps are those that training takes, on one batch of real text, in the middle of the schedule. What is
    recorded already on this machine with this code is not measured again.

    ValueError for jobs that differ in what their steps compute: batch, sequence, model, device, threads.
    """
    _check(jobs)
    device = check_device(jobs[0].config.device)
    with cpu_threads(threads):
        books = [Book(job, threads, record) for job in jobs]
        if not all(book.complete for book in books):
            for book, found in zip(books, _measure(jobs, device, rounds, min_seconds)):
                book.write(*found)
        return [row for book in books for row in book.rows()]


def _check(jobs: Sequence[Job]) -> None:
    if not jobs or not jobs[0].dense:
        raise ValueError(f"jobs must begin with a dense one, got {jobs[0].name if jobs else 'none'}")
    same = lambda job: (job.size, job.config.batch, job.config.seq, job.config.device, job.config.precision, job.language.digest)
    for job in jobs[1:]:
        if same(job) != same(jobs[0]):
            raise ValueError(f"jobs must have one model, batch, device, precision and language, got {same(jobs[0])} and {same(job)}")


@dataclass(frozen=True)
class Book:
    """Where the rows of one run's steps are kept; ``other`` names a loop that is not ours."""

    job: Job
    threads: int
    folder: str
    other: str = ""

    @property
    def method(self) -> str:
        return self.other or self.job.method

    @property
    def at(self) -> dict[str, str | int | bool]:
        config, settings = self.job.config, self.job.at()
        kept = {name: settings[name] for name in ("model", "language", "batch", "seq", "optimizer")}
        return {**kept, "precision": config.precision, "compile": config.compile, "chunk": config.chunk, "micro": config.micro,
                "threads": self.threads}

    @property
    def source(self) -> str:
        return f"{self.job.source},sparsesurvey.{'trainer' if self.other else 'steptime'}"

    @property
    def code(self) -> str:
        return measure.code_of(self.source, device=self.machine.device)

    @property
    def machine(self) -> Machine:
        return Machine.current(self.job.config.device)

    def rows(self) -> list[Measurement]:
        """What is recorded on this machine with this code: times, then the rest."""
        found = [row for row in measure.live(CHAPTER, self.folder) if row.metric in (TIME, GAIN, WORK, STORED)
                 and (row.structure, row.method) == (self.job.name, self.method) and self.at.items() <= row.at.items()
                 and row.code == self.code and row.machine.slug == self.machine.slug]
        return sorted(found, key=lambda row: (row.metric != TIME, (STEP, *PARTS).index(row.at["part"])))

    @property
    def complete(self) -> bool:
        return [row.at["part"] for row in self.rows() if row.metric == TIME] == [STEP, *PARTS]

    @property
    def timed(self) -> bool:
        return {TIME, GAIN} <= {row.metric for row in self.rows()}

    def write(self, times: dict[str, Sequence[float]], gain: Timing, work: tuple[float, ...] = ()) -> None:
        add = lambda metric, unit, value, low, high, part: measure.record(Measurement.now(
            metric, unit, value, low=min(low, value), high=max(high, value), structure=self.job.name, method=self.method,
            at={**self.at, "part": part}, source=self.source, machine=self.machine, code=self.code), CHAPTER, self.folder)
        for metric, value in zip((WORK, STORED), work):
            add(metric, "FLOP", value, value, value, STEP)
        add(GAIN, "x", gain.speedup, gain.speedup_low, gain.speedup_high, STEP)
        for part, samples in times.items():
            add(TIME, "s", median(samples), float(np.quantile(samples, 0.2)), float(np.quantile(samples, 0.8)), part)


def _measure(jobs: Sequence[Job], device: torch.device, rounds: int, min_seconds: float) -> Iterator[tuple]:
    """Of each job the seconds of a step and of its parts, round by round, its step beside the first job's, and its arithmetic."""
    calls: dict[str, Callable[[], object]] = {}
    arithmetic = []
    for number, job in enumerate(jobs):
        model = job.start().to(device).train()
        arithmetic.append(work(model, job.config))
        calls |= {f"{number} {part}": run for part, run in _calls(model, job, device).items()}
    times = measure.compare(calls, f"0 {STEP}", rounds, min_seconds, device)
    for number, done in enumerate(arithmetic):
        samples = {part: times[f"{number} {part}"].samples for part in (STEP, PASSES, *OF_MODEL)}
        yield parts(samples), times[f"{number} {STEP}"], done


def work(model: nn.Module, config: TrainConfig) -> tuple[float, float]:
    """FLOP of a step of the dense model, and of one that multiplies by the stored weights of its MLPs alone."""
    by_part = flops(model.config, config.seq, training=True)
    kept = densities(model)
    share = sum(kept.values()) / len(kept) if kept else 1.0  # gate, up and down are equally large
    in_mlp = sum(value for part, value in by_part.items() if part.endswith("_proj"))
    whole, tokens = sum(by_part.values()), config.batch * config.seq
    return float(tokens * whole), float(tokens * (whole - (1 - share) * in_mlp))


def parts(samples: dict[str, Sequence[float]]) -> dict[str, Sequence[float]]:
    """Seconds by part, round by round, from those of the step, of both passes and of the parts of the model."""
    least = lambda whole, *others: [total - sum(some) for total, *some in zip(samples[whole], *(samples[part] for part in others))]
    return {STEP: samples[STEP], **{part: samples[part] for part in OF_MODEL}, OPTIMIZER: least(STEP, PASSES),
            REST: least(PASSES, *OF_MODEL)}


def _calls(model: nn.Module, job: Job, device: torch.device) -> dict[str, Callable[[], object]]:
    """What is timed, ready to be called again and again: the whole step and its parts."""
    config = job.settings
    run = _Run(model, job.language, config, device, None)
    run.warm_up()
    middle = min(config.steps - 1, max(config.warmup, config.steps // 2) + 3)  # no round number: masks are moved after those
    x, y = (part.to(device) for part in batch(job.language.train, middle, config.batch, config.seq, config.seed))

    def step() -> None:
        run.step = middle
        run.timed_step()

    def passes() -> None:
        run.step = middle
        run.prepare()
        run.backward(x, y)
        model.zero_grad(set_to_none=True)

    step()  # the optimizer's state is made
    return {STEP: step, PASSES: passes, **_parts_of(model, config, y)}


def _parts_of(model: nn.Module, config: TrainConfig, y: Tensor) -> dict[str, Callable[[], object]]:
    """Attention, MLP and head of a model, forward and backward, on random activations as large as those of a batch ``y``."""
    trunk, size = model.base_model, config.micro or len(y)
    generator = torch.Generator(y.device).manual_seed(0)
    hidden = torch.randn(size, config.seq, model.config.hidden_size, generator=generator, device=y.device)
    places = torch.arange(config.seq, device=y.device)[None]
    rotary = trunk.rotary_emb(hidden, position_ids=places)
    attend = lambda member, x: member(x, position_embeddings=rotary, attention_mask=None)[0]
    members = {ATTENTION: ([layer.self_attn for layer in trunk.layers], attend),
               MLP: ([layer.mlp for layer in trunk.layers], lambda member, x: member(x))}
    calls = {name: _both_ways(row, call, hidden, config) for name, (row, call) in members.items()}
    calls[HEAD] = partial(_head, model, hidden, y[:size], config)
    times = len(y) // size  # pieces that a batch is trained in
    return {name: partial(_repeat, call, times) for name, call in calls.items()}


def _both_ways(row: Sequence[nn.Module], call: Callable[[nn.Module, Tensor], Tensor], hidden: Tensor,
               config: TrainConfig) -> Callable[[], object]:
    """A function that computes the outputs of one part of every layer, and all gradients.

    Each has activations of its own, so that no sums are made of what belongs to different layers.
    """
    forward = lambda inputs: [call(member, x) for member, x in zip(row, inputs)]
    forward = torch.compile(forward) if config.compile else forward
    weights = [weight for member in row for weight in member.parameters()]
    dy: list[Tensor] = []

    def run() -> None:
        inputs = [hidden.detach().requires_grad_() for _ in row]
        with torch.autocast(hidden.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            outputs = forward(inputs)
        if not dy:
            dy.append(torch.randn_like(outputs[0]))
        torch.autograd.grad(outputs, [*inputs, *weights], dy * len(outputs), allow_unused=True)

    return run


def _head(model: nn.Module, hidden: Tensor, y: Tensor, config: TrainConfig) -> None:
    x = hidden.detach().requires_grad_()
    loss = loss_of(model, y, y, config.precision, config.chunk, lambda input_ids: (x,))
    torch.autograd.grad(loss, [x, model.get_output_embeddings().weight])


def _repeat(call: Callable[[], object], times: int) -> None:
    for _ in range(times):
        call()
