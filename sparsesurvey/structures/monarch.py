"""Monarch: two block-diagonal factors and two fixed permutations, ``W = P L P' R`` (Dao et al. 2022); no mask.

>>> weight = torch.outer(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0])).repeat(2, 2)
>>> weight  # rows 0 and 2 make the first two slices, rows 1 and 3 the others
tensor([[1., 3., 1., 3.],
        [2., 6., 2., 6.],
        [1., 3., 1., 3.],
        [2., 6., 2., 6.]])
>>> structure = Monarch(2)
>>> packed = structure.pack(weight)
>>> packed.values.shape, structure.nnz((4, 4))  # R is 2 blocks of 2 x 2, L as well
(torch.Size([16]), 16)
>>> structure.unpack(packed).round(decimals=4).equal(weight)
True
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparsesurvey.structure import (
    Facts, Plan, Shape, Structure, check_activations, check_int, check_pair, check_part, check_weight,
)


class PackedMonarch(NamedTuple):
    values: Tensor  # [blocks * rank * (in + out)]: R [blocks, blocks, rank, p], then L [blocks, s, blocks, rank]
    shape: Shape


@dataclass(frozen=True)
class Monarch(Structure):
    """Both factors have ``blocks`` dense blocks; ``rank`` is that of what each block of R hands to each block of L.

    With b blocks, s = out / b and p = in / b, entry (row, column) of the weight is ::

        W[i b + l, k p + j] = sum over r < rank of L[l, i, k, r] R[k, l, r, j]

    so the s x p slice of the rows l, l + b, l + 2b ... and the inputs k p to k p + p - 1 is any matrix of that rank,
    and the b x b slices are independent. Values are b rank (in + out), as many as those of a matrix of rank b * rank.
    ``Monarch(b)`` with in = out = b * b is the square Monarch of the paper, 2 n sqrt(n) values.
    """

    blocks: int = 16
    rank: int = 1

    def __post_init__(self) -> None:
        check_int("blocks", self.blocks, 1)
        check_int("rank", self.rank, 1)

    def __str__(self) -> str:
        return f"monarch {self.blocks}" + (f" rank {self.rank}" if self.rank > 1 else "")

    @classmethod
    def variants(cls) -> tuple["Monarch", ...]:
        return cls(16), cls(4, 3), cls(8, 3), cls(16, 2), cls(32, 2), cls(64, 2)

    @property
    def tile(self) -> Shape:
        return (self.blocks, self.blocks)

    def check_shape(self, shape: Shape) -> Shape:
        out, inn = super().check_shape(shape)
        if self.rank * self.blocks > min(out, inn):
            raise ValueError(f"{self} needs a shape of at least {self.rank * self.blocks} x {self.rank * self.blocks}, so that a "
                             f"slice can have rank {self.rank}, got {tuple(shape)}")
        return out, inn

    def facts(self) -> Facts:
        return Facts("dense tensor cores, two products", (
            f"Both factors are {self.blocks} dense blocks side by side: two batched dense products, which tensor cores run "
            "at their dense rate where the blocks fill an instruction. Between them the intermediate result is transposed, "
            "and unless both are fused into one kernel it is written to memory and read again (not in the bound)."
        ), None, 0.0, "no weight is kept as it is: every entry is the product of a piece of L and one of R")

    def nnz(self, shape: Shape) -> int:
        return self.blocks * self.rank * sum(self.check_shape(shape))

    def index_bits(self, shape: Shape) -> int:
        self.check_shape(shape)
        return 0

    def slices(self, weight: Tensor) -> Tensor:
        """``[out, in]`` as ``[blocks, blocks, s, p]``: for each block of L and of R the slice that goes through both."""
        out, inn = self.check_shape(weight.shape)
        return weight.reshape(out // self.blocks, self.blocks, self.blocks, inn // self.blocks).permute(1, 2, 0, 3)

    def pack(self, weight: Tensor) -> PackedMonarch:
        """The closest member in the Frobenius norm: the largest ``rank`` singular triples of every slice.

        Slices are independent, so the best of each (Eckart and Young 1936) is the best of all (Dao et al. 2022, for rank
        1). Both factors get the root of the singular values.
        """
        check_weight(weight)
        slices = self.slices(weight.detach()).contiguous()
        left, size, right = torch.linalg.svd(slices.to(torch.promote_types(weight.dtype, torch.float32)), full_matrices=False)
        root = size[..., :self.rank].sqrt()
        second = left[..., :self.rank] * root.unsqueeze(-2)  # [l, k, s, rank]
        first = right[..., :self.rank, :] * root.unsqueeze(-1)  # [l, k, rank, p]
        values = torch.cat([first.transpose(0, 1).flatten(), second.transpose(1, 2).flatten()])
        return PackedMonarch(values.to(weight.dtype), self.check_shape(weight.shape))

    def factors(self, packed: PackedMonarch) -> tuple[Tensor, Tensor]:
        """R ``[blocks, blocks * rank, p]`` and L ``[blocks, s, blocks * rank]``, views of the values.

        Row (l, r) of block k of R goes to column (k, r) of block l of L. ValueError if the operand is corrupt.
        """
        out, inn = self.check_shape(packed.shape)
        check_part("values", packed.values, None, (self.nnz(packed.shape),))
        inner = self.blocks * self.rank
        first, second = packed.values.split([inner * inn, inner * out])
        return first.view(self.blocks, inner, inn // self.blocks), second.view(self.blocks, out // self.blocks, inner)

    def unpack(self, packed: PackedMonarch) -> Tensor:
        first, second = self.factors(packed)
        wide = torch.promote_types(first.dtype, torch.float32)
        left = second.unflatten(-1, (self.blocks, self.rank)).transpose(1, 2)  # [l, k, s, rank]
        right = first.unflatten(1, (self.blocks, self.rank)).transpose(0, 1)  # [l, k, rank, p]
        slices = left.to(wide) @ right.to(wide)  # [l, k, s, p]
        return slices.permute(2, 0, 1, 3).reshape(packed.shape).to(first.dtype)

    # Each product is two batched dense ones, a matrix a block. Tokens come last, so that the permutations between and after
    # them move whole rows: with tokens first the copies take longer than the products.

    def cross(self, inner: Tensor) -> Tensor:
        """What blocks k say to blocks l, ``[k, (l, rank), tokens]``, as what l hear, ``[l, (k, rank), tokens]``; or back."""
        return inner.unflatten(1, (self.blocks, self.rank)).transpose(0, 1).flatten(1, 2)

    def blocks_of_in(self, x: Tensor) -> Tensor:
        """``[tokens, in]`` to ``[blocks, p, tokens]``: neighbouring inputs in one block."""
        return x.T.unflatten(0, (self.blocks, x.shape[1] // self.blocks))

    def blocks_of_out(self, y: Tensor) -> Tensor:
        """``[tokens, out]`` to ``[blocks, s, tokens]``: every ``blocks``-th output in one block."""
        return y.T.contiguous().unflatten(0, (y.shape[1] // self.blocks, self.blocks)).transpose(0, 1)

    def spmm_bmm(self, packed: PackedMonarch) -> Plan:
        first, second = (factor.detach() for factor in self.factors(packed))

        def run(x: Tensor) -> Tensor:
            x = check_activations("x", x, packed.shape[1], first)
            y = second @ self.cross(first @ self.blocks_of_in(x))  # [l, s, tokens]
            return y.transpose(0, 1).flatten(0, 1).T

        return run

    def spmmt_bmm(self, packed: PackedMonarch) -> Plan:
        first, second = (factor.detach() for factor in self.factors(packed))

        def run(dy: Tensor) -> Tensor:
            dy = check_activations("dy", dy, packed.shape[0], first)
            dx = first.mT @ self.cross(second.mT @ self.blocks_of_out(dy))  # [k, p, tokens]
            return dx.flatten(0, 1).T

        return run

    def sddmm_bmm(self, packed: PackedMonarch) -> Plan:
        """Gradient of both factors; what flows between them is computed again, in both directions."""
        first, second = (factor.detach() for factor in self.factors(packed))

        def run(dy: Tensor, x: Tensor) -> Tensor:
            dy, x = check_pair(dy, x, packed.shape, first)
            dy, x = self.blocks_of_out(dy), self.blocks_of_in(x)
            to_first = self.cross(second.mT @ dy) @ x.mT  # [k, (l, rank), p]
            to_second = dy @ self.cross(first @ x).mT  # [l, s, (k, rank)]
            return torch.cat([to_first.flatten(), to_second.flatten()])

        return run
