"""Dense: every weight is kept. The limit that the other structures are measured against.

>>> Dense().mask(torch.tensor([[1.0, -2.0]]))
tensor([[True, True]])
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparsesurvey.structure import Pattern, Plan, Shape


class PackedDense(NamedTuple):
    values: Tensor  # [out, in]


@dataclass(frozen=True)
class Dense(Pattern):
    """All weights, row after row, and no index."""

    def __str__(self) -> str:
        return "dense"

    @property
    def density(self) -> float:
        return 1.0

    def holds(self, mask: Tensor) -> bool:
        return mask.dim() == 2

    def mask(self, scores: Tensor) -> Tensor:
        return torch.ones_like(self.check_scores(scores), dtype=torch.bool)

    def index_bits(self, shape: Shape) -> int:
        return 0

    def pack(self, weight: Tensor) -> PackedDense:
        return PackedDense(self.check_member(weight).contiguous())

    def unpack(self, packed: PackedDense) -> Tensor:
        return packed.values

    def spmm_torch(self, packed: PackedDense) -> Plan:
        weight = packed.values
        return lambda x: torch.nn.functional.linear(x, weight)

    def spmmt_torch(self, packed: PackedDense) -> Plan:
        weight = packed.values
        return lambda dy: dy @ weight

    def sddmm_torch(self, packed: PackedDense) -> Plan:
        return lambda dy, x: dy.T @ x
