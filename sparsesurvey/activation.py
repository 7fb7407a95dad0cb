"""Activation sparsity: inputs of a product that are left out because they are small, chosen anew for every token.

No structure of the weight, which stays dense: an input that is left out saves the weights that it would be multiplied with,
which is worth something while one or a few tokens wait for them, and only if a kernel does not fetch them (kernels/active.py).
"""

import torch
from torch import Tensor

from sparsesurvey.structure import Plan, check_activations, check_weight


def threshold_at(activations: Tensor, sparsity: float) -> float:
    """The magnitude that this share of a layer's activations does not exceed: TEAL's (Liu et al. 2024), for one tensor.

    >>> threshold_at(torch.tensor([[-4.0, 1.0, 0.5, 3.0]]), 0.5)
    1.0
    """
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)) or not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be a number of at least 0 and below 1, got {sparsity!r}")
    check_weight(activations, "activations")
    if not activations.numel():
        raise ValueError("activations must not be empty")
    count = round(sparsity * activations.numel())
    return float(activations.abs().flatten().kthvalue(count).values) if count else 0.0


def without_small(x: Tensor, threshold: float) -> Tensor:
    """``x`` with zeros for what is not beyond the threshold in magnitude; NaN stays."""
    return torch.where(x.abs() <= check_threshold(threshold), torch.zeros_like(x), x)


def product_plan(weight: Tensor, threshold: float) -> Plan:
    """Plan of ``without_small(x, threshold) @ weight.T`` that fetches only the weights it needs; Unavailable without a GPU.

    ``weight`` ``[out, in]``, at most 4 tokens; at threshold 0 it skips exact zeros, as a ReLU makes them.
    """
    check_weight(weight)
    check_threshold(threshold)
    from sparsesurvey.kernels import active

    return active.plan(weight, threshold)


def reference_plan(weight: Tensor, threshold: float) -> Plan:
    """The same for any number of tokens by a dense product: slow, obviously right."""
    check_weight(weight)
    check_threshold(threshold)
    weight = weight.detach()
    return lambda x: without_small(check_activations("x", x, weight.shape[1], weight), threshold) @ weight.T


def check_threshold(threshold: float) -> float:
    """Return a finite threshold of at least 0, or raise ValueError."""
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 <= threshold < float("inf"):
        raise ValueError(f"threshold must be a finite number of at least 0, got {threshold!r}")
    return threshold
