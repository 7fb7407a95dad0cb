"""HiNM, hierarchical N:M (Yu et al. 2024): panels of v outputs keep some of the inputs, then n of every m that are left.

>>> scores = torch.tensor([[9.0, 1.0, 5.0, 0.0, 0.0, 4.0, 8.0, 0.0],
...                        [0.0, 1.0, 5.0, 0.0, 7.0, 3.0, 6.0, 1.0]])
>>> structure = HiNM(v=2, columns=0.5, n=2, m=4)
>>> structure.mask(scores).int()  # the sums are 9 2 10 0 7 7 14 1: inputs 0, 2, 6 and the first of the 7s survive
tensor([[1, 0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 1, 0, 1, 0]], dtype=torch.int32)
>>> packed = structure.pack(scores * structure.mask(scores))
>>> packed.values
tensor([[[9., 8.]],
<BLANKLINE>
        [[7., 6.]]])
>>> packed.columns.tolist()  # no row keeps anything in column 2: three inputs are stored, and the last one once more
[[0, 4, 6, 6]]
>>> [f"{byte:04b}" for byte in packed.index.flatten().tolist()]  # of those: the third and the first; third and second
['1000', '1001']
"""

from dataclasses import dataclass
from itertools import combinations
from math import comb, log2
from typing import NamedTuple

import torch
from torch import Tensor

from sparsesurvey.packing import entropy, index_dtype, tiles, top
from sparsesurvey.structure import Facts, Pattern, Plan, Shape, check_density, check_int, check_part, check_weight
from sparsesurvey.structures.block import Panel, gather_gradient_plan, gather_plan, panel_code, scatter_plan
from sparsesurvey.structures.nm import NM, PackedNM, most_of_4, tensor_cores

MOST_SETS = 1 << 20  # sets of columns that ``optimum`` is ready to weigh


class PackedHiNM(NamedTuple):
    values: Tensor  # [out, kept / m, n]
    index: Tensor  # uint8 [out, bytes]: the n:m code of the compacted matrix [out, kept]
    columns: Tensor  # [out / v, kept], which inputs these are; one that repeats the one before it stands nowhere
    rising: bool  # False where the caller gave each panel an order of its own
    shape: Shape


@dataclass(frozen=True)
class HiNM(Pattern):
    """Every panel of ``v`` outputs keeps ``round(columns * in / m) * m`` inputs; moved together they are ``n``:``m``.

    A panel with fewer non-zeros may leave gaps: its used columns, in their order, fall into at most kept / m
    consecutive groups of at most m columns, in each of which a row has at most n non-zeros.

    The order of the inputs is each panel's own business: the operand lists them one by one, so that a kernel that
    gathers them in another order costs the same. ``holds``, ``select`` and ``pack`` take such an ``order``
    (int64 ``[out / v, in]``, a permutation in each row; rising if None), which ``sparsesurvey.gyro`` looks for.
    """

    v: int = 32
    columns: float = 0.5
    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        check_int("v", self.v, 1)
        check_density(self.columns, "columns")
        check_int("m", self.m, 1, 64)
        check_int("n", self.n, 1, self.m)

    def __str__(self) -> str:
        return f"HiNM {self.v} {100 * self.columns:g}% {self.n}:{self.m}"

    @classmethod
    def variants(cls) -> tuple["HiNM", ...]:
        return cls(), cls(64, 0.5), cls(16, 0.5), cls(32, 0.25), cls(32, 0.5, 1, 4), cls(16, 0.75, 4, 8)

    @property
    def tile(self) -> Shape:
        return (self.v, self.m)

    @property
    def density(self) -> float:
        return self.columns * self.n / self.m

    @property
    def inner(self) -> NM:
        """The structure of the compacted matrix."""
        return NM(self.n, self.m)

    def panels(self, shape: Shape) -> int:
        return self.check_shape(shape)[0] // self.v

    def kept(self, shape: Shape) -> int:
        """How many inputs a panel keeps: a multiple of m, at least m."""
        return max(1, round(self.columns * self.check_shape(shape)[1] / self.m)) * self.m

    def facts(self) -> Facts:
        v, n, m = self.v, self.n, self.m
        place = "panel {tile_row}, {rows} rows high: column {col} is "
        why = place + f"among those that it keeps; of every {m} of them this row keeps {n}"
        gone = place + "none of those that it keeps, by the sum of its scores over the panel"
        positions = entropy(self.columns) / v + self.columns * log2(comb(m, n)) / m
        sparse = n < m and most_of_4(n, m) <= 2
        rows = 16 if sparse else 8  # of weights that one instruction multiplies
        tall, inside = max(1.0, rows / v), (0.5 if sparse else 1.0)
        gathered, backward = self.columns * inside * tall, min(1.0, self.columns * max(1.0, 8 / v))
        verdict, words, plain = tensor_cores(n, m)
        if self.columns == 1:
            return Facts(verdict, words, plain, positions, why, gone, why, 1.0, 1.0)
        units = "sparse tensor cores halve what is left" if sparse else "dense tensor cores multiply them"
        hardware = f"The panel's inputs are gathered, which leaves {self.columns:g} of the arithmetic; {units}."
        if v < rows:
            hardware += f" But an instruction takes {rows} rows that share their columns, and {v} fill it only in part."
        hardware += " By notes on the paper its kernel ran on an RTX 3090; no public code is known."
        verdict = f"gathered, then {'sparse' if sparse else 'dense'} tensor cores"
        return Facts(verdict, hardware, min(1.0, gathered), positions, why, gone, why, backward, backward)

    def holds(self, mask: Tensor, order: Tensor | None = None) -> bool:
        return self.groups(self.split(self.check_mask(mask)), self.check_order(mask, order)) is not None

    def split(self, matrix: Tensor) -> Tensor:
        """``[out, in]`` as panels ``[out / v, v, in]``."""
        return matrix.reshape(-1, self.v, matrix.shape[1])

    def check_order(self, matrix: Tensor, order: Tensor | None) -> Tensor | None:
        """Return the panels' orders of their inputs, or raise ValueError where a row is no permutation."""
        if order is None:
            return None
        shape, right = (len(matrix) // self.v, matrix.shape[1]), torch.arange(matrix.shape[1], device=matrix.device)
        if not isinstance(order, Tensor) or order.dtype != torch.int64 or tuple(order.shape) != shape:
            raise ValueError(f"order must be int64 {list(shape)}, a permutation of the inputs for each panel")
        if not torch.equal(order.sort(-1).values, right.expand(shape)):
            raise ValueError(f"order must have in each row a permutation of 0 to {shape[1] - 1}")
        return order

    def groups(self, kept: Tensor, order: Tensor | None = None) -> Tensor | None:
        """Columns ``[panels, kept]`` that hold a mask ``[panels, v, in]``, padded by repeats; None if none do.

        A part of a good group is a good group, so that the longest groups from left to right are as few as can be.
        """
        most, used = self.kept((self.v, kept.shape[-1])), kept.any(1)  # [panels, in]
        used = used if order is None else used.gather(1, order)
        count = used.sum(1, keepdim=True)
        width = max(1, int(count.max()))
        if width > most:
            return None
        slots = used.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :width]  # the used ones come first
        slots = slots if order is None else order.gather(1, slots)
        length = self.longest(kept.gather(2, slots.unsqueeze(1).expand(-1, self.v, -1)) & self.within(width, count))
        start = torch.zeros_like(count)
        places = []
        for _ in range(most // self.m):
            end = torch.minimum(start + length.gather(1, start.clamp(max=width - 1)), count)
            places.append(torch.minimum(start + torch.arange(self.m, device=start.device), end - 1))
            start = end
        if (start < count).any():
            return None
        return slots.gather(1, torch.cat(places, 1).clamp(min=0))

    def within(self, width: int, count: Tensor) -> Tensor:
        """Which of ``width`` slots are real in each panel, ``[panels, 1, width]``."""
        return (torch.arange(width, device=count.device) < count).unsqueeze(1)

    def longest(self, entries: Tensor) -> Tensor:
        """How many columns from each one on can share a group: ``[panels, v, width]`` to int64 ``[panels, width]``."""
        total = torch.zeros_like(entries, dtype=torch.uint8)
        length = torch.zeros_like(entries[:, 0], dtype=torch.int64)
        for step in range(min(self.m, entries.shape[-1])):
            total[..., : entries.shape[-1] - step] += entries[..., step:]
            length += total.amax(1) <= self.n
        return length

    def select(self, scores: Tensor, order: Tensor | None = None) -> Tensor:
        """The inputs with the highest sums of scores over the panel, then in each row the n highest of every m.

        As the paper does it; not optimal (see ``optimum``): a sum counts scores that the second step then drops. An input
        of which no row keeps anything (rare, unless v is small) leaves no trace: chosen again from what was kept, the
        inputs after it may fall into other groups.
        """
        tiled = self.split(scores)  # [panels, v, in]
        columns = self.survivors(scores, order).unsqueeze(1).expand(-1, self.v, -1)
        kept = top(tiled.gather(2, columns).unflatten(2, (-1, self.m)), self.n).flatten(2)
        return torch.zeros_like(tiled, dtype=torch.bool).scatter_(2, columns, kept).view(scores.shape)

    def survivors(self, scores: Tensor, order: Tensor | None = None) -> Tensor:
        """The inputs that each panel keeps, int64 ``[panels, kept]``, in the panel's order."""
        wide = torch.promote_types(scores.dtype, torch.float32)
        sums = self.split(scores).sum(1, dtype=wide)
        sums = sums if order is None else sums.gather(1, order)
        chosen = top(sums, self.kept(scores.shape))
        first = chosen.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : self.kept(scores.shape)]
        return first if order is None else order.gather(1, first)

    def nnz(self, shape: Shape) -> int:
        return shape[0] * self.kept(shape) // self.m * self.n

    def index_bits(self, shape: Shape) -> int:
        out, inn = self.check_shape(shape)
        listed = self.panels(shape) * self.kept(shape) * 8 * index_dtype(inn).itemsize
        return self.inner.index_bits((out, self.kept(shape))) + listed

    def pack(self, weight: Tensor, order: Tensor | None = None) -> PackedHiNM:
        check_weight(weight)
        self.check_shape(weight.shape)
        tiled = self.split(weight.detach())
        columns = self.groups(tiled != 0, self.check_order(weight, order))
        if columns is None:
            raise ValueError(f"weight is not {self}: apply a mask of this structure before packing it")
        compact = tiled.gather(2, columns.unsqueeze(1).expand(-1, self.v, -1)).masked_fill(self.repeats(columns), 0)
        inner = self.inner.pack(compact.flatten(0, 1))
        listed = columns.to(index_dtype(weight.shape[1]))
        return PackedHiNM(inner.values, inner.index, listed, order is None, tuple(weight.shape))

    @staticmethod
    def repeats(columns: Tensor) -> Tensor:
        """Which of the listed columns are padding, ``[panels, 1, kept]``."""
        return torch.nn.functional.pad(columns[:, 1:] == columns[:, :-1], (1, 0)).unsqueeze(1)

    def unpack(self, packed: PackedHiNM) -> Tensor:
        compact = self.compact(packed)  # [panels, v, kept]
        columns = packed.columns.long().unsqueeze(1).expand(compact.shape)
        weight = compact.new_zeros(*compact.shape[:2], packed.shape[1]).scatter_add_(2, columns, compact)
        return weight.view(packed.shape)

    def compact(self, packed: PackedHiNM) -> Tensor:
        """The listed columns of each panel ``[panels, v, kept]``, 0 in padding; ValueError if the operand is corrupt."""
        out, inn = self.check_shape(packed.shape)
        kept, columns = self.kept(packed.shape), packed.columns
        check_part("columns", columns, index_dtype(inn), (out // self.v, kept))
        if int(columns.min()) < 0 or int(columns.max()) >= inn:
            raise ValueError(f"packed.columns must be from 0 to {inn - 1}")
        apart = torch.arange(inn, inn + kept, device=columns.device)  # padding may be there as often as it likes
        real = torch.where(self.repeats(columns).squeeze(1), apart, columns)
        listed = columns if packed.rising else real.sort(-1).values
        bad = columns[:, 1:] < columns[:, :-1] if packed.rising else listed[:, 1:] == listed[:, :-1]
        if bad.any():
            what = "not fall" if packed.rising else "be distinct, but for padding,"
            raise ValueError(f"packed.columns must {what} in a panel")
        flat = self.inner.unpack(PackedNM(packed.values, packed.index, (out, kept)))
        return self.split(flat).masked_fill(self.repeats(columns), 0)

    # A CPU gathers the inputs of a panel and multiplies them densely, the zeros of the inner n:m included: ``columns`` of
    # the dense arithmetic. In which order the inputs are gathered is all the same to it.

    def parts(self, packed: PackedHiNM) -> tuple[list[Panel], Shape, Tensor]:
        """The panels, how many of them and of inputs there are, and a tensor shaped as their v x 1 vectors."""
        compact = self.compact(packed).detach()
        panels = [Panel(columns, weight.T.contiguous()) for columns, weight in zip(packed.columns.long(), compact)]
        return panels, (len(panels), packed.shape[1]), compact.reshape(-1, self.v, 1)

    def spmm_gather(self, packed: PackedHiNM) -> Plan:
        return gather_plan(*self.parts(packed))

    def spmmt_gather(self, packed: PackedHiNM) -> Plan:
        return scatter_plan(*self.parts(packed))

    def sddmm_gather(self, packed: PackedHiNM) -> Plan:
        return self.of_the_kept(gather_gradient_plan(*self.parts(packed)), packed)

    def of_the_kept(self, run: Plan, packed: PackedHiNM) -> Plan:
        """A plan that gives the gradients of the listed columns, as one of those of the values in them."""
        out, kept = packed.shape[0], packed.columns.shape[1]
        number = torch.arange(out * kept, device=packed.values.device).view(-1, kept, self.v)  # place in the vectors
        chosen = self.inner.decode(PackedNM(packed.values, packed.index, (out, kept)))
        places = number.mT.reshape(out, kept)[chosen]
        padding = self.repeats(packed.columns).expand(-1, self.v, -1).reshape(out, kept)[chosen]
        shape = packed.values.shape
        return lambda dy, x: run(dy, x).flatten().index_select(0, places).masked_fill_(padding, 0).view(shape)

    # On a GPU the same on dense tensor cores (kernels/panel.py), or without the zeros of 2:4 on sparse ones (kernels/mma_sp.py).

    def spmm_triton(self, packed: PackedHiNM) -> Plan:
        return panel_code().gather_plan(*self.parts(packed))

    def spmmt_triton(self, packed: PackedHiNM) -> Plan:
        return panel_code().spread_plan(*self.parts(packed))

    def spmmt_triton_scatter(self, packed: PackedHiNM) -> Plan:
        return panel_code().scatter_plan(*self.parts(packed))

    def sddmm_triton(self, packed: PackedHiNM) -> Plan:
        return self.of_the_kept(panel_code().sample_plan(*self.parts(packed)), packed)

    def spmm_cuda(self, packed: PackedHiNM) -> Plan:
        from sparsesurvey.kernels import mma_sp

        compact = self.compact(packed)
        mma_sp.require(packed.values, self.n, self.m, self.v)
        return mma_sp.product_plan(mma_sp.arrange(*self.quads(compact, packed.columns), packed.shape))

    def quads(self, compact: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The groups of four as ``mma_sp.arrange`` takes them: values and positions, inputs, groups a panel."""
        from sparsesurvey.kernels import mma_sp

        groups = columns.unflatten(1, (-1, self.m))  # [panels, groups, m]
        values, positions = mma_sp.compressed(compact.unflatten(2, (-1, self.m)).transpose(1, 2).flatten(0, 1))
        return values, positions, groups.flatten(0, 1), torch.full((len(groups),), groups.shape[1])


def optimum(structure: HiNM, scores: Tensor) -> Tensor:
    """The mask of the highest kept sum, exactly: dynamic programming over the groups of each panel, all sets of m columns.

    Time and memory grow as in^m: for small tiles, to see what ``select`` misses. ValueError for more than 2^20 sets.
    """
    structure.check_scores(scores)
    inn, sizes = scores.shape[1], range(1, structure.m + 1)
    number = sum(comb(inn, size) for size in sizes)
    if number > MOST_SETS:
        what = f"{number} sets of at most {structure.m} of {inn}"
        raise ValueError(f"scores must have fewer inputs for an exact choice: {what}")
    sets = torch.full((number, structure.m), inn)  # ``inn`` stands for no column
    start = 0
    for size in sizes:
        chosen = torch.tensor(list(combinations(range(inn), size)))
        sets[start:start + len(chosen), :size] = chosen
        start += len(chosen)
    best = [_best_panel(structure, panel.double(), sets) for panel in structure.split(scores)]
    return torch.cat(best)


def _best_panel(structure: HiNM, scores: Tensor, sets: Tensor) -> Tensor:
    """The best mask ``[v, in]`` of one panel, from every set of columns that may be a group, ``[sets, m]``."""
    rows, inn = scores.shape
    wide = torch.nn.functional.pad(scores, (0, 1), value=-torch.inf)
    worth = torch.stack([row[sets].topk(structure.n).values.clamp(min=0).sum(-1) for row in wide]).sum(0)
    first, last = sets[:, 0], sets.masked_fill(sets == inn, -1).amax(1)
    reached = [torch.zeros(inn + 1, dtype=scores.dtype)]  # by number of groups: the best sum in the first so many columns
    for _ in range(structure.kept((structure.v, inn)) // structure.m):
        ends = torch.zeros(inn + 1, dtype=scores.dtype).scatter_reduce_(0, last + 1, reached[-1][first] + worth, "amax")
        reached.append(ends.cummax(0).values)
    mask, end = torch.zeros(rows, inn + 1, dtype=torch.bool), inn
    for groups in range(len(reached) - 1, 0, -1):  # back from the end: which set was the last group
        total = (reached[groups - 1][first] + worth).masked_fill(last >= end, -1)
        group = sets[int(total.argmax())]
        mask[:, group] |= top(wide[:, group], structure.n)
        end = int(group[0])
        if not end:
            break
    return mask[:, :inn]
