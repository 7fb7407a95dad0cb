"""Masks that grow: now and then the smallest kept units are dropped and as many others grown, so that training explores.

A unit is whatever the structure keeps or drops as a whole: a weight, a block, a diagonal, a neuron.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import lru_cache
from math import ceil, cos, pi
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from sparsesurvey.recipe import Recipe
from sparsesurvey.recipes.static import Static
from sparsesurvey.recipes.ste import changed, check_count, check_number

if TYPE_CHECKING:
    from sparsesurvey.linear import SparseLinear
    from sparsesurvey.structure import Pattern


@dataclass(frozen=True)
class RigL(Recipe):
    """Rigging the lottery (Evci et al. 2020): F(W) = W * m, dW * m; now and then drop the smallest, grow by the gradient.

    Every ``every`` steps, up to the share ``until`` of them, the share f = fraction / 2 * (1 + cos(pi t / (until T))) of
    what is kept is dropped, the units with the least norm of w, and as many of those that were not kept are grown, with
    the largest norm of the dense gradient of the whole batch. A grown unit starts at zero, its moments in the optimizer as
    well. What is dropped cannot grow back in the same update: no more is dropped than there is else to grow. The
    constants are the paper's.

    The mask is random at first, the kept weights scaled as in ``Static``. Ours: the published code lets a dropped
    unit grow back at once (google-research/rigl#5 asks), and takes no gradient step where it changes the mask; this takes
    both, as JaxPruner does. A unit of several weights counts by its Frobenius norm.

    It serves every pattern with a ``density``, by the pattern's own choice of units.
    """

    fraction: float = 0.3
    every: int = 100
    until: float = 0.75

    table: ClassVar[dict[str, str]] = {
        "forward": "W * m", "input gradient": "W * m", "output gradient": "dy", "edit": "dW * m",
        "mask": "every k steps: drop |w|, grow |dW|",
    }
    name: ClassVar[str] = "rigl"
    grows_by_gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_number("fraction", self.fraction, 0, 1)
        check_count("every", self.every)
        check_number("until", self.until, 0, 1)

    def __str__(self) -> str:
        return f"{self.name}{changed(self)}"

    @classmethod
    def variants(cls) -> tuple[RigL, ...]:
        return cls(), cls(every=2)

    def check(self, structure: Pattern) -> None:
        if not grows(structure):
            raise ValueError(f"recipe {self} needs a structure that keeps or drops units one by one, in a number that its "
                             f"density tells, such as Block(32, 32, 0.1) or Unstructured(0.1); got {structure}")

    def start(self, weight: Tensor, structure: Pattern, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return Static().start(weight, structure, generator)

    def begin(self, layer: SparseLinear) -> None:
        layer.changes = False  # does the mask change after the step that is being done?

    def forward_weight(self, layer: SparseLinear) -> Tensor:
        return layer.weight * layer.mask

    def prepare(self, layer: SparseLinear, step: int, steps: int) -> None:
        layer.changes = step < steps and self.due(step + 1, steps)

    def edit_grad(self, layer: SparseLinear, grad: Tensor) -> Tensor:
        if layer.changes and self.grows_by_gradient:
            layer.dense_grad = grad.clone()
        return grad.mul_(layer.mask)

    def update(self, layer: SparseLinear, step: int, steps: int, state: dict[str, Any]) -> None:
        if self.due(step, steps):
            target = self.target(layer.structure, step, steps)
            mask = regrown(layer.mask, layer.weight.square(), target, self.drop(step, steps), self.growth(layer, step))
            kept = layer.mask & mask
            for moment in state.values():
                if isinstance(moment, Tensor) and moment.shape == kept.shape:
                    moment.mul_(kept)
            layer.weight.mul_(kept)
            layer.mask.copy_(mask)
        layer.weight.mul_(layer.mask)

    def due(self, step: int, steps: int) -> bool:
        """Does the mask change after this step, the first of which is 1?"""
        return step % self.every == 0 and step <= self.until * steps

    def drop(self, step: int, steps: int) -> float:
        """Share of the kept units that is dropped after this step."""
        return self.fraction / 2 * (1 + cos(pi * min(1.0, step / max(1.0, self.until * steps))))

    def target(self, structure: Pattern, step: int, steps: int) -> Pattern:
        """The pattern that the mask has after this step."""
        return structure

    def growth(self, layer: SparseLinear, step: int) -> Tensor:
        """Scores ``[out, in]`` of at least 0 by which what is not kept grows."""
        grad = layer.dense_grad.double()
        del layer.dense_grad
        return grad.square()


@dataclass(frozen=True)
class SET(RigL):
    """Sparse evolutionary training (Mocanu et al. 2018): as ``RigL``, but what grows is drawn at random.

    The paper drops a constant share, the smallest of the positive and of the negative weights. Ours, as in JaxPruner:
    the smallest in magnitude, and RigL's share that falls to zero.
    """

    table: ClassVar[dict[str, str]] = {**RigL.table, "mask": "every k steps: drop |w|, grow at random"}
    name: ClassVar[str] = "set"
    grows_by_gradient: ClassVar[bool] = False

    def growth(self, layer: SparseLinear, step: int) -> Tensor:
        scores = torch.rand(layer.weight.shape, generator=layer.generator(step), dtype=torch.float64)
        return scores.to(layer.weight.device)


@dataclass(frozen=True)
class PruneAndGrow(RigL):
    """Prune-and-grow under a ramp, as BLaST trains its blocks (Okanovic et al. 2025): dense at first, sparser by and by.

    The density falls from 1 as d(t) = d + (1 - d) (1 - t / (ramp T))^3 (Zhu and Gupta 2018). At each update the units with
    the least norm of w go, down to d(t) and by ``RigL``'s share f beyond it, and those of the largest gradient norm that
    were not kept grow up to d(t). After the ramp it is RigL. It starts from the dense weight, as it is.

    BLaST's paper was not at hand beyond its abstract: ramp, share and period are ours, and so is growing within d(t).
    """

    ramp: float = 0.5

    table: ClassVar[dict[str, str]] = {**RigL.table, "mask": "every k steps: density down a cubic ramp, drop |w|, grow |dW|"}
    name: ClassVar[str] = "prune-and-grow"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("ramp", self.ramp, 0, 1)
        if self.ramp > self.until:
            raise ValueError(f"ramp must be at most until, {self.until}, got {self.ramp!r}")

    def start(self, weight: Tensor, structure: Pattern, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return weight, torch.ones_like(weight, dtype=torch.bool)

    def due(self, step: int, steps: int) -> bool:
        """Also where the ramp ends: there the mask becomes one of the structure, whatever ``every`` is."""
        return step == self.end(steps) or super().due(step, steps)

    def end(self, steps: int) -> int:
        """The step after which the density is the structure's."""
        return max(1, round(self.ramp * steps))

    def target(self, structure: Pattern, step: int, steps: int) -> Pattern:
        left = (1 - min(1.0, step / self.end(steps))) ** 3
        return replace(structure, density=structure.density + (1 - structure.density) * left) if left else structure


def stays(mask: Tensor, size: Tensor, target: Pattern, fraction: float) -> Tensor:
    """What is left of a mask when it is pruned to the density of ``target`` and by ``fraction`` beyond, by ``size``."""
    fewer = replace(target, density=target.density * (1 - fraction))
    return mask & fewer.select(torch.where(mask, 1 + scaled(size), 0.0))


def regrown(mask: Tensor, size: Tensor, target: Pattern, fraction: float, growth: Tensor) -> Tensor:
    """A mask ``[out, in]`` of ``target``: ``mask`` without its smallest units, grown by ``growth``; both scores at least 0.

    Both choices are the pattern's own, from scores that put every unit of one kind above every unit of the next: what
    stays above what may grow, and that above what was dropped, of which the largest then stay if nothing else is left.
    """
    scores = torch.where(mask, scaled(size), 2 + scaled(growth))
    return target.select(torch.where(stays(mask, size, target, fraction), 4.0, scores))


def scaled(scores: Tensor) -> Tensor:
    """Scores of at least 0 as numbers from 0 to 1, in double precision."""
    scores = scores.double()
    return scores / scores.max().clamp_min(torch.finfo(scores.dtype).tiny)


@lru_cache
def grows(structure: Pattern) -> bool:
    """Has it a density, and can units be dropped and grown one by one? Tried on an example."""
    if "density" not in {field.name for field in fields(structure)}:
        return False
    shape = [side * max(8, ceil(64 / side)) for side in structure.tile]
    first, size, growth = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    try:
        quarter = replace(structure, density=0.25)
        mask = quarter.mask(first)
        after, stay = regrown(mask, size, quarter, 0.5, growth), stays(mask, size, quarter, 0.5)
    except ValueError:
        return False
    return torch.equal(mask & after, stay) and stay.sum() < mask.sum() == after.sum() and quarter.holds(after)
