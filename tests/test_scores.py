"""Scores: functions (weight, inputs) -> scores, higher = keep."""

import pytest
import torch

from sparsesurvey.scores import magnitude


def test_magnitude_by_hand():
    assert magnitude(torch.tensor([[-3.0, 0.5], [0.0, 2.0]])).tolist() == [[3, 0.5], [0, 2]]
    assert magnitude(torch.tensor([[-3.0]]), inputs="not looked at").tolist() == [[3]]


@pytest.mark.parametrize("weight, what", [
    (torch.tensor([[1, 2]]), "weight must be floating point, got torch.int64"),
    (torch.tensor([1.0]), "weight must be a matrix .out, in., got torch.float32 .1."),
    (torch.tensor([[float("nan"), 1.0]]), "weight must be finite, got 1 NaN or infinite of 2 entries"),
    ([[1.0]], "weight must be a matrix .out, in., got list"),
])
def test_only_finite_float_matrices_have_a_magnitude(weight, what):
    with pytest.raises(ValueError, match=what):
        magnitude(weight)
