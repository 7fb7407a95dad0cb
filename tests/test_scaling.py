"""The law of scaling: known numbers, its own algebra, and our gaps beside it."""

import pytest

from sparsesurvey import mistral
from sparsesurvey.measure import Machine, Measurement
from sparsesurvey.scaling import T5, Law, beside, draw, equal_kept, linear_weights, penalties, share_of_mlp
from sparsesurvey.structures import NM, Unstructured


@pytest.mark.parametrize(("sparsity", "kept", "steps", "loss"), [  # measurements of Frantar et al. (2024), 24 * 12 * 768^2 * scale
    (0.0, 84.934656, 10.0, 1.7400618703741777), (0.75, 84.934656, 10.0, 1.610997464364035),
    (0.875, 1.327104, 2.5, 2.6937549256441886), (0.5, 21.233664, 5.0, 1.984130002741228),
])
def test_the_law_is_near_published_measurements(sparsity, kept, steps, loss):
    assert T5.loss(sparsity, kept, steps) == pytest.approx(loss, rel=0.016)


def test_penalty_and_gain_by_hand():
    law = Law(1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0)
    assert law.loss(0.5, 4.0, 2.0) == pytest.approx(1.5 / 4 + 1 / 2)
    assert law.penalty(0.5, 8.0) == pytest.approx(1.5 / 4 - 2 / 8)
    assert law.gain(0.5, 4.0) == pytest.approx(2 / 4 - 1.5 / 4)
    assert law.worth(0.5) == pytest.approx(2 / 1.5)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.75, 0.875])
def test_a_sparse_model_equals_the_dense_one_that_its_weights_are_worth(sparsity):
    assert T5.loss(sparsity, 30.0) == pytest.approx(T5.loss(0.0, 30.0 * T5.worth(sparsity)))
    assert (T5.penalty(sparsity, 113.0) > 0) == (sparsity > 0)


def test_tables():
    assert penalties([85, 113], [0.5, 0.875]).loc["113M", "87.5%"] == T5.penalty(0.875, 113.0)
    table = equal_kept([0.5, 0.75])
    assert list(table["weights before, millions"]) == [226.0, 452.0] and table["below dense, nats"].is_monotonic_increasing


@pytest.mark.parametrize(("call", "message"), [
    (lambda: T5.loss(1.0, 3.0), "sparsity must be a number of at least 0 and below 1, got 1.0"),
    (lambda: T5.loss(0.5, 0.0), "kept must be a number above 0, got 0.0"),
    (lambda: T5.worth(-0.1), "sparsity must be a number of at least 0 and below 1, got -0.1"),
])
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_mlp_is_three_quarters_of_the_162m_model():
    assert share_of_mlp("162m") == 0.75 and linear_weights("162m") == pytest.approx(113.246208)


def row(model, structure, seed, loss):
    at = {"model": model, "seed": seed, "step": 10, "steps": 10}
    return Measurement.now("validation loss", "nats/byte", loss, structure=structure, method="dense" if structure == "dense" else "static",
                           at=at, source="sparsesurvey.scaling", machine=Machine.current())


def test_our_gaps_beside_the_law():
    rows = [row("bytes", "dense", 0, 1.5), row("bytes", "2:4", 0, 1.53), row("5m", "dense", 0, 1.2), row("5m", "unstructured 10%", 0, 1.3)]
    table = beside(rows, [NM(2, 4), Unstructured(0.1)]).set_index("model")
    size = mistral.parameters(mistral.config("bytes"))
    mlp = size["gate_proj"] + size["up_proj"] + size["down_proj"]
    assert table.loc["bytes", "sparsity"] == pytest.approx(mlp / (mlp + size["attention"]) / 2)
    assert table.loc["bytes", "gap, share of dense"] == pytest.approx(0.02, rel=1e-3)
    assert table.loc["5m", "law, share of dense"] == pytest.approx(
        T5.penalty(table.loc["5m", "sparsity"], linear_weights("5m")) / T5.loss(0.0, linear_weights("5m")))
    assert beside([], [NM(2, 4)]).empty
    figure = draw([20, 113], beside(rows, [NM(2, 4)]))
    assert "ours, bytes" in figure.axes[0].get_legend_handles_labels()[1]
