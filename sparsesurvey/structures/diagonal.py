"""Diagonal: whole wrapped diagonals are kept or dropped (DynaDiag, Tyagi et al. 2025); stored one diagonal a row.

>>> scores = torch.tensor([[9.0, 1.0, 0.0, 2.0],
...                        [3.0, 8.0, 1.0, 0.0],
...                        [1.0, 4.0, 7.0, 0.0],
...                        [0.0, 0.0, 5.0, 6.0]])
>>> structure = Diagonal(0.5)
>>> structure.mask(scores).int()  # the diagonals' sums are 30, 2, 1 and 14: offsets 0 and 3 are kept
tensor([[1, 0, 0, 1],
        [1, 1, 0, 0],
        [0, 1, 1, 0],
        [0, 0, 1, 1]], dtype=torch.int32)
>>> packed = structure.pack(scores * structure.mask(scores))
>>> packed.values  # entry i of offset k is weight[i, (i + k) % 4]
tensor([[9., 8., 7., 6.],
        [2., 3., 4., 5.]])
>>> packed.offsets.tolist()
[0, 3]
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparsesurvey.packing import compress_rows, index_dtype, top
from sparsesurvey.structure import (
    Facts, Pattern, Plan, Shape, check_activations, check_density, check_order, check_pair, check_part,
)
from sparsesurvey.structures.unstructured import (
    NO_PATH, WHY_NOT, PackedCSR, scipy_product, scipy_sparse, skipping_product, tiled_product, torch_csr, torch_product, torch_sampled,
)

FEW = 8  # tokens up to which all diagonals are multiplied at once
TOKENS = {"product": 128, "gradient": 64}  # multiplied at a time, so that they stay in a core's cache


class PackedDiagonals(NamedTuple):
    values: Tensor  # [K, short], entry s of a diagonal is in row (or, of a tall weight, column) s
    offsets: Tensor  # [K], rising; int16 where the long side is at most 32768, else int32
    shape: Shape


@dataclass(frozen=True)
class Diagonal(Pattern):
    """At most ``round(density * long)`` of the wrapped diagonals keep anything; ``long`` is the longer side.

    Diagonal k of a wide or square weight is the entries (s, (s + k) mod in), that of a tall one ((s + k) mod out, s).
    There are ``long`` of them, each has ``short`` entries, and together they are the matrix. Hence the transpose of a
    member is a member; every line of the short side has as many weights as there are diagonals, while those of the
    long side may differ, and one may even be empty.
    """

    density: float = 0.1

    def __post_init__(self) -> None:
        check_density(self.density)

    def __str__(self) -> str:
        return f"diagonal {100 * self.density:g}%"

    @classmethod
    def variants(cls) -> tuple["Diagonal", ...]:
        return cls(0.1), cls(0.5), cls(0.25), cls(0.05), cls(0.02)

    def diagonals(self, shape: Shape) -> int:
        """How many diagonals are kept."""
        return round(self.density * max(self.check_shape(shape)))

    def nnz(self, shape: Shape) -> int:
        return self.diagonals(shape) * min(shape)

    def index_bits(self, shape: Shape) -> int:
        return self.diagonals(shape) * 8 * index_dtype(max(shape)).itemsize

    def facts(self) -> Facts:
        why = ("number {rank_row} of row {row} by magnitude, {row_kept} of {cols} kept: what counts is its wrapped "
               "diagonal's Σ|w|")
        hardware = ("A diagonal gives each output one weight, so that a block that a tensor core multiplies is nearly "
                    f"empty unless diagonals lie side by side. {WHY_NOT}")
        return Facts(NO_PATH, hardware, 1.0, 0.0, why, pruned=why)

    def holds(self, mask: Tensor) -> bool:
        used = skewed(self.check_mask(mask)).any(0)
        return int(used.count_nonzero()) <= self.diagonals(mask.shape)

    def select(self, scores: Tensor) -> Tensor:
        """The diagonals with the highest sums of scores, which is optimal: every weight is on exactly one."""
        sums = skewed(scores).sum(0, dtype=torch.promote_types(scores.dtype, torch.float32))
        return spread(top(sums, self.diagonals(scores.shape)), tuple(scores.shape))

    def pack(self, weight: Tensor) -> PackedDiagonals:
        offsets = skewed(self.stored(weight)).any(0).nonzero().flatten()
        values = skewed(weight)[:, offsets].T.contiguous()
        return PackedDiagonals(values, offsets.to(index_dtype(max(weight.shape))), tuple(weight.shape))

    def unpack(self, packed: PackedDiagonals) -> Tensor:
        offsets = self.places(packed)
        short, long = sorted(packed.shape)
        line = torch.arange(short, device=offsets.device)
        lying = packed.values.new_zeros(short, long)
        lying[line, (line + offsets[:, None]) % long] = packed.values
        return lying if packed.shape[0] == short else lying.T.contiguous()

    def places(self, packed: PackedDiagonals) -> Tensor:
        """The offsets as int64; ValueError if the operand is corrupt."""
        count, long = self.diagonals(packed.shape), max(packed.shape)
        check_part("values", packed.values, None, (count, min(packed.shape)))
        check_part("offsets", packed.offsets, index_dtype(long), (count,))
        check_order("offsets", packed.offsets, long)
        return packed.offsets.long()

    def transposed(self, packed: PackedDiagonals) -> PackedDiagonals:
        """The packed transpose: the same diagonals seen from the other side; of a square weight k becomes -k."""
        out, inn = packed.shape
        if out != inn:
            return packed._replace(shape=(inn, out))
        offsets = self.places(packed)
        other, order = ((-offsets) % inn).sort()
        column = torch.arange(inn, device=offsets.device)
        rolled = packed.values.gather(1, (column - offsets[:, None]) % inn)  # entry j is now the one in column j
        return PackedDiagonals(rolled[order], other.to(packed.offsets.dtype), packed.shape)

    # A product by rolls adds, for each diagonal, its values times a window of the activations, which are laid out
    # twice in a row so that nothing wraps. No index is read, so it wins while the weight is the traffic: few tokens.
    # With many, a diagonal reads and writes an output for every multiplication, and CSR, whose loop keeps them in
    # registers, is faster.

    def spmm_roll(self, packed: PackedDiagonals) -> Plan:
        return roll_plan("x", packed, self.places(packed))

    def spmmt_roll(self, packed: PackedDiagonals) -> Plan:
        self.places(packed)
        other = self.transposed(packed)
        return roll_plan("dy", other, self.places(other))

    def sddmm_roll(self, packed: PackedDiagonals) -> Plan:
        offsets = self.places(packed).tolist()
        values, (out, inn) = packed.values.detach(), packed.shape

        def run(dy: Tensor, x: Tensor) -> Tensor:
            dy, x = check_pair(dy, x, packed.shape, values)
            near, far = (dy, x) if out <= inn else (x, dy)  # [tokens, short], [tokens, long]
            gradient = widened(values.new_zeros(values.shape))
            for left, right in zip(near.split(TOKENS["gradient"]), far.split(TOKENS["gradient"])):
                left, right = widened(left), around(widened(right), left.shape[1])
                buffer = torch.empty_like(left)
                for row, offset in zip(gradient, offsets):
                    torch.mul(left, right[:, offset:offset + left.shape[1]], out=buffer)
                    row += buffer.sum(0)
            return gradient.to(values.dtype)

        return run

    def general(self, packed: PackedDiagonals) -> tuple[PackedCSR, Tensor]:
        """The same weights as CSR, and the place of each of them in ``packed.values.flatten()``."""
        number = torch.arange(1, packed.values.numel() + 1, dtype=torch.float64, device=packed.values.device)
        place = self.unpack(packed._replace(values=number.view_as(packed.values)))
        kept = place > 0
        order = place[kept].long() - 1
        return PackedCSR(packed.values.flatten()[order], *compress_rows(kept), packed.shape), order

    def spmm_torch_csr(self, packed: PackedDiagonals) -> Plan:
        self.places(packed)
        return torch_product("x", torch_csr(self.general(packed)[0]))

    def spmmt_torch_csr(self, packed: PackedDiagonals) -> Plan:
        self.places(packed)
        return torch_product("dy", torch_csr(self.general(packed)[0].transposed()))

    def sddmm_torch_csr(self, packed: PackedDiagonals) -> Plan:
        self.places(packed)
        general, order = self.general(packed)
        run, values = torch_sampled(torch_csr(general)), packed.values
        return lambda dy, x: values.new_empty(values.numel()).index_copy_(0, order, run(dy, x)).view(values.shape)

    def spmm_tiled_csr(self, packed: PackedDiagonals) -> Plan:
        self.places(packed)
        return tiled_product("x", torch_csr(self.general(packed)[0]))

    def spmmt_tiled_csr(self, packed: PackedDiagonals) -> Plan:
        self.places(packed)
        return tiled_product("dy", torch_csr(self.general(packed)[0].transposed()))

    # On a GPU: the kernel that skips. Its activations are feature-major, so that diagonals cost it no unaligned loads.

    def spmm_cuda_skip(self, packed: PackedDiagonals) -> Plan:
        self.places(packed)
        return skipping_product("x", self.general(packed)[0])

    def spmmt_cuda_skip(self, packed: PackedDiagonals) -> Plan:
        self.places(packed)
        return skipping_product("dy", self.general(packed)[0].transposed())

    def spmm_scipy_dia(self, packed: PackedDiagonals) -> Plan:
        self.places(packed)
        return scipy_product("x", self.scipy_dia(packed), packed.values)

    def spmmt_scipy_dia(self, packed: PackedDiagonals) -> Plan:
        self.places(packed)
        return scipy_product("dy", self.scipy_dia(self.transposed(packed)), packed.values)

    def scipy_dia(self, packed: PackedDiagonals) -> object:
        """The weight as scipy's DIA array, which has no wrapped diagonals: one that wraps becomes two."""
        sparse = scipy_sparse(packed.values)
        offsets, values = packed.offsets.long(), packed.values.detach()
        short, long = sorted(packed.shape)
        line = (torch.arange(long) - offsets[:, None]) % long  # DIA keeps an entry at its column
        data = torch.where(line < short, values.gather(1, line.clamp(max=short - 1)), 0)
        wraps = offsets + short > long
        parts = torch.cat([data, data[wraps]]).numpy(), torch.cat([offsets, offsets[wraps] - long]).numpy()
        lying = sparse.dia_array(parts, shape=(short, long))
        return lying if packed.shape[0] == short else lying.T


def skewed(matrix: Tensor) -> Tensor:
    """``[out, in]`` with its diagonals as columns, ``[short, long]``: entry (s, k) is entry s of diagonal k."""
    lying = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    short, long = lying.shape
    twice = around(lying, short)
    return twice.as_strided((short, long), (twice.shape[1] + 1, 1))


def around(matrix: Tensor, short: int) -> Tensor:
    """``[rows, long]`` beside its first ``short - 1`` columns: a window of ``short`` that wraps lies in one piece."""
    return torch.cat([matrix, matrix[:, : short - 1]], 1)


def spread(kept: Tensor, shape: Shape) -> Tensor:
    """Booleans of the diagonals ``[long]`` to the mask ``[out, in]`` of those that are kept."""
    short, long = sorted(shape)
    windows = kept.repeat(2).unfold(0, long, 1)[long - short + 1: long + 1].flip(0)  # row s begins at diagonal -s
    return windows if shape[0] == short else windows.T.contiguous()


def widened(x: Tensor) -> Tensor:
    """In the precision that sums are made in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def roll_plan(name: str, packed: PackedDiagonals, offsets: Tensor) -> Plan:
    """Plan of ``x @ W.T``: a wide or square weight reads windows of x, a tall one adds into windows of y."""
    (out, inn), values = packed.shape, packed.values.detach()
    wide = widened(values)
    make = gathering if out <= inn else scattering
    few, many = make(wide, offsets, out, inn)

    def run(x: Tensor) -> Tensor:
        x = check_activations(name, x, inn, values)
        if len(x) <= FEW:
            return few(widened(x)).to(x.dtype)
        return torch.cat([many(widened(part)).to(x.dtype) for part in x.split(TOKENS["product"])])

    return run


def gathering(values: Tensor, offsets: Tensor, out: int, inn: int) -> tuple[Plan, Plan]:
    """Output s is the sum over the diagonals k of ``values[k, s] * x[(s + k) mod in]``; for few tokens, for many."""
    starts = offsets.tolist()

    def few(x: Tensor) -> Tensor:
        windows = around(x, out).unfold(1, out, 1)  # [tokens, in, out], a view
        sums = [mine.index_select(0, offsets).mul_(values).sum(0) for mine in windows]
        return torch.stack(sums) if sums else x.new_zeros(0, out)

    def many(x: Tensor) -> Tensor:
        x, y = around(x, out), x.new_zeros(len(x), out)
        for start, line in zip(starts, values):
            y.addcmul_(x[:, start:start + out], line)
        return y

    return few, many


def scattering(values: Tensor, offsets: Tensor, out: int, inn: int) -> tuple[Plan, Plan]:
    """Input s adds ``values[k, s] * x[s]`` to output (s + k) mod out, for every diagonal k; few tokens, many."""
    starts = offsets.tolist()
    place = ((torch.arange(inn, device=offsets.device) + offsets[:, None]) % out).flatten()

    def few(x: Tensor) -> Tensor:
        return x.new_zeros(len(x), out).index_add_(1, place, (x[:, None] * values).flatten(1))

    def many(x: Tensor) -> Tensor:
        y = x.new_zeros(len(x), out + inn - 1)
        for start, line in zip(starts, values):
            y[:, start:start + inn].addcmul_(x, line)
        y[:, : inn - 1] += y[:, out:]
        return y[:, :out]

    return few, many
