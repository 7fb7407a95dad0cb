"""TASD: a sum of N:M matrices, each made of what the ones before it leave (Jeong et al. 2025); stored as one N:M a term.

>>> scores = torch.tensor([[9.0, 8.0, 7.0, 6.0, 1.0, 0.0, 0.0, 5.0]])
>>> structure = TASD((NM(1, 4), NM(2, 8)))
>>> structure.mask(scores).int()  # 9 and 5 are in the first term; of what is left, 8 and 7 in the second
tensor([[1, 1, 1, 0, 0, 0, 0, 1]], dtype=torch.int32)
>>> packed = structure.pack(scores * structure.mask(scores))
>>> packed.values
tensor([[9., 5., 8., 7.]])
>>> [operand.values.tolist() for operand in structure.operands(packed)]
[[[[9.0], [5.0]]], [[[8.0, 7.0]]]]
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from sparsesurvey.structure import Facts, Pattern, Plan, Shape, check_part, check_weight
from sparsesurvey.structures.nm import NM, PackedNM, tensor_cores

Terms = tuple[NM, ...]


class PackedTASD(NamedTuple):
    values: Tensor  # [out, stored]: in each row the values of the first term, then those of the second, ...
    index: Tensor  # uint8 [out, bytes]: likewise their codes
    shape: Shape


@dataclass(frozen=True)
class TASD(Pattern):
    """A sum of two or more N:M matrices along the inputs; each m is a multiple of the one before, and all fit in the whole.

    As a pattern, what the sum may have: a set of weights of which each term takes its share of every group. Costs what
    its terms cost together, in bytes and in arithmetic: 2:4+2:8 is three quarters of dense.
    """

    terms: Terms = (NM(2, 4), NM(2, 8))

    def __post_init__(self) -> None:
        terms = self.terms
        if not isinstance(terms, tuple) or len(terms) < 2 or not all(isinstance(term, NM) for term in terms):
            raise ValueError(f"terms must be a tuple of two or more NM, such as (NM(2, 4), NM(2, 8)), got {terms!r}")
        if any(term.across for term in terms):
            raise ValueError(f"terms must be along the inputs, got {terms!r}")
        if any(after.m % before.m for before, after in zip(terms, terms[1:])):
            raise ValueError(f"terms must have each m a multiple of the one before, got {self}")
        if sum(term.n * terms[-1].m // term.m for term in terms) > terms[-1].m:
            raise ValueError(f"terms must not keep more than all weights, got {self}")

    def __str__(self) -> str:
        return "+".join(map(str, self.terms))

    @classmethod
    def variants(cls) -> tuple["TASD", ...]:
        two = NM(2, 4)
        return (cls(), cls((two, NM(2, 16))), cls((two, two)), cls((NM(1, 4), NM(1, 8))), cls((NM(1, 4), NM(1, 4), NM(2, 16))),
                cls((NM(1, 3), NM(1, 6))))

    @property
    def tile(self) -> Shape:
        return (1, self.terms[-1].m)

    @property
    def density(self) -> float:
        return cost(self.terms)

    def facts(self) -> Facts:
        parts = [tensor_cores(term.n, term.m)[2] for term in self.terms]
        shares = " + ".join(f"{part:g}" for part in parts)
        hardware = (
            f"A product for each term, added up. On hardware that multiplies any N:M at its density that is {self.density:g} "
            f"of the arithmetic; sparse tensor cores know only 2:4, where the terms cost {shares} of a dense product."
        )
        verdict = "needs hardware of its own" if sum(parts) >= 1 else "sparse tensor cores, term by term"
        why = "inputs {tile_col} × {cols} on of row {row}: {row_kept} of {cols} kept; number {rank_row} of them by magnitude"
        return Facts(verdict, hardware, min(1.0, sum(parts)), None, why, pruned=why, input_grad=1.0, weight_grad=1.0)

    def holds(self, mask: Tensor) -> bool:
        """Can the terms share the kept weights out? What a group of one term cannot take is left to the next term."""
        left, width = self.check_mask(mask).to(torch.int16), 1
        for term in self.terms:
            left = (left.unflatten(1, (-1, term.m // width)).sum(-1, dtype=torch.int16) - term.n).clamp(min=0)
            width = term.m
        return not bool(left.any())

    def select(self, scores: Tensor) -> Tensor:
        """What the first term would take, then the second of what is left, and so on, which is optimal.

        Which weights can be shared out depends on nothing but how many there are in each group, and a group always
        keeps its n; so the best set has the n best of each, and the terms after it see groups of groups (see tests).
        """
        return torch.stack(split(scores, self.terms)).any(0)

    def nnz(self, shape: Shape) -> int:
        return sum(term.nnz(self.check_shape(shape)) for term in self.terms)

    def index_bits(self, shape: Shape) -> int:
        return sum(term.index_bits(self.check_shape(shape)) for term in self.terms)

    def pack(self, weight: Tensor) -> PackedTASD:
        """Each term with exactly its n a group, no weight in two of them."""
        weight = self.check_member(weight).detach()
        out, inn = self.check_shape(weight.shape)
        values, codes = [], []
        for term, mask in zip(self.terms, split(weight.abs(), self.terms)):
            values.append(weight[mask].view(out, inn // term.m * term.n))
            codes.append(term.encode(mask))
        return PackedTASD(torch.cat(values, 1), torch.cat(codes, 1), (out, inn))

    def unpack(self, packed: PackedTASD) -> Tensor:
        return sum(term.unpack(operand) for term, operand in zip(self.terms, self.operands(packed)))

    def operands(self, packed: PackedTASD) -> list[PackedNM]:
        """One N:M operand a term; ValueError if the sizes are wrong."""
        out, inn = shape = self.check_shape(packed.shape)
        widths = [inn // term.m * term.n for term in self.terms]
        lengths = [term.row_bytes(inn) for term in self.terms]
        check_part("values", packed.values, None, (out, sum(widths)))
        check_part("index", packed.index, torch.uint8, (out, sum(lengths)))
        parts = zip(self.terms, packed.values.split(widths, 1), packed.index.split(lengths, 1))
        return [PackedNM(values.reshape(out, -1, term.n), index, shape) for term, values, index in parts]

    # A product is the sum of the terms' products: distributivity.

    def plans(self, packed: PackedTASD, kernel: str) -> list[Plan]:
        return [getattr(term, kernel)(operand) for term, operand in zip(self.terms, self.operands(packed))]

    def spmm_torch_csr(self, packed: PackedTASD) -> Plan:
        return added(self.plans(packed, "spmm_torch_csr"))

    def spmmt_torch_csr(self, packed: PackedTASD) -> Plan:
        return added(self.plans(packed, "spmmt_torch_csr"))

    def sddmm_torch_csr(self, packed: PackedTASD) -> Plan:
        plans = self.plans(packed, "sddmm_torch_csr")
        return lambda dy, x: torch.cat([run(dy, x).flatten(1) for run in plans], 1)

    def spmm_tiled_csr(self, packed: PackedTASD) -> Plan:
        return added(self.plans(packed, "spmm_tiled_csr"))

    def spmmt_tiled_csr(self, packed: PackedTASD) -> Plan:
        return added(self.plans(packed, "spmmt_tiled_csr"))


def added(plans: Sequence[Plan]) -> Plan:
    """Plan of the sum of what several give."""
    def run(x: Tensor) -> Tensor:
        y = plans[0](x)
        for plan in plans[1:]:
            y = y + plan(x)
        return y

    return run


def split(scores: Tensor, terms: Iterable[NM]) -> list[Tensor]:
    """A mask a term, disjoint: the highest scores of every group, each term's among what those before it left."""
    masks = []
    for term in terms:
        masks.append(term.select(scores))
        scores = scores.masked_fill(masks[-1], -torch.inf)
    return masks


def cost(terms: Iterable[NM]) -> float:
    """Stored weights, and multiplications, as a share of dense: the sum of the densities."""
    return sum(term.density for term in terms)


class Series(NamedTuple):
    terms: list[Tensor]  # A_1, A_2, ... of the size of the matrix, zeros elsewhere
    residual: Tensor  # what they leave


def series(matrix: Tensor, terms: Sequence[NM]) -> Series:
    """Jeong et al.'s greedy decomposition of any matrix ``[rows, in]``, weight or activations, into terms and a rest.

    >>> parts = series(torch.tensor([[4.0, 3.0, 2.0, 1.0]]), [NM(1, 4), NM(2, 4)])
    >>> [part.tolist() for part in parts.terms], parts.residual.tolist()
    ([[[4.0, 0.0, 0.0, 0.0]], [[0.0, 3.0, 2.0, 0.0]]], [[0.0, 0.0, 0.0, 1.0]])
    """
    check_weight(matrix, "matrix")
    residual, found = matrix, []
    for term in terms:
        found.append(term.project(residual))
        residual = residual - found[-1]
    return Series(found, residual)


def dropped(weight: Tensor, terms: Sequence[NM]) -> float:
    """Share of the non-zeros of a weight ``[out, in]`` that a series leaves out; 0 of a weight that has none."""
    return int(series(weight, terms).residual.count_nonzero()) / max(1, int(weight.count_nonzero()))


def captured(weight: Tensor, terms: Sequence[NM]) -> float:
    """Share of the non-zeros of a matrix ``[rows, in]`` that are in a series."""
    return 1 - dropped(weight, terms)


def output_error(weight: Tensor, terms: Sequence[NM], x: Tensor) -> float:
    """||x R.T|| / ||x W.T|| of the residual R of a weight ``[out, in]``, for inputs ``[tokens, in]`` of its layer."""
    return float((x @ series(weight, terms).residual.T).norm() / (x @ weight.T).norm())


def choose(layers: Mapping[str, Tensor], candidates: Iterable[Terms], alpha: float,
           inputs: Mapping[str, Tensor] | None = None) -> dict[str, Terms | None]:
    """TASDER's choice for weights: the cheapest series of each layer that loses at most ``alpha``, None where none does.

    Lost is the share of dropped non-zeros or, with ``inputs`` ``{layer: [tokens, in]}``, the relative output error.
    The search is our reading: the paper says what is chosen, not how.
    """
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be a number from 0 to 1, got {alpha!r}")
    ordered = sorted(candidates, key=lambda terms: (cost(terms), len(terms)))
    loss = lambda name, terms: (
        dropped(layers[name], terms) if inputs is None else output_error(layers[name], terms, inputs[name]))
    return {name: next((terms for terms in ordered if loss(name, terms) <= alpha), None) for name in layers}


def energy_delay(terms: Sequence[NM], shape: Shape, tokens: int, bit: float, itemsize: int = 2) -> float:
    """Energy-delay product of ``y = x @ W.T`` over that of dense, where a stored bit costs ``bit`` multiplications to read.

    Our reading of the paper's model, for hardware that multiplies any N:M: energy is that of the multiplications and of
    reading the weight once, delay is the share of multiplications. Activations, registers and control cost nothing.
    """
    size = prod(shape)
    bits = sum(term.value_bits(shape, itemsize) + term.index_bits(shape) for term in terms)
    energy = cost(terms) * tokens * size + bit * bits
    return cost(terms) * energy / (tokens * size + bit * 8 * itemsize * size)
