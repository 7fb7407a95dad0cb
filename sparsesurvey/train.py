"""One training loop: dense or sparse, resumable, the same on CPU and GPU."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm

from sparsesurvey import checkpoint, nvml, parallel
from sparsesurvey.data import Language, batch, windows
from sparsesurvey.device import check_device
from sparsesurvey.diagnose import Masks, state_of
from sparsesurvey.linear import sparse_layers
from sparsesurvey.optim import freeze, learning_rate, optimizers
from sparsesurvey.recipe import spelled

TIME, NORM, ENERGY = "training time", "gradient norm", "training energy"
FREE = ("device", "checkpoint_every", "checkpoint_seconds", "micro", "chunk", "compile")  # the numbers do not depend on them


@dataclass(frozen=True)
class TrainConfig:
    """How to train. The defaults suit the smallest model and the Markov language, see ``experiments.preset``.

    ``lr`` is AdamW's. With ``optimizer="muon"`` the matrices of attention and MLP are trained by Muon (Jordan 2024)
    at ``muon_lr``, embedding, head and norms by AdamW at ``lr``. The rate rises linearly over ``warmup`` steps; then
    "cosine" lowers it to ``final_lr * lr`` along half a cosine, "wsd" (warm-up, stable, decay) keeps it and lowers it
    linearly over the last ``cooldown`` of the steps. Weight decay is on matrices only. ``precision="bfloat16"`` is
    autocast with float32 weights. The last line below changes how much memory and time a step takes, not what it computes.
    """

    steps: int = 320
    batch: int = 32  # sequences
    seq: int = 64  # tokens of a sequence
    optimizer: str = "adamw"
    lr: float = 1e-2
    muon_lr: float = 0.02
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip: float = 1.0  # of the gradient's global norm
    warmup: int = 20
    schedule: str = "wsd"
    cooldown: float = 0.3
    final_lr: float = 0.0
    seed: int = 0  # of the order of the data
    eval_every: int = 40
    eval_batches: int = 8  # of ``batch`` sequences each
    checkpoint_every: int = 80  # steps
    checkpoint_seconds: float = 60.0  # and whenever the last one is so old
    device: str = "cpu"
    precision: str = "float32"
    micro: int = 0  # sequences at a time in a process, their gradients added up; 0 = all
    chunk: int = 0  # tokens whose logits are in memory at a time; 0 = all
    compile: bool = False  # the decoder, by torch.compile

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "seq", "eval_every", "eval_batches", "checkpoint_every"):
            _check(name, getattr(self, name), int, lambda value: value >= 1, "an integer of at least 1")
        for name in ("micro", "chunk"):
            _check(name, getattr(self, name), int, lambda value: value >= 0, "an integer of at least 0")
        _check("warmup", self.warmup, int, lambda value: 0 <= value <= self.steps, f"an integer from 0 to {self.steps}")
        _check("seed", self.seed, int, lambda value: value >= 0, "an integer of at least 0")
        for name in ("lr", "muon_lr", "clip", "checkpoint_seconds"):
            _check(name, getattr(self, name), float, lambda value: 0 < value < float("inf"), "a number above 0")
        _check("weight_decay", self.weight_decay, float, lambda value: 0 <= value < float("inf"), "at least 0")
        for name in ("cooldown", "final_lr"):
            _check(name, getattr(self, name), float, lambda value: 0 <= value <= 1, "a number from 0 to 1")
        choices = {"optimizer": ("adamw", "muon"), "schedule": ("cosine", "wsd"), "precision": ("float32", "bfloat16")}
        for name, allowed in choices.items():
            _check(name, getattr(self, name), str, lambda value: value in allowed, f"one of {', '.join(allowed)}")
        object.__setattr__(self, "betas", tuple(self.betas))


def _check(name: str, value: object, kind: type, good, allowed: str) -> None:
    fits = isinstance(value, int | float if kind is float else kind) and not isinstance(value, bool)
    if not fits or not good(value):
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


@dataclass
class History:
    """What a run did: training loss after each step, and validation loss, both in nats per token.

    ``trace`` has what else was seen at each validation, as (steps done, value) by name: the seconds that the steps so far
    took (validation, checkpoints and compiling not counted), the mean gradient norm before clipping, joules where a GPU counts
    them, and what ``diagnose`` says of masks that move.
    """

    train: list[float] = field(default_factory=list)  # loss of the batch of step 1, 2, ...
    valid: list[tuple[int, float]] = field(default_factory=list)  # (steps done, loss); the first is at 0
    trace: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    seconds: float = 0.0  # of the steps, over all parts of a resumed run
    joules: float = 0.0  # of the steps, where a GPU counts them

    @classmethod
    def told(cls, about: dict) -> History:
        """The history that ``asdict`` and JSON have made of one."""
        pairs = lambda lines: [(step, value) for step, value in lines]
        trace = {name: pairs(lines) for name, lines in about["trace"].items()}
        return cls(about["train"], pairs(about["valid"]), trace, about["seconds"], about["joules"])


class Diverged(RuntimeError):
    """The loss or the gradient is no longer a finite number."""


def train(model: nn.Module, data: Language, config: TrainConfig = TrainConfig(), folder: str | Path | None = None,
          progress: bool = True, watch: Callable[[History], None] | None = None) -> History:
    """Train ``model`` in place on ``data.train`` and validate it, at fixed places, on ``data.valid``.

    Under torchrun (``parallel.start``) every process has its share of each batch, and all end with the same weights.

    Args:
        folder: where ``checkpoint.safetensors`` is kept. If there is one, the run goes on from it, and on a CPU ends
            bit for bit as if it had never been interrupted; a finished run is only loaded.
        progress: a bar on the standard error.
        watch: is handed the history after each validation.

    Raises:
        Diverged: loss or gradient is not finite; the last checkpoint written, if any, is from before.
        BadCheckpoint: the checkpoint is damaged, or of another model, configuration or corpus.
        ValueError: an unknown device, a corpus shorter than one batch, tokens that the model does not know, a batch that
            the processes do not divide.
    """
    device = check_device(config.device)
    rank, size = parallel.world()
    if config.batch % size:
        raise ValueError(f"batch must be a multiple of the {size} processes, got {config.batch}")
    if data.vocab > model.config.vocab_size:
        raise ValueError(f"model must know the {data.vocab} tokens of {data.name}, "
                         f"got a vocabulary of {model.config.vocab_size}")
    model.to(device).train()
    path = None if folder is None else Path(folder) / "checkpoint.safetensors"
    run = _Run(model, data, config, device, path)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed + rank)
        run.resume()
        run.warm_up()
        run.go(progress and parallel.first(), watch)
    return run.history


class _Run:
    """A model, its optimizers and its history: what a checkpoint holds."""

    def __init__(self, model: nn.Module, data: Language, config: TrainConfig, device: torch.device, path: Path | None) -> None:
        self.model, self.data, self.config, self.device, self.path = model, data, config, device, path
        self.trunk = torch.compile(model.base_model) if config.compile else model.base_model
        self.optimizers = optimizers(model, config)
        self.layers = sparse_layers(model)
        self.masks = Masks(self.layers)
        self.history = History()
        self.step = 0  # optimizer steps done
        self.saved = 0
        self.norms: list[float] = []  # since the last validation
        self.seen = windows(data.valid, config.batch * config.eval_batches, config.seq)

    def go(self, progress: bool, watch: Callable[[History], None] | None) -> None:
        config, history = self.config, self.history
        written = time.monotonic()
        with tqdm(total=config.steps, initial=self.step, desc="train", unit="step", disable=not progress) as bar:
            if self.step == 0 and not history.valid:
                self.validate()
            while self.step < config.steps:
                self.timed_step()
                last = self.step == config.steps
                if last or self.step % config.eval_every == 0:
                    self.validate()
                    if watch:
                        watch(history)
                old = time.monotonic() - written >= config.checkpoint_seconds
                if self.path and (last or self.step % config.checkpoint_every == 0 or parallel.agreed(old)):
                    self.save()
                    written = time.monotonic()
                bar.set_postfix(loss=f"{history.train[-1]:.3f}", valid=f"{history.valid[-1][1]:.3f}", refresh=False)
                bar.update()

    def timed_step(self) -> None:
        """One optimizer step, on the clock and on the counter of joules."""
        config, history = self.config, self.history
        spent, begun = nvml.spent(self.device), time.perf_counter()
        x, y = batch(self.data.train, self.step, config.batch, config.seq, config.seed)
        rank, size = parallel.world()
        history.train.append(self.update(x[rank::size].to(self.device), y[rank::size].to(self.device)))
        history.seconds += time.perf_counter() - begun
        if spent is not None:
            history.joules += (nvml.spent(self.device) or spent) - spent

    def update(self, x: Tensor, y: Tensor) -> float:
        """One optimizer step on this process's inputs and targets ``[batch, seq]``; the loss of all before it."""
        config, parameters = self.config, list(self.model.parameters())
        factor = learning_rate(config, self.step)
        rates = {}
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = group["base"] * factor
            rates |= dict.fromkeys(map(id, group["params"]), group["lr"])
        self.prepare()
        value = self.backward(x, y)
        parallel.average_gradients(parameters)
        for layer in self.layers.values():
            layer.edit_grad()
        norm = nn.utils.clip_grad_norm_(parameters, config.clip).item()
        self.check(value, "loss")
        self.check(norm, "gradient norm")
        self.norms.append(norm)
        freeze(self.optimizers, self.layers.values())
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        before = self.masks.now()
        for layer in self.layers.values():
            layer.rate = rates[id(layer.parameter)]
            layer.update(self.step, config.steps, state_of(self.optimizers, layer))
        self.masks.follow(before)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        return value

    def prepare(self) -> None:
        for layer in self.layers.values():
            layer.prepare(self.step, self.config.steps)

    def backward(self, x: Tensor, y: Tensor) -> float:
        """Add the gradients of the mean loss, a few sequences at a time; the mean loss over all processes."""
        config, value = self.config, 0.0
        for part, target in zip(x.split(config.micro or len(x)), y.split(config.micro or len(y))):
            share = len(part) / len(x)
            loss = loss_of(self.model, part, target, config.precision, config.chunk, self.trunk)
            value += loss.item() * share
            extra = [cost for layer in self.layers.values() if (cost := layer.penalty()) is not None]
            (sum(extra, loss) * share).backward()
        return parallel.total(value, device=self.device)[0] / parallel.world()[1]

    def warm_up(self) -> None:
        """Compile, and tune a GPU's kernels, before the clock starts."""
        if not (self.config.compile or self.device.type == "cuda") or self.step == self.config.steps:
            return
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            x, y = batch(self.data.train, 0, self.config.batch, self.config.seq, self.config.seed)
            rank, size = parallel.world()
            self.prepare()
            self.backward(x[rank::size].to(self.device), y[rank::size].to(self.device))
        self.model.zero_grad(set_to_none=True)

    def validate(self) -> None:
        self.prepare()
        loss = evaluate(self.model, *self.seen, self.config.batch, self.device, self.config.precision, self.config.chunk, self.trunk)
        self.check(loss, "validation loss")
        self.history.valid.append((self.step, loss))
        seen = {TIME: self.history.seconds} if self.step else {}
        if self.norms:
            seen[NORM] = sum(self.norms) / len(self.norms)
        if self.history.joules:
            seen[ENERGY] = self.history.joules
        for name, value in {**seen, **self.masks.report()}.items():
            self.history.trace.setdefault(name, []).append((self.step, value))
        self.norms = []

    def check(self, value: float, what: str) -> None:
        if not isfinite(value):
            rate = self.optimizers[0].param_groups[0]["lr"]
            kept = "no checkpoint was written"
            if self.saved:
                kept = f"the checkpoint of step {self.saved} is kept in {self.path}"
            raise Diverged(f"{what} is {value} in step {self.step + 1} of {self.config.steps}, "
                           f"learning rate {rate:.3g}; {kept}. Try a lower lr or a longer warm-up")

    def tensors(self) -> dict[str, Tensor]:
        names = {id(p): name for name, p in self.model.named_parameters()}
        found = checkpoint.model_tensors(self.model)
        for optimizer in self.optimizers:
            for p, state in optimizer.state.items():
                found.update({f"optimizer.{names[id(p)]}.{key}": value for key, value in state.items()})
        return found | self.masks.tensors()

    def about(self) -> dict:
        """What a checkpoint must agree with: everything that the numbers depend on."""
        return {
            "config": {name: value for name, value in asdict(self.config).items() if name not in FREE},
            "corpus": {"name": self.data.name, "digest": self.data.digest},
            "layers": {name: f"{layer.structure!r} {spelled(layer.recipe)} {layer.kernel}"
                       for name, layer in self.layers.items()},
        }

    def save(self) -> None:
        tensors = self.tensors()
        for name, tensor in tensors.items():  # finite loss, yet an update that was too large
            if tensor.is_floating_point() and not tensor.isfinite().all():
                self.check(float("nan"), name)
        random = {"random.cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["random.cuda"] = torch.cuda.get_rng_state(self.device)
        rest = {"step": self.step, "norms": self.norms, "history": asdict(self.history)}
        if parallel.first():
            checkpoint.save(self.path, tensors | random, self.about() | rest)
        parallel.wait()
        self.saved = self.step

    def resume(self) -> None:
        if self.path is None or not self.path.exists():
            return
        tensors, about = checkpoint.load(self.path)
        for part, here in json.loads(json.dumps(self.about())).items():
            there = about.get(part, {})
            for name in sorted(here.keys() | there.keys()):
                if here.get(name) != there.get(name):
                    raise checkpoint.BadCheckpoint(
                        f"checkpoint {self.path} is of another run: its {part} has {name} = {there.get(name)!r}, "
                        f"this run {here.get(name)!r}; allowed: the same, or another folder")
        own = {name: value for name, value in tensors.items() if name.startswith("model.")}
        checkpoint.copy_tensors(self.path, checkpoint.model_tensors(self.model), own)
        self.load_optimizers(tensors)
        torch.set_rng_state(tensors["random.cpu"])
        if not parallel.first():  # the file has the first one's state
            torch.manual_seed(self.config.seed + parallel.world()[0] + about["step"])
        if self.device.type == "cuda" and "random.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random.cuda"], self.device)
        self.masks.load(tensors)
        self.history = History.told(about["history"])
        self.norms = about["norms"]
        self.step = self.saved = about["step"]
        self.prepare()

    def load_optimizers(self, tensors: dict[str, Tensor]) -> None:
        names = {id(p): name for name, p in self.model.named_parameters()}
        for optimizer in self.optimizers:
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                prefix = f"optimizer.{names[id(p)]}."
                state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
                optimizer.state[p] = {key: value.to(p.device) for key, value in state.items()}


def loss_of(model: nn.Module, x: Tensor, y: Tensor, precision: str = "float32", chunk: int = 0,
            trunk: Callable[..., object] | None = None) -> Tensor:
    """Mean cross-entropy in nats of the targets ``y`` given the inputs ``x``, both ``[batch, seq]``.

    With ``chunk`` the logits of so many tokens are in memory at a time, and are computed again in the backward pass: they
    are the largest tensor of a small model with a large vocabulary. ``trunk`` is the decoder, if it is not the model's own.
    """
    with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        hidden = (model.base_model if trunk is None else trunk)(input_ids=x)[0].flatten(0, 1)
        head, y = model.get_output_embeddings(), y.flatten()
        if not 0 < chunk < len(y):
            return functional.cross_entropy(head(hidden).float(), y)
        cost = lambda part, target: functional.cross_entropy(head(part).float(), target, reduction="sum")
        parts = zip(hidden.split(chunk), y.split(chunk))
        return sum(recompute(cost, part, target, use_reentrant=False) for part, target in parts) / len(y)


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor, y: Tensor, batch: int = 32, device: torch.device | str = "cpu",
             precision: str = "float32", chunk: int = 0, trunk: Callable[..., object] | None = None) -> float:
    """Mean loss in nats per token over ``x``, ``y`` ``[windows, seq]``, ``batch`` windows at a time."""
    training = model.training
    model.eval()
    total, (rank, size) = 0.0, parallel.world()
    for start in range(rank * batch, len(x), size * batch):
        part, target = x[start:start + batch].to(device), y[start:start + batch].to(device)
        total += loss_of(model, part, target, precision, chunk, trunk).item() * len(part)
    model.train(training)
    return parallel.total(total, device=device)[0] / len(x)
