"""The speed of training from rows: steps and their parts, the time until a loss is reached, and what must be reached."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf

from sparsesurvey.records import Measurement, Scalar
from sparsesurvey.roofline import A100, H100, H200, Roofline
from sparsesurvey.steptime import GAIN, STEP, STORED, TIME, WORK
from sparsesurvey.targets import Verdict

LOSS, SECONDS = "validation loss", "training time"
TRAINER = "transformers Trainer"  # a method, beside "dense"
NAMEPLATES = {"H200": H200, "H100": H100, "A100": A100}


# ---- steps


def steps(rows: Iterable[Measurement]) -> list[dict[str, Measurement]]:
    """The rows of each kind of step that was taken apart, by metric, and by part where that is a time; the dense ones first."""
    found: dict[tuple, dict[str, Measurement]] = {}
    for row in rows:
        if row.metric in (TIME, GAIN, WORK, STORED):
            at = tuple(sorted((name, value) for name, value in row.at.items() if name != "part"))
            mine = found.setdefault((row.origin, row.machine.slug, row.structure, row.method, at), {})
            mine[row.at["part"] if row.metric == TIME else row.metric] = row
    whole = [mine for mine in found.values() if STEP in mine]
    return sorted(whole, key=lambda mine: (mine[STEP].origin, mine[STEP].machine.slug, mine[STEP].method != "dense"))


def rate(mine: Mapping[str, Measurement]) -> float:
    """Tokens a second."""
    row = mine[STEP]
    return row.at["batch"] * row.at["seq"] / row.value


def nameplate(row: Measurement) -> Roofline | None:
    """The datasheet of the row's GPU, quoted, where we know it."""
    return next((sheet for name, sheet in NAMEPLATES.items() if name in row.machine.name), None) if row.machine.device == "cuda" else None


def utilisation(mine: Mapping[str, Measurement], peak: float) -> float | None:
    """Model FLOP utilisation: the arithmetic of the stored weights over what ``peak`` FLOP/s would do in that time."""
    return mine[STORED].value / mine[STEP].value / peak if STORED in mine else None


# ---- time to a loss


@dataclass(frozen=True)
class Course:
    """What one run had reached when: seconds of training, and the validation loss then."""

    row: Measurement  # of its last loss
    seconds: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def name(self) -> str:
        return "dense" if self.row.method == "dense" else f"{self.row.structure}, {self.row.method}"

    @property
    def masked(self) -> bool:
        """Are its products dense ones with a mask? Then its time is no structure's."""
        return self.row.method != "dense" and not KERNELS.intersection(self.row.method.replace(",", "").split())

    @property
    def task(self) -> tuple[Scalar, ...]:
        """Runs with the same compare: machine, model, text."""
        row = self.row
        return row.origin, row.machine.slug, row.at["model"], row.at["language"], row.at["corpus"]

    def seconds_to(self, loss: float) -> float:
        """Seconds until the loss was at most so large, straight between two validations; infinite if it never was."""
        for number, value in enumerate(self.losses):
            if value <= loss:
                if number == 0:
                    return self.seconds[0]
                before = self.losses[number - 1]
                share = (before - loss) / (before - value) if before > value else 1.0
                return self.seconds[number - 1] + share * (self.seconds[number] - self.seconds[number - 1])
        return inf


KERNELS = {"triton", "cuda", "cusparselt", "gather", "roll", "factored"}  # words of the methods that multiply by the stored weights alone


def courses(rows: Iterable[Measurement]) -> list[Course]:
    """The runs whose losses and times are both known; those that shared their machine with others are left out, for they had
    less of it than they seem to have."""
    found: dict[tuple, tuple[dict, dict]] = {}
    for row in rows:
        if row.metric in (LOSS, SECONDS) and row.at.get("beside", 1) == 1 and row.at.get("processes", 1) == 1 and "step" in row.at:
            at = tuple(sorted((name, value) for name, value in row.at.items() if name not in ("step", "tokens", "beside")))
            losses, times = found.setdefault((row.origin, row.machine.slug, row.structure, row.method, row.code, at), ({}, {}))
            (losses if row.metric == LOSS else times)[row.at["step"]] = row
    made = []
    for losses, times in found.values():
        at = sorted(step for step in losses if step == 0 or step in times)
        if len(at) > 1:
            made.append(Course(losses[at[-1]], tuple(times[step].value if step else 0.0 for step in at),
                               tuple(losses[step].value for step in at)))
    return made


def references(found: Iterable[Course]) -> dict[tuple, Course]:
    """Of each task the dense run that ends at the least loss."""
    best: dict[tuple, Course] = {}
    for course in found:
        if course.row.method == "dense" and (course.task not in best or course.losses[-1] < best[course.task].losses[-1]):
            best[course.task] = course
    return best


# ---- what must be reached


def verdicts(rows: Iterable[Measurement]) -> list[Verdict]:
    """The targets of training, from rows of one machine of the chapters "speed" and "training"; stale rows do not count."""
    rows = [row for row in rows if not row.stale]
    kinds = steps(rows)
    gpu = [mine for mine in kinds if mine[STEP].machine.device == "cuda" and mine[STEP].at["model"] == "162m"]
    cpu = [mine for mine in kinds if mine[STEP].machine.device == "cpu"]
    dense = [utilisation(mine, sheet.flops_per_second) for mine in gpu if mine[STEP].method == "dense" and (sheet := nameplate(mine[STEP]))]
    trainer = [1 / mine[GAIN].value for mine in cpu if mine[STEP].method == TRAINER]
    return [
        one("162M, dense: share of the datasheet's bf16 peak", 0.35, dense),
        one("162M, block 128, 90% sparse, fused: tokens/s over dense", 1.4, gains(gpu, ("block 128x128 10%",), ("fused",))),
        one("162M, 2:4 with sparse tensor cores: tokens/s over dense", 1.1,
            gains(gpu, ("2:4", "transposable 2:4"), ("cusparselt", "cuda"))),
        one("162M, time to dense's last loss over that of a sparse run", 1.0, ahead(rows, "162m")),
        one("CPU, block 64, 90% sparse, wide MLP: steps/s over dense", 1.5, gains(cpu, ("block 64x64 10%",), ("gather",))),
        one("CPU, dense: steps/s over transformers' Trainer", 0.9, trainer),
    ]


def one(what: str, least: float, values: Sequence[float]) -> Verdict:
    """The best of several: the target is that there is one."""
    return Verdict(what, least, max(values, default=None), len(values[:1]), 1)


def gains(kinds: Iterable[Mapping[str, Measurement]], structures: Iterable[str], words: Iterable[str]) -> list[float]:
    """Speed-ups over the dense step of these structures whose method has one of these words."""
    return [mine[GAIN].value for mine in kinds if GAIN in mine and mine[STEP].structure in structures
            and set(words) & set(mine[STEP].method.replace(",", "").split())]


def ahead(rows: Iterable[Measurement], model: str) -> list[float]:
    """How many times sooner sparse runs were at the last loss of dense; 0 for one that never was."""
    found = [course for course in courses(rows) if course.row.at["model"] == model and course.row.machine.device == "cuda"]
    best = references(found)
    goals = {task: dense.losses[-1] for task, dense in best.items()}
    return [best[course.task].seconds_to(goals[course.task]) / course.seconds_to(goals[course.task])
            for course in found if course.row.method != "dense" and course.task in best]
