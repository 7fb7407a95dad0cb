"""Dense: every weight is kept. The limit that the other structures are measured against.

>>> Dense().mask(torch.tensor([[1.0, -2.0]]))
tensor([[True, True]])
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparsesurvey.structure import (
    Facts, Pattern, Plan, Shape, Unavailable, check_activations, check_pair, check_part,
)


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

    # On a GPU what torch calls is one algorithm of cuBLAS, chosen by a heuristic. These search.

    def spmm_torch_compile(self, packed: PackedDense) -> Plan:
        """``F.linear`` compiled with mode max-autotune: cuBLAS and Triton templates are timed, the fastest is taken.

        Every number of tokens is compiled when it is first seen, which takes seconds; what was compiled before is dropped.
        """
        weight = packed.values.detach()
        if weight.device.type != "cuda":
            raise Unavailable(f"needs a CUDA device, got an operand on {weight.device}")
        torch.compiler.reset()
        product = torch.compile(torch.nn.functional.linear, mode="max-autotune-no-cudagraphs", dynamic=False, fullgraph=True)
        return lambda x: product(check_activations("x", x, weight.shape[1], weight), weight)

    def spmm_cublaslt(self, packed: PackedDense) -> Plan:
        """The fastest of the algorithms that cuBLASLt proposes (kernels/cublaslt.py)."""
        return self.searched(packed, "spmm")

    def spmmt_cublaslt(self, packed: PackedDense) -> Plan:
        return self.searched(packed, "spmmt")

    def sddmm_cublaslt(self, packed: PackedDense) -> Plan:
        return self.searched(packed, "sddmm")

    def searched(self, packed: PackedDense, product: str) -> Plan:
        from sparsesurvey.kernels import cublaslt

        return cublaslt.searched_plan(packed.values, product)
