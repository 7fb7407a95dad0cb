"""SparseGPT (Frantar and Alistarh 2023): prune from the first input to the last, and let later weights make good.

>>> from types import SimpleNamespace
>>> from sparsesurvey.structures import NM
>>> twins = SimpleNamespace(gram=torch.tensor([[1.0, 0.99], [0.99, 1.0]]), tokens=1)  # two inputs that say the same
>>> weight, mask = sparsegpt(torch.tensor([[1.0, 2.0]]), NM(1, 2), twins, damp=0)
>>> weight, mask  # the second weight takes over what the first one did
(tensor([[0.0000, 2.9900]]), tensor([[False,  True]]))
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from sparsesurvey.reconstruction import Pruned, alive, check_pattern, damped, gram_of
from sparsesurvey.structure import Pattern, Shape, check_int

BLOCK = 128  # inputs that an unstructured choice is made for at a time


class Sweep(NamedTuple):
    """What a sweep did: enough to see the weight at any moment of it."""

    weight: Tensor  # [out, in], of the dtype of the sweep
    mask: Tensor  # bool [out, in]
    errors: Tensor  # [out, in]: what was pruned at each place, over the diagonal of ``factor``
    factor: Tensor  # [in, in], upper, ``factor.T @ factor`` is the inverse of the damped gram per token
    width: int  # inputs that were chosen at a time

    def after(self, columns: int) -> Tensor:
        """The weight ``[out, in]`` when that many inputs were done; 0 is the dense one, without its dead inputs."""
        return self.weight + self.errors[:, columns:] @ self.factor[columns:]

    def losses(self) -> Tensor:
        """``[in]``: what each step added to ``tr (W - V) H (W - V)^T``, with the damped gram per token. They sum to it."""
        return self.errors.square().sum(0)


def sparsegpt(weight: Tensor, structure: Pattern, inputs: object, damp: float = 0.01, block: int = BLOCK,
              dtype: torch.dtype = torch.float32) -> Pruned:
    """Prune ``weight`` ``[out, in]`` to ``structure`` and move what is kept; ``inputs.gram`` is the layer's ``X^T X``.

    With ``U`` the upper Cholesky factor of ``(H + damp mean(diag H) I)^-1``, input after input: the structure chooses by
    the scores ``w^2 / U_jj^2``, what is pruned leaves the error ``e = w / U_jj``, and ``W[:, j:] -= e U[j, j:]``. See
    ``columns_at_a_time`` for when it chooses. An input that was always 0 loses its weights.

    Raises:
        ValueError: no or an unfit gram, NaN, a structure that has no mask or does not divide the weight.

    Warns:
        DampingRaised: ``damp`` did not do, see ``damped``.
    """
    done = sweep(weight, structure, inputs, damp, block, dtype)
    return Pruned(done.weight.to(weight.dtype), done.mask)


def sweep(weight: Tensor, structure: Pattern, inputs: object, damp: float = 0.01, block: int = BLOCK,
          dtype: torch.dtype = torch.float32, mask: Tensor | None = None) -> Sweep:
    """``sparsegpt`` with all that it did on the way. With a ``mask`` only the weights that it keeps are moved."""
    check_pattern(structure, "sparsegpt")
    gram = gram_of(weight, inputs, dtype, "sparsegpt")
    out, inn = structure.check_shape(weight.shape)
    width = columns_at_a_time(structure, (out, inn), block)
    dense, gram = alive(weight.detach().to(dtype), gram)
    eye = torch.eye(inn, dtype=dtype, device=dense.device)
    factor = torch.linalg.solve_triangular(damped(gram, damp)[1], eye, upper=True)
    if mask is None and width == inn:
        mask = structure.select(dense.square() / factor.diagonal().square())
    moving = _Moving(dense, factor, structure, mask)
    moving.prune(0, inn, width if mask is None else 1, choose=mask is None)
    return Sweep(moving.rows.T.contiguous(), moving.kept.T.contiguous(), moving.errors.T.contiguous(), factor, width)


class _Moving:
    """A sweep under way, all transposed, ``[in, out]``, so that the weights of an input lie side by side."""

    def __init__(self, dense: Tensor, factor: Tensor, structure: Pattern, mask: Tensor | None):
        self.rows, self.factor, self.structure = dense.T.clone(memory_format=torch.contiguous_format), factor, structure
        self.errors, self.diagonal = torch.zeros_like(self.rows), factor.diagonal()
        self.kept = torch.zeros_like(self.rows, dtype=torch.bool) if mask is None else mask.T.contiguous()

    def prune(self, start: int, stop: int, width: int, choose: bool) -> None:
        """The inputs ``start`` to ``stop - 1``: the first half, what it means for the second half, the second half.

        So nearly all arithmetic is in products of matrices, and whatever begins is up to date with all before it.
        """
        if stop - start > width:
            middle = start + (stop - start + width) // (2 * width) * width
            self.prune(start, middle, width, choose)
            self.rows[middle:stop].addmm_(self.factor[start:middle, middle:stop].T, self.errors[start:middle], alpha=-1)
            self.prune(middle, stop, width, choose)
        elif choose:
            self.choose(start, stop)
            self.prune(start, stop, 1, False)
        else:
            row = self.rows[start]
            kept = row * self.kept[start]
            torch.sub(row, kept, out=self.errors[start]).div_(self.diagonal[start])
            row.copy_(kept)

    def choose(self, start: int, stop: int) -> None:
        """The structure's choice from these inputs as they are now."""
        scores = (self.rows[start:stop] / self.diagonal[start:stop, None]).square_().T.contiguous()
        mask = self.structure.select(scores)
        if stop == len(self.rows):
            mask &= self.room(scores, mask)
        self.kept[start:stop] = mask.T

    def room(self, scores: Tensor, mask: Tensor) -> Tensor:
        """What the last choice may keep: where parts round up to more than the whole allows, its lowest scores go."""
        out, inn = self.rows.shape[::-1]
        before = inn - scores.shape[1]
        if int(self.kept.sum()) + int(mask.sum()) <= self.structure.nnz((out, inn)):
            return torch.ones_like(mask)
        last = (1 + scores / scores.max().clamp(min=torch.finfo(scores.dtype).tiny)) * mask
        return self.structure.select(torch.cat([3.0 * self.kept[:before].T, last], 1))[:, before:]


def columns_at_a_time(structure: Pattern, shape: Shape, block: int = BLOCK) -> int:
    """How many inputs the structure chooses for at a time, from the weights as they are when the sweep gets there.

    A tile's width where every tile column chooses alone (m inputs of N:M, V:N:M, transposable N:M); ``block`` where any
    weight may be kept and the choices of parts make a choice of the whole (unstructured, rows of equal density),
    which is what the released code does; else all, once, from the dense weights.
    """
    check_int("block", block, 1)
    out, inn = structure.check_shape(shape)
    width = structure.tile[1]
    if chooses_alone(structure) and structure.nnz((out, width)) * (inn // width) == structure.nnz((out, inn)):
        return width
    return min(block, inn) if structure.tile == (1, 1) and _parts_fit(structure) else inn


@lru_cache(maxsize=256)
def chooses_alone(structure: Pattern) -> bool:
    """Does a tile column choose the same, however loud the others are and whether they are there or not?"""
    rows, width = structure.tile
    few = torch.rand(rows * -(-16 // rows), 4 * width, generator=torch.Generator().manual_seed(0)) + 0.1
    choices = [structure.select(torch.cat([few[:, :width], few[:, width:] * scale], 1)) for scale in (1e-3, 1.0, 1e3)]
    first = structure.select(few[:, :width].contiguous())
    return bool(first.any()) and all(torch.equal(choice[:, :width], first) for choice in choices)


@lru_cache(maxsize=256)
def _parts_fit(structure: Pattern) -> bool:
    """Do masks of two halves of the inputs, chosen apart, make one of the structure?"""
    halves = torch.rand(2, 100, 100, generator=torch.Generator().manual_seed(0))
    return structure.holds(torch.cat([structure.select(half) for half in halves], 1))
