"""Scores: functions ``(weight, inputs) -> scores`` of the weight's shape, higher = keep."""

from torch import Tensor

from sparsesurvey.structure import check_weight


def magnitude(weight: Tensor, inputs: object = None) -> Tensor:
    """``|W|`` (Han et al. 2015): what the layer saw does not matter, so ``inputs`` is not looked at.

    >>> import torch
    >>> magnitude(torch.tensor([[-3.0, 0.5]]))
    tensor([[3.0000, 0.5000]])
    """
    check_weight(weight)
    return weight.abs()
