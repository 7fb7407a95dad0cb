"""Low rank, and low rank + sparse: ``W = B A`` and ``W = B A + S``; no mask.

>>> weight = torch.outer(torch.tensor([1.0, 2.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, 2.0, 1.0]))
>>> low = LowRank(0.5)
>>> low.rank((4, 4)), low.project(weight).round(decimals=4).equal(weight)
(1, True)
>>> weight[3, 0] = 9.0  # one spike
>>> both = LowRankSparse(0.5, Unstructured(1 / 16))
>>> packed = both.pack(weight)
>>> packed.values.numel(), packed.inner.columns.tolist(), packed.inner.row_pointers.tolist()  # 4 + 4 + 1; S has (3, 0)
(9, [0], [0, 0, 0, 0, 1])
>>> packed.values[-1:], both.unpack(packed).round(decimals=2).equal(weight)  # the spike less what it had been worth
(tensor([8.0000]), True)
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from sparsesurvey.structure import (
    PRODUCTS, Facts, Pattern, Plan, Shape, Structure, check_activations, check_density, check_pair, check_part,
    check_weight, describe,
)
from sparsesurvey.structures.nm import NM
from sparsesurvey.structures.unstructured import Unstructured

ROUNDS = 8  # of the alternating projections; 12 more add 0.1 points of a Gaussian weight's energy


class PackedLowRank(NamedTuple):
    values: Tensor  # [rank * (out + in)]: B [out, rank], then A [rank, in]
    shape: Shape


@dataclass(frozen=True)
class LowRank(Structure):
    """``B A`` with B ``[out, rank]`` and A ``[rank, in]`` that have together ``density * out * in`` entries.

    The rank is the nearest that gives this density, at least 1: so one instance fits every shape, and structures are
    compared at equal storage. ``density`` of a square weight is twice the rank over its side.
    """

    density: float = 0.25

    def __post_init__(self) -> None:
        check_density(self.density)

    def __str__(self) -> str:
        return f"low-rank {100 * self.density:g}%"

    @classmethod
    def variants(cls) -> tuple["LowRank", ...]:
        return cls(0.25), cls(0.5), cls(0.125)

    def rank(self, shape: Shape) -> int:
        out, inn = self.check_shape(shape)
        return max(1, round(self.density * out * inn / (out + inn)))

    def facts(self) -> Facts:
        return Facts("dense tensor cores, two thin products", (
            "Two dense products, which tensor cores run at their dense rate if the rank fills an instruction; the result "
            "between them has rank numbers a token and is written and read again (not in the bound) unless they are fused."
        ), self.density, 0.0, "no weight is kept as it is: every entry is a row of B times a column of A")

    def nnz(self, shape: Shape) -> int:
        return self.rank(shape) * (shape[0] + shape[1])

    def index_bits(self, shape: Shape) -> int:
        self.check_shape(shape)
        return 0

    def pack(self, weight: Tensor) -> PackedLowRank:
        """The closest matrix of this rank (Eckart and Young 1936): both factors get the root of the singular values."""
        check_weight(weight)
        rank = self.rank(weight.shape)
        wide = weight.detach().contiguous().to(torch.promote_types(weight.dtype, torch.float32))
        left, size, right = torch.linalg.svd(wide, full_matrices=False)
        root = size[:rank].sqrt()
        values = torch.cat([(left[:, :rank] * root).flatten(), (root.unsqueeze(-1) * right[:rank]).flatten()])
        return PackedLowRank(values.to(weight.dtype), self.check_shape(weight.shape))

    def factors(self, packed: PackedLowRank) -> tuple[Tensor, Tensor]:
        """B ``[out, rank]`` and A ``[rank, in]``, views of the values; ValueError if the operand is corrupt."""
        rank, (out, inn) = self.rank(packed.shape), packed.shape
        check_part("values", packed.values, None, (self.nnz(packed.shape),))
        second, first = packed.values.split([out * rank, rank * inn])
        return second.view(out, rank), first.view(rank, inn)

    def unpack(self, packed: PackedLowRank) -> Tensor:
        second, first = self.factors(packed)
        wide = torch.promote_types(first.dtype, torch.float32)
        return (second.to(wide) @ first.to(wide)).to(first.dtype)

    def spmm_thin(self, packed: PackedLowRank) -> Plan:
        second, first = (factor.detach().mT for factor in self.factors(packed))
        return lambda x: check_activations("x", x, packed.shape[1], first) @ first @ second

    def spmmt_thin(self, packed: PackedLowRank) -> Plan:
        second, first = (factor.detach() for factor in self.factors(packed))
        return lambda dy: check_activations("dy", dy, packed.shape[0], first) @ second @ first

    def sddmm_thin(self, packed: PackedLowRank) -> Plan:
        """Gradient of both factors; what flows between them is computed again, in both directions."""
        second, first = (factor.detach() for factor in self.factors(packed))

        def run(dy: Tensor, x: Tensor) -> Tensor:
            dy, x = check_pair(dy, x, packed.shape, first)
            to_second, to_first = dy.T @ (x @ first.T), (dy @ second).T @ x
            return torch.cat([to_second.flatten(), to_first.flatten()])

        return run


class PackedLowRankSparse(NamedTuple):
    values: Tensor  # those of B and A, then those of S
    inner: Any  # S as its pattern packs it; its values are the last of ``values``
    shape: Shape


@dataclass(frozen=True)
class LowRankSparse(Structure):
    """``B A + S``: B and A as in ``LowRank(low_rank)``, S of the pattern ``inner``. The two densities add up.

    Two such sums can be the same matrix, and the best one is hard to find, so that ``pack`` is a greedy.
    """

    low_rank: float = 0.2
    inner: Pattern = field(default_factory=lambda: Unstructured(0.05))

    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_density(self.low_rank, "low_rank")
        if not isinstance(self.inner, Pattern):
            raise ValueError(f"inner must be a pattern such as Unstructured(0.05), got {describe(self.inner)}")

    def __str__(self) -> str:
        return f"low-rank {100 * self.low_rank:g}% + {self.inner}"

    @classmethod
    def variants(cls) -> tuple["LowRankSparse", ...]:
        some = cls(0.4, Unstructured(0.1)), cls(0.1, Unstructured(0.025)), cls(0.125, Unstructured(0.125))
        return cls(), *some, cls(0.0625, NM(2, 4))

    @property
    def outer(self) -> LowRank:
        """The structure of ``B A``."""
        return LowRank(self.low_rank)

    @property
    def tile(self) -> Shape:
        return self.inner.tile

    def check_shape(self, shape: Shape) -> Shape:
        super().check_shape(shape)
        return self.inner.check_shape(shape)

    def facts(self) -> Facts:
        inner = self.inner.facts()
        shares = [inner.share(product) for product in PRODUCTS]
        whole = [None if share is None else min(1.0, self.low_rank + share) for share in shares]
        return Facts(f"two thin products; the rest: {inner.verdict}", (
            f"B and A are two dense products, S is multiplied as any {self.inner} is, and the results are added. {inner.hardware}"
        ), whole[0], inner.positions, "a row of B times a column of A and, in some places, an entry of S", input_grad=whole[1],
            weight_grad=whole[2])

    def nnz(self, shape: Shape) -> int:
        return self.outer.nnz(self.check_shape(shape)) + self.inner.nnz(shape)

    def index_bits(self, shape: Shape) -> int:
        return self.inner.index_bits(shape)

    def rounds(self, weight: Tensor, count: int = ROUNDS) -> tuple[PackedLowRank, Tensor]:
        """B A packed, and S ``[out, in]``, after ``count`` alternating projections (GoDec, Zhou and Tao 2011).

        Each round takes the closest B A to W - S, then what the pattern keeps of W - B A by magnitude. The first S is
        what it keeps of W (GoDec begins with none): a spike would else be taken for a direction. Where the pattern's
        selection is optimal no round is further from W than the one before; the end is a local optimum.
        """
        sparse = self.inner.project(weight)
        for _ in range(count):
            low = self.outer.pack(weight - sparse)
            sparse = self.inner.project(weight - self.outer.unpack(low))
        return low, sparse

    def smallest_loss(self, weight: Tensor, count: int = 200) -> float:
        """Squared distance of W to the closest B A + S found by trying every place of S: for matrices of a few entries.

        For each place B A and S alternate until they stay; that is not proved to be the optimum, but nothing is left out.
        """
        shape, keep = self.check_shape(weight.shape), self.inner.nnz(weight.shape)
        places = torch.tensor(list(combinations(range(weight.numel()), keep)))
        masks = torch.zeros(len(places), weight.numel(), dtype=torch.bool).scatter_(1, places, True).view(-1, *shape)
        masks = masks[[self.inner.holds(mask) for mask in masks]]
        rest, rank = weight.double() * ~masks, self.outer.rank(shape)
        for _ in range(count):
            left, size, right = torch.linalg.svd(rest, full_matrices=False)
            low = left[..., :rank] * size[:, None, :rank] @ right[:, :rank]
            rest = torch.where(masks, low, weight)
        return float(((weight - low) * ~masks).square().sum((1, 2)).min())

    def pack(self, weight: Tensor) -> PackedLowRankSparse:
        check_weight(weight)
        shape = self.check_shape(weight.shape)
        wide = weight.detach().contiguous().to(torch.promote_types(weight.dtype, torch.float32))
        low, sparse = self.rounds(wide)
        inner = self.inner.pack(sparse.to(weight.dtype))
        values = torch.cat([low.values.to(weight.dtype), inner.values.flatten()])
        return PackedLowRankSparse(values, inner._replace(values=values[low.values.numel():].view(inner.values.shape)), shape)

    def parts(self, packed: PackedLowRankSparse) -> tuple[PackedLowRank, Any]:
        """``B A`` and S as operands of their own, both with views of the values; ValueError if the operand is corrupt."""
        check_part("values", packed.values, None, (self.nnz(packed.shape),))
        low, sparse = packed.values.split([self.outer.nnz(packed.shape), self.inner.nnz(packed.shape)])
        if packed.inner.values.numel() != sparse.numel():
            raise ValueError(f"packed.inner must hold {sparse.numel()} values, got {packed.inner.values.numel()}")
        return PackedLowRank(low, packed.shape), packed.inner._replace(values=sparse.view(packed.inner.values.shape))

    def unpack(self, packed: PackedLowRankSparse) -> Tensor:
        low, sparse = self.parts(packed)
        second, first = self.outer.factors(low)
        wide = torch.promote_types(first.dtype, torch.float32)
        sparse = self.inner.unpack(sparse)
        check_part("inner", sparse, None, packed.shape)
        return (second.to(wide) @ first.to(wide) + sparse.to(wide)).to(first.dtype)

    def kernels(self, product: str = "spmm") -> dict[str, Callable[[Any], Plan]]:
        """The reference, and for each kernel of the inner pattern the two thin products and that one, added."""
        inner = {f"thin_{name}": partial(self.added, product, kernel)
                 for name, kernel in self.inner.kernels(product).items() if name != "reference"}
        return super().kernels(product) | inner

    def added(self, product: str, kernel: Callable[[Any], Plan], packed: PackedLowRankSparse) -> Plan:
        """The plan of a product whose inner part is multiplied by ``kernel``; a weight gradient is both, one after the other."""
        low, sparse = self.parts(packed)
        thin, rest = getattr(self.outer, f"{product}_thin")(low), kernel(sparse)
        if product == "sddmm":
            return lambda dy, x: torch.cat([thin(dy, x), rest(dy, x).flatten()])
        return lambda operand: thin(operand) + rest(operand)
