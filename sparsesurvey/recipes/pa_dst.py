"""PA-DST: an order of the inputs that is learned with the sparse weight, W = S P.

>>> permutation = torch.eye(4)[[2, 0, 3, 1]]
>>> birkhoff_penalty(permutation).item(), round(birkhoff_penalty(torch.full((4, 4), 0.25)).item(), 3)
(0.0, 4.0)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsesurvey.recipe import Recipe
from sparsesurvey.recipes.growing import RigL
from sparsesurvey.recipes.static import Static
from sparsesurvey.recipes.ste import changed, check_number

if TYPE_CHECKING:
    from sparsesurvey.linear import SparseLinear
    from sparsesurvey.structure import Pattern

TINY = 1e-8  # of a soft permutation: no row or column of it is ever zero


@dataclass(frozen=True)
class PADST(Recipe):
    """Permutation-augmented dynamic sparse training (Tyagi et al. 2025): y = S (P x), and P is learned.

    P begins as a matrix M ``[in, in]`` of the Birkhoff polytope (no entry below 0, rows and columns of sum 1), trained as a
    weight and brought back to the polytope after every step. The loss has ``decay`` times the penalty of AutoShuffleNet
    (Lyu et al. 2019), the sum of ``|M_i|_1 - |M_i|_2`` over rows and columns, which is zero for permutations alone. When the
    penalty of a row is below ``threshold`` on average, M becomes the permutation nearest to it (by the Hungarian method)
    for good, and the product a gather of x. S is trained by another recipe, ``inner``: RigL for the dynamic sparse
    training of the paper, ``Static()`` for a mask that stays, or any other.

    Args:
        inner: how S is trained; it must leave x and what is added to the product alone.
        decay: 1e-3 in the published code (abhishektyaagi/pytorch-image-models_perm).
        threshold: of the mean penalty of a row or column, which is at most 1 - 1 / sqrt(in). Ours.
        deadline: the share of the steps after which M becomes a permutation in any case. Ours: the published code trains
            M to the end, and makes it a permutation afterwards.
        identity: M begins with this share of the identity, the rest is random. 0 as in the published code, which averages a
            layer's inputs at first. Starts with 0.1 and 0.5 ended at the identity on the Markov language, in every layer.

    As published M is brought back by cutting what is below 0, then dividing columns, then rows by their sums; its P stands
    left of S, the paper's right of it. Every layer has its own P, gate_proj and up_proj as well, which a kernel that reads
    x once would want to share. While P is soft, a layer costs one more dense product ``[in, in]``.
    """

    inner: Recipe = RigL()
    decay: float = 1e-3
    threshold: float = 0.1
    deadline: float = 0.5
    identity: float = 0.0

    ends: ClassVar[str] = "permuted"
    table: ClassVar[dict[str, str]] = {
        "forward": "S P, S the inner recipe's", "input gradient": "S P", "output gradient": "the inner recipe's",
        "edit": "the inner recipe's", "mask": "the inner recipe's; P soft, then a permutation",
    }

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Recipe) or isinstance(self.inner, PADST):
            raise ValueError(f"inner must be another recipe, such as RigL() or Static(), got {self.inner!r}")
        touched = [name for name in ("inputs", "beside") if getattr(type(self.inner), name) is not getattr(Recipe, name)]
        if touched:
            raise ValueError(f"inner must leave x and what is added to the product alone, but {self.inner} has "
                             f"{' and '.join(touched)} of its own")
        check_number("decay", self.decay, 0)
        for name in ("threshold", "deadline", "identity"):
            check_number(name, getattr(self, name), 0, 1)

    def __str__(self) -> str:
        return f"pa-dst {self.inner}{changed(self, 'inner')}"

    @classmethod
    def variants(cls) -> tuple[PADST, ...]:
        return cls(), cls(inner=Static())

    # S, by the inner recipe.

    def check(self, structure: Pattern) -> None:
        try:
            self.inner.check(structure)
        except ValueError as error:
            raise ValueError(f"recipe {self} trains S by another one: {error}") from None

    def start(self, weight: Tensor, structure: Pattern, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return self.inner.start(weight, structure, generator)

    def lr_multiplier(self, structure: Pattern) -> float:
        return self.inner.lr_multiplier(structure)

    def forward_weight(self, layer: SparseLinear) -> Tensor:
        return self.inner.forward_weight(layer)

    def input_weight(self, layer: SparseLinear) -> Tensor | None:
        return self.inner.input_weight(layer)

    def output_grad(self, layer: SparseLinear) -> Callable[[Tensor], Tensor] | None:
        return self.inner.output_grad(layer)

    def edit_grad(self, layer: SparseLinear, grad: Tensor) -> Tensor:
        return self.inner.edit_grad(layer, grad)

    def freezes_variance(self, layer: SparseLinear) -> bool:
        return self.inner.freezes_variance(layer)

    # P.

    def begin(self, layer: SparseLinear) -> None:
        self.inner.begin(layer)
        size = layer.in_features
        noise = torch.rand(size, size, generator=layer.generator(0), dtype=torch.float64).to(layer.weight)
        eye = torch.eye(size, dtype=noise.dtype, device=noise.device)
        layer.soft_order = nn.Parameter(to_birkhoff(self.identity * eye + (1 - self.identity) * to_birkhoff(noise)))
        layer.register_buffer("order", torch.full((size,), -1, device=layer.weight.device))  # -1 while it is soft
        layer.ordered = False  # the same for Python

    def prepare(self, layer: SparseLinear, step: int, steps: int) -> None:
        self.inner.prepare(layer, step, steps)
        layer.ordered = is_ordered(layer)
        layer.soft_order.requires_grad_(not layer.ordered)

    def inputs(self, layer: SparseLinear, x: Tensor) -> Tensor:
        return x.index_select(1, layer.order) if layer.ordered else x @ layer.soft_order.T

    def penalty(self, layer: SparseLinear) -> Tensor | None:
        penalty = None if layer.ordered else self.decay * birkhoff_penalty(layer.soft_order)
        inner = self.inner.penalty(layer)
        return penalty if inner is None else inner if penalty is None else penalty + inner

    def update(self, layer: SparseLinear, step: int, steps: int, state: dict[str, Any]) -> None:
        self.inner.update(layer, step, steps, state)
        if layer.ordered:
            return
        soft = layer.soft_order.data
        soft.copy_(to_birkhoff(soft))
        if step >= self.deadline * steps or birkhoff_penalty(soft) < 2 * len(soft) * self.threshold:
            layer.order.copy_(nearest_order(soft))
            layer.ordered = True

    def dense(self, layer: SparseLinear) -> Tensor:
        weight = self.inner.dense(layer)
        return weight[:, layer.order.argsort()] if is_ordered(layer) else weight @ layer.soft_order


def is_ordered(layer: SparseLinear) -> bool:
    """Is P a permutation already?"""
    return bool(layer.order[0] >= 0)


def birkhoff_penalty(soft: Tensor) -> Tensor:
    """The sum over rows and columns of ``|M_i|_1 - |M_i|_2``: 0 for a permutation, above that elsewhere on the polytope."""
    size = soft.abs()
    return sum((size.sum(axis) - torch.linalg.vector_norm(soft, dim=axis)).sum() for axis in (0, 1))


def to_birkhoff(soft: Tensor) -> Tensor:
    """One sweep of Sinkhorn's iteration: nothing below 0, columns and then rows divided by their sums."""
    soft = soft.clamp_min(TINY)
    return functional.normalize(functional.normalize(soft, p=1, dim=0), p=1, dim=1)


def nearest_order(soft: Tensor) -> Tensor:
    """int64 ``[in]``: for each row of the permutation nearest to ``soft`` the place of its one (Kuhn 1955)."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise ModuleNotFoundError("PADST needs scipy for the assignment: pip install scipy") from None
    return torch.from_numpy(linear_sum_assignment(soft.detach().double().cpu().numpy(), maximize=True)[1]).to(soft.device)
