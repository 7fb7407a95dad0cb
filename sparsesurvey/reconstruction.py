"""What a pruned layer's outputs lose, and the least squares that repair them.

A layer with weight W ``[out, in]`` that saw the inputs X ``[tokens, in]`` and now has V instead loses
``|X (W - V)^T|^2 = tr (W - V) H (W - V)^T`` with the gram ``H = X^T X``: all that is needed of X. Every pruner that moves
weights makes this small.
"""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sparsesurvey.structure import Pattern, check_weight, describe

STEP, FIRST, LAST = 10.0, 1e-8, 10.0  # how damping is raised: by what factor, from where if it was 0, up to where
MEMORY = {"cpu": 2**23, "cuda": 2**28}  # bytes that refit takes for equations at a time: what a cache holds, or a launch is worth

Score = Callable[[Tensor, object], Tensor]


class DampingRaised(UserWarning):
    """The damping asked for did not make the gram positive definite; the message says what was used instead."""


class Pruned(NamedTuple):
    """What a pruner returns: ``weight, mask = sparsegpt(...)``."""

    weight: Tensor  # [out, in], of the dtype that came in, 0 where nothing is kept
    mask: Tensor  # bool [out, in], True = kept


def output_error(weight: Tensor, pruned: Tensor, inputs: object) -> float:
    """``|X (W - V)^T|^2 / |X W^T|^2``: the share of the outputs' energy that is lost, from ``inputs.gram``.

    >>> from types import SimpleNamespace
    >>> inputs = SimpleNamespace(gram=torch.diag(torch.tensor([1.0, 4.0])), tokens=2)
    >>> output_error(torch.tensor([[2.0, 1.0]]), torch.tensor([[0.0, 1.0]]), inputs)  # 1 * 2^2 of 1 * 2^2 + 4 * 1^2
    0.5
    """
    gram = gram_of(weight, inputs, torch.float64, "output_error")
    weight, lost = weight.detach().double(), (weight.detach() - pruned.detach()).double()
    return float(((lost @ gram) * lost).sum() / ((weight @ gram) * weight).sum())


def gram_of(weight: Tensor, inputs: object, dtype: torch.dtype, who: str) -> Tensor:
    """The layer's gram ``[in, in]`` per token, a tensor of its own, or a ValueError that says what is missing."""
    check_weight(weight)
    gram, inn = getattr(inputs, "gram", None), weight.shape[1]
    if gram is None:
        raise ValueError(f'{who} needs inputs.gram: calibrate with want=("gram",) first, got {type(inputs).__name__} without it')
    if not isinstance(gram, Tensor) or tuple(gram.shape) != (inn, inn):
        raise ValueError(f"inputs.gram must be [{inn}, {inn}] for a weight {list(weight.shape)}, got {describe(gram)}")
    check_weight(gram, "inputs.gram")
    if (gram.diagonal() < 0).any():
        raise ValueError(f"inputs.gram must have a diagonal of at least 0, got {float(gram.diagonal().min()):g}")
    return gram.detach().to(weight.device, dtype) / max(int(getattr(inputs, "tokens", 1)), 1)


def alive(weight: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and gram without their dead inputs: one that was always 0 gets weight 0 and a 1 on the gram's diagonal."""
    dead = gram.diagonal() == 0
    return weight.masked_fill(dead, 0), gram + torch.diag(dead.to(gram.dtype))


def damped(gram: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    """The gram with ``damp`` times its mean diagonal added to the diagonal, and its factor R, upper, ``R @ R.T`` = gram.

    Where that is not positive definite ``damp`` is multiplied by 10 until it is, and a ``DampingRaised`` warning says so.

    Raises:
        ValueError: a negative ``damp``, or a gram that no damping up to 10 times its mean diagonal makes definite.
    """
    if isinstance(damp, bool) or not isinstance(damp, (int, float)) or not 0 <= damp <= LAST:
        raise ValueError(f"damp must be a number from 0 to {LAST:g}, got {damp!r}")
    size, used = gram.diagonal().mean(), float(damp)
    while used <= LAST:
        shifted = gram + torch.eye(len(gram), dtype=gram.dtype, device=gram.device) * (used * size)
        lower, failed = torch.linalg.cholesky_ex(shifted.flip(0, 1))
        if not failed and lower.isfinite().all():
            if used != damp:
                warnings.warn(f"the gram {list(gram.shape)} is not positive definite with damp={damp:g}: used {used:g}",
                              DampingRaised, stacklevel=3)
            return shifted, lower.flip(0, 1)
        used = max(STEP * used, FIRST)
    raise ValueError(f"inputs.gram must be positive semidefinite: damp was raised from {damp:g} to {LAST:g} in vain")


def refit(weight: Tensor, mask: Tensor, inputs: object, damp: float = 0.0, dtype: torch.dtype = torch.float64) -> Tensor:
    """The weight ``[out, in]`` on the support ``mask`` with the smallest ``output_error``: the best that any update can do.

    Each row is a least-squares problem of its own, ``w_S = (H_SS)^-1 (H w)_S``, solved exactly by Cholesky; rows with
    the same support share the factor. With ``damp`` the distance to the dense weights counts as well, as everywhere here.
    Work: a third of ``kept^3`` for every support; memory some copies of the weight and ``MEMORY``, or what one support needs.
    """
    gram = gram_of(weight, inputs, dtype, "refit")
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != weight.shape:
        raise ValueError(f"mask must be a boolean matrix {list(weight.shape)}, got {describe(mask)}")
    dense, gram = alive(weight.detach().to(dtype), gram)
    gram, _ = damped(gram, damp)
    target = dense @ gram  # [out, in]
    supports, which = mask.unique(dim=0, return_inverse=True)
    fitted = torch.zeros_like(dense)
    width = int(supports.sum(1).max()) if mask.numel() else 0
    together = max(1, MEMORY.get(gram.device.type, 2**28) // (3 * gram.element_size() * max(width, 1) ** 2))
    for start in range(0, len(supports) if width else 0, together):
        rows = ((which >= start) & (which < start + together)).nonzero().flatten()
        fitted[rows] = _solved(gram, supports[start:start + together], which[rows] - start, target[rows])
    return (fitted * mask).to(weight.dtype)


def _solved(gram: Tensor, supports: Tensor, which: Tensor, target: Tensor) -> Tensor:
    """Rows ``[rows, in]`` that solve the equations of their support, one of ``supports`` ``[supports, in]``."""
    width = int(supports.sum(1).max())
    places = supports.int().argsort(dim=1, descending=True, stable=True)[:, :width]  # what is kept, then padding
    real = supports.gather(1, places)
    matrix = gram[places[:, :, None], places[:, None, :]]
    if not real.all():
        matrix *= real[:, :, None] & real[:, None, :]
        matrix.diagonal(dim1=1, dim2=2).add_((~real).to(gram.dtype))
    order = which.argsort(stable=True)  # a support's rows side by side, as its right-hand sides
    first = torch.searchsorted(which[order], torch.arange(len(supports), device=which.device))
    column = torch.empty_like(which)
    column[order] = torch.arange(len(which), device=which.device) - first[which[order]]
    sides = target.new_zeros(len(supports), int(column.max()) + 1, width)
    sides[which, column] = target.gather(1, places[which]) * real[which]
    solution = torch.cholesky_solve(sides.mT, torch.linalg.cholesky(matrix)).mT[which, column]
    return torch.zeros_like(target).scatter_(1, places[which], solution * real[which])


def refitted(weight: Tensor, structure: Pattern, inputs: object, score: Score, damp: float = 0.01,
             dtype: torch.dtype = torch.float32) -> Pruned:
    """A pruner made of a score: the structure chooses from it, ``refit`` gives the best values.

    ``functools.partial(refitted, score=wanda)`` is one for ``prune_model``. It costs far more than SparseGPT, see ``refit``.
    """
    check_pattern(structure, "refitted")
    mask = structure.mask(score(weight, inputs))
    return Pruned(refit(weight, mask, inputs, damp, dtype), mask)


def check_pattern(structure: object, who: str) -> None:
    """Raise ValueError unless the structure has masks to choose from."""
    if not isinstance(structure, Pattern):
        raise ValueError(f"{who} needs a structure with a mask (a Pattern), got {structure!r}")
