"""The scoreboard and the figures of rows, on rows written by hand."""

from dataclasses import replace

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

from sparsesurvey import figures, scoreboard
from sparsesurvey.measure import Machine, Measurement
from sparsesurvey.pruning import density
from sparsesurvey.roofline import H200
from sparsesurvey.structure import Pattern
from sparsesurvey.structures import NM, VNM, Block, Dense, LowRank, Unstructured, all_structures
from sparsesurvey.tables import gaps, table

MACHINE = Machine.current("cpu")


@pytest.fixture(autouse=True)
def own_style():
    with plt.rc_context():
        figures.style()
        yield
    plt.close("all")


def speedup(structure, method, value, product="spmm", origin="live", code=""):
    at = {"out": 64, "in": 64, "tokens": 8, "product": product}
    row = Measurement.now("speedup", "x", value, low=0.9 * value, high=1.1 * value, structure=structure, method=method, at=at,
                          source="sparsesurvey.structures.block", machine=MACHINE, code=code)
    return Measurement(**{**vars_of(row), "origin": origin})


def vars_of(row):
    return {name: getattr(row, name) for name in Measurement.__dataclass_fields__}


def loss(structure, seed, value, step=10):
    return Measurement.now("validation loss", "nats/token", value, structure=structure, method="static",
                           at={"seed": seed, "step": step, "tokens": step * 8}, source="sparsesurvey.train", machine=MACHINE)


def test_every_pattern_is_an_entry():
    names = {type(item).__name__ for item in scoreboard.entries(all_structures())}
    assert names == set(all_structures())
    densities = [round(density(item, (512, 512)), 4) for item in scoreboard.entries(all_structures())]
    assert densities == sorted(densities, reverse=True)


def test_definition_by_hand():
    frame = scoreboard.definition([Dense(), NM(2, 4)])
    assert frame.loc["dense", "bits a weight"] == 16 and frame.loc["2:4", "bits a weight"] == 9
    assert frame.loc["dense", "kept, Gaussian"] == pytest.approx(1)
    assert frame.loc["2:4", "kept, Gaussian"] == pytest.approx(0.868 / 0.928, abs=0.01)


def test_bounds_by_hand():
    frame = scoreboard.permitted([Dense(), NM(2, 4), Unstructured(0.1)], H200)
    assert frame.loc["dense"].tolist() == [1, 1]
    assert frame.loc["2:4", "bound, 8192 tokens"] == pytest.approx(2, rel=0.01)
    assert frame.loc["unstructured 10%", "bound, 8192 tokens"] == pytest.approx(1)


def test_fastest_of_ours_and_of_a_library():
    block = Block(8, 8, 0.5)
    rows = [speedup(block, "gather", 3.0), speedup(block, "tiled", 2.0), speedup(block, "torch_bsr", 1.5),
            speedup(block, "scipy_bsr", 0.2), speedup(block, "gather", 9.0, product="sddmm")]
    frame = scoreboard.fastest(rows)
    assert len(frame) == 1 and frame["ours"].iloc[0] == "3 (2.7 to 3.3) gather" and "torch_bsr" in frame["library"].iloc[0]
    assert str(MACHINE) in frame.index[0][0] and frame.index[0][1] == str(block)
    assert scoreboard.fastest([]).empty


def test_gaps_are_paired_by_seed():
    rows = [loss("dense", 0, 2.0), loss("dense", 1, 2.1), loss("2:4", 0, 2.3), loss("2:4", 1, 2.4), loss("8:16", 0, 2.05),
            loss("8:16", 1, 2.05), loss("2:4", 0, 9.0, step=5)]
    frame = gaps(rows).set_index("structure")
    assert frame.loc["2:4", "gap"] == pytest.approx(0.3) and frame.loc["2:4", "resolved"] == "yes"
    assert frame.loc["8:16", "lowest"] == pytest.approx(-0.05) and frame.loc["8:16", "resolved"] == "no"
    with pytest.raises(ValueError, match="dense run"):
        gaps([loss("2:4", 0, 2.0)])


def test_losses_of_two_trainings_have_no_gap():
    dense, other = loss("dense", 0, 2.0), loss("2:4", 0, 2.3)
    with pytest.raises(ValueError, match="rows must be of one training, got batch = 16, None"):
        gaps([dense, replace(other, at={**other.at, "batch": 16})])


def test_one_seed_resolves_nothing():
    assert set(gaps([loss("dense", 0, 2.0), loss("2:4", 0, 3.0)])["resolved"]) == {"", "no"}


def test_a_stale_row_is_drawn_hollow_and_said():
    fresh, stale = speedup(Block(8, 8, 0.5), "gather", 3.0), speedup(Block(8, 8, 0.5), "gather", 2.0, code="0" * 12)
    figure = figures.speedups([fresh, stale])
    faces = [line.get_markerfacecolor() for line in figure.axes[0].lines if line.get_marker() in figures.MARKERS]
    assert faces.count("white") == 1 and len(faces) == 2
    assert table([stale])["measured"].iloc[0].endswith("stale")


def test_live_and_recorded_have_a_panel_each_that_names_machine_and_date():
    figure = figures.speedups([speedup(Block(), "gather", 3.0), speedup(Block(), "gather", 3.0, origin="recorded")])
    titles = [ax.get_title(loc="left") or ax.get_title() for ax in figure.axes]
    assert len(titles) == 2 and "live" in titles[0] and "recorded" in titles[1]
    assert all(str(MACHINE) in title and "20" in title for title in titles)


def test_nothing_to_draw_is_said_in_words():
    assert "no speed-up" in figures.speedups([]).texts[0].get_text()
    assert "no run" in figures.curves([]).texts[0].get_text()


def test_curves_show_every_structure_and_the_floor():
    rows = [loss(name, seed, 2.0 + seed / 10, step) for name in ("dense", "2:4", "4:8") for seed in (0, 1) for step in (5, 10)]
    ax = figures.curves(rows, floor=1.7)
    assert [text.get_text() for text in ax.get_legend().texts] == ["dense (2)", "2:4 (2)", "4:8 (2)"]
    assert figures.final_losses(rows).get_yticklabels()[0].get_text() == "dense"


@pytest.mark.parametrize("name, family", [("2:4", "N:M"), ("64:2:8", "V:N:M"), ("block 8x8 50%", "block"), ("dense", "dense")])
def test_a_notation_has_its_family(name, family):
    assert figures.family(name) == family


def test_every_pattern_is_drawn_and_its_storage():
    for structure in [kind() for kind in all_structures().values() if issubclass(kind, Pattern)]:
        weight = torch.randn(128, 128)
        assert str(structure) in figures.pattern(structure, structure.mask(weight.abs()), weight).get_title(loc="left")
    assert len(figures.storage([Dense(), VNM(), Block()], (4096, 14336)).containers) == 2
    parts = {"B": torch.randn(16, 2), "A": torch.randn(2, 16), "S": torch.eye(16)}
    assert [ax.get_title(loc="left") for ax in figures.factors(LowRank(), parts).axes] == ["B", "A", "S"]
    frame = pd.DataFrame({"a": [1, 3]}, index=["x", "y"])
    assert figures.shares(frame, "things", ["y"]).get_xlabel() == "share of things"


def test_the_price_has_a_line_for_each_structure():
    rows = [loss(name, seed, 2.0 + seed / 10) for name in ("dense", "2:4") for seed in (0, 1)]
    assert [text.get_text() for text in scoreboard.price(gaps(rows)).axes[0].get_yticklabels()] == ["dense", "2:4"]


def test_no_rows_are_no_lines_and_a_picture_that_says_so():
    frame = gaps([])
    assert frame.empty and "gap" in frame.columns
    assert "no run" in scoreboard.price(frame).texts[0].get_text()


def test_the_price_is_sorted():
    rows = [loss("dense", 0, 2.0), loss("2:4", 0, 2.3), loss("unstructured 50%", 0, 2.1)]
    labels = [label.get_text() for label in scoreboard.price(gaps(rows)).axes[0].get_yticklabels()]
    assert labels == ["dense", "unstructured 50%", "2:4"]


def test_many_of_one_family_have_a_look_each():
    few, many = ["dense", "2:4", "2:8", "unstructured 50%"], ["dense", "unstructured 50%", *(f"2:4, way {number}" for number in range(9))]
    assert figures.looks(few)["2:4"][0] == figures.looks(few)["2:8"][0] == figures.colour("2:4")
    assert len(set(figures.looks(many).values())) == len(many)
