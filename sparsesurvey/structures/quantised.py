"""Quantised N:M: pruned to n of every m inputs first, then what is left in 4-bit integers with a scale a group.

After the pipeline of Hsieh et al. 2025, a paper that its authors withdrew; it is here as a worked example of what two
compressions cost together.

>>> weight = torch.tensor([[7.0, 2.6, -3.4, 0.2, 0.1, 1.2, 0.0, -5.4]])
>>> structure = QuantisedNM(2, 4)
>>> packed = structure.pack(weight)  # 7 and -3.4, 1.2 and -5.4 are kept; the largest is 7, so the scale is 1
>>> packed.scales
tensor([[1.]])
>>> [f"{byte:08b}" for byte in packed.values.flatten().tolist()]  # -3 and 7, -5 and 1, in two's complement
['11010111', '10110001']
>>> structure.unpack(packed)
tensor([[ 7.,  0., -3.,  0.,  0.,  1.,  0., -5.]])
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, comb, log2
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsesurvey.packing import pack_bits
from sparsesurvey.structure import Facts, Plan, Shape, Structure, Unavailable, check_int, check_part
from sparsesurvey.structures.nm import NM, PackedNM, tensor_cores
from sparsesurvey.structures.unstructured import PackedCSR, check_library, tiled_product, torch_csr

LOWEST, HIGHEST = -8, 7  # what 4 bits hold; with a scale of max|w| / 7 the lowest code is never chosen


class PackedInt4(NamedTuple):
    values: Tensor  # uint8 [out, bytes]: two codes a byte, the earlier in the low half; a row's last half may be empty
    scales: Tensor  # [out, groups], of the weight's dtype
    index: Tensor  # uint8 [out, bytes]: which n of every m inputs are kept, coded as in nm.py
    shape: Shape


@dataclass(frozen=True)
class QuantisedNM(Structure):
    """At most ``n`` of every ``m`` inputs, chosen by magnitude, as 4-bit integers times the scale of their group.

    A group is ``group`` kept weights of one output, in the order of the inputs; the last of an output may have fewer.
    No group crosses from one output to the next, so that a kernel needs one scale at a time.
    """

    n: int = 2
    m: int = 4
    group: int = 128

    def __post_init__(self) -> None:
        check_int("m", self.m, 1, 64)
        check_int("n", self.n, 1, self.m)
        check_int("group", self.group, 1)
        if self.group % self.n:  # else a scale would change in the middle of n weights of m
            raise ValueError(f"group must be a multiple of n, which is {self.n}, got {self.group}")

    def __str__(self) -> str:
        return f"int4 {self.n}:{self.m}" + f" group {self.group}" * (self.group != 128)

    @classmethod
    def variants(cls) -> tuple["QuantisedNM", ...]:
        return cls(2, 4), cls(2, 4, 32), cls(4, 8), cls(1, 4, 64), cls(2, 8), cls(3, 5, 12)

    @property
    def inner(self) -> NM:
        """The structure of what is kept."""
        return NM(self.n, self.m)

    @property
    def tile(self) -> Shape:
        return (1, self.m)

    def facts(self) -> Facts:
        n, m = self.n, self.m
        why = "group {tile_col} of row {row}: {row_kept} of {cols} kept; this is number {rank_row} by magnitude"
        verdict, hardware, arithmetic = tensor_cores(n, m)
        hardware = (
            "Integers of 4 bits are turned to 16-bit numbers on their way to the tensor cores, so that they save bytes and no "
            f"arithmetic. {hardware}"
        )
        positions = log2(comb(m, n)) / m
        return Facts(f"4-bit weights; {verdict}", hardware, arithmetic, positions, why, pruned=why, input_grad=1.0, weight_grad=1.0)

    def nnz(self, shape: Shape) -> int:
        return self.inner.nnz(self.check_shape(shape))

    def row(self, inn: int) -> tuple[int, int]:
        """Kept weights of one output, and how many groups they make."""
        kept = inn // self.m * self.n
        return kept, ceil(kept / self.group)

    def value_bits(self, shape: Shape, itemsize: int = 2) -> int:
        """The codes, each row padded to whole bytes, and the scales."""
        out, inn = self.check_shape(shape)
        kept, groups = self.row(inn)
        return 8 * out * (ceil(kept / 2) + itemsize * groups)

    def index_bits(self, shape: Shape) -> int:
        return self.inner.index_bits(self.check_shape(shape))

    def pack(self, weight: Tensor) -> PackedInt4:
        """Choose what is kept from the weights as they are, then quantise it.

        A kept weight may be rounded to zero. Which zero of its n of m stands for it is then of no account, and the
        first is taken, so that a member is packed as it was before.
        """
        chosen = self.inner.pack(self.inner.project(weight).detach())
        codes, scales = quantise(chosen.values.flatten(1), self.group)
        placed = self.inner.unpack(chosen._replace(values=codes.to(weight.dtype).view_as(chosen.values)))
        final = self.inner.pack(placed)
        return PackedInt4(pack_bits(final.values.flatten(1).to(torch.int8) & 15, 4), scales, final.index, final.shape)

    def unpack(self, packed: PackedInt4) -> Tensor:
        decode = self.decoder(packed)
        return self.inner.unpack(self.as_nm(packed, decode()))

    def as_nm(self, packed: PackedInt4, values: Tensor) -> PackedNM:
        """An operand of ``inner`` with the places of this one."""
        out, inn = packed.shape
        return PackedNM(values.view(out, inn // self.m, self.n), packed.index, (out, inn))

    def check(self, packed: PackedInt4) -> None:
        """Raise ValueError if codes or scales are corrupt; ``inner`` looks at the index."""
        out, inn = self.check_shape(packed.shape)
        count, groups = self.row(inn)
        check_part("values", packed.values, torch.uint8, (out, ceil(count / 2)))
        check_part("scales", packed.scales, None, (out, groups))
        if not (packed.scales.isfinite() & (packed.scales > 0)).all():
            raise ValueError("packed.scales must be finite and above 0")

    def decoder(self, packed: PackedInt4) -> Callable[[], Tensor]:
        """A function of no argument that reads the codes and gives the kept weights ``[out, kept]``."""
        self.check(packed)
        (count, _), scales = self.row(packed.shape[1]), packed.scales.detach()
        byte = torch.arange(256, device=scales.device)
        pairs = torch.stack([byte & 15, byte >> 4], 1)  # of codes, by the byte that holds them
        pairs = (pairs - 16 * (pairs > HIGHEST)).to(scales.dtype)

        def decode() -> Tensor:
            codes = pairs.index_select(0, packed.values.flatten().int()).view(len(scales), -1)[:, :count]
            return dequantise(codes, scales, self.group)

        return decode

    # The codes are read in every run, as a kernel that keeps the weight in 4 bits must; only the layout is planned. The
    # product of the decoded weights is that of torch's CSR.

    def spmm_decode_csr(self, packed: PackedInt4) -> Plan:
        return self.decoded_product("x", packed, lambda csr: csr)

    def spmmt_decode_csr(self, packed: PackedInt4) -> Plan:
        return self.decoded_product("dy", packed, PackedCSR.transposed)

    def decoded_product(self, name: str, packed: PackedInt4, turn: Callable[[PackedCSR], PackedCSR]) -> Plan:
        """Plan of the product with the weight, or with its transpose, in the order that ``turn`` puts its entries."""
        decode, count = self.decoder(packed), self.nnz(packed.shape)
        check_library(packed.scales)
        number = torch.arange(count, dtype=torch.float64, device=packed.scales.device)
        csr = turn(self.inner.general(self.as_nm(packed, number)))
        order = csr.values.long()

        def run(x: Tensor) -> Tensor:
            values = decode().flatten().index_select(0, order)
            return tiled_product(name, torch_csr(csr._replace(values=values)))(x)

        return run

    def sddmm_reference(self, packed: Any) -> Plan:
        """There is none: a 4-bit integer has no derivative."""
        raise Unavailable("needs floating-point values: 4-bit integers take no gradient")


def quantise(values: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Rows of weights ``[rows, cols]`` to codes (int8, the same shape) and scales ``[rows, groups]``, group by group.

    The scale is max|w| / 7, code = clip(round(w / scale), -8, 7) with halves to the even code. The quotient is rounded
    to the weights' dtype such that the same scale is found again from the weight that becomes 7 scales: at most one
    unit in the last place beside the nearest. Eight times the smallest number is the least scale.
    """
    info, wide = torch.finfo(values.dtype), torch.promote_types(values.dtype, torch.float32)
    rows, cols = values.shape
    grouped = torch.nn.functional.pad(values, (0, -cols % group)).view(rows, -1, group)
    scales = seventh(grouped.abs().amax(-1)).clamp(min=8 * info.smallest_normal * info.eps)
    scales = seventh((HIGHEST * scales).clamp(max=info.max))
    codes = (grouped.to(wide) / scales.to(wide).unsqueeze(-1)).round().clamp(LOWEST, HIGHEST)
    return codes.to(torch.int8).view(rows, -1)[:, :cols], scales


def seventh(values: Tensor) -> Tensor:
    """A seventh of each, rounded to the dtype of the values."""
    return (values.to(torch.promote_types(values.dtype, torch.float32)) / HIGHEST).to(values.dtype)


def dequantise(codes: Tensor, scales: Tensor, group: int) -> Tensor:
    """Codes ``[rows, cols]`` times the scales ``[rows, groups]`` of their groups, in the dtype of the scales."""
    most = torch.finfo(scales.dtype).max  # 7 times a scale may be rounded to beyond it
    return (codes.to(scales.dtype) * scales.repeat_interleave(group, 1)[:, :codes.shape[1]]).clamp(-most, most)
