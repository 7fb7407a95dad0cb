"""One-shot pruning: a score, a structure that chooses from it, and what the choice keeps."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

from sparsesurvey.linear import MLP
from sparsesurvey.scores import magnitude
from sparsesurvey.structure import Pattern, Structure, check_weight

Score = Callable[[Tensor, object], Tensor]


class Kept(NamedTuple):
    """What a mask keeps of a weight, each as a fraction of the whole."""

    density: float
    magnitude: float  # sum of |w|, the L1 norm
    energy: float  # sum of w squared


def kept(weight: Tensor, mask: Tensor) -> Kept:
    """Density, magnitude and energy that a boolean ``mask`` keeps of ``weight`` (both ``[out, in]``).

    >>> kept(torch.tensor([[3.0, -1.0]]), torch.tensor([[True, False]]))
    Kept(density=0.5, magnitude=0.75, energy=0.9)
    """
    check_weight(weight)
    size = weight.double().abs()
    share = [float((part * mask).sum() / part.sum()) for part in (torch.ones_like(size), size, size.square())]
    return Kept(*share)


def captured(weight: Tensor, near: Tensor, density: float) -> Kept:
    """What of ``weight`` is in ``near`` (both ``[out, in]``): 1 - |W - near| / |W| in either norm. For a mask, what it keeps.

    >>> captured(torch.tensor([[3.0, -1.0]]), torch.tensor([[3.0, 0.0]]), 0.5)
    Kept(density=0.5, magnitude=0.75, energy=0.9)
    """
    check_weight(weight)
    lost, size = (weight.double() - near.double()).abs(), weight.double().abs()
    return Kept(density, *(1 - float(part(lost).sum() / part(size).sum()) for part in (torch.abs, torch.square)))


def approximation(structure: Structure, weight: Tensor) -> Tensor:
    """The weight ``[out, in]`` that the forward product of a structure without a mask multiplies with."""
    return structure.forward_weight(structure.pack(weight))


def density(structure: Structure, shape: tuple[int, int]) -> float:
    """Stored weights of a structure over all positions of a weight ``[out, in]`` of this shape."""
    return structure.nnz(shape) / (shape[0] * shape[1])


def best_kept(weight: Tensor, density: float) -> Kept:
    """What the best choice without any structure keeps at this density: the largest magnitudes of the matrix."""
    size = weight.double().abs().flatten()
    keep = min(round(density * size.numel()), size.numel())  # factors may have more entries than the weight
    best = torch.zeros_like(size, dtype=torch.bool)
    best[size.topk(keep, sorted=False).indices] = True
    return kept(weight, best.view(weight.shape))


def retention(weight: Tensor, structures: Iterable[Structure], score: Score = magnitude) -> pd.DataFrame:
    """One line a structure: what it keeps of ``weight``, and which share of the best choice at equal density.

    A structure without a mask keeps what its approximation captures, whatever the score.
    """
    lines = []
    for structure in structures:
        if isinstance(structure, Pattern):
            here = kept(weight, structure.mask(score(weight, None)))
        else:
            here = captured(weight, approximation(structure, weight), density(structure, tuple(weight.shape)))
        best = best_kept(weight, here.density)
        lines.append({"structure": str(structure), **here._asdict(), "best energy": best.energy,
                      "share of best": here.energy / best.energy})
    return pd.DataFrame(lines)


def retentions(structures: Iterable[Structure], shape: tuple[int, int] = (512, 512)) -> dict[str, pd.DataFrame]:
    """``retention`` on the two kinds of random weights: without any outlier, and with scaled channels."""
    structures = list(structures)
    return {"Gaussian": retention(gaussian(shape), structures), "channel-scaled": retention(channel_scaled(shape), structures)}


def prune(model: nn.Module, structure: Structure, score: Score = magnitude, modules: Iterable[str] = MLP) -> dict[str, float]:
    """Zero, in place, what ``structure`` does not keep in every linear layer named in ``modules``; a structure without a
    mask replaces the weight by its approximation.

    Returns the density of each pruned layer by its full name. Every shape is checked before any weight is touched;
    ValueError if a layer does not fit or none has such a name.
    """
    modules = tuple(modules)
    chosen = {name: layer for name, layer in model.named_modules()
              if isinstance(layer, nn.Linear) and name.rpartition(".")[2] in modules}
    if not chosen:
        raise ValueError(f"model must have linear layers named {', '.join(modules)}, got a {type(model).__name__} with none")
    with torch.no_grad():
        made = {name: _pruned(layer.weight.detach(), structure, score) for name, layer in chosen.items()}
        for name, (weight, _) in made.items():
            chosen[name].weight.copy_(weight)
    return {name: share for name, (_, share) in made.items()}


def _pruned(weight: Tensor, structure: Structure, score: Score) -> tuple[Tensor, float]:
    """The weight under the structure, and its density: counted where there is a mask."""
    if not isinstance(structure, Pattern):
        return approximation(structure, weight), density(structure, tuple(weight.shape))
    mask = structure.mask(score(weight, None))
    return weight * mask, mask.double().mean().item()


def gaussian(shape: tuple[int, int], seed: int = 0) -> Tensor:
    """A weight of independent standard normal entries: the case without any outlier to find."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def channel_scaled(shape: tuple[int, int], seed: int = 0, sigma: float = 0.5) -> Tensor:
    """A Gaussian weight whose rows and columns have log-normal scales, as the layers of real models do."""
    generator = torch.Generator().manual_seed(seed)
    rows, cols = (torch.randn(size, generator=generator).mul(sigma).exp() for size in shape)
    return torch.randn(shape, generator=generator) * rows[:, None] * cols
