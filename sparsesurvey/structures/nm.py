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
from math import ceil, comb, gcd, lcm, log2
from typing import NamedTuple

import torch
from torch import Tensor

from sparsesurvey.packing import bits_for, compress_rows, in_cache, pack_bits, top, unpack_bits, words
from sparsesurvey.structure import (
    Facts, Pattern, Plan, Shape, Unavailable, check_int, check_order, check_pair, check_part, check_weight,
)
from sparsesurvey.structures.unstructured import (
    NO_PATH, WHY_NOT, PackedCSR, bitmap_product, scipy_csr, scipy_product, skipping_product, tiled_product, torch_csr, torch_product,
    torch_sampled,
)


WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


class PackedNM(NamedTuple):
    values: Tensor  # [out, in / m, n], in the order of the inputs; for groups along the outputs [in, out / m, n]
    index: Tensor  # uint8 [out (in), bytes]: n positions of ceil(log2 m) bits a group, or the group's m-bit bitmap
    shape: Shape


class Table(NamedTuple):
    """Where a byte of 8 entries holds whole groups: what to look up for it. Several times as fast as finding each place."""

    places: Tensor  # [256, kept]: where the kept entries of this byte are, 0 to 7, as one word
    codes: Tensor  # uint8 [256]: the code of its groups
    first: Tensor  # int32: place of the first entry of the byte in which each kept entry lies
    each: int  # kept entries of a byte
    width: int  # bits of its code

    @classmethod
    def of(cls, structure: "NM", part: Tensor) -> "Table":
        """For rows of entries as many as those of ``part``, or fewer."""
        m, each, device = structure.m, 8 * structure.n // structure.m, part.device
        byte = torch.arange(256, device=device)
        order = (byte[:, None] >> torch.arange(8, device=device) & 1).argsort(dim=1, descending=True, stable=True)
        inside = order[:, :each].to(torch.uint8)  # the kept ones, rising
        size = next(size for size in WORDS if size >= each)
        bits = structure.position_bits
        return cls(
            words(torch.nn.functional.pad(inside, (0, size - each)), WORDS[size]),
            pack_bits(inside % m, bits)[:, 0] if bits else byte.to(torch.uint8),
            torch.arange(0, part.numel(), 8, dtype=torch.int32, device=device).repeat_interleave(each),
            each, 8 // m * structure.code_bits)

    def look_up(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Flat places of the kept of a mask ``[rows, ...]``, rising, and the code of each row."""
        byte = pack_bits(kept, 1)
        index = byte.flatten().int()
        inside = words(self.places.index_select(0, index), torch.uint8)[:, : self.each].flatten()
        codes = self.codes.index_select(0, index).view(byte.shape)
        return inside.int().add_(self.first[: len(inside)]), pack_bits(codes, self.width)


@dataclass(frozen=True)
class NM(Pattern):
    """At most ``n`` kept of every ``m`` consecutive inputs of one output, or outputs of one input; m at most 64.

    ``axis`` is "in" or "out", the axis along which the groups lie. Stored as n values a group (zeros fill up a group that
    has fewer) and the shorter of two codes, each output (input) padded to whole bytes: n positions of ceil(log2 m) bits,
    or a bitmap of m bits. For n = m there is nothing to tell.
    """

    n: int = 2
    m: int = 4
    axis: str = "in"

    def __post_init__(self) -> None:
        check_int("m", self.m, 1, 64)
        check_int("n", self.n, 1, self.m)
        if self.axis not in ("in", "out"):
            raise ValueError(f"axis must be 'in' or 'out', along which the groups lie, got {self.axis!r}")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" + (" out" if self.across else "")

    @classmethod
    def variants(cls) -> tuple["NM", ...]:
        inputs = cls(2, 4), cls(1, 4), cls(4, 8), cls(2, 8), cls(8, 16), cls(3, 5), cls(1, 64)
        return *inputs, cls(2, 4, "out"), cls(2, 8, "out"), cls(3, 5, "out")

    @property
    def across(self) -> bool:
        """Do the groups lie along the outputs?"""
        return self.axis == "out"

    @property
    def tile(self) -> Shape:
        return (self.m, 1) if self.across else (1, self.m)

    @property
    def density(self) -> float:
        return self.n / self.m

    def facts(self) -> Facts:
        n, m = self.n, self.m
        why = "group {tile_col} of row {row}: {row_kept} of {cols} kept; this is number {rank_row} by magnitude"
        if not self.across:
            return Facts(*tensor_cores(n, m), log2(comb(m, n)) / m, why, pruned=why, input_grad=1.0, weight_grad=1.0)
        why = "group {tile_row} of column {col}: {kept} of {size} outputs kept"
        grad = tensor_cores(n, m)[2]  # dx = dy W sums over the outputs, along which the groups lie
        return Facts(*wrong_axis(n, m), log2(comb(m, n)) / m, why, pruned=why, input_grad=grad, weight_grad=1.0)

    def along(self, matrix: Tensor) -> Tensor:
        """A view in which each row has whole groups: the matrix ``[out, in]``, or its transpose."""
        return matrix.T if self.across else matrix

    def holds(self, mask: Tensor) -> bool:
        parts = in_cache(self.along(self.check_mask(mask)))
        return all(bool((self.counts(whole_rows(part)) <= self.n).all()) for part, in parts)

    def counts(self, kept: Tensor) -> Tensor:
        """How many are kept in each group: bool ``[rows, groups * m]`` to small integers ``[rows, groups]``."""
        size = gcd(self.m, 8)  # bytes that are added at once, as lanes of a word
        lanes = words(kept.view(torch.uint8), WORDS[size]).view(len(kept), -1, self.m // size)
        lanes = lanes.sum(-1, dtype=lanes.dtype) if size < self.m else lanes.squeeze(-1)
        return (lanes * sum(1 << 8 * lane for lane in range(size))) >> 8 * (size - 1)  # the highest lane sums all

    def select(self, scores: Tensor) -> Tensor:
        """The n highest of every group, which is optimal: groups are independent."""
        axis = 0 if self.across else 1
        groups = scores.unflatten(axis, (-1, self.m)).movedim(axis + 1, -1)
        return top(groups, self.n).movedim(-1, axis + 1).reshape(scores.shape)

    def nnz(self, shape: Shape) -> int:
        out, inn = self.check_shape(shape)
        return out * inn // self.m * self.n

    @property
    def position_bits(self) -> int:
        """Bits of one position where positions are stored; 0 where a bitmap is shorter, or there is nothing to tell."""
        width = bits_for(self.m)
        return width if self.n < self.m and self.n * width <= self.m else 0

    @property
    def code_bits(self) -> int:
        """Bits that a group spends on telling which of its entries are kept."""
        if self.n == self.m:
            return 0
        return self.n * self.position_bits or self.m

    def grid(self, shape: Shape) -> Shape:
        """Rows of groups, and groups in each: (out, in / m), along the outputs (in, out / m)."""
        out, inn = self.check_shape(shape)
        return (inn, out // self.m) if self.across else (out, inn // self.m)

    def index_bits(self, shape: Shape) -> int:
        rows, groups = self.grid(shape)
        return rows * 8 * self.row_bytes(groups * self.m)

    def row_bytes(self, length: int) -> int:
        return ceil(length // self.m * self.code_bits / 8)

    def pack(self, weight: Tensor) -> PackedNM:
        check_weight(weight)
        rows, groups = self.grid(weight.shape)
        values = weight.new_empty(rows, groups, self.n)
        index = torch.empty(rows, self.row_bytes(groups * self.m), dtype=torch.uint8, device=weight.device)
        table = None
        for part, stored, code in in_cache(self.along(weight.detach()), values, index):
            kept = self.filled(part := whole_rows(part))
            if 8 % self.m == 0 and part.shape[1] % 8 == 0:
                table = table or Table.of(self, part)  # the first part is the largest
                places, codes = table.look_up(kept)
            else:
                places = kept.flatten().nonzero().flatten()
                codes = self.encode(kept, places)
            torch.index_select(part.flatten(), 0, places, out=stored.view(-1))
            code.copy_(codes)
        return PackedNM(values, index, (int(weight.shape[0]), int(weight.shape[1])))

    def filled(self, rows: Tensor) -> Tensor:
        """Mask of what is stored of rows of groups: their non-zeros and zeros up to n a group; ValueError for more."""
        kept = rows.bool()
        least, most = self.counts(kept).aminmax()
        if most > self.n:
            raise ValueError(f"weight is not {self}: apply a mask of this structure before packing it")
        return kept if least == self.n else top(kept.view(len(rows), -1, self.m).float(), self.n).view(rows.shape)

    def encode(self, kept: Tensor, places: Tensor | None = None) -> Tensor:
        """Rows with exactly n kept a group, at these flat places, to their code, uint8 ``[rows, bytes]``."""
        if self.n == self.m:
            return torch.empty(len(kept), 0, dtype=torch.uint8, device=kept.device)
        if not self.position_bits:
            return pack_bits(kept, 1)
        places = kept.flatten().nonzero() if places is None else places
        return pack_bits((places % self.m).view(len(kept), -1), self.position_bits)

    def decode(self, packed: PackedNM) -> Tensor:
        """Invert ``encode``: the mask ``[out, in]``; ValueError unless the code names exactly n entries of each group."""
        rows, groups = self.grid(packed.shape)
        index = packed.index
        check_part("index", index, torch.uint8, (rows, self.row_bytes(groups * self.m)))
        kept = torch.ones(rows, groups, self.m, dtype=torch.bool, device=index.device)
        if self.position_bits:
            positions = unpack_bits(index, self.position_bits, groups * self.n).view(rows, groups, self.n)
            check_order("index", positions, self.m)
            kept = torch.zeros_like(kept).scatter_(-1, positions.long(), True)
        elif self.n < self.m:
            kept = unpack_bits(index, 1, groups * self.m).view(kept.shape).bool()
            if (kept.sum(-1) != self.n).any():
                raise ValueError(f"packed.index must set {self.n} of the {self.m} bits of every group")
        return self.along(kept.view(rows, -1))

    def unpack(self, packed: PackedNM) -> Tensor:
        rows, groups = self.grid(packed.shape)
        check_part("values", packed.values, None, (rows, groups, self.n))
        zeros = packed.values.new_zeros(rows, groups * self.m)
        return self.along(zeros.masked_scatter(self.along(self.decode(packed)), packed.values)).contiguous()

    def general(self, packed: PackedNM) -> PackedCSR:
        """The same weights as CSR of the matrix whose rows hold the groups, which has them in the same order."""
        rows, groups = self.grid(packed.shape)
        check_part("values", packed.values, None, (rows, groups, self.n))
        kept = self.along(self.decode(packed))
        return PackedCSR(packed.values.flatten(), *compress_rows(kept), tuple(kept.shape))

    def forward(self, packed: PackedNM) -> PackedCSR:
        """The weight as CSR."""
        return self.general(packed).transposed() if self.across else self.general(packed)

    def backward(self, packed: PackedNM) -> PackedCSR:
        """The transposed weight as CSR."""
        return self.general(packed) if self.across else self.general(packed).transposed()

    # No CPU multiplies N:M as such; as CSR it is faster than dense from about 1:8 down.

    def spmm_torch_csr(self, packed: PackedNM) -> Plan:
        return torch_product("x", torch_csr(self.forward(packed)))

    def spmmt_torch_csr(self, packed: PackedNM) -> Plan:
        return torch_product("dy", torch_csr(self.backward(packed)))

    def sddmm_torch_csr(self, packed: PackedNM) -> Plan:
        sampled = torch_sampled(torch_csr(self.general(packed)))
        if not self.across:
            return lambda dy, x: sampled(dy, x).view(packed.values.shape)

        def run(dy: Tensor, x: Tensor) -> Tensor:
            dy, x = check_pair(dy, x, packed.shape, packed.values)
            return sampled(x, dy).view(packed.values.shape)

        return run

    def spmm_tiled_csr(self, packed: PackedNM) -> Plan:
        return tiled_product("x", torch_csr(self.forward(packed)))

    def spmmt_tiled_csr(self, packed: PackedNM) -> Plan:
        return tiled_product("dy", torch_csr(self.backward(packed)))

    def spmm_scipy_csr(self, packed: PackedNM) -> Plan:
        return scipy_product("x", scipy_csr(self.forward(packed)), packed.values)

    def spmmt_scipy_csr(self, packed: PackedNM) -> Plan:
        return scipy_product("dy", scipy_csr(self.backward(packed)), packed.values)

    # On a GPU sparse tensor cores multiply 2:4 along the axis that is summed over, in libraries (kernels/semi_structured.py).

    def spmm_cusparselt(self, packed: PackedNM) -> Plan:
        return self.on_sparse_cores("in", packed)

    def spmm_cusparselt_searched(self, packed: PackedNM) -> Plan:
        return self.on_sparse_cores("in", packed, searched=True)

    def spmmt_cusparselt(self, packed: PackedNM) -> Plan:
        return self.on_sparse_cores("out", packed)

    def spmmt_cusparselt_searched(self, packed: PackedNM) -> Plan:
        return self.on_sparse_cores("out", packed, searched=True)

    def spmm_cutlass(self, packed: PackedNM) -> Plan:
        from sparsesurvey.kernels import semi_structured

        rows = self.two_of_four("in", packed)
        pairs = packed if (self.n, self.m) == (2, 4) else NM(2, 4).pack(rows)
        return semi_structured.cutlass_plan(pairs.values, pairs.index, packed.shape)

    # And in our kernel for panels with 2:4 inside (kernels/mma_sp.py), to compare it with what it is measured against.

    def spmm_cuda(self, packed: PackedNM) -> Plan:
        from sparsesurvey.kernels import mma_sp

        return mma_sp.rows_plan("x", self.two_of_four("in", packed))

    def spmmt_cuda(self, packed: PackedNM) -> Plan:
        from sparsesurvey.kernels import mma_sp

        return mma_sp.rows_plan("dy", self.two_of_four("out", packed))

    # Any n:m can be multiplied by the two kernels for zeros anywhere: few tokens, or few weights.

    def spmm_cuda_bitmap(self, packed: PackedNM) -> Plan:
        if self.across:
            raise Unavailable(f"needs groups along the inputs, {self} has them along the outputs")
        return bitmap_product(self.general(packed))

    def spmm_cuda_skip(self, packed: PackedNM) -> Plan:
        return skipping_product("x", self.forward(packed))

    def spmmt_cuda_skip(self, packed: PackedNM) -> Plan:
        return skipping_product("dy", self.backward(packed))

    def on_sparse_cores(self, summed: str, packed: PackedNM, searched: bool = False) -> Plan:
        from sparsesurvey.kernels import semi_structured

        return semi_structured.cusparselt_plan(self.two_of_four(summed, packed), searched)

    def two_of_four(self, summed: str, packed: PackedNM) -> Tensor:
        """The matrix whose rows the product sums over, with at most 2 of every 4 in a row; Unavailable if it has more."""
        if self.axis != summed or most_of_4(self.n, self.m) > 2:
            raise Unavailable(f"needs at most 2 of every 4 along the {summed}puts, {self} may keep more")
        return self.along(self.unpack(packed))


def whole_rows(part: Tensor) -> Tensor:
    """Rows as contiguous memory; a transposed part by way of a dense one, which torch transposes several times as fast."""
    return part.contiguous() if part.stride(-1) == 1 else part.T.contiguous().T.contiguous()


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


def wrong_axis(n: int, m: int) -> tuple[str, str, float]:
    """Verdict, words and arithmetic of columns that are n:m: the groups lie along the outputs."""
    if n == m:
        return tensor_cores(n, m)
    verdict, words_, _ = tensor_cores(n, m)
    return ("no help forward" if verdict != NO_PATH else NO_PATH), (
        "Sparse tensor cores compress the axis that a product sums over. For y = x Wᵀ that is the inputs, so groups along "
        f"the outputs cost a dense product's arithmetic; for the input gradient dx = dy W it is the outputs. There: {words_}"
    ), 1.0


def most_of_4(n: int, m: int) -> int:
    """Most weights that n:m can keep among 4 aligned inputs; with 2 or fewer it is a 2:4 mask too."""
    starts = range(0, lcm(4, m), 4)
    return max(sum(min(n, size) for size in Counter((start + i) // m for i in range(4)).values()) for start in starts)
