"""Our loop beside the Trainer of transformers: the same dense model, batch, loss and optimizer, in interleaved rounds.

The Trainer needs the package accelerate, which nothing else here does.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from statistics import median
from typing import Any


from sparsesurvey.benchmark import cpu_threads
from sparsesurvey.data import batch
from sparsesurvey.device import check_device
from sparsesurvey.job import Job
from sparsesurvey.measure import Measurement, Timing
from sparsesurvey.speed import TRAINER
from sparsesurvey.steptime import STEP, Book
from sparsesurvey.structure import Unavailable, check_int
from sparsesurvey.train import _Run


def against_trainer(job: Job, record: str = "", rounds: int = 9, steps: int = 6, threads: int = 1) -> list[Measurement]:
    """Time ``steps`` steps of our loop and of the Trainer's in each round, the order turning: rows of "speed".

    The Trainer's row is that of ``job`` with its own method: "step time", and "step speedup" over ours, in the same rounds. Both clip
    gradients and decay weights alike; the Trainer neither logs nor saves, and its batches are made before the clock starts.
    A step of it ends where the next may begin, so that its first one in a round, with what goes before it, is not counted.

    Unavailable without accelerate; ValueError for a job that is not dense, AdamW in float32, whole and uncompiled.
    """
    check_int("steps", steps, 2)
    check_int("rounds", rounds, 3)
    how = job.config.optimizer, job.config.precision, job.config.micro, job.config.compile
    if not job.dense or how != ("adamw", "float32", 0, False):
        raise ValueError(f"job must be dense with AdamW in float32, not compiled and in whole batches, got {job.name}, {job.config}")
    theirs = _trainer(job, steps + 1)
    with cpu_threads(threads):
        book = Book(job, threads, record, TRAINER)
        if not book.timed:
            ours = _ours(job)
            seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
            for number in range(rounds + 1):  # the first one warms up
                runs = {"ours": lambda: median(ours() for _ in range(steps)), "theirs": lambda: median(theirs())}
                for name in sorted(runs, reverse=number % 2 == 1):
                    value = runs[name]()
                    if number:
                        seconds[name].append(value)
            own, other = tuple(seconds["ours"]), tuple(seconds["theirs"])
            book.write({STEP: other}, Timing(other, tuple(mine / its for mine, its in zip(own, other))))
        return book.rows()


def _ours(job: Job) -> Callable[[], float]:
    """One step of our loop, and how many seconds it took."""
    run = _Run(job.start(), job.language, job.settings, check_device(job.config.device), None)

    def step() -> float:
        run.step = min(run.step, job.config.steps - 1)
        before = time.perf_counter()
        run.timed_step()
        return time.perf_counter() - before

    return step


def _trainer(job: Job, steps: int) -> Callable[[], list[float]]:
    """A function that lets the Trainer train so many steps, and says how long each but the first took."""
    try:
        import accelerate  # noqa: F401
        from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
    except ImportError:
        raise Unavailable("needs the package accelerate, which the Trainer of transformers is made of") from None
    config, seen = job.settings, []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            seen.append(time.perf_counter())

    batches = [batch(job.language.train, step, config.batch, config.seq, config.seed)[0] for step in range(steps)]
    held = [{"input_ids": row, "labels": row} for x in batches for row in x]  # the model shifts the labels itself
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(prefix="sparsesurvey-"), max_steps=steps, per_device_train_batch_size=config.batch,
        learning_rate=config.lr, weight_decay=config.weight_decay, adam_beta1=config.betas[0], adam_beta2=config.betas[1],
        max_grad_norm=config.clip, optim="adamw_torch_fused", lr_scheduler_type="constant", logging_strategy="no", save_strategy="no",
        report_to=[], disable_tqdm=True, dataloader_pin_memory=False, use_cpu=job.config.device == "cpu", seed=config.seed)
    trainer = Trainer(job.start(), arguments, train_dataset=held, callbacks=[Clock()])
    trainer.remove_callback(PrinterCallback)

    def train() -> list[float]:
        seen.clear()
        trainer.train()
        return [after - before for before, after in zip(seen, seen[1:])]

    return train
