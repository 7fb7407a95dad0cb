"""One-shot pruning: a score, a structure that chooses from it, and what the choice keeps."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

from sparsesurvey.linear import MLP
from sparsesurvey.scores import magnitude
from sparsesurvey.structure import Pattern, check_weight

Score = Callable[[Tensor, object], Tensor]


class Kept(NamedTuple):
    """What a mask keeps of a weight, each as a fraction of the whole."""

    density: float
    magnitude: float  # sum of |w|, the L1 norm
    energy: float  # sum of w squared


def kept(weight: Tensor, mask: Tensor) -> Kept:
    """Density, magnitude and energy that ``mask`` keeps of ``weight`` (both ``[out, in]``).

    >>> kept(torch.tensor([[3.0, -1.0]]), torch.tensor([[True, False]]))
    Kept(density=0.5, magnitude=0.75, energy=0.9)
    """
    check_weight(weight)
    size = weight.double().abs()
    share = [float((part * mask).sum() / part.sum()) for part in (torch.ones_like(size), size, size.square())]
    return Kept(*share)


def best_kept(weight: Tensor, density: float) -> Kept:
    """What the best choice without any structure keeps at this density: the largest magnitudes of the matrix."""
    size = weight.double().abs().flatten()
    keep = round(density * size.numel())
    best = torch.zeros_like(size, dtype=torch.bool)
    best[size.topk(keep, sorted=False).indices] = True
    return kept(weight, best.view(weight.shape))


def retention(weight: Tensor, structures: Iterable[Pattern], score: Score = magnitude) -> pd.DataFrame:
    """One line a structure: what it keeps of ``weight``, and which share of the best choice at equal density."""
    lines = []
    for structure in structures:
        here = kept(weight, structure.mask(score(weight, None)))
        best = best_kept(weight, here.density)
        lines.append({"structure": str(structure), **here._asdict(), "best energy": best.energy,
                      "share of best": here.energy / best.energy})
    return pd.DataFrame(lines)


def retentions(structures: Iterable[Pattern], shape: tuple[int, int] = (512, 512)) -> dict[str, pd.DataFrame]:
    """``retention`` on the two kinds of random weights: without any outlier, and with scaled channels."""
    structures = list(structures)
    return {"Gaussian": retention(gaussian(shape), structures), "channel-scaled": retention(channel_scaled(shape), structures)}


def prune(model: nn.Module, structure: Pattern, score: Score = magnitude, modules: Iterable[str] = MLP) -> dict[str, float]:
    """Zero, in place, what ``structure`` does not keep in every linear layer named in ``modules``.

    Returns the density of each pruned layer by its full name. Every shape is checked before any weight is touched;
    ValueError if a layer does not fit or none has such a name.
    """
    modules = tuple(modules)
    chosen = {name: layer for name, layer in model.named_modules()
              if isinstance(layer, nn.Linear) and name.rpartition(".")[2] in modules}
    if not chosen:
        raise ValueError(f"model must have linear layers named {', '.join(modules)}, got a {type(model).__name__} with none")
    with torch.no_grad():
        masks = {name: structure.mask(score(layer.weight.detach(), None)) for name, layer in chosen.items()}
        for name, mask in masks.items():
            chosen[name].weight.mul_(mask)
    return {name: mask.double().mean().item() for name, mask in masks.items()}


def gaussian(shape: tuple[int, int], seed: int = 0) -> Tensor:
    """A weight of independent standard normal entries: the case without any outlier to find."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def channel_scaled(shape: tuple[int, int], seed: int = 0, sigma: float = 0.5) -> Tensor:
    """A Gaussian weight whose rows and columns have log-normal scales, as the layers of real models do."""
    generator = torch.Generator().manual_seed(seed)
    rows, cols = (torch.randn(size, generator=generator).mul(sigma).exp() for size in shape)
    return torch.randn(shape, generator=generator) * rows[:, None] * cols
