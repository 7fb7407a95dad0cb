"""How far a recipe's gradient is from the gradient of the loss that the model computed.

A recipe may multiply dy with another weight than the forward product had (dx is then of no loss, in every step the same way
off), or draw a sparse dy for dW (then it is right on average). Means over draws tell the two apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from sparsesurvey.linear import SparseLinear, sparse_layers
from sparsesurvey.recipe import Recipe
from sparsesurvey.train import loss_of

INPUT, WEIGHTS = "input gradient", "weight gradients"


@dataclass(frozen=True)
class Exact(Recipe):
    """The forward pass of ``recipe`` with its true backward pass: B = F, and G leaves dy as it is."""

    recipe: Recipe = Recipe()

    def forward_weight(self, layer: SparseLinear) -> Tensor:
        return self.recipe.forward_weight(layer)

    def inputs(self, layer: SparseLinear, x: Tensor) -> Tensor:
        return self.recipe.inputs(layer, x)

    def beside(self, layer: SparseLinear, x: Tensor) -> Tensor | None:
        return self.recipe.beside(layer, x)


def directions(model: nn.Module, x: Tensor, y: Tensor, draws: int = 16, seed: int = 0) -> dict[str, float]:
    """Cosines with the true gradient of the loss on inputs and targets ``[batch, seq]``; 1 is the same direction.

    "input gradient" is the mean over the sparse layers, each given the dy that reaches it: what its own dx is off by. "weight gradients"
    are those of the sparse layers, straight through to their dense weights, all together and through the whole model, once
    one gradient and once the mean of ``draws``, which differs where the recipe draws at random.
    """
    layers = {name: layer for name, layer in sparse_layers(model).items() if isinstance(layer, SparseLinear)}
    if not layers:
        raise ValueError("model must have masked layers (sparsify), got none")
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 2:
        raise ValueError(f"draws must be an integer of at least 2, got {draws!r}")
    random = any(layer.recipe.output_grad(layer) is not None for layer in layers.values())
    weights = [layer.weight for layer in layers.values()]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with seeing(layers) as seen:
            first = gradient(model, x, y, weights)
        every = [first] + [gradient(model, x, y, weights) for _ in range(draws - 1 if random else 0)]
    with exact(layers):
        right = gradient(model, x, y, weights)
        ways = {layer: input_gradient(layer, *seen[layer]) for layer in layers.values()}
    found = {INPUT: sum(cosine(input_gradient(layer, *seen[layer]), ways[layer]) for layer in ways) / len(ways),
             WEIGHTS: cosine(first, right)}
    return found | {f"{WEIGHTS}, mean of {draws}": cosine(sum(every) / len(every), right)}


def gradient(model: nn.Module, x: Tensor, y: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """The gradient of the mean loss by ``parameters``, as one vector."""
    parts = torch.autograd.grad(loss_of(model, x, y), parameters)
    return torch.cat([part.flatten() for part in parts])


def input_gradient(layer: SparseLinear, x: Tensor, dy: Tensor) -> Tensor:
    """dx of a layer ``[tokens, in]`` from its inputs and dy ``[tokens, out]``."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(layer.product(x), x, dy)[0]


@contextmanager
def seeing(layers: dict[str, SparseLinear]) -> Iterator[dict[SparseLinear, tuple[Tensor, Tensor]]]:
    """What each layer has in a forward and a backward pass inside: x ``[tokens, in]`` and dy ``[tokens, out]``."""
    seen: dict[SparseLinear, tuple[Tensor, Tensor]] = {}

    def follow(layer: SparseLinear, given: tuple[Tensor, ...], y: Tensor) -> None:
        x = given[0].detach().flatten(0, -2)
        y.register_hook(lambda dy: seen.__setitem__(layer, (x, dy.detach().flatten(0, -2))))

    hooks = [layer.register_forward_hook(follow) for layer in layers.values()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def exact(layers: dict[str, SparseLinear]) -> Iterator[None]:
    """The layers with the true backward pass, inside."""
    recipes = {name: layer.recipe for name, layer in layers.items()}
    try:
        for layer in layers.values():
            layer.recipe = Exact(layer.recipe)
        yield
    finally:
        for name, layer in layers.items():
            layer.recipe = recipes[name]


def cosine(a: Tensor, b: Tensor) -> float:
    return float(cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0))
