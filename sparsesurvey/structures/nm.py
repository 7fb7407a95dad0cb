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

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparsesurvey.structure import (
    Pattern, Plan, Shape, bits_for, check_int, pack_bits, top, unpack_bits,
)


class PackedNM(NamedTuple):
    values: Tensor  # [out, in / m, n]
    index: Tensor  # uint8 [out, bytes]: n positions of log2(m) bits a group, or the group's m-bit bitmap
    shape: Shape


@dataclass(frozen=True)
class NM(Pattern):
    """At most ``n`` kept of every ``m`` consecutive inputs of one output.

    Stored as n values a group and the shorter of two codes: n positions of ceil(log2 m) bits, or a bitmap of m bits.
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

    def holds(self, mask: Tensor) -> bool:
        return bool((mask.view(mask.shape[0], -1, self.m).sum(-1) <= self.n).all())

    def mask(self, scores: Tensor) -> Tensor:
        groups = self.check_scores(scores).reshape(scores.shape[0], -1, self.m)
        return top(groups, self.n).view(scores.shape)

    @property
    def code_bits(self) -> int:
        """Bits a group spends on telling which of its inputs are kept."""
        return min(self.n * bits_for(self.m), self.m)

    def index_bits(self, shape: Shape) -> int:
        out, inn = self.check_shape(shape)
        return out * 8 * -(-inn // self.m * self.code_bits // 8)
