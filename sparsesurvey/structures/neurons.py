"""Neurons: whole rows or whole columns are kept (Li et al. 2017 for filters); what stays is a smaller dense matrix.

>>> scores = torch.tensor([[1.0, 2.0, 3.0],
...                        [0.0, 9.0, 0.0],
...                        [1.0, 1.0, 1.0],
...                        [2.0, 2.0, 2.0]])
>>> structure = Neurons(0.5)
>>> structure.mask(scores).int()  # taller than wide: the rows are neurons; their sums are 6, 9, 3 and 6
tensor([[1, 1, 1],
        [1, 1, 1],
        [0, 0, 0],
        [0, 0, 0]], dtype=torch.int32)
>>> packed = structure.pack(scores * structure.mask(scores))
>>> packed.values, packed.index.tolist()
(tensor([[1., 2., 3.],
        [0., 9., 0.]]), [0, 1])

In the MLP of a Mistral, row i of ``gate_proj``, row i of ``up_proj`` and column i of ``down_proj`` are one neuron.
Removed together, no index is needed:

>>> gate, up, down = scores, scores, scores.T
>>> [part.shape for part in remove_neurons(gate, up, down, torch.tensor([0, 1]))]
[torch.Size([2, 3]), torch.Size([2, 3]), torch.Size([3, 2])]
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparsesurvey.packing import index_dtype, top
from sparsesurvey.structure import (
    Facts, Pattern, Plan, Shape, check_activations, check_density, check_order, check_pair, check_part,
    check_weight,
)

AXES = ("inner", "out", "in")


class PackedNeurons(NamedTuple):
    values: Tensor  # the rows [kept, in] or the columns [out, kept] that are kept
    index: Tensor  # [kept], rising: which; int16 where there are at most 32768 to choose from, else int32
    shape: Shape


@dataclass(frozen=True)
class Neurons(Pattern):
    """At most ``round(density * neurons)`` whole neurons keep anything.

    A neuron is a row (``axis="out"``, as in gate_proj and up_proj) or a column (``"in"``, as in down_proj). ``"inner"``
    takes the longer side, which in all three is the inside of the MLP; a square weight's rows.
    """

    density: float = 0.5
    axis: str = "inner"

    def __post_init__(self) -> None:
        check_density(self.density)
        if not isinstance(self.axis, str) or self.axis not in AXES:
            raise ValueError(f"axis must be one of {', '.join(AXES)}, got {self.axis!r}")

    def __str__(self) -> str:
        return " ".join(["neurons", *([] if self.axis == "inner" else [self.axis]), f"{100 * self.density:g}%"])

    @classmethod
    def variants(cls) -> tuple["Neurons", ...]:
        return cls(0.5), cls(0.25), cls(0.1), cls(0.5, "out"), cls(0.5, "in")

    def dim(self, shape: Shape) -> int:
        """The dimension of the weight that neurons are numbered along: 0 for rows, 1 for columns."""
        out, inn = self.check_shape(shape)
        return int(inn > out) if self.axis == "inner" else int(self.axis == "in")

    def neurons(self, shape: Shape) -> int:
        """How many neurons are kept."""
        return round(self.density * shape[self.dim(shape)])

    def nnz(self, shape: Shape) -> int:
        return self.neurons(shape) * shape[1 - self.dim(shape)]

    def index_bits(self, shape: Shape) -> int:
        return self.neurons(shape) * 8 * index_dtype(shape[self.dim(shape)]).itemsize

    def facts(self) -> Facts:
        why = "row {row}: {row_kept} of {cols} kept; a neuron stays or goes as a whole, by its Σ|w|"
        hardware = ("Every machine multiplies a smaller dense matrix faster, with the library that it has. Where an "
                    "MLP drops the same neurons in all three projections, nothing is gathered and nothing looked up.")
        return Facts("dense, smaller", hardware, self.density, 0.0, why, pruned=why)

    def holds(self, mask: Tensor) -> bool:
        used = self.check_mask(mask).any(1 - self.dim(mask.shape))
        return int(used.count_nonzero()) <= self.neurons(mask.shape)

    def select(self, scores: Tensor) -> Tensor:
        """The neurons with the highest sums of scores, which is optimal for one weight."""
        across = 1 - self.dim(scores.shape)
        sums = scores.sum(across, dtype=torch.promote_types(scores.dtype, torch.float32))
        return top(sums, self.neurons(scores.shape)).unsqueeze(across).repeat_interleave(scores.shape[across], across)

    def pack(self, weight: Tensor) -> PackedNeurons:
        dim = self.dim(self.check_member(weight).shape)
        index = self.stored(weight).any(1 - dim).nonzero().flatten()
        values = weight.index_select(dim, index)
        return PackedNeurons(values, index.to(index_dtype(weight.shape[dim])), tuple(weight.shape))

    def unpack(self, packed: PackedNeurons) -> Tensor:
        index = self.places(packed)
        return packed.values.new_zeros(packed.shape).index_copy(self.dim(packed.shape), index, packed.values)

    def places(self, packed: PackedNeurons) -> Tensor:
        """The numbers of the neurons as int64; ValueError if the operand is corrupt."""
        shape, dim = self.check_shape(packed.shape), self.dim(packed.shape)
        kept = self.neurons(shape)
        check_part("values", packed.values, None, (shape[0], kept) if dim else (kept, shape[1]))
        check_part("index", packed.index, index_dtype(shape[dim]), (kept,))
        check_order("index", packed.index, shape[dim])
        return packed.index.long()

    # Each product is one dense product with the small matrix, before or after a gather or a scatter of activations.

    def spmm_gather(self, packed: PackedNeurons) -> Plan:
        dim, index = self.dim(packed.shape), self.places(packed)
        return small_product("x", packed.values.detach().T, index, dim == 1, packed.shape[::-1])

    def spmmt_gather(self, packed: PackedNeurons) -> Plan:
        dim, index = self.dim(packed.shape), self.places(packed)
        return small_product("dy", packed.values.detach(), index, dim == 0, packed.shape)

    def sddmm_gather(self, packed: PackedNeurons) -> Plan:
        dim, index = self.dim(packed.shape), self.places(packed)
        values = packed.values.detach()

        def run(dy: Tensor, x: Tensor) -> Tensor:
            dy, x = check_pair(dy, x, packed.shape, values)
            return dy.T @ x.index_select(1, index) if dim else dy.index_select(1, index).T @ x

        return run


def small_product(name: str, small: Tensor, index: Tensor, gather: bool, shape: Shape) -> Plan:
    """Plan of ``x [tokens, shape[0]]`` to ``[tokens, shape[1]]`` by ``small``, which has some of its rows or columns."""
    def run(x: Tensor) -> Tensor:
        x = check_activations(name, x, shape[0], small)
        if gather:
            return x.index_select(1, index) @ small
        return x.new_zeros(len(x), shape[1]).index_copy_(1, index, x @ small)

    return run


# The neurons of a gated MLP ``down(silu(gate(x)) * up(x))``: gate and up ``[inner, hidden]``, down ``[hidden, inner]``.


def neuron_scores(gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Σ|w| over all weights of a neuron, ``[inner]``: row i of gate and of up, and column i of down."""
    check_mlp(gate, up, down)
    wide = torch.promote_types(gate.dtype, torch.float32)
    return sum(part.abs().sum(1, dtype=wide) for part in (gate, up, down.T))


def remove_neurons(gate: Tensor, up: Tensor, down: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three weights of the MLP with the neurons ``keep`` (rising numbers) alone, ``[kept, hidden]`` twice and
    ``[hidden, kept]``. ValueError if they are no MLP or a number is none of its neurons'.
    """
    check_mlp(gate, up, down)
    if not isinstance(keep, Tensor) or keep.dim() != 1 or keep.is_floating_point() or keep.dtype == torch.bool:
        raise ValueError(f"keep must be a vector of neurons' numbers, got {keep!r}")
    if not keep.numel() or int(keep.min()) < 0 or int(keep.max()) >= len(gate) or (keep.diff() <= 0).any():
        raise ValueError(f"keep must rise strictly from at least 0 to at most {len(gate) - 1}, got {keep.tolist()}")
    return gate[keep], up[keep], down[:, keep]


def shrink(model: nn.Module, density: float) -> nn.Module:
    """Keep, in place, the ``round(density * inner)`` neurons of each MLP with the highest ``neuron_scores``; return it.

    An MLP is a module with linear layers gate_proj, up_proj and down_proj; ValueError if there is none.
    """
    check_density(density)
    names = ("gate_proj", "up_proj", "down_proj")
    linear = lambda part: all(isinstance(getattr(part, name, None), nn.Linear) for name in names)
    blocks = [part for part in model.modules() if linear(part)]
    if not blocks:
        raise ValueError(f"model must have modules with linear layers {', '.join(names)}, "
                         f"got a {type(model).__name__} with none")
    for block in blocks:
        layers = [getattr(block, name) for name in names]
        weights = [layer.weight.detach() for layer in layers]
        scores = neuron_scores(*weights)
        keep = scores.topk(round(density * len(scores))).indices.sort().values
        for layer, weight in zip(layers, remove_neurons(*weights, keep)):
            layer.weight = nn.Parameter(weight)
            layer.out_features, layer.in_features = weight.shape
    return model


def check_mlp(gate: Tensor, up: Tensor, down: Tensor) -> None:
    """Raise ValueError unless these are the finite weights of one gated MLP."""
    for name, weight in (("gate", gate), ("up", up), ("down", down)):
        check_weight(weight, name)
    if not gate.shape == up.shape == down.shape[::-1]:
        shapes = ", ".join(str(list(weight.shape)) for weight in (gate, up, down))
        raise ValueError(f"gate and up must be [inner, hidden] and down [hidden, inner], got {shapes}")


def first(weight: Tensor, inputs: object = None) -> Tensor:
    """Scores that put the first of the longer side's neurons first, the same ones in gate, up and down.

    Before training no neuron is better than another, so that this is as good a choice as any, and the same in all
    three: a model that is trained under ``Static(first)`` is the smaller dense one.
    """
    check_weight(weight)
    count = max(weight.shape)
    wide = torch.promote_types(weight.dtype, torch.float32)  # 16 bits cannot count that far
    rank = torch.arange(count, 0, -1, dtype=wide, device=weight.device)
    along = rank[:, None] if len(weight) == count else rank
    return along.expand(weight.shape)
