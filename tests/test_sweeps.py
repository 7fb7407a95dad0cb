"""Pictures and tables of methods that move weights: drawn from any sweep, their numbers those of ``output_error``."""

import matplotlib.pyplot as plt
import pytest
import torch

from sparsesurvey import sweeps
from sparsesurvey.alps import alps
from sparsesurvey.calibration import correlated_layer, inputs_of
from sparsesurvey.reconstruction import output_error
from sparsesurvey.scores import magnitude, wanda
from sparsesurvey.sparsegpt import sparsegpt, sweep
from sparsesurvey.structures import NM, Block, Unstructured


@pytest.fixture(scope="module")
def layer():
    weight, x = correlated_layer(size=64, tokens=256)
    return weight, inputs_of(x, ("gram",))


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def test_draw_has_a_column_for_each_moment(layer):
    figure = sweeps.draw(sweep(layer[0], NM(2, 4), layer[1]), [0, 16, 64], corner=(8, 64))
    assert len(figure.axes) == 6
    assert [ax.get_title() for ax in figure.axes[:3]] == ["dense", "after 16 inputs", "after 64 inputs"]
    assert figure.axes[3].images[0].get_array().max() == 0  # nothing moved before the first input
    assert figure.axes[4].images[0].get_array().max() > 0


def test_course_ends_where_the_methods_end(layer):
    weight, inputs = layer
    mask = NM(2, 4).mask(wanda(weight, inputs))
    lines = {line.get_label(): line.get_ydata() for line in sweeps.course(weight, inputs, NM(2, 4), {"Wanda": mask}).lines}
    assert lines["SparseGPT"][0] == pytest.approx(0, abs=1e-10)
    assert lines["SparseGPT"][-1] == pytest.approx(output_error(weight, sparsegpt(weight, NM(2, 4), inputs).weight, inputs))
    assert lines["Wanda"][-1] == pytest.approx(output_error(weight, weight * mask, inputs))
    assert lines["SparseGPT"][-1] < lines["its mask, nothing moved"][-1]


def test_parts_rise_to_the_best_values(layer):
    table = sweeps.parts(*layer, NM(2, 4), {"magnitude": magnitude, "Wanda": wanda, "SparseGPT": sparsegpt, "ALPS": alps})
    assert (table["least squares on its mask"] <= table["as it is"] + 1e-4).all()
    assert (table["as it is"] <= table["mask alone"]).all()
    assert table.loc["Wanda", "as it is"] == table.loc["Wanda", "mask alone"]


def test_choices_say_when_each_structure_chooses(layer):
    table = sweeps.choices([NM(2, 4), Unstructured(0.5), Block(16, 16, 0.5)], (64, 64), *layer)
    assert table["chosen at a time"].tolist() == ["4 inputs", "all, once", "all, once"]
    assert (table["SparseGPT"] < table["its mask alone"]).all() and (table["density"] == 0.5).all()


def test_a_sweep_of_one_line_is_drawn():
    weight, x = correlated_layer(size=8, tokens=64)
    sweeps.draw(sweep(weight[:1], NM(2, 4), inputs_of(x, ("gram",))), [0, 8], corner=(4, 8))
    assert torch.isfinite(weight).all()
