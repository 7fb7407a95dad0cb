"""The explorer: its numbers against the structures, its limits, and the ES module in a bare page in Chromium."""

import base64
import json
import re
import shutil
from itertools import product
from math import ceil

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from sparsesurvey.hardware import FACTS, H200
from sparsesurvey.structures import NM, VNM, Block, Dense, Unstructured, all_structures
from sparsesurvey.widgets import HERE, MATRIX, SHAPE, TOKENS, PatternExplorer, bound, grid, grids, sample_weights

SHORT = 5e-4  # the table has four significant digits
STEPS = {
    "Dense": {},
    "Unstructured": {"density": [0.05, 0.125, 0.25, 0.5, 0.75]},
    "NM": {"n": [1, 2, 4, 8], "m": [4, 8, 16, 32]},
    "VNM": {"v": [4, 16, 64], "n": [2, 4], "m": [8, 16]},
    "Block": {"rows": [8, 16, 32, 64], "cols": [1, 16, 32], "density": [0.125, 0.25, 0.5]},
}


@pytest.fixture(scope="module")
def explorer() -> PatternExplorer:
    return PatternExplorer(grids(all_structures(), STEPS), pins=[NM(2, 8), VNM(64, 2, 8), Block(16, 16, 0.25)])


def state(explorer: PatternExplorer) -> dict:
    """The synced traits as a page gets them: JSON, with bytes in base64."""
    traits = {name: getattr(explorer, name) for name in ("index", "kind", "pins", "data", "masks", "values")}
    coded = {name: base64.b64encode(traits[name]).decode() for name in ("masks", "values")}
    return {**traits, **coded}


def every(explorer: PatternExplorer):
    return zip(explorer.structures, explorer.data["configs"])


def test_masks_and_weights_travel_unchanged(explorer):
    size = SHAPE[0] * SHAPE[1]
    bits = np.frombuffer(explorer.masks, np.uint8).reshape(len(explorer.structures), len(explorer.weights), -1)
    masks = np.unpackbits(bits, axis=-1, count=size, bitorder="little").astype(bool)
    values = np.frombuffer(explorer.values, "<f4").reshape(-1, *SHAPE)
    for kind, weight in enumerate(explorer.weights.values()):
        assert (values[kind] == weight.numpy()).all()
        for index, structure in enumerate(explorer.structures):
            mask = structure.mask(weight.abs())
            assert structure.holds(mask)
            assert (masks[index, kind] == mask.flatten().numpy()).all(), str(structure)


def test_what_is_kept_equals_a_recomputation_in_float64(explorer):
    for structure, config in every(explorer):
        for kind, weight in enumerate(explorer.weights.values()):
            size = np.abs(weight.double().numpy()).ravel()
            mask = structure.mask(weight.abs()).numpy().ravel()
            best = np.sort(size)[::-1][: mask.sum()]
            expected = [mask.mean(), size[mask].sum() / size.sum(), (size[mask] ** 2).sum() / (size**2).sum(),
                        best.sum() / size.sum(), (best**2).sum() / (size**2).sum()]
            np.testing.assert_allclose(config["kept"][kind], expected, rtol=SHORT, err_msg=str(structure))


def test_bytes_equal_the_cost_model(explorer):
    for structure, config in every(explorer):
        values, index, positions = config["bits"]
        stored = 8 * structure.cost(MATRIX, 1, 2).weight_bytes / (MATRIX[0] * MATRIX[1])
        assert values + index == pytest.approx(stored, rel=SHORT), str(structure)
        assert positions <= index + 1e-3, f"{structure}: an index shorter than its entropy"


def test_bounds_equal_the_roofline_written_out(explorer):
    out, inn = MATRIX
    curves = explorer.data["curves"]
    for structure, config in every(explorer):
        for step, tokens in enumerate(TOKENS):
            stored = structure.nnz(MATRIX)
            weight = 2 * stored + ceil(structure.index_bits(MATRIX) / 8)
            activations = 2 * tokens * (out + inn)
            dense = max(2 * tokens * out * inn / 989e12, (2 * out * inn + activations) / 4.8e12)
            sparse = max(2 * tokens * stored / 989e12, (weight + activations) / 4.8e12)
            assert curves[config["ideal"]][step] == pytest.approx(dense / sparse, rel=SHORT), (str(structure), tokens)
            share = FACTS[type(structure).__name__](structure).arithmetic
            usable = max(sparse, 2 * tokens * out * inn * share / 989e12)
            assert curves[config["usable"]][step] == pytest.approx(dense / usable, rel=SHORT), (str(structure), tokens)


def test_two_four_is_bounded_by_its_bytes_and_then_by_two():
    assert bound(NM(2, 4), 1) == pytest.approx(16 / 9, rel=1e-3)
    assert bound(NM(2, 4), 32768) == pytest.approx(2)
    assert bound(Unstructured(0.1), 32768, arithmetic=1.0) == pytest.approx(1)
    assert bound(Dense(), 64) == 1


def test_hardware_knows_every_structure_it_names():
    assert set(FACTS) <= set(all_structures())
    expected = {
        Dense(): 1, Unstructured(0.1): 1,
        NM(2, 4): 0.5, NM(1, 4): 0.5, NM(2, 8): 0.5, NM(4, 8): 1, NM(8, 16): 1, NM(4, 4): 1,
        VNM(64, 2, 8): 0.25, VNM(64, 4, 8): 0.5, VNM(64, 2, 4): 0.5, VNM(4, 2, 8): 0.5, VNM(2, 4, 8): 1,
        Block(32, 32, 0.25): 0.25, Block(1, 1, 0.25): 1, Block(4, 1, 0.25): 0.5,
    }
    for structure, share in expected.items():
        fact = FACTS[type(structure).__name__](structure)
        assert fact.arithmetic == pytest.approx(share), str(structure)
        assert fact.hardware.endswith(".") and fact.verdict


@pytest.mark.parametrize("n, m", [(1, 2), (1, 3), (2, 3), (2, 6), (2, 8), (3, 8), (2, 5)])
def test_a_pattern_claimed_to_be_two_four_is(n, m):
    groups = [torch.tensor(group) for group in product((False, True), repeat=m) if sum(group) == n]
    rows = (torch.cat([left, right, left, right]) for left in groups for right in groups)
    worst = max(int(row.view(-1, 4).sum(-1).max()) for row in rows)
    assert (FACTS["NM"](NM(n, m)).arithmetic == 0.5) == (worst <= 2)


def test_a_structure_without_a_fact_is_shown_without_a_hardware_curve():
    explorer = PatternExplorer([NM(2, 4)], facts={})
    assert explorer.data["configs"][0]["usable"] is None
    assert "Nothing is on record" in explorer.data["notes"][explorer.data["configs"][0]["words"][1]]


def test_state_is_small(explorer):
    sent = len(explorer.masks) + len(explorer.values) + len(json.dumps(explorer.data))
    assert sent <= 150_000
    assert len((HERE / "explorer.js").read_bytes()) + len((HERE / "explorer.css").read_bytes()) <= 40_000


def test_every_control_reaches_its_ends_and_every_pattern_has_its_place(explorer):
    for number, family in enumerate(explorer.data["families"]):
        members = [config for config in explorer.data["configs"] if config["family"] == number]
        assert len({tuple(config["at"]) for config in members}) == len(members)
        for place, field in enumerate(family["fields"]):
            assert {config["at"][place] for config in members} == set(range(len(field["values"]))), field
    names = [family["name"] for family in explorer.data["families"]]
    assert names[:5] == ["dense", "unstructured", "N:M", "V:N:M", "block"]
    for structure, config in every(explorer):
        fields = explorer.data["families"][config["family"]]["fields"]
        for field, step in zip(fields, config["at"]):
            value = getattr(structure, field["name"])
            assert field["values"][step] == (f"{100 * value:g} %" if field["name"] == "density" else str(value))


def test_index_and_structure_follow_each_other(explorer):
    try:
        explorer.index = 3
        assert explorer.structure is explorer.structures[3]
        explorer.structure = VNM(64, 2, 8)
        assert explorer.structures[explorer.index] == VNM(64, 2, 8)
        with pytest.raises(ValueError, match="index must be from 0 to"):
            explorer.index = len(explorer.structures)
        with pytest.raises(ValueError, match="kind must be from 0 to 1"):
            explorer.kind = 2
        with pytest.raises(ValueError, match="pins must be from 0"):
            explorer.pins = [-1]
        with pytest.raises(ValueError, match="one of the explorer's"):
            explorer.structure = NM(3, 8)
    finally:
        explorer.index = 0


@pytest.mark.parametrize("structures, weights, message", [
    ([], None, "structures must be a list of patterns, at least one, got none"),
    ([NM], None, "got <class"),
    ([NM(3, 5)], None, r"divide the weights \(64, 64\); the tile of 3:5 is \(1, 5\)"),
    ([Block(32, 32, 0.1)], None, "keeps nothing"),
    ([NM(2, 4)], {}, "at least one weight"),
    ([NM(2, 4)], {"a": torch.zeros(4, 4, dtype=torch.int32)}, r"weights\['a'\] must be floating point"),
    ([NM(2, 4)], {"a": torch.full((4, 4), float("nan"))}, "must be finite"),
    ([NM(2, 4)], {"a": torch.ones(4, 4), "b": torch.ones(4, 8)}, "one shape"),
    ([NM(2, 4)], {"a": torch.ones(4, 256)}, "at most 128"),
])
def test_what_cannot_be_shown_is_refused(structures, weights, message):
    with pytest.raises(ValueError, match=message):
        PatternExplorer(structures, weights)


def test_a_matrix_that_is_not_divided_is_refused():
    with pytest.raises(ValueError, match="divide the matrix"):
        PatternExplorer([NM(2, 32)], matrix=(64, 48))


def test_grid_drops_what_makes_no_sense():
    assert grid(NM, n=[4, 8], m=[4, 8]) == [NM(4, 4), NM(4, 8), NM(8, 8)]
    assert NM(3, 5) not in grid(NM) and NM(2, 4) in grid(NM)
    assert grid(Block, rows=[32], cols=[32], density=[0.1, 0.25]) == [Block(32, 32, 0.25)]
    with pytest.raises(ValueError, match="steps must hold a valid NM"):
        grid(NM, n=[8], m=[4])
    with pytest.raises(ValueError, match="keyed by one of"):
        grids(all_structures(), {"Nm": {}})
    found = {type(pattern).__name__ for pattern in grids(all_structures())}
    assert found >= {"Dense", "Unstructured", "NM", "VNM", "Block"}


def test_a_weight_of_ones_own_and_one_that_is_not_square():
    weight = sample_weights((32, 16))["independent Gaussian"].double()
    explorer = PatternExplorer([NM(2, 4), Block(8, 8, 0.5)], {"mine": weight})
    assert explorer.data["shape"] == [32, 16] and explorer.data["kinds"] == ["mine"]


def test_the_static_figure_shows_the_pinned(explorer):
    figure = explorer.figure()
    assert [ax.get_title() for ax in figure.axes[:3]] == ["2:8", "64:2:8", "block 16x16 25%"]
    assert len(figure.axes) == 9 and "not measurements" in figure.get_suptitle()
    plt.close(figure)
    plt.close(explorer.figure([NM(2, 4)], kind=1))


def test_the_front_end_asks_for_nothing():
    code = (HERE / "explorer.js").read_text() + (HERE / "explorer.css").read_text()
    assert re.findall(r"https?://[^\s\"')]+", code) == ["http://www.w3.org/2000/svg"]
    assert not re.search(r"\b(fetch|XMLHttpRequest|WebSocket|eval|import|innerHTML|@import)\b|url\(", code)
    assert "export default { render };" in code
