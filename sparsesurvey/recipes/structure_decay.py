"""Structure decay: n:m that tightens, from nearly dense to its end, in equal time frames.

Kao et al. (2022), "sparse structure decay", called SDGF in Bambhaniya et al. (2024), and, as we reconstruct it from its
abstract, the inheritance of Fang et al. (2022), "An algorithm-hardware co-optimized framework for accelerating N:M sparse
Transformers".

>>> chain("stepwise", 1, 16)
[(15, 16), (8, 16), (4, 16), (2, 16), (1, 16)]
>>> chain("geometric", 1, 8)
[(8, 64), (4, 32), (2, 16), (1, 8)]
>>> chain("inherit", 1, 16)
[(8, 16), (4, 16), (2, 16), (1, 16)]
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from sparsesurvey.recipe import Recipe
from sparsesurvey.recipes.mask_decay import check_phases, progress
from sparsesurvey.recipes.s_ste import groups
from sparsesurvey.recipes.sr_ste import decayed
from sparsesurvey.recipes.ste import changed, check_number

if TYPE_CHECKING:
    from sparsesurvey.linear import SparseLinear
    from sparsesurvey.structure import Pattern

CHAINS = ("stepwise", "geometric", "inherit")


@dataclass(frozen=True)
class StructureDecay(Recipe):
    """F(W) = W * m with m the mask of ``|W|``, chosen anew in each step, for the n:m of the time frame.

    Args:
        chain: "stepwise", m-1:m then m/2:m, m/4:m ... n:m; "geometric", 8n:8m, 4n:4m, 2n:2m, n:m; "inherit", m/2:m, m/4:m ...
            n:m. Where m is no power of two times n, the halves are rounded down and stop before n. Of a geometric chain a
            layer goes through what divides its inputs, and groups of at most 64, the most that ``NM`` has.
        decay: of SR-STE, on the gradient.
        warmup: share of the steps before the first frame, without a mask. tune: share after the last frame, in which n:m
            goes on. Both are 0 in the published program unless told otherwise; the papers' values we have not read.
    """

    chain: str = "stepwise"
    decay: float = 0.0
    warmup: float = 0.0
    tune: float = 0.1

    table: ClassVar[dict[str, str]] = {
        "forward": "W * m", "input gradient": "W * m", "output gradient": "dy", "edit": "dW",
        "mask": "each step, by |W|; n:m tightens frame by frame",
    }

    def __post_init__(self) -> None:
        if self.chain not in CHAINS:
            raise ValueError(f"chain must be one of {', '.join(CHAINS)}, got {self.chain!r}")
        check_number("decay", self.decay, 0)
        check_phases(self.warmup, self.tune)

    def __str__(self) -> str:
        return f"structure decay {self.chain}{changed(self, 'chain')}"

    @classmethod
    def variants(cls) -> tuple[StructureDecay, ...]:
        return cls(), cls("geometric")

    def check(self, structure: Pattern) -> None:
        n, m = groups(self, structure)
        if self.chain == "geometric" and n < m and 2 * m > 64:
            raise ValueError(f"recipe {self} needs groups of at most 32, so that they can be twice as long, got {structure}")

    def frames(self, structure: Pattern, inputs: int) -> list[Pattern]:
        """The structures that a layer of so many inputs goes through."""
        return [replace(structure, n=n, m=m) for n, m in chain(self.chain, structure.n, structure.m)
                if m <= 64 and inputs % m == 0]

    def now(self, structure: Pattern, inputs: int, step: int, steps: int) -> Pattern | None:
        """The structure in force before step ``step``, from 0, of ``steps``; None while dense."""
        if step < self.warmup * steps:
            return None
        frames = self.frames(structure, inputs)
        done = progress(step, steps, self.warmup, self.tune)
        return frames[min(int(done * len(frames) + 1e-9), len(frames) - 1)]

    def start(self, weight: Tensor, structure: Pattern, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        first = None if self.warmup else self.frames(structure, weight.shape[1])[0]
        return weight, torch.ones_like(weight, dtype=torch.bool) if first is None else first.mask(weight.abs())

    def forward_weight(self, layer: SparseLinear) -> Tensor:
        return layer.weight * layer.mask

    def edit_grad(self, layer: SparseLinear, grad: Tensor) -> Tensor:
        return decayed(layer, grad, self.decay)

    def update(self, layer: SparseLinear, step: int, steps: int, state: dict[str, Any]) -> None:
        structure = self.now(layer.structure, layer.in_features, step, steps)
        if structure is not None:
            layer.mask.copy_(structure.select(layer.weight.abs()))


@dataclass(frozen=True)
class Inheritance(StructureDecay):
    """Our reading of inherited dynamic pruning (Fang et al. 2022): each n:m starts from the weights of the one before.

    m/2:m, m/4:m ... n:m, each trained for a frame with dynamic masks and SR-STE's decay from the dense weights, not the
    masked ones, that the frame before left. The abstract says that a series of n:m candidates is made in this way; the
    equal frames, the decay of 2e-4 and the start from fresh rather than trained weights are ours.
    """

    chain: str = "inherit"
    decay: float = 2e-4
    tune: float = 0.0

    table: ClassVar[dict[str, str]] = {**StructureDecay.table, "edit": "dW + λ (1 - m) * W"}

    def __str__(self) -> str:
        return f"inheritance{changed(self)}"

    @classmethod
    def variants(cls) -> tuple[Inheritance, ...]:
        return (cls(),)


def chain(kind: str, n: int, m: int) -> list[tuple[int, int]]:
    """The n:m that a chain goes through; the last one is ``(n, m)``."""
    if kind == "geometric":
        return [(n * factor, m * factor) for factor in (8, 4, 2, 1)]
    first = [m - 1] if kind == "stepwise" else []
    halves = [m >> power for power in range(1, m.bit_length())]
    return [(kept, m) for kept in dict.fromkeys(kept for kept in first + halves if kept > n)] + [(n, m)]
