"""All structures at one density: who is among them, and numbers that can be verified by hand."""

import matplotlib.pyplot as plt
import pytest
import torch

from sparsesurvey import comparing, mistral
from sparsesurvey.pruning import channel_scaled, density, gaussian
from sparsesurvey.roofline import Roofline
from sparsesurvey.structures import NM, VNM, Block, Dense, Transposable, Unstructured, all_structures

EVEN = Roofline("a machine", 100.0, 1e9, "made up")  # so much bandwidth that arithmetic is all that counts


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.mark.parametrize("share", [0.5, 0.25])
def test_at_one_density_nothing_else_is_compared(share):
    shape = (512, 512)
    found = comparing.at_density(all_structures(), share, shape)
    assert len(found) == len(set(map(str, found)))
    for item in found:
        assert density(item, shape) == pytest.approx(share, rel=0.03)
    names = {type(item).__name__ for item in found}
    assert {"Unstructured", "NM", "Block"} <= names and "Dense" not in names


def test_a_structure_that_does_not_divide_the_shape_is_left_out():
    assert not comparing.fits(Block(64, 64, 0.5), (96, 64)) and not comparing.fits(NM(2, 4), (4, 6))
    assert comparing.fits(NM(2, 4), (4, 8)) and not comparing.fits(Unstructured(0.01), (4, 4))
    assert "3:5" not in map(str, comparing.at_density({"NM": NM}, 0.6, (512, 512)))


def test_kept_by_hand():
    weight = torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 0.0, 0.0, 0.0]])
    frame = comparing.keeps([NM(2, 4), Unstructured(0.5)], {"mine": [weight, 2 * weight]}).set_index("structure")
    assert frame.loc["2:4", "energy"] == pytest.approx(26 / 31)  # 16 + 9 + 1 of 31
    assert frame.loc["unstructured 50%", "energy"] == pytest.approx(1.0 - 1 / 31)  # all but one of the ones
    assert frame.loc["2:4", "share of best"] == pytest.approx(26 / 30)
    assert set(frame["weights"]) == {"mine"}


def test_stored_by_hand():
    frame = comparing.stores([NM(2, 4), Dense(), Unstructured(0.5)], (4096, 4096))
    assert frame.loc["2:4", ["values", "index", "total"]].tolist() == [8, 1, 9]
    assert frame.loc["2:4", "least"] == pytest.approx(2.585 / 4, abs=1e-3)  # six patterns of four
    assert frame.loc["dense", ["index", "over"]].tolist() == [0, 1]
    assert frame.loc["unstructured 50%", "index"] == pytest.approx(8, abs=0.01)  # int16 a kept weight


def test_no_structure_stores_its_places_below_the_entropy():
    kinds = [item for kind in all_structures().values() for item in kind.variants() if comparing.fits(item, (1024, 1024))]
    frame = comparing.stores(kinds, (1024, 1024)).dropna()
    short = frame[frame["index"] < frame["least"] - 1e-2]
    assert short.empty, f"either the index is too short to be right or the bound is wrong: {list(short.index)}"


def test_bounds_of_the_three_products():
    choices = [Dense(), Block(64, 64, 0.25), Unstructured(0.5), NM(2, 4), NM(2, 4, "out"), Transposable(2, 4), VNM(64, 2, 8)]
    frame = comparing.permits(choices, (4096, 4096), 8192, EVEN)
    assert frame.loc["dense"].tolist() == [1, 1, 1, 1]
    assert frame.loc["block 64x64 25%"].tolist() == pytest.approx([4, 4, 4, 4])
    assert frame.loc["unstructured 50%"].tolist() == [1, 1, 1, 1]
    assert frame.loc["2:4"].tolist() == pytest.approx([2, 1, 1, 3 / 2.5])  # along the inputs: the forward product alone
    assert frame.loc["2:4 out"].tolist() == pytest.approx([1, 2, 1, 3 / 2.5])
    assert frame.loc["transposable 2:4"].tolist() == pytest.approx([2, 2, 1, 3 / 2])
    assert frame.loc["64:2:8"].tolist() == pytest.approx([4, 2, 2, 3 / 1.25])


def test_every_structure_has_a_bound_of_at_least_nearly_dense():
    found = [item for kind in all_structures().values() for item in kind.variants() if comparing.fits(item, (4096, 14336))]
    assert {type(item) for item in found} == set(all_structures().values()), "every kind fits the down_proj of a 7B Mistral"
    frame = comparing.permits(found, (4096, 14336), 8192, EVEN)
    assert (frame > 0).all().all() and frame.notna().all().all()


def test_mlp_weights_are_the_three_projections():
    weights = comparing.mlp_weights(mistral.build("markov", 0))
    assert {name.rpartition(".")[2] for name in weights} == {"gate_proj", "up_proj", "down_proj"} and len(weights) == 6


def test_figures_show_every_structure_once():
    structures = comparing.at_density(all_structures(), 0.5, (64, 64))
    frame = comparing.keeps(structures, {"Gaussian": [gaussian((64, 64))], "scaled": [channel_scaled((64, 64))]})
    names = sorted(map(str, structures))
    assert sorted(label.get_text() for label in comparing.draw_kept(frame).get_yticklabels()) == names
    stored = comparing.stores(structures, (64, 64))
    assert sorted(label.get_text() for label in comparing.draw_stored(stored).get_yticklabels()) == names
    ax = comparing.draw_permitted(comparing.permits(structures, (64, 64), 16, EVEN), EVEN).axes[0]
    assert sorted(label.get_text() for label in ax.get_yticklabels()) == names
    assert "not a measurement" in ax.get_xlabel() and EVEN.source in ax.get_xlabel()
