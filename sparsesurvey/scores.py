"""Scores: functions ``(weight, inputs) -> scores`` of the weight's shape, higher = keep.

``weight`` is ``[out, in]`` and ``inputs`` is what the layer saw (``calibration.Inputs``). A score ranks; which weights are
compared with each other is the structure's affair: groups of N:M along its axis, banks of ``Balanced``, the whole layer of
``Unstructured``. Rows compared each on their own are ``Balanced(1, density)``. What a score needs of ``inputs`` stands in
its attribute ``want``, to be handed to ``calibrate``; where it is missing, a ValueError says so.

With other parameters: ``functools.partial(ria, power=1.0)``; ``wanted`` finds the attribute of such a one, too.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsesurvey.structure import check_weight, describe

if TYPE_CHECKING:
    from sparsesurvey.calibration import Inputs


def wanted(score: Callable) -> tuple[str, ...]:
    """What of the inputs a score, or a partial of one, needs: ``calibrate(model, batches, want=wanted(score))``.

    >>> wanted(dass), wanted(magnitude)
    (('output_square',), ())
    """
    return getattr(getattr(score, "func", score), "want", ())


def magnitude(weight: Tensor, inputs: object = None) -> Tensor:
    """``|W|`` (Han et al. 2015): what the layer saw does not matter, so ``inputs`` is not looked at.

    >>> import torch
    >>> magnitude(torch.tensor([[-3.0, 0.5]]))
    tensor([[3.0000, 0.5000]])
    """
    check_weight(weight)
    return weight.abs()


def wanda(weight: Tensor, inputs: Inputs) -> Tensor:
    """``|W_ij| |X_j|`` with the norm of input channel j over all tokens (Sun et al. 2024).

    Its square is the error that removing this weight alone adds to the layer's output, and, where the gram is diagonal, the
    saliency of optimal brain surgery. The paper compares within rows.
    """
    return _part("wanda", weight, inputs, "square", 1).sqrt() * weight.abs()


def wanda_share(weight: Tensor, inputs: Inputs) -> Tensor:
    """Wanda's variant: of the sum of a row's Wanda scores, the share of those that are not above this one.

    The variant prunes, in every row, the lowest scores that together make up at most alpha of the row's sum, with one
    alpha for all rows, found by bisection such that the layer comes out at the density asked for. Comparing these shares
    over the whole layer (``Unstructured``) is the same: alpha is where the layer is cut. Rows then differ in density.
    """
    scores = wanda(weight, inputs)
    order = scores.argsort(dim=1, stable=True)
    sums = scores.gather(1, order).double().cumsum(1)
    share = sums / sums[:, -1:].where(sums[:, -1:] > 0, torch.ones_like(sums[:, -1:]))
    return torch.empty_like(share).scatter_(1, order, share)


def ria(weight: Tensor, inputs: Inputs, power: float = 0.5) -> Tensor:
    """``(|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) |X_j|^power``, relative importance (Zhang et al. 2024).

    A weight counts by its share of its row and of its column, so that no channel is lost as a whole. The released code
    compares within the layer, with N:M after a permutation of channels.
    """
    _check_number("power", power)
    norms = _part("ria", weight, inputs, "square", 1).sqrt()
    size = weight.abs().to(norms.dtype)
    return (_share(size, 0) + _share(size, 1)) * norms.pow(power)


def dass(weight: Tensor, inputs: Inputs, power: float = 0.5) -> Tensor:
    """``|W_ij| |z_i|^power`` for gate_proj and up_proj, z what output neuron i becomes: down_proj's input (Guo et al. 2025).

    A layer that feeds no down_proj (``inputs.output_square`` None), down_proj itself above all, is scored by Wanda. The
    released code compares gate and up within columns, N:M groups lying along the outputs: ``NM(2, 4, "out")``. Within
    a row the factor of neuron i is common to all, so that groups along the inputs, ``NM(2, 4)``, which sparse tensor cores
    need, are chosen by magnitude alone.
    """
    _check_number("power", power)
    if getattr(inputs, "output_square", None) is None:
        return _part("dass", weight, inputs, "square", 1).sqrt() * weight.abs()
    return _part("dass", weight, inputs, "output_square", 0).sqrt().pow(power)[:, None] * weight.abs()


def e_sparse(weight: Tensor, inputs: Inputs, alpha: float = 1.0) -> Tensor:
    """``|W_ij| (H_j + alpha |X_j|)``, H_j the entropy of channel j's histogram, both divided by their means (Li et al. 2023).

    The division is ours: norms grow with the number of tokens and would drown the entropies, and the score be Wanda's.
    How the paper bins is not known to us; ``calibration.entropies`` says how we do, and its paper's alpha is recalled.
    """
    _check_number("alpha", alpha)
    entropy = _part("e_sparse", weight, inputs, "entropy", 1)
    norms = _part("e_sparse", weight, inputs, "square", 1).sqrt()
    return weight.abs() * (_over_mean(entropy) + alpha * _over_mean(norms))


def wanda_plus(weight: Tensor, inputs: Inputs, alpha: float = 100.0) -> Tensor:
    """``|W_ij| (alpha G_ij + |X_j|)`` with the regional gradient G (Wanda++, Yang et al. 2025).

    G is the root mean square, over sequences, of the gradient of the norm of the decoder block's output. As in Wanda's
    code |X_j| is the root mean square over sequences of the norm of one, since the two are added. The paper goes
    on to tune the block for a few steps, which we do not.
    """
    _check_number("alpha", alpha)
    gradient = _part("wanda_plus", weight, inputs, "gradient", None)
    norms = (_part("wanda_plus", weight, inputs, "square", 1) / inputs.sequences).sqrt()
    return weight.abs() * (alpha * gradient + norms)


def taylor(weight: Tensor, inputs: Inputs) -> Tensor:
    """``|W_ij| G_ij``: to first order, how much removing the weight changes what G is the gradient of (Molchanov et al. 2017).

    G is the root mean square over sequences: signs cannot cancel. With ``calibrate(region="block")`` it is the gradient of
    the block's output norm, with "model" that of the model's loss. Movement pruning (Sanh et al. 2020) sums the signed
    ``-W g`` while a model is fine-tuned; one shot has no such path, and this is what is left of it.
    """
    return _part("taylor", weight, inputs, "gradient", None) * weight.abs()


magnitude.want = ()
wanda.want = wanda_share.want = ria.want = ("square",)
dass.want = ("output_square",)
e_sparse.want = ("entropy",)
wanda_plus.want = taylor.want = ("gradient",)


def _part(score: str, weight: Tensor, inputs: Inputs, name: str, axis: int | None) -> Tensor:
    """A part of the inputs that fits the weight: one number for each of ``axis`` (0 out, 1 in), or for each weight."""
    check_weight(weight)
    part = getattr(inputs, name, None)
    if part is None:
        raise ValueError(f"{score} needs inputs.{name}: calibrate first, with want=({name!r},)")
    shape = tuple(weight.shape) if axis is None else (weight.shape[axis],)
    if not isinstance(part, Tensor) or not part.is_floating_point() or part.shape != shape or part.device != weight.device:
        raise ValueError(f"inputs.{name} must be floating point {list(shape)} on {weight.device} for a weight "
                         f"{list(weight.shape)}, got {describe(part)}")
    if not part.isfinite().all() or (part < 0).any():
        raise ValueError(f"inputs.{name} must be finite and not negative")
    return part


def _share(size: Tensor, axis: int) -> Tensor:
    """Of its sum along an axis; nothing of nothing is nothing."""
    total = size.sum(axis, keepdim=True)
    return size / total.where(total > 0, torch.ones_like(total))


def _over_mean(part: Tensor) -> Tensor:
    mean = part.mean()
    return part / mean if mean > 0 else part


def _check_number(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value) or value < 0:
        raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")
