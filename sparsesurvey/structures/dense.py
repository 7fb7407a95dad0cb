"""Dense: every weight is kept. The limit that the other structures are measured against.

>>> Dense().mask(torch.tensor([[1.0, -2.0]]))
tensor([[True, True]])
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparsesurvey.structure import Facts, Pattern, Plan, Shape, check_activations, check_pair, check_part


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

    def facts(self) -> Facts:
        return Facts("baseline", "Dense tensor cores.", 1.0, 0.0, "dense: nothing is pruned")

    def holds(self, mask: Tensor) -> bool:
        return self.check_mask(mask).dim() == 2

    def select(self, scores: Tensor) -> Tensor:
        return torch.ones_like(scores, dtype=torch.bool)

    def index_bits(self, shape: Shape) -> int:
        return 0

    def pack(self, weight: Tensor) -> PackedDense:
        return PackedDense(self.check_member(weight).clone(memory_format=torch.contiguous_format))

    def unpack(self, packed: PackedDense) -> Tensor:
        check_part("values", packed.values, None, packed.values.shape[:2])
        return packed.values.clone()

    def spmm_torch(self, packed: PackedDense) -> Plan:
        """``F.linear``: what every other structure's time is compared with."""
        weight = packed.values.detach()
        return lambda x: torch.nn.functional.linear(check_activations("x", x, weight.shape[1], weight), weight)

    def spmmt_torch(self, packed: PackedDense) -> Plan:
        weight = packed.values.detach()
        return lambda dy: check_activations("dy", dy, weight.shape[0], weight) @ weight

    def sddmm_torch(self, packed: PackedDense) -> Plan:
        def run(dy: Tensor, x: Tensor) -> Tensor:
            dy, x = check_pair(dy, x, packed.values.shape, packed.values)
            return dy.T @ x

        return run
