"""A training run: what is trained, on what, how, and the rows and the folder that are its own."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path

from torch import nn
from transformers import MistralConfig

from sparsesurvey import parallel
from sparsesurvey.causal import without_mask
from sparsesurvey.compressed import KERNEL, compress_layers
from sparsesurvey.data import Language
from sparsesurvey.diagnose import DIVERGENCE, EXPLORED, FLIPS
from sparsesurvey.factored import factorise
from sparsesurvey.initial import OURS, WAYS, initialise
from sparsesurvey.linear import sparsify
from sparsesurvey.measure import Machine, Measurement, code_of, live
from sparsesurvey.measure import recorded as shipped
from sparsesurvey.mistral import build
from sparsesurvey.packed import has_all_three, pack_layers
from sparsesurvey.recipe import Recipe, spelled
from sparsesurvey.recipes.static import Static
from sparsesurvey.structure import Pattern, Structure
from sparsesurvey.train import ENERGY, FREE, NORM, TIME, History, TrainConfig

CHAPTER = "training"
FUSED = " fused"  # behind the name of a kernel
LOSS = "validation loss"
UNITS = {TIME: "s", NORM: "1", ENERGY: "J", FLIPS: "1", DIVERGENCE: "1", EXPLORED: "1"}
# The structures are not among the code whose change makes a curve stale: what a mask of theirs is, is fixed by
# ``holds`` and its tests, and another kernel or a new helper does not change the loss of a masked run. A structure without
# a mask is: what it stores and what it makes of that is what is trained.
SOURCE = ",".join(f"sparsesurvey.{module}" for module in ("data", "linear", "mistral", "recipe", "train"))


@dataclass(frozen=True)
class Job:
    """One run: what is trained, on what, how. ``structure`` None is the plain dense model, as is one named "dense".

    The model has the vocabulary of the language. A structure without a mask is trained by the values that
    it stores, see ``factored``; its recipe must be ``Static()``.
    ``kernel`` is "masked", dense products with a mask, or one of the structure's kernels, see ``packed`` and, for 2:4 masks that
    move, ``compressed``; with " fused" behind its name gate, up and activation are one kernel, and gate and up have one mask,
    see ``mlp``.
    ``initial`` is how its first weights are drawn, see ``initial.initialise``.
    """

    structure: Structure | None
    seed: int  # of the weights, the mask and the order of the data
    language: Language
    model: str | MistralConfig = field(hash=False)  # by name, or one of your own
    config: TrainConfig
    recipe: Recipe
    kernel: str = "masked"
    chapter: str = CHAPTER  # in whose record its rows are
    code: str = ""  # of ``source``, before anything runs
    initial: str = OURS

    def __post_init__(self) -> None:
        if self.initial not in WAYS:
            raise ValueError(f"initial must be one of {', '.join(WAYS)}, got {self.initial!r}")
        device = str(self.config.device).partition(":")[0]
        object.__setattr__(self, "code", self.code or code_of(self.source, device=device))

    @property
    def dense(self) -> bool:
        return self.structure is None or str(self.structure) == "dense"

    @property
    def name(self) -> str:
        return "dense" if self.dense else str(self.structure)

    @property
    def size(self) -> str:
        """The model's name, or what it is like."""
        if isinstance(self.model, str):
            return self.model
        return f"{self.model.hidden_size} x {self.model.intermediate_size}, {self.model.num_hidden_layers} layers"

    @property
    def factored(self) -> bool:
        return not (self.dense or isinstance(self.structure, Pattern))

    @property
    def method(self) -> str:
        """What stands in a row: the recipe, and the kernel if it is not the masked one."""
        if self.dense or self.factored:
            return "dense" if self.dense else "factored"
        return str(self.recipe) if self.kernel == "masked" else f"{self.recipe}, {self.kernel}"

    @property
    def source(self) -> str:
        """The modules whose change makes a curve stale."""
        base = SOURCE if self.initial == OURS else f"{SOURCE},sparsesurvey.initial"
        if self.dense:
            return base
        if self.factored:
            return f"{base},sparsesurvey.factored,{type(self.structure).__module__}"
        recipe = "".join(f",{module}" for module in sorted(_modules(self.recipe)))
        if self.kernel == "masked":
            return base + recipe
        layer = "compressed" if self.compressed else "mlp" if self.fused else "packed"
        return f"{base}{recipe},sparsesurvey.{layer},{type(self.structure).__module__}"

    @property
    def compressed(self) -> bool:
        """Is a dense weight kept, and compressed anew in every step?"""
        return self.kernel == KERNEL and not (self.recipe.fixed_mask and has_all_three(self.structure, self.kernel))

    @property
    def fused(self) -> bool:
        return self.kernel.endswith(FUSED)

    @property
    def settings(self) -> TrainConfig:
        return replace(self.config, seed=self.seed)

    @property
    def evaluations(self) -> list[int]:
        """The steps after which the loss is validated."""
        steps, every = self.config.steps, self.config.eval_every
        return sorted({*range(0, steps, every), steps})

    @property
    def unit(self) -> str:
        """Of its losses."""
        return "nats/byte" if self.language.bytes_per_token == 1 else "nats/token"

    def at(self, step: int | None = None) -> dict[str, str | int | float]:
        """The settings that stand in a row. ``settings`` is a hash that covers those without a column of their own."""
        config = {key: value for key, value in asdict(self.settings).items() if key not in FREE}
        shown = {key: config[key] for key in ("seed", "steps", "batch", "seq", "optimizer")}
        shown["lr"] = config["muon_lr" if self.config.optimizer == "muon" else "lr"]
        if self.config.precision != "float32":
            shown["precision"] = self.config.precision
        if self.initial != OURS:
            shown["initial"] = self.initial
        when = {} if step is None else {"step": step, "tokens": step * self.config.batch * self.config.seq}
        return {"model": self.size, "language": self.language.name, "corpus": self.language.digest[:12],
                **shown, **when, "settings": _hash([config, "" if self.dense else spelled(self.recipe)], 8)}

    @property
    def folder(self) -> Path:
        """Where this run's checkpoint is kept."""
        words = " ".join([self.size, self.language.name, self.name, self.method, f"seed {self.seed}"])
        slug = re.sub("[^a-z0-9]+", "-", words.lower()).strip("-")
        return runs_folder() / f"{slug}-{_hash([self.name, self.method, self.code, self.at()], 10)}"

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    def show(self, history: History) -> None:
        """Let others watch: what the run has seen so far, in ``history.json`` of its folder, never half there."""
        part = self.folder / "history.tmp"
        part.write_text(json.dumps({"name": self.name, "method": self.method, "seed": self.seed, **asdict(history)}))
        part.replace(self.folder / "history.json")

    def under_way(self) -> list[Measurement]:
        """The validation losses that a run which is not finished has shown so far."""
        try:
            told = json.loads((self.folder / "history.json").read_text())
        except FileNotFoundError:
            return []
        return [row for row in self.rows(History.told(told)) if row.metric == LOSS]

    def rows(self, history: History, beside: int = 1) -> Iterator[Measurement]:
        """What a run saw as rows: losses, also as bits per byte where tokens stand for bytes, and the rest of its trace.

        ``beside``: how many runs shared the machine, which stands in the rows of time and energy, as does how many processes
        of torchrun one run had, if it had several; their energy is not known, each counts its own GPU's.
        """
        machine = Machine.current(self.config.device)
        row = lambda metric, of, value, step, **more: Measurement.now(
            metric, of, value, structure=self.name, method=self.method, at={**self.at(step), **more}, source=self.source,
            machine=machine, code=self.code)
        processes = parallel.world()[1]
        shared = {"beside": beside, **({"processes": processes} if processes > 1 else {})}
        for metric, lines in history.trace.items():
            if metric == ENERGY and processes > 1:
                continue
            more = shared if metric in (TIME, ENERGY) else {}
            yield from (row(metric, UNITS[metric], value, step, **more) for step, value in lines)
        for step, loss in history.valid:
            bits = self.language.bits_per_byte(loss)
            if bits is not None:
                yield row("bits per byte", "bits/byte", bits, step)
            yield row(LOSS, self.unit, loss, step)

    def recorded(self, folder: str | Path | None) -> list[Measurement]:
        """The validation losses of this run on this machine that are in the record, by step."""
        slug = _slug(self.config.device)
        return self._mine(row for row in live(self.chapter, folder) if row.machine.slug == slug)

    def shipped(self) -> list[Measurement]:
        """The validation losses of this run that come with the package, of one machine that recorded all of them, or none."""
        found: dict[str, list[Measurement]] = {}
        for row in self._mine(shipped(self.chapter)):
            found.setdefault(row.machine.slug, []).append(row)
        return next((rows for rows in found.values() if len(rows) == len(self.evaluations)), [])

    def _mine(self, rows: Iterable[Measurement]) -> list[Measurement]:
        settings, steps = self.at().items(), set(self.evaluations)
        mine = (LOSS, self.name, self.method, self.code)
        found = [row for row in rows if (row.metric, row.structure, row.method, row.code) == mine
                 and settings <= row.at.items() and row.at.get("step") in steps]
        return sorted(found, key=lambda row: row.at["step"])

    def done(self, folder: str | Path | None) -> bool:
        return len(self.recorded(folder)) == len(self.evaluations)

    def start(self) -> nn.Module:
        """The model before its first step."""
        named = {"vocab": self.language.vocab} if isinstance(self.model, str) else {}
        model = initialise(build(self.model, self.seed, **named), self.initial, self.seed)
        if self.config.compile:
            without_mask(model)
        if self.factored:
            if self.recipe != Static() or self.kernel != "masked":
                raise ValueError(f"recipe must be Static() for {self.structure}, which has no mask; got {self.recipe}")
            return factorise(model, self.structure)
        if self.dense:
            return model
        if self.fused:
            from sparsesurvey.mlp import sparse_mlps

            return sparse_mlps(model, self.structure, self.kernel.removesuffix(FUSED), self.recipe, self.seed, fused=True)
        sparsify(model, self.structure, self.recipe, seed=self.seed)
        if self.kernel == "masked":
            return model
        return compress_layers(model) if self.compressed else pack_layers(model, self.kernel)


def _modules(recipe: Recipe) -> set[str]:
    """The modules of a recipe and of those that it is made of."""
    inner = (getattr(recipe, field.name) for field in fields(recipe))
    return {type(recipe).__module__}.union(*(_modules(part) for part in inner if isinstance(part, Recipe)))


@lru_cache(maxsize=8)
def _slug(device: str) -> str:
    return Machine.current(device).slug


def _hash(data: object, digits: int) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:digits]


def runs_folder() -> Path:
    """``$SPARSESURVEY_RUNS``, or ``sparsesurvey/runs`` in the user's cache."""
    if os.environ.get("SPARSESURVEY_RUNS"):
        return Path(os.environ["SPARSESURVEY_RUNS"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsesurvey" / "runs"
