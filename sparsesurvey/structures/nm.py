"""N:M: at most n of every m consecutive inputs of one output are kept (Mishra et al. 2021 for 2:4; Zhou et al. 2021).

>>> scores = torch.tensor([[5.0, 1.0, 2.0, 4.0, 1.0, 3.0, 2.0, 9.0]])
>>> NM(2, 4).mask(scores).int()
tensor([[1, 0, 0, 1, 0, 1, 0, 1]], dtype=torch.int32)
>>> packed = NM(2, 4).pack(scores * NM(2, 4).mask(scores))
>>> packed.values
tensor([[[5., 4.],
         [3., 9.]]])
>>> [f"{byte:08b}" for byte in packed.index.flatten().tolist()]  # second group 3, 1; first group 3, 0
['11011100']
"""

from collections import Counter
from dataclasses import dataclass
from math import ceil, comb, lcm, log2
from typing import NamedTuple

import torch
from torch import Tensor

from sparsesurvey.structure import (
    Facts, Pattern, Plan, Shape, bits_for, check_int, check_order, check_part, compress_rows, pack_bits, tiles, top,
    unpack_bits,
)
from sparsesurvey.structures.unstructured import (
    NO_PATH, WHY_NOT, PackedCSR, scipy_csr, scipy_product, tiled_product, torch_csr, torch_product, torch_sampled,
)


class PackedNM(NamedTuple):
    values: Tensor  # [out, in / m, n], in the order of the inputs
    index: Tensor  # uint8 [out, bytes]: n positions of ceil(log2 m) bits a group, or the group's m-bit bitmap
    shape: Shape


@dataclass(frozen=True)
class NM(Pattern):
    """At most ``n`` kept of every ``m`` consecutive inputs of one output; m at most 64.

    Stored as n values a group (zeros fill up a group that has fewer) and the shorter of two codes, each row padded to
    whole bytes: n positions of ceil(log2 m) bits, or a bitmap of m bits. For n = m there is nothing to tell.
    """

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        check_int("m", self.m, 1, 64)
        check_int("n", self.n, 1, self.m)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @classmethod
    def variants(cls) -> tuple["NM", ...]:
        return cls(2, 4), cls(1, 4), cls(4, 8), cls(2, 8), cls(8, 16), cls(3, 5), cls(1, 64)

    @property
    def tile(self) -> Shape:
        return (1, self.m)

    @property
    def density(self) -> float:
        return self.n / self.m

    def facts(self) -> Facts:
        n, m = self.n, self.m
        why = "group {tile_col} of row {row}: {row_kept} of {cols} kept; this is number {rank_row} by magnitude"
        return Facts(*tensor_cores(n, m), log2(comb(m, n)) / m, why, pruned=why)

    def holds(self, mask: Tensor) -> bool:
        return bool((tiles(self.check_mask(mask), 1, self.m).sum(-1, dtype=torch.uint8) <= self.n).all())

    def select(self, scores: Tensor) -> Tensor:
        """The n highest of every group, which is optimal: groups are independent."""
        groups = scores.reshape(scores.shape[0], -1, self.m)
        return top(groups, self.n).view(scores.shape)

    def nnz(self, shape: Shape) -> int:
        out, inn = self.check_shape(shape)
        return out * inn // self.m * self.n

    @property
    def position_bits(self) -> int:
        """Bits of one position where positions are stored; 0 where a bitmap is shorter."""
        width = bits_for(self.m)
        return width if self.n * width <= self.m else 0

    @property
    def code_bits(self) -> int:
        """Bits that a group spends on telling which of its inputs are kept."""
        if self.n == self.m:
            return 0
        return self.n * self.position_bits or self.m

    def index_bits(self, shape: Shape) -> int:
        out, inn = self.check_shape(shape)
        return out * 8 * self.row_bytes(inn)

    def row_bytes(self, inn: int) -> int:
        return ceil(inn // self.m * self.code_bits / 8)

    def pack(self, weight: Tensor) -> PackedNM:
        kept = self.stored(weight)
        out, inn = self.check_shape(weight.shape)
        return PackedNM(weight[kept].view(out, inn // self.m, self.n), self.encode(kept), (out, inn))

    def encode(self, kept: Tensor) -> Tensor:
        """Mask with exactly n kept a group to its code, uint8 ``[out, bytes]``."""
        out, inn = kept.shape
        if self.n == self.m:
            return torch.empty(out, 0, dtype=torch.uint8, device=kept.device)
        if not self.position_bits:
            return pack_bits(kept, 1)
        positions = kept.reshape(-1, self.m).nonzero()[:, 1]
        return pack_bits(positions.view(out, -1), self.position_bits)

    def decode(self, packed: PackedNM) -> Tensor:
        """Invert ``encode``; ValueError unless the code names exactly n inputs of each group."""
        out, inn = self.check_shape(packed.shape)
        index, groups = packed.index, inn // self.m
        check_part("index", index, torch.uint8, (out, self.row_bytes(inn)))
        kept = torch.ones(out, groups, self.m, dtype=torch.bool, device=index.device)
        if self.position_bits:
            positions = unpack_bits(index, self.position_bits, groups * self.n).view(out, groups, self.n)
            check_order("index", positions, self.m)
            kept = torch.zeros_like(kept).scatter_(-1, positions.long(), True)
        elif self.n < self.m:
            kept = unpack_bits(index, 1, inn).view(kept.shape).bool()
            if (kept.sum(-1) != self.n).any():
                raise ValueError(f"packed.index must set {self.n} of the {self.m} bits of every group")
        return kept.view(out, inn)

    def unpack(self, packed: PackedNM) -> Tensor:
        out, inn = self.check_shape(packed.shape)
        check_part("values", packed.values, None, (out, inn // self.m, self.n))
        return packed.values.new_zeros(out, inn).masked_scatter(self.decode(packed), packed.values)

    def general(self, packed: PackedNM) -> PackedCSR:
        """The same weights as CSR, which has them in the same order."""
        out, inn = self.check_shape(packed.shape)
        check_part("values", packed.values, None, (out, inn // self.m, self.n))
        return PackedCSR(packed.values.flatten(), *compress_rows(self.decode(packed)), packed.shape)

    # No CPU multiplies N:M as such; as CSR it is faster than dense from about 1:8 down.

    def spmm_torch_csr(self, packed: PackedNM) -> Plan:
        return torch_product("x", torch_csr(self.general(packed)))

    def spmmt_torch_csr(self, packed: PackedNM) -> Plan:
        return torch_product("dy", torch_csr(self.general(packed).transposed()))

    def sddmm_torch_csr(self, packed: PackedNM) -> Plan:
        run = torch_sampled(torch_csr(self.general(packed)))
        return lambda dy, x: run(dy, x).view(packed.values.shape)

    def spmm_tiled_csr(self, packed: PackedNM) -> Plan:
        return tiled_product("x", torch_csr(self.general(packed)))

    def spmmt_tiled_csr(self, packed: PackedNM) -> Plan:
        return tiled_product("dy", torch_csr(self.general(packed).transposed()))

    def spmm_scipy_csr(self, packed: PackedNM) -> Plan:
        return scipy_product("x", scipy_csr(self.general(packed)), packed.values)

    def spmmt_scipy_csr(self, packed: PackedNM) -> Plan:
        return scipy_product("dy", scipy_csr(self.general(packed).transposed()), packed.values)


def tensor_cores(n: int, m: int) -> tuple[str, str, float]:
    """Verdict, words and arithmetic of rows that are n:m and share nothing with other rows."""
    if n == m:
        return "baseline", f"{n}:{m} prunes nothing.", 1.0
    if most_of_4(n, m) > 2:
        return NO_PATH, f"Sparse tensor cores take 2 of every 4 at most, and {n}:{m} may have more. {WHY_NOT}", 1.0
    if (n, m) == (2, 4):
        return "sparse tensor cores, 2×", (
            "Sparse tensor cores (NVIDIA Ampere and later) multiply 2:4 at most twice as fast as dense. Published "
            "large products on an H100 reach 1.2 to 1.7 times; small ones and few tokens gain little or lose."
        ), 0.5
    saved = "" if 2 * n == m else f", not {m / n:g} times: the other zeros are multiplied"
    return "sparse tensor cores, 2×", (
        f"Every {n}:{m} mask is also a 2:4 mask, so sparse tensor cores run it at most twice as fast as dense{saved}."
    ), 0.5


def most_of_4(n: int, m: int) -> int:
    """Most weights that n:m can keep among 4 aligned inputs; with 2 or fewer it is a 2:4 mask too."""
    starts = range(0, lcm(4, m), 4)
    return max(sum(min(n, size) for size in Counter((start + i) // m for i in range(4)).values()) for start in starts)
