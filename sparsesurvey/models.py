"""Pruning a whole model in place, decoder block after decoder block, resumable.

Any causal model of transformers whose MLP projections are linear layers will do: Mistral, Llama, Qwen2. What each layer
saw comes from ``calibration``; what is kept is chosen by a structure from a score, or by a pruner that also moves the
weights. ``hub`` opens and saves such models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from inspect import signature
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsesurvey.calibration import Inputs, as_names, layer_by_layer
from sparsesurvey.data import batch as draw
from sparsesurvey.finished import Finished, block_of
from sparsesurvey.linear import MLP, linear_layers
from sparsesurvey.scores import magnitude, wanted
from sparsesurvey.structure import Pattern, Shape, Structure

if TYPE_CHECKING:
    import pandas as pd

Method = Callable[..., Any]
Plan = Mapping[str, tuple[Structure, Method]]


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer. ``bits``: stored per weight, where a number has 16. ``error``: the share of the
    outputs' energy that is lost on the calibration tokens; None where no gram was gathered."""

    name: str
    structure: str
    method: str
    shape: Shape
    density: float  # non-zeros, counted
    bits: float
    error: float | None = None
    seconds: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class Report:
    """What ``prune_model`` did: its layers in order, the names of those that stayed dense, the tokens of calibration."""

    layers: tuple[LayerReport, ...]
    excluded: tuple[str, ...] = ()
    tokens: int = 0

    @property
    def density(self) -> float:
        """Of all pruned layers together."""
        sizes = [layer.shape[0] * layer.shape[1] for layer in self.layers]
        return sum(layer.density * size for layer, size in zip(self.layers, sizes)) / sum(sizes)

    def table(self) -> pd.DataFrame:
        """One line a layer."""
        import pandas as pd

        return pd.DataFrame([asdict(layer) for layer in self.layers]).round({"density": 4, "bits": 3, "error": 4, "seconds": 2})


def prune_model(model: nn.Module, structure: Structure | Plan, method: Method = magnitude, batches: Iterable[Tensor] = (),
                modules: Iterable[str] = MLP, exclude: Iterable[str] = (), propagate: bool = True,
                then: Structure | None = None, folder: str | Path | None = None, dtype: torch.dtype = torch.float32,
                dead: str = "refuse", progress: bool = True) -> Report:
    """Prune, in place, the linear layers of ``model`` that are named in ``modules``; return what became of each.

    A block's layers are calibrated together, on what the pruned blocks before it give (``propagate``) or on what the
    dense ones gave. Beside the model there are one hidden state per token of ``batches`` and the statistics of one block,
    and a copy of its weights where nothing is propagated.

    Args:
        structure: of all layers, or ``{module: (structure, method)}`` where they differ, which names the modules as well.
        method: a score ``(weight, inputs) -> scores`` from which the structure chooses, or a pruner ``(weight,
            structure, inputs) -> new weight, or (new weight, mask)``, known by its parameter ``structure``. What it
            wants of the inputs is its attribute ``want``, a gram for a pruner without one. A structure that has no mask is
            put in place of the weight by its own ``project``, which only ``magnitude`` goes with.
        batches: token ids ``[sequences, tokens]``; may be empty if no method looks at inputs. See ``samples``.
        exclude: layers that stay dense, full names with ``*``: ``"model.layers.0.*"``.
        then: what each pruned weight is put into at last, such as ``QuantisedNM(2, 4)`` after ``NM(2, 4)``.
        folder: where each finished layer is kept, so that a run that was killed goes on after its last finished block,
            to the same weights. Start it again with the dense model. The pruned model does not go there, see ``hub.save``.
        dtype: of the statistics. dead: "refuse" an input channel that was zero on all tokens, or "keep" it.

    Raises:
        ValueError: whatever does not fit, before any weight is touched; statistics that are unfit in the midst of the
            model, when the blocks before are pruned already. The model is then to be loaded again.
        BadCheckpoint: a folder that is damaged or of another run.
    """
    plan, excluded = _plan(model, structure, method, modules, exclude, then)
    batches = list(batches)
    want = _want(plan, batches)
    _check_weights(model, plan)
    work = _Work(model, plan, then, propagate or not batches,
                 None if folder is None else Finished(Path(folder)))
    if work.files:
        work.resume({"batches": batches, "propagate": propagate, "dtype": str(dtype), "dead": dead})
    if batches:
        _check_runs(model, batches[0])
        layer_by_layer(model, batches, work.visit, work.modules, want, dtype, dead, done=work.done + excluded, progress=progress)
    else:
        for name in [name for name in plan if name not in work.done]:
            work.visit(name, model.get_submodule(name), None)
    work.flush()
    return Report(tuple(work.report[name] for name in plan), tuple(excluded), sum(batch.numel() for batch in batches))


def samples(tokens: np.ndarray, sequences: int = 128, length: int = 2048, seed: int = 0, size: int = 1) -> list[Tensor]:
    """Calibration batches ``[size, length]``: ``sequences`` pieces at random places of a text's tokens.

    128 x 2048 is what the papers take. ValueError if the text is shorter than one batch.
    """
    if sequences < 1 or sequences % size:
        raise ValueError(f"sequences must be a positive multiple of size, which is {size}, got {sequences}")
    return [draw(tokens, step, size, length, seed)[0] for step in range(sequences // size)]


class _Work:
    """The state of one run: what each layer is to become, what is done, and new weights that wait to be put in place.

    They wait where nothing is propagated: calibrating the next block runs this one once more, as it was.
    """

    def __init__(self, model: nn.Module, plan: Plan, then: Structure | None, propagate: bool, files: Finished | None) -> None:
        self.model, self.plan, self.then, self.propagate, self.files = model, plan, then, propagate, files
        self.modules = tuple(dict.fromkeys(name.rpartition(".")[2] for name in plan))
        self.done: list[str] = []
        self.report: dict[str, LayerReport] = {}
        self.waiting: dict[str, Callable[[], Tensor]] = {}
        self.block = ""

    def resume(self, settings: dict[str, Any]) -> None:
        """Take what an earlier run of these settings has finished."""
        layers = {name: f"{structure!r} {describe(method)}" for name, (structure, method) in self.plan.items()}
        self.done = self.files.open(self.model, {**settings, "layers": layers, "then": repr(self.then)})
        for name in self.done:
            weight, about = self.files.load(name)
            self.report[name] = LayerReport(**{**about, "shape": tuple(about["shape"])})
            self.waiting[name] = lambda name=name: self.files.load(name)[0]
            if self.propagate:
                self.flush()

    def visit(self, name: str, layer: nn.Linear, inputs: Inputs | None) -> None:
        """Prune one layer; called when its block was calibrated."""
        start = perf_counter()
        if self.block != block_of(name):
            self.flush()
        self.block = block_of(name)
        structure, method = self.plan[name]
        old = layer.weight.detach()
        new = pruned_weight(old, structure, method, inputs, self.then)
        self.report[name] = _report(name, old, new, self.then or structure, method, inputs, start)
        if self.files:
            self.files.save(name, new, {**asdict(self.report[name]), "shape": list(old.shape)})
        self.waiting[name] = lambda: new
        if self.propagate:
            self.flush()

    @torch.no_grad()
    def flush(self) -> None:
        """Put in place what waits."""
        for name, weight in self.waiting.items():
            self.model.get_submodule(name).weight.copy_(weight())
        self.waiting = {}


def pruned_weight(weight: Tensor, structure: Structure, method: Method = magnitude, inputs: Inputs | None = None,
                  then: Structure | None = None) -> Tensor:
    """``weight [out, in]`` under ``structure``, in its dtype: by a score or a pruner, see ``prune_model``.

    Numbers of 16 bits are scored and moved in 32. ValueError if what a pruner returns is not finite.
    """
    wide = weight.detach().float() if weight.dtype.itemsize < 4 else weight.detach()
    if not isinstance(structure, Pattern):
        new = structure.project(wide)
    elif is_pruner(method):
        new = method(wide, structure, inputs)
        new = new if isinstance(new, Tensor) else new[0]
    else:
        new = wide * structure.mask(method(wide, inputs))
    new = (new if then is None else then.project(new)).to(weight.dtype)
    if new.shape != weight.shape or not new.isfinite().all():
        raise ValueError(f"{describe(method)} must give finite weights {list(weight.shape)}, got NaN, infinity or another shape")
    return new


def is_pruner(method: Method) -> bool:
    """Does ``method`` move weights under a structure that it is handed, rather than score them?"""
    return "structure" in signature(method).parameters


def _plan(model: nn.Module, structure: Structure | Plan, method: Method, modules: Iterable[str], exclude: Iterable[str],
          then: Structure | None) -> tuple[dict[str, tuple[Structure, Method]], list[str]]:
    """What each layer is to become by its full name, and the names of those that stay; ValueError for what cannot be."""
    if isinstance(structure, Mapping):
        modules, each = tuple(structure), dict(structure)
    else:
        modules = as_names(modules)
        each = dict.fromkeys(modules, (structure, method))
    layers = linear_layers(model, modules)
    missing = set(modules) - {name.rpartition(".")[2] for name in layers}
    if missing:
        raise ValueError(f"modules must name linear layers of the model, got {', '.join(sorted(missing))}: it has none such")
    exclude = as_names(exclude)
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name in layers):
            raise ValueError(f"exclude must match layers among {', '.join(modules)}, got {pattern!r}, which matches none")
    excluded = [name for name in layers if any(fnmatchcase(name, pattern) for pattern in exclude)]
    plan = {name: each[name.rpartition(".")[2]] for name in layers if name not in excluded}
    if not plan:
        raise ValueError("exclude must leave some layer to prune, got patterns that match all")
    for name, (its, how) in plan.items():
        _check_layer(name, tuple(layers[name].weight.shape), its, how, then)
    return plan, excluded


def _check_layer(name: str, shape: Shape, structure: Structure, method: Method, then: Structure | None) -> None:
    if not isinstance(structure, Structure) or not callable(method):
        raise ValueError(f"structure must be a Structure, or {{module: (structure, method)}}, got {structure!r} and {method!r}")
    if not isinstance(structure, Pattern) and method is not magnitude:
        raise ValueError(f"method must be magnitude for {structure}, which has no mask to choose, got {describe(method)}")
    for each in (structure, then):
        try:
            if each is not None:
                each.check_shape(shape)
        except ValueError as error:
            raise ValueError(f"{name} cannot be pruned: {error}") from error


def _want(plan: Plan, batches: Sequence[Tensor]) -> tuple[str, ...]:
    """What all methods together want to know of the inputs."""
    found: dict[str, None] = {}
    for _, method in plan.values():
        mine = wanted(method) or (("gram",) if is_pruner(method) else ())
        if mine and not batches:
            raise ValueError(f"batches must hold calibration data for {describe(method)}, which looks at {', '.join(mine)}; got none")
        found |= dict.fromkeys(mine)
    return tuple(found)


def _check_weights(model: nn.Module, names: Iterable[str]) -> None:
    for name in names:
        if not model.get_submodule(name).weight.isfinite().all():
            raise ValueError(f"model must have finite weights, {name} holds NaN or infinity")


@torch.no_grad()
def _check_runs(model: nn.Module, batch: Tensor) -> None:
    """One sequence through the whole model, so that what is broken is found before anything is changed."""
    vocab = getattr(getattr(model, "config", None), "vocab_size", None)
    if not isinstance(batch, Tensor) or batch.dim() != 2 or batch.is_floating_point() or not batch.numel():
        return  # calibration says what is wrong
    if vocab is not None and int(batch.max()) >= vocab:
        raise ValueError(f"batches must hold tokens below {vocab}, which the model knows, got {int(batch.max())}")
    training = model.training
    model.eval()
    out = model(batch[:1].to(next(model.parameters()).device))
    model.train(training)
    if not getattr(out, "logits", out).isfinite().all():
        raise ValueError("model must give finite activations, its outputs hold NaN or infinity on the first sequence")


def _report(name: str, old: Tensor, new: Tensor, structure: Structure, method: Method, inputs: Inputs | None,
            start: float) -> LayerReport:
    shape = tuple(old.shape)
    error = None if getattr(inputs, "gram", None) is None else _lost(old, new, inputs.gram)
    bits = (structure.value_bits(shape, 2) + structure.index_bits(shape)) / old.numel()
    density = int(new.count_nonzero()) / new.numel()
    return LayerReport(name, str(structure), describe(method), shape, density, bits, error, perf_counter() - start)


def _lost(old: Tensor, new: Tensor, gram: Tensor) -> float:
    """As ``reconstruction.output_error``, in the gram's own precision: this is for a report, at every layer of a model."""
    old, lost = old.to(gram.dtype), (old - new).to(gram.dtype)
    whole = float(((old @ gram) * old).sum())
    return float(((lost @ gram) * lost).sum()) / whole if whole else 0.0


def describe(method: Method) -> str:
    """The name of a score or pruner, with the parameters that a ``partial`` sets."""
    options = ", ".join(f"{key}={value!r}" for key, value in getattr(method, "keywords", {}).items())
    name = getattr(getattr(method, "func", method), "__name__", type(method).__name__)
    return f"{name}({options})" if options else name
