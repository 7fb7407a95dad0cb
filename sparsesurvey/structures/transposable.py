"""Transposable N:M: W and W.T are both n:m, so that one mask serves the forward product and the input gradient.

Every m x m tile keeps at most n of each row and of each column (Hubara et al. 2021; 2:4 in Hu et al. 2024; any n:m in
TSENOR, Meng et al. 2025).

>>> scores = torch.tensor([[9.0, 4.0, 3.0, 2.0],
...                        [4.0, 5.0, 8.0, 0.0],
...                        [2.0, 0.0, 7.0, 6.0],
...                        [3.0, 6.0, 1.0, 5.0]])
>>> Transposable(2, 4).mask(scores).int()  # the best: 49 of 65, two in each row and in each column
tensor([[1, 1, 0, 0],
        [1, 0, 1, 0],
        [0, 0, 1, 1],
        [0, 1, 0, 1]], dtype=torch.int32)
>>> greedy(scores[None], 2).int()[0]  # the first row and the first column have one left that no rule may take
tensor([[1, 0, 0, 0],
        [0, 1, 1, 0],
        [0, 0, 1, 1],
        [0, 1, 0, 1]], dtype=torch.int32)
>>> packed = Transposable(2, 4).pack(scores * Transposable(2, 4).mask(scores))
>>> packed.values[:, 0]
tensor([[9., 4.],
        [4., 8.],
        [7., 6.],
        [6., 5.]])
>>> [f"{byte:04b}" for byte in packed.index.flatten().tolist()]  # first input at the right; columns read it downwards
['0011', '0101', '1100', '1010']
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, product
from math import ceil, comb, exp, factorial, log2, prod
from typing import NamedTuple

import torch
from torch import Tensor

from sparsesurvey.packing import compress_rows, in_cache, pack_bits, tiles, top, unpack_bits, untile
from sparsesurvey.structure import Facts, Pattern, Plan, Shape, Unavailable, check_int, check_part
from sparsesurvey.structures.nm import most_of_4, tensor_cores
from sparsesurvey.structures.unstructured import (
    PackedCSR, scipy_csr, scipy_product, tiled_product, torch_csr, torch_product, torch_sampled,
)


class PackedTransposable(NamedTuple):
    values: Tensor  # [out, in / m, n], in the order of the inputs; zeros fill up a group that has fewer
    index: Tensor  # uint8 [out, ceil(in / 8)]: one bit a weight; those of a tile can be read by rows and by columns
    shape: Shape


@dataclass(frozen=True)
class Transposable(Pattern):
    """At most ``n`` of each row and of each column of every ``m`` x ``m`` tile keep anything; m at most 64.

    The masks that are chosen have exactly n in each. Stored once: n values a row and group as in N:M, and one bit a
    weight. Those bits, read down the columns, are the code of W.T, and how many of them precede one in its row is the
    slot of its value: neither a second copy of the values nor a second code is needed, as two N:M operands would.
    """

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        check_int("m", self.m, 1, 64)
        check_int("n", self.n, 1, self.m)

    def __str__(self) -> str:
        return f"transposable {self.n}:{self.m}"

    @classmethod
    def variants(cls) -> tuple["Transposable", ...]:
        return cls(2, 4), cls(4, 8), cls(8, 16), cls(16, 32), cls(1, 4), cls(2, 8)

    @property
    def tile(self) -> Shape:
        return (self.m, self.m)

    @property
    def density(self) -> float:
        return self.n / self.m

    def facts(self) -> Facts:
        n, m = self.n, self.m
        verdict, hardware, arithmetic = tensor_cores(n, m)
        hardware += " That holds for the forward product and, as W.T has the pattern too, for the input gradient."
        why = "tile ({tile_row}, {tile_col}): {row_kept} of {cols} kept in this row, and as many in each column; " \
            "this is number {rank_row} of the row by magnitude"
        masks = count(n, m) if m <= 8 else estimate(n, m)
        return Facts(verdict, hardware, arithmetic, log2(masks) / m**2, why, pruned=why, weight_grad=1.0)

    def holds(self, mask: Tensor) -> bool:
        tiled = tiles(self.check_mask(mask), self.m, self.m)
        return all(bool((tiled.sum(axis, dtype=torch.uint8) <= self.n).all()) for axis in (-1, -2))

    def select(self, scores: Tensor) -> Tensor:
        """The best of all masks with exactly n a row and column where there are few (2:4 has 90), else TSENOR's."""
        tiled = tiles(scores, self.m, self.m)
        solve = exhaustive if few(self.n, self.m) else tsenor
        return untile(solve(tiled.reshape(-1, self.m, self.m), self.n).view(tiled.shape))

    def index_bits(self, shape: Shape) -> int:
        out, inn = self.check_shape(shape)
        return out * 8 * ceil(inn / 8)

    def pack(self, weight: Tensor) -> PackedTransposable:
        """Stores what is no zero: a mask with fewer than n in a row cannot always be filled up within its tile."""
        out, inn = self.check_member(weight).shape
        kept = weight != 0
        slots = self.slots(kept)
        values = weight.reshape(slots.shape[0], -1, self.m).gather(-1, slots)
        return PackedTransposable(values, pack_bits(kept, 1), (out, inn))

    def slots(self, kept: Tensor) -> Tensor:
        """Which input of its group each slot is for, int64 ``[out, in / m, n]``: the kept ones, then any others."""
        groups = kept.view(kept.shape[0], -1, self.m).to(torch.uint8)
        return groups.argsort(dim=-1, descending=True, stable=True)[..., :self.n]

    def kept(self, packed: PackedTransposable) -> Tensor:
        """The mask of an operand, bool ``[out, in]``; ValueError if the operand is corrupt."""
        out, inn = self.check_shape(packed.shape)
        check_part("values", packed.values, None, (out, inn // self.m, self.n))
        check_part("index", packed.index, torch.uint8, (out, ceil(inn / 8)))
        kept = unpack_bits(packed.index, 1, inn).bool()
        if not self.holds(kept):
            limit = f"at most {self.n} of the {self.m} bits"
            raise ValueError(f"packed.index must set {limit} of every row and column of a tile")
        return kept

    def unpack(self, packed: PackedTransposable) -> Tensor:
        kept = self.kept(packed)
        slots = self.slots(kept)
        weight = packed.values.new_zeros(kept.shape[0], slots.shape[1], self.m).scatter(-1, slots, packed.values)
        return weight.view(kept.shape).masked_fill(~kept, 0)  # a slot that stands nowhere may hold anything

    def general(self, packed: PackedTransposable) -> tuple[PackedCSR, Tensor]:
        """The same weights as CSR, and which of the values, flat, each of its entries is."""
        kept = self.kept(packed)
        used = kept.view(kept.shape[0], -1, self.m).gather(-1, self.slots(kept)).flatten().nonzero().flatten()
        return PackedCSR(packed.values.flatten()[used], *compress_rows(kept), packed.shape), used

    # As for N:M: no CPU multiplies the pattern as such, CSR does from about 1:8 down. Here W.T is no worse than W.

    def spmm_torch_csr(self, packed: PackedTransposable) -> Plan:
        return torch_product("x", torch_csr(self.general(packed)[0]))

    def spmmt_torch_csr(self, packed: PackedTransposable) -> Plan:
        return torch_product("dy", torch_csr(self.general(packed)[0].transposed()))

    def sddmm_torch_csr(self, packed: PackedTransposable) -> Plan:
        matrix, used = self.general(packed)
        run, like = torch_sampled(torch_csr(matrix)), packed.values
        return lambda dy, x: like.new_zeros(like.numel()).index_copy_(0, used, run(dy, x)).view(like.shape)

    def spmm_tiled_csr(self, packed: PackedTransposable) -> Plan:
        return tiled_product("x", torch_csr(self.general(packed)[0]))

    def spmmt_tiled_csr(self, packed: PackedTransposable) -> Plan:
        return tiled_product("dy", torch_csr(self.general(packed)[0].transposed()))

    def spmm_scipy_csr(self, packed: PackedTransposable) -> Plan:
        return scipy_product("x", scipy_csr(self.general(packed)[0]), packed.values)

    def spmmt_scipy_csr(self, packed: PackedTransposable) -> Plan:
        return scipy_product("dy", scipy_csr(self.general(packed)[0].transposed()), packed.values)

    # On a GPU sparse tensor cores, through cuSPARSELt, skip in both products of the activations, and no kernel in the weight gradient.

    def spmm_cusparselt(self, packed: PackedTransposable) -> Plan:
        from sparsesurvey.kernels import semi_structured

        return semi_structured.trained_plan(packed.values, *self.entries(packed), packed.shape)

    def spmmt_cusparselt(self, packed: PackedTransposable) -> Plan:
        from sparsesurvey.kernels import semi_structured

        out, inn = packed.shape
        used, places = self.entries(packed)
        return semi_structured.trained_plan(packed.values, used, places % inn * out + places // inn, (inn, out))

    def sddmm_cusparselt(self, packed: PackedTransposable) -> Plan:
        """All of dW by a dense product, of which the stored weights are kept."""
        from sparsesurvey.kernels import semi_structured

        return semi_structured.sampled_plan(packed.values, *self.entries(packed), packed.shape)

    def lasting(self, kernel: str) -> bool:
        """Do this kernel's plans read the values where these are? Then they stay right while the values are trained."""
        return kernel == "cusparselt"

    def entries(self, packed: PackedTransposable) -> tuple[Tensor, Tensor]:
        """Which of the values, flat, stand somewhere, and where in the weight, flat; for 2:4."""
        if most_of_4(self.n, self.m) > 2:
            raise Unavailable(f"needs at most 2 of every 4, {self} may keep more")
        return self.general(packed)[1], self.kept(packed).flatten().nonzero().flatten()


# How many masks there are.


@lru_cache
def count(n: int, m: int) -> int:
    """Number of m x m masks with exactly n in each row and column: 90 for 2:4.

    Exact, row by row over how full the columns are; a tenth of a second up to m = 8, a minute for 8:16.
    """
    @lru_cache(None)
    def ways(rows: int, wanting: tuple[int, ...]) -> int:  # wanting[k]: columns that still need k + 1
        if rows == 0:
            return 1
        return sum(times * ways(rows - 1, rest) for times, rest in _rows(wanting, n))

    return ways(m, (0,) * (n - 1) + (m,))


def _rows(wanting: Sequence[int], n: int) -> list[tuple[int, tuple[int, ...]]]:
    """The ways to give a row its n entries: how many there are of each kind, and what the columns then need."""
    found = []
    for taken in product(*(range(min(n, columns) + 1) for columns in wanting)):
        if sum(taken) == n:
            after = [columns - took + more for columns, took, more in zip(wanting, taken, (*taken[1:], 0))]
            found.append((prod(map(comb, wanting, taken)), tuple(after)))
    return found


def estimate(n: int, m: int) -> float:
    """``count`` for large m, from Canfield, Greenhill and McKay (2008); 6 % low for 4:8, closer for larger."""
    return exp(-0.5) * (comb(m, n) ** (2 * m) / comb(m * m, m * n))


def closed_form(n: int, m: int) -> int:
    """The count of Hubara et al. (2021), m! (m - 1)! ... (m - n + 1)!: too many for n above 1, 150 times for 4:8."""
    return prod(factorial(m - k) for k in range(n))


def few(n: int, m: int) -> bool:
    """Are all masks few enough to try? 90 for 2:4, 720 for 1:6."""
    return m <= 4 or (m <= 6 and min(n, m - n) <= 1)


# Solvers of one problem: the highest sum of scores with n in each row and column of a tile. They take tiles
# [tiles, m, m] and n, and return a mask of that shape.


@lru_cache
def _patterns(n: int, m: int) -> list[list[int]]:
    rows = [[int(column in chosen) for column in range(m)] for chosen in combinations(range(m), n)]
    found = (choice for choice in product(rows, repeat=m) if all(sum(column) == n for column in zip(*choice)))
    return [sum(choice, []) for choice in found]


def exhaustive(scores: Tensor, n: int) -> Tensor:
    """The best of all masks, one matrix product with the list of them (Hu et al. 2024); for small m."""
    wide = torch.promote_types(scores.dtype, torch.float32)
    m = scores.shape[-1]
    every = torch.tensor(_patterns(n, m), dtype=wide, device=scores.device)  # [masks, m * m]
    flat = scores.reshape(-1, m * m)
    sums = flat[:, :1].expand(-1, len(every))  # what has to stay in the cache is so large
    best = torch.cat([part.to(wide).mm(every.T).argmax(1) for _, part in in_cache(sums, flat)])
    return every.bool().index_select(0, best).view(scores.shape)


def tsenor(scores: Tensor, n: int, steps: int = 100, relaxation: float = 1.8, tau: float = 100.0) -> Tensor:
    """TSENOR (Meng et al. 2025): a relaxed choice by Dykstra's algorithm, rounded greedily, then swaps to fill up.

    Its 300 plain steps are ``steps=300, relaxation=1.0``; over-relaxed, 100 come as close. Where more than half is
    kept, what is dropped is chosen, because only then the swaps are sure to end with n in every row and column.
    """
    m = scores.shape[-1]
    if 2 * n > m:
        all_kept = torch.ones_like(scores, dtype=torch.bool)
        return all_kept if n == m else ~tsenor(-scores, m - n, steps, relaxation, tau)
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    done = [saturate(greedy(dykstra(part, n, steps, relaxation, tau), n), part, n) for part, in in_cache(wide)]
    return torch.cat(done)


def dykstra(scores: Tensor, n: int, steps: int = 300, relaxation: float = 1.0, tau: float = 100.0) -> Tensor:
    """Logarithm of the entropic transport plan that ``scores`` and row and column sums n define, before its cut at 1.

    Plan: min(1, exp(tau * scores + a_i + b_j)), scores scaled to the range 0 to 1 in each tile. A step of TSENOR's
    algorithm (normalise rows, normalise columns, cut at 1 and remember what was cut) only changes a and b, so these are
    all that is kept: nothing overflows, and an entry that underflows for a while is not lost. ``relaxation`` above 1
    moves a and b further than a step would.
    """
    low, high = scores.amin((1, 2), keepdim=True), scores.amax((1, 2), keepdim=True)
    energy = (scores - low) * (tau / (high - low).clamp_min(torch.finfo(scores.dtype).tiny * 1e4))
    rows = -energy.topk(n, dim=-1).values[..., -1:]  # [tiles, m, 1]; starts with n entries at 1 in each row
    columns = torch.zeros_like(energy[:, :1])  # [tiles, 1, m]
    plan = torch.empty_like(energy)
    for _ in range(steps):
        torch.add(energy, rows, out=plan).add_(columns).clamp_max_(0).exp_()
        up = -plan.sum(-1, keepdim=True).clamp_min_(1e-30).div_(n).log_()
        sums = up.exp().mT @ plan  # of the columns, after the rows
        rows = rows + relaxation * up
        columns = columns - relaxation * sums.clamp_min_(1e-30).div_(n).log_()
    return energy + rows + columns


def greedy(scores: Tensor, n: int) -> Tensor:
    """From the highest score down, keep what its row and its column have room for.

    This is all that apex (``mn_2d_greedy``) does: a row and a column can be left with too few, their common entry being
    kept already. At most n, then, not n.
    """
    return _walk(scores, n, both=True)


def two_approximation(scores: Tensor, n: int) -> Tensor:
    """From the lowest score up, drop what its row or its column has yet to drop (Hubara et al. 2021).

    What is dropped sums to less than twice the least; what is kept is at most n, and often fewer.
    """
    return ~_walk(-scores, scores.shape[-1] - n, both=False)


def _walk(scores: Tensor, limit: int, both: bool) -> Tensor:
    """Take entries from the highest down while row and column (``both``), or one of them, have fewer than ``limit``."""
    count, m, _ = scores.shape
    order = scores.reshape(count, m * m).argsort(dim=1, descending=True, stable=True)
    first = torch.arange(count, device=scores.device) * m  # line of each tile's first row, and of its first column
    row_of, column_of = (order // m).T + first, (order % m).T + first  # [m * m, tiles]
    in_row, in_column = (torch.zeros(count * m, dtype=torch.int32, device=scores.device) for _ in range(2))
    taken = []
    for row, column in zip(row_of.unbind(), column_of.unbind()):
        room = in_row.index_select(0, row) < limit, in_column.index_select(0, column) < limit
        take = room[0] & room[1] if both else room[0] | room[1]
        in_row.index_add_(0, row, take.int())
        in_column.index_add_(0, column, take.int())
        taken.append(take)
    return torch.zeros_like(order, dtype=torch.bool).scatter_(1, order, torch.stack(taken, 1)).view(scores.shape)


def saturate(mask: Tensor, scores: Tensor, n: int) -> Tensor:
    """TSENOR's swaps: fill a row i and a column j that have too few by (i, j') and (i', j) in place of a kept (i', j').

    ``mask`` is one that ``greedy`` left, n at most m / 2. Then such a swap always exists (every row outside column j is
    full, and those rows hold more than the columns outside row i lack), and n * n / 4 of them are enough. The paper
    applies a swap only if it gains; here the best is applied in any case.
    """
    count, m, _ = scores.shape
    gone = torch.full_like(scores, -torch.inf)
    free, held = torch.where(mask, gone, scores).flatten(1), torch.where(mask, -scores, gone).flatten(1)
    rows, columns = n - mask.sum(2, dtype=torch.int32), n - mask.sum(1, dtype=torch.int32)  # that are lacking
    line = torch.arange(m, device=scores.device)
    for _ in range(n * n // 4):
        i, j = rows.argmax(1, keepdim=True), columns.argmax(1, keepdim=True)
        lacking = rows.gather(1, i) > 0
        across, down = free.gather(1, i * m + line), free.gather(1, line * m + j)  # what (i, j') and (i', j) would add
        gain = held.view(scores.shape) + across.unsqueeze(1) + down.unsqueeze(2)
        best = gain.flatten(1).argmax(1, keepdim=True)
        add_1, add_2 = i * m + best % m, best // m * m + j
        for place, kept in (add_1, True), (add_2, True), (best, False):
            was_free, was_held = free.gather(1, place), held.gather(1, place)
            free.scatter_(1, place, torch.where(lacking, -torch.inf if kept else -was_held, was_free))
            held.scatter_(1, place, torch.where(lacking, -was_free if kept else -torch.inf, was_held))
        rows.scatter_add_(1, i, -lacking.int())
        columns.scatter_add_(1, j, -lacking.int())
    return (held > -torch.inf).view(scores.shape)


def row_then_column(scores: Tensor, n: int) -> Tensor:
    """The n best of each row, then of each column the n best of these (Bi-NM, Zhang et al. 2023): at most n."""
    rows = top(scores, n)
    kept = torch.where(rows, scores, -torch.inf)
    return rows & top(kept.mT, n).mT


def linear_program(scores: Tensor, n: int) -> Tensor:
    """The optimum, tile by tile: the relaxation has whole numbers at its corners. For reference: slow, on the CPU."""
    from scipy.optimize import linprog
    from scipy.sparse import csr_array, vstack

    m = scores.shape[-1]
    place = torch.arange(m * m)
    rows, columns = (csr_array(([1.0] * m * m, (line.numpy(), place.numpy()))) for line in (place // m, place % m))
    sums = vstack([rows, columns]).tocsr()
    tables = [linprog(-tile.double().flatten().numpy(), A_eq=sums, b_eq=[n] * 2 * m, bounds=(0, 1), method="highs").x
              for tile in scores]
    return torch.tensor([list(table) for table in tables]).view(scores.shape) > 0.5
