"""One training loop: dense or sparse, resumable, the same on CPU and GPU."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from math import cos, isfinite, pi
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from sparsesurvey import checkpoint
from sparsesurvey.data import Language, batch, windows
from sparsesurvey.device import check_device
from sparsesurvey.linear import sparse_layers


@dataclass(frozen=True)
class TrainConfig:
    """How to train. The defaults suit the smallest model and the Markov language, see ``experiments.preset``.

    ``lr`` is AdamW's. With ``optimizer="muon"`` the matrices of attention and MLP are trained by Muon (Jordan 2024)
    at ``muon_lr``, embedding, head and norms by AdamW at ``lr``. The rate rises linearly over ``warmup`` steps; then
    "cosine" lowers it to ``final_lr * lr`` along half a cosine, "wsd" (warm-up, stable, decay) keeps it and lowers it
    linearly over the last ``cooldown`` of the steps. Weight decay is on matrices only. ``precision="bfloat16"`` is
    autocast with float32 weights.
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
    checkpoint_every: int = 80
    device: str = "cpu"
    precision: str = "float32"

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "seq", "eval_every", "eval_batches", "checkpoint_every"):
            _check(name, getattr(self, name), int, lambda value: value >= 1, "an integer of at least 1")
        _check("warmup", self.warmup, int, lambda value: 0 <= value <= self.steps, f"an integer from 0 to {self.steps}")
        _check("seed", self.seed, int, lambda value: value >= 0, "an integer of at least 0")
        for name in ("lr", "muon_lr", "clip"):
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
    """What a run did: training loss after each step, and validation loss, both in nats per token."""

    train: list[float] = field(default_factory=list)  # loss of the batch of step 1, 2, ...
    valid: list[tuple[int, float]] = field(default_factory=list)  # (steps done, loss); the first is at 0
    seconds: float = 0.0  # of wall time, over all parts of a resumed run


class Diverged(RuntimeError):
    """The loss or the gradient is no longer a finite number."""


def learning_rate(config: TrainConfig, step: int) -> float:
    """Factor on the learning rate in step 0, 1, ..."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    if config.schedule == "cosine":
        done = (step - config.warmup) / max(1, config.steps - config.warmup)
        return config.final_lr + (1 - config.final_lr) * (1 + cos(pi * done)) / 2
    cooling = config.cooldown * config.steps
    left = min(1.0, (config.steps - step) / cooling) if cooling else 1.0
    return config.final_lr + (1 - config.final_lr) * left


def optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon for the hidden matrices and AdamW for the rest.

    A group's "base" is its highest learning rate: the recipe's multiplier is in it.
    """
    layers = sparse_layers(model)
    multiplier = {id(p): layer.recipe.lr_multiplier(layer.structure)
                  for layer in layers.values() for p in layer.parameters(recurse=False)}
    packed = {id(layer.values) for layer in layers.values() if layer.kernel != "masked"}
    outer = {id(part.weight) for part in (model.get_input_embeddings(), model.get_output_embeddings())}
    groups: dict[tuple[str, float, float], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        matrix = p.dim() >= 2 or id(p) in packed
        kind = "muon" if config.optimizer == "muon" and matrix and id(p) not in outer else "adamw"
        if kind == "muon" and id(p) in packed:
            raise ValueError(f"optimizer muon needs matrices, but {name} is packed: take adamw, or kernel='masked'")
        base = (config.muon_lr if kind == "muon" else config.lr) * multiplier.get(id(p), 1.0)
        groups.setdefault((kind, base, config.weight_decay if matrix else 0.0), []).append(p)
    made = []
    for kind in ("adamw", "muon"):
        some = [{"params": params, "lr": base, "base": base, "weight_decay": decay}
                for (which, base, decay), params in groups.items() if which == kind]
        if some and kind == "adamw":
            made.append(torch.optim.AdamW(some, betas=config.betas, fused=True))
        elif some:
            made.append(torch.optim.Muon(some, momentum=0.95))
    return made


def train(model: nn.Module, data: Language, config: TrainConfig = TrainConfig(), folder: str | Path | None = None,
          progress: bool = True) -> History:
    """Train ``model`` in place on ``data.train`` and validate it, at fixed places, on ``data.valid``.

    Args:
        folder: where ``checkpoint.safetensors`` is kept. If there is one, the run goes on from it, and on a CPU ends
            bit for bit as if it had never been interrupted; a finished run is only loaded.
        progress: a bar on the standard error.

    Raises:
        Diverged: loss or gradient is not finite; the last checkpoint written, if any, is from before.
        BadCheckpoint: the checkpoint is damaged, or of another model, configuration or corpus.
        ValueError: an unknown device, a corpus shorter than one batch, tokens that the model does not know.
    """
    device = check_device(config.device)
    if data.vocab > model.config.vocab_size:
        raise ValueError(f"model must know the {data.vocab} tokens of {data.name}, "
                         f"got a vocabulary of {model.config.vocab_size}")
    model.to(device).train()
    path = None if folder is None else Path(folder) / "checkpoint.safetensors"
    run = _Run(model, data, config, path)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        run.resume()
        run.go(device, progress)
    return run.history


class _Run:
    """A model, its optimizers and its history: what a checkpoint holds."""

    def __init__(self, model: nn.Module, data: Language, config: TrainConfig, path: Path | None) -> None:
        self.model, self.data, self.config, self.path = model, data, config, path
        self.optimizers = optimizers(model, config)
        self.layers = list(sparse_layers(model).values())
        self.history = History()
        self.step = 0  # optimizer steps done
        self.saved = 0
        self.seen = windows(data.valid, config.batch * config.eval_batches, config.seq)

    def go(self, device: torch.device, progress: bool) -> None:
        config, history = self.config, self.history
        before, begun = history.seconds, time.perf_counter()
        with tqdm(total=config.steps, initial=self.step, desc="train", unit="step", disable=not progress) as bar:
            if self.step == 0 and not history.valid:
                self.validate(device)
            while self.step < config.steps:
                x, y = batch(self.data.train, self.step, config.batch, config.seq, config.seed)
                history.train.append(self.update(x.to(device), y.to(device)))
                last = self.step == config.steps
                if last or self.step % config.eval_every == 0:
                    self.validate(device)
                history.seconds = before + time.perf_counter() - begun
                if self.path and (last or self.step % config.checkpoint_every == 0):
                    self.save()
                bar.set_postfix(loss=f"{history.train[-1]:.3f}", valid=f"{history.valid[-1][1]:.3f}", refresh=False)
                bar.update()

    def update(self, x: Tensor, y: Tensor) -> float:
        """One optimizer step on inputs and targets ``[batch, seq]``; the loss before it."""
        factor = learning_rate(self.config, self.step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base"] * factor
        loss = loss_of(self.model, x, y, self.config.precision)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        value = loss.item()
        self.check(value, "loss")
        self.check(norm.item(), "gradient norm")
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        for layer in self.layers:
            layer.update_mask(self.step)
        return value

    def validate(self, device: torch.device) -> None:
        loss = evaluate(self.model, *self.seen, self.config.batch, device, self.config.precision)
        self.check(loss, "validation loss")
        self.history.valid.append((self.step, loss))

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
        return found

    def about(self) -> dict:
        """What a checkpoint must agree with: everything that the numbers depend on."""
        skip = {"device", "checkpoint_every"}
        return {
            "config": {name: value for name, value in asdict(self.config).items() if name not in skip},
            "corpus": {"name": self.data.name, "digest": self.data.digest},
            "layers": {name: f"{layer.structure!r} {layer.recipe} {layer.kernel}"
                       for name, layer in sparse_layers(self.model).items()},
        }

    def save(self) -> None:
        tensors = self.tensors()
        for name, tensor in tensors.items():  # finite loss, yet an update that was too large
            if tensor.is_floating_point() and not tensor.isfinite().all():
                self.check(float("nan"), name)
        random = {"random.cpu": torch.get_rng_state()}
        if self.config.device != "cpu":
            random["random.cuda"] = torch.cuda.get_rng_state()
        rest = {"step": self.step, "history": asdict(self.history)}
        checkpoint.save(self.path, tensors | random, self.about() | rest)
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
        if self.config.device != "cpu" and "random.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random.cuda"])
        told = about["history"]
        self.history = History(told["train"], [(step, loss) for step, loss in told["valid"]], told["seconds"])
        self.step = self.saved = about["step"]

    def load_optimizers(self, tensors: dict[str, Tensor]) -> None:
        names = {id(p): name for name, p in self.model.named_parameters()}
        for optimizer in self.optimizers:
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                prefix = f"optimizer.{names[id(p)]}."
                state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
                optimizer.state[p] = {key: value.to(p.device) for key, value in state.items()}


def loss_of(model: nn.Module, x: Tensor, y: Tensor, precision: str = "float32") -> Tensor:
    """Mean cross-entropy in nats of the targets ``y`` given the inputs ``x``, both ``[batch, seq]``."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        logits = model(input_ids=x).logits
    return functional.cross_entropy(logits.float().flatten(0, 1), y.flatten())


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor, y: Tensor, batch: int = 32, device: torch.device | str = "cpu",
             precision: str = "float32") -> float:
    """Mean loss in nats per token over ``x``, ``y`` ``[windows, seq]``, ``batch`` windows at a time."""
    training = model.training
    model.eval()
    total = 0.0
    for start in range(0, len(x), batch):
        part, target = x[start:start + batch].to(device), y[start:start + batch].to(device)
        total += loss_of(model, part, target, precision).item() * len(part)
    model.train(training)
    return total / len(x)
