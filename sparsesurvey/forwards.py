"""Forwards of a whole model under hooks: as far as some block, from behind some block, with gradients on the way.

Decoder layers are never called by hand: what the model hands them (rotary embeddings, masks, caches) changes with every
release of transformers, and is the model's own affair. A block is what stands in the model's outermost ModuleList.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional


class Stop(Exception):
    """Raised by a hook when the model has run as far as it is needed."""


@contextmanager
def ready(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no autograd; afterwards everything is as before."""
    modes = {part: part.training for part in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def call(model: nn.Module, batch: Tensor) -> tuple[Tensor, object]:
    """The batch on the model's device, and what the model gives for it."""
    batch = batch.to(next(model.parameters()).device)
    options = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
    return batch, model(batch, **options)


def run(model: nn.Module, batch: Tensor, last: nn.Module | None) -> None:
    """The whole model on one batch, as far as the block ``last``."""
    def stop(*_: object) -> None:
        raise Stop

    hook = last.register_forward_hook(stop) if last is not None else None
    try:
        call(model, batch)
    except Stop:
        pass
    finally:
        if hook:
            hook.remove()


def places_of(model: nn.Module, layers: Iterable[str]) -> dict[str, tuple[int, str]]:
    """For each layer inside of a ModuleList, the outermost one: its place in the list, and the list's name."""
    found = {}
    for name in layers:
        parts = name.split(".")
        for depth in range(1, len(parts)):
            if isinstance(model.get_submodule(".".join(parts[:depth])), nn.ModuleList):
                found[name] = int(parts[depth]), ".".join(parts[:depth])
                break
    return found


def block_list(model: nn.Module, layers: dict[str, nn.Linear]) -> nn.ModuleList:
    """The one ModuleList that holds all of the layers; ValueError if there is none."""
    found = places_of(model, layers)
    names = {name for _, name in found.values()}
    if len(found) < len(layers) or len(names) != 1:
        raise ValueError(f"model must hold its layers in one ModuleList of decoder blocks, got a {type(model).__name__}")
    return model.get_submodule(names.pop())


def last_block(model: nn.Module, layers: dict[str, nn.Linear]) -> nn.Module | None:
    """The block behind which none of the layers lies; None where they are not all in blocks of one list."""
    found = places_of(model, layers)
    one_list = len(found) == len(layers) and len({name for _, name in found.values()}) == 1
    return block_list(model, layers)[max(place for place, _ in found.values())] if one_list else None


class Replay:
    """Blocks that are done return what they returned before, so that the model runs on from there."""

    def __init__(self, blocks: nn.ModuleList, batches: int) -> None:
        self.blocks, self.behind, self.number = blocks, -1, 0
        self.held: list = [None] * batches
        self.next: list = [None] * batches

    @contextmanager
    def up_to(self, place: int) -> Iterator[None]:
        """Within, blocks up to ``behind`` are not computed, and what goes into block ``place`` is held for the next time."""
        skipped = list(self.blocks)[: self.behind + 1]
        own = [vars(block).get("forward") for block in skipped]  # some wrappers of models set one
        for block in skipped:
            block.forward = lambda *args, **options: self.held[self.number]
        keep = place > self.behind + 1
        hook = self.blocks[place - 1].register_forward_hook(self._hold) if keep else None
        try:
            yield
        finally:
            for block, forward in zip(skipped, own):
                vars(block).pop("forward")
                if forward is not None:
                    block.forward = forward
            if hook:
                hook.remove()

    def _hold(self, block: nn.Module, args: tuple, output: object) -> None:
        self.next[self.number] = output

    def advance(self, place: int) -> None:
        if place > self.behind + 1:
            self.held, self.next, self.behind = self.next, [None] * len(self.held), place - 1


class Gradients:
    """Sums of squares, over sequences, of the gradients of the layers' weights; what of is the subclasses' affair."""

    def __init__(self, layers: dict[str, nn.Linear]) -> None:
        self.layers = layers
        self.sums = {name: torch.zeros_like(layer.weight, dtype=torch.float32) for name, layer in layers.items()}

    def hooks(self) -> list:
        """Make the weights known to autograd, until ``close``; the hooks that this takes."""
        self.frozen = [layer for layer in self.layers.values() if not layer.weight.requires_grad]
        for layer in self.frozen:
            layer.weight.requires_grad_(True)
        return []

    def close(self) -> None:
        for layer in self.frozen:
            layer.weight.requires_grad_(False)

    def add(self, names: Sequence[str], losses: Sequence[Tensor]) -> None:
        """One loss a sequence, all of one graph."""
        weights = [self.layers[name].weight for name in names]
        for number, loss in enumerate(losses, start=1):
            found = torch.autograd.grad(loss, weights, retain_graph=number < len(losses))
            for name, gradient in zip(names, found):
                self.sums[name] += gradient.float().square()

    def rms(self, name: str, sequences: int) -> Tensor:
        """``[out, in]``, root mean square over sequences."""
        return (self.sums[name] / sequences).sqrt()


class BlockGradients(Gradients):
    """Of the norm of what a layer's decoder block gives (Wanda++): each block has a graph of its own, gone when it returns."""

    def __init__(self, model: nn.Module, layers: dict[str, nn.Linear]) -> None:
        super().__init__(layers)
        self.blocks, self.inside = block_list(model, layers), {}
        for name, (place, _) in places_of(model, layers).items():
            self.inside.setdefault(place, []).append(name)

    def hooks(self) -> list:
        made = super().hooks()
        for place, names in self.inside.items():
            made.append(self.blocks[place].register_forward_pre_hook(self._begin))
            made.append(self.blocks[place].register_forward_hook(self._end(names)))
        return made

    def _begin(self, *_: object) -> None:
        torch.set_grad_enabled(True)

    def _end(self, names: list[str]) -> Callable:
        def hook(block: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple:
            hidden = output if isinstance(output, Tensor) else output[0]
            self.add(names, [sequence.float().norm() for sequence in hidden])
            torch.set_grad_enabled(False)
            return hidden.detach() if isinstance(output, Tensor) else (hidden.detach(), *output[1:])

        return hook


class LossGradients(Gradients):
    """Of the model's own loss, the mean cross-entropy of the next token in each sequence; its whole graph is held."""

    def run(self, model: nn.Module, batch: Tensor) -> None:
        with torch.enable_grad():
            batch, given = call(model, batch)
            logits = given if isinstance(given, Tensor) else given.logits
            losses = [functional.cross_entropy(some[:-1].float(), tokens[1:]) for some, tokens in zip(logits, batch)]
            self.add(list(self.layers), losses)
