"""The explorer: its numbers against the structures, its limits, and the ES module in a bare page in Chromium."""

import base64
import json
import re
from dataclasses import dataclass
from itertools import product
from math import ceil

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from sparsesurvey.pruning import approximation
from sparsesurvey.roofline import H200
from sparsesurvey.structure import Pattern, Structure
from sparsesurvey.structures import NM, VNM, Block, Dense, Unstructured, all_structures
from sparsesurvey.widgets import HERE, MATRIX, SHAPE, TOKENS, PatternExplorer, grid, grids, sample_weights

SHORT = 5e-4  # the table has four significant digits
STEPS = {
    "Dense": {},
    "Unstructured": {"density": [0.05, 0.125, 0.25, 0.5, 0.75]},
    "NM": {"n": [1, 2, 4, 8], "m": [4, 8, 16, 32], "axis": ["in", "out"]},
    "VNM": {"v": [4, 16, 64], "n": [2, 4], "m": [8, 16]},
    "Block": {"rows": [8, 16, 32, 64], "cols": [1, 16, 32], "density": [0.125, 0.25, 0.5]},
}


@pytest.fixture(scope="module")
def explorer() -> PatternExplorer:
    return PatternExplorer(grids(all_structures(), STEPS), pins=[NM(2, 8), VNM(64, 2, 8), Block(16, 16, 0.25)])


def state(explorer: PatternExplorer) -> dict:
    """The synced traits as a page gets them: JSON, with bytes in base64."""
    traits = {name: getattr(explorer, name) for name in ("index", "kind", "pins", "data", "masks", "levels", "values")}
    coded = {name: base64.b64encode(traits[name]).decode() for name in ("masks", "levels", "values")}
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
            if isinstance(structure, Pattern):
                mask = structure.mask(weight.abs())
                assert structure.holds(mask)
            else:
                mask = approximation(structure, weight) != 0
            assert (masks[index, kind] == mask.flatten().numpy()).all(), str(structure)


def test_what_is_kept_equals_a_recomputation_in_float64(explorer):
    for structure, config in every(explorer):
        for kind, weight in enumerate(explorer.weights.values()):
            weight = weight.double()
            size, pattern = np.abs(weight.numpy()).ravel(), isinstance(structure, Pattern)
            near = weight * structure.mask(weight.abs()) if pattern else approximation(structure, weight.float()).double()
            lost, stored = (weight - near).abs().numpy().ravel(), structure.nnz(SHAPE)
            best = np.sort(size)[::-1][:stored]
            expected = [stored / size.size, 1 - lost.sum() / size.sum(), 1 - (lost**2).sum() / (size**2).sum(),
                        best.sum() / size.sum(), (best**2).sum() / (size**2).sum()]
            np.testing.assert_allclose(config["kept"][kind], expected, rtol=SHORT, err_msg=str(structure))


def test_bytes_equal_the_cost_model(explorer):
    for structure, config in every(explorer):
        values, index, positions = config["bits"]
        stored = 8 * structure.cost(MATRIX, 1, 2).weight_bytes / (MATRIX[0] * MATRIX[1])
        assert values + index == pytest.approx(stored, rel=SHORT), str(structure)
        assert positions is None or positions <= index + 1e-3, f"{structure}: an index shorter than its entropy"


def test_bounds_equal_the_roofline_written_out(explorer):
    out, inn = MATRIX
    curves = explorer.data["curves"]
    for structure, config in every(explorer):
        for step, tokens in enumerate(TOKENS):
            stored = structure.nnz(MATRIX)
            weight = ceil(structure.value_bits(MATRIX) / 8) + ceil(structure.index_bits(MATRIX) / 8)
            activations = 2 * tokens * (out + inn)
            dense = max(2 * tokens * out * inn / 989e12, (2 * out * inn + activations) / 4.8e12)
            sparse = max(2 * tokens * stored / 989e12, (weight + activations) / 4.8e12)
            assert curves[config["ideal"]][step] == pytest.approx(dense / sparse, rel=SHORT), (str(structure), tokens)
            share = structure.facts().arithmetic
            if share is None:
                assert config["usable"] is None
                continue
            usable = max(sparse, 2 * tokens * out * inn * share / 989e12)
            assert curves[config["usable"]][step] == pytest.approx(dense / usable, rel=SHORT), (str(structure), tokens)


def test_two_four_is_bounded_by_its_bytes_and_then_by_two():
    assert H200.over_dense(NM(2, 4), MATRIX, 1) == pytest.approx(16 / 9, rel=1e-3)
    assert H200.over_dense(NM(2, 4), MATRIX, 32768) == pytest.approx(2)
    assert H200.over_dense(Unstructured(0.1), MATRIX, 32768) == pytest.approx(1)
    assert H200.over_dense(Unstructured(0.1), MATRIX, 32768, ideal=True) > 9
    assert H200.over_dense(Dense(), MATRIX, 64) == 1


def test_structures_state_what_tensor_cores_make_of_them():
    expected = {
        Dense(): 1, Unstructured(0.1): 1,
        NM(2, 4): 0.5, NM(1, 4): 0.5, NM(2, 8): 0.5, NM(4, 8): 1, NM(8, 16): 1, NM(4, 4): 1,
        VNM(64, 2, 8): 0.25, VNM(64, 4, 8): 0.5, VNM(64, 2, 4): 0.5, VNM(4, 2, 8): 0.5, VNM(2, 4, 8): 1,
        Block(32, 32, 0.25): 0.25, Block(1, 1, 0.25): 1, Block(4, 1, 0.25): 0.5,
    }
    for structure, share in expected.items():
        fact = structure.facts()
        assert fact.arithmetic == pytest.approx(share), str(structure)
        assert fact.hardware.endswith(".") and fact.verdict


@pytest.mark.parametrize("n, m", [(1, 2), (1, 3), (2, 3), (2, 6), (2, 8), (3, 8), (2, 5)])
def test_a_pattern_claimed_to_be_two_four_is(n, m):
    groups = [torch.tensor(group) for group in product((False, True), repeat=m) if sum(group) == n]
    rows = (torch.cat([left, right, left, right]) for left in groups for right in groups)
    worst = max(int(row.view(-1, 4).sum(-1).max()) for row in rows)
    assert (NM(n, m).facts().arithmetic == 0.5) == (worst <= 2)


@dataclass(frozen=True)
class Untold(NM):
    def facts(self):
        return Structure.facts(self)


def test_a_structure_without_a_fact_is_shown_without_a_hardware_curve():
    explorer = PatternExplorer([Untold(2, 4)])
    assert explorer.data["configs"][0]["usable"] is None
    assert "Nothing is on record" in explorer.data["notes"][explorer.data["configs"][0]["words"][1]]


def test_state_is_small(explorer):
    sent = len(explorer.masks) + len(explorer.levels) + len(explorer.values) + len(json.dumps(explorer.data))
    assert sent <= 550_000  # one and a half hundred structures, each with the masks of two weights or a picture instead
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
            value, shown = getattr(structure, field["name"]), field["values"][step]
            if isinstance(value, bool):
                assert shown == ("yes" if value else "no")
            elif isinstance(value, float):
                assert shown == f"{100 * value:g} %"
            else:
                assert shown == str(value) or isinstance(value, tuple)


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
    ([], None, "structures must be a list of structures, at least one, got none"),
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
    assert grid(NM, n=[2, 4, 8], m=[4, 8]) == [NM(2, 4), NM(2, 8), NM(4, 8)]
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


PAGE = """<!doctype html><html lang="en" data-theme="light"><meta charset="utf-8"><title>explorer</title>
<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">
<link rel="stylesheet" href="explorer.css">
<style>
html { --pst-color-text-base: #222832; --pst-color-background: #ffffff; --pst-color-surface: #f3f4f5; }
html[data-theme="dark"] { --pst-color-text-base: #ced6dd; --pst-color-text-muted: #9ca4af;
  --pst-color-background: #14181e; --pst-color-surface: #222832; --pst-color-border: #48566b; --pst-color-primary: #3fb1c5; }
body { margin: 8px; background: var(--pst-color-background); }
</style><div id="here"></div><script type="module">
import explorer from "./explorer.js";
const state = await (await fetch("state.json")).json();
for (const name of ["masks", "levels", "values"])
  state[name] = new DataView(Uint8Array.from(atob(state[name]), (letter) => letter.charCodeAt(0)).buffer);
const handlers = {};
window.model = {
  saved: 0,
  get: (name) => state[name],
  set(name, value) { state[name] = value; for (const handler of handlers[`change:${name}`] || []) handler(); },
  save_changes() { this.saved += 1; },
  on: (name, handler) => (handlers[name] ||= []).push(handler),
  off: (name, handler) => { handlers[name] = handlers[name].filter((other) => other !== handler); },
  listening: () => Object.values(handlers).flat().length,
};
window.clean = explorer.render({ model, el: document.getElementById("here") });
</script></html>"""

@pytest.fixture
def page(chromium, explorer):
    """The ES module in a bare page that is served from here; a page error or any other request fails the test."""
    files = {"": ("text/html", PAGE), "state.json": ("application/json", json.dumps(state(explorer)))}
    for name, kind in (("explorer.js", "text/javascript"), ("explorer.css", "text/css")):
        files[name] = (kind, (HERE / name).read_text())
    wrong = []

    def serve(route):
        name = route.request.url.removeprefix("http://explorer.test/")
        if name in files:
            return route.fulfill(content_type=files[name][0], body=files[name][1])
        wrong.append(f"request of {route.request.url}")
        return route.abort()

    page = chromium.new_page(viewport={"width": 820, "height": 1200})
    page.set_default_timeout(10_000)
    page.on("pageerror", lambda error: wrong.append(f"page error {error}"))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.route("**/*", serve)
    page.goto("http://explorer.test/")
    page.wait_for_selector(".se-name:not(:empty)")
    yield page
    page.close()
    assert not wrong


def readouts(page) -> dict[str, str]:
    names = ("name", "density", "magnitude", "energy", "bits", "usable-value", "ideal-value", "hardware")
    return {name: page.locator(f".se-{name}").first.inner_text() for name in names}


def canvas(page) -> str:
    return page.evaluate("document.querySelector('.se-canvas').toDataURL()")


@pytest.mark.browser
def test_every_control_at_both_ends_changes_what_is_read(page, explorer):
    for number, family in enumerate(explorer.data["families"]):
        page.get_by_label("structure", exact=True).select_option(str(number))
        assert page.locator(".se-sliders output").all_inner_texts() == current(page, explorer)
        for place, field in enumerate(family["fields"]):
            slider, seen = page.get_by_label(field["name"], exact=True), []
            for key, step in (("Home", 0), ("End", len(field["values"]) - 1)):
                slider.press(key)
                assert current(page, explorer)[place] == field["values"][step]
                assert slider.get_attribute("aria-valuetext") == field["values"][step]
                assert page.locator(".se-sliders output").all_inner_texts() == current(page, explorer)
                seen.append((readouts(page), canvas(page)))
            assert seen[0][0] != seen[1][0], field
            if field["name"] != "group":  # scales of more or fewer 4-bit integers look the same
                assert seen[0][1] != seen[1][1], field


def current(page, explorer) -> list[str]:
    """The values of the parameters of the pattern that the model holds, which the readouts must name."""
    index = page.evaluate("model.get('index')")
    config = explorer.data["configs"][index]
    assert page.locator(".se-name").inner_text() == str(explorer.structures[index])
    fields = explorer.data["families"][config["family"]]["fields"]
    return [field["values"][step] for field, step in zip(fields, config["at"])]


@pytest.mark.browser
def test_another_structure_starts_at_the_same_density_near_its_default(page, explorer):
    steps = ((NM(2, 4), 4, "block 32x32 50%"), (NM(2, 8), 3, "64:2:8"), (NM(2, 8), 1, "unstructured 25%"))
    for start, number, expected in steps:
        page.evaluate(f"model.set('index', {explorer.structures.index(start)})")
        page.get_by_label("structure", exact=True).select_option(str(number))
        assert page.locator(".se-name").inner_text() == expected


@pytest.mark.browser
def test_weight_tokens_and_pins_change_what_is_read(page, explorer):
    page.evaluate(f"model.set('index', {explorer.structures.index(NM(2, 8))})")
    before = readouts(page)
    page.get_by_label("weight", exact=True).select_option("1")
    assert readouts(page)["energy"] != before["energy"] and readouts(page)["bits"] == before["bits"]
    page.get_by_label("tokens", exact=True).press("Home")
    assert readouts(page)["usable-value"] == "at most 3.37×"
    page.get_by_label("tokens", exact=True).press("End")
    assert readouts(page)["usable-value"] == "at most 2.00×" and readouts(page)["ideal-value"] == "at most 4.00×"
    assert page.locator(".se-compare tbody tr").count() == 3
    page.get_by_label("remove 2:8").click()
    page.get_by_label("show 64:2:8").click()
    assert page.evaluate("model.get('pins').length") == 2 and readouts(page)["name"] == "64:2:8"
    page.evaluate(f"model.set('index', {explorer.structures.index(Unstructured(0.25))})")
    page.get_by_label("pin unstructured 25%").click()
    assert explorer.structures[page.evaluate("model.get('pins')")[-1]] == Unstructured(0.25)
    assert page.evaluate("model.saved") == 4


@pytest.mark.browser
def test_the_mask_says_why(page, explorer):
    page.evaluate(f"model.set('index', {explorer.structures.index(NM(2, 4))})")
    tip, mask = page.locator(".se-tip"), page.locator(".se-canvas")
    assert tip.is_hidden()
    mask.focus()
    for _ in range(6):  # the first press shows row 0, column 0
        page.keyboard.press("ArrowRight")
    weight = explorer.weights["independent Gaussian"]
    group = weight[0, 4:8].abs()
    kept = "kept" if NM(2, 4).mask(weight.abs())[0, 5] else "pruned"
    rank = 1 + int((group > group[1]).sum())
    value = f"{weight[0, 5]:.3f}".replace("-", "−")
    assert tip.inner_text().split("\n") == [
        f"row 0, column 5: {value}, {kept}", f"group 1 of row 0: 2 of 4 kept; this is number {rank} by magnitude"]
    page.keyboard.press("Escape")
    assert tip.is_hidden()
    for structure in (Dense(), Unstructured(0.25), VNM(16, 2, 8), Block(16, 16, 0.25)):
        page.evaluate(f"model.set('index', {explorer.structures.index(structure)})")
        for x, y in ((3, 3), (200, 200), (370, 370)):
            mask.hover(position={"x": x, "y": y})
            assert not re.search(r"undefined|NaN|[{}]", tip.inner_text()), (str(structure), tip.inner_text())


@pytest.mark.browser
def test_themes_narrow_pages_and_the_end(page, tmp_path):
    light = canvas(page)
    page.screenshot(path=tmp_path / "light.png", full_page=True)
    page.evaluate("document.documentElement.dataset.theme = 'dark'")
    page.wait_for_function("before => document.querySelector('.se-canvas').toDataURL() !== before", arg=light)
    page.screenshot(path=tmp_path / "dark.png", full_page=True)
    page.set_viewport_size({"width": 390, "height": 800})
    page.wait_for_timeout(100)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.screenshot(path=tmp_path / "narrow.png", full_page=True)
    page.evaluate("clean()")
    assert page.evaluate("[document.getElementById('here').childElementCount, model.listening()]") == [0, 0]


@pytest.mark.browser
def test_every_control_has_a_name_and_text_stands_out(page):
    for theme in ("light", "dark"):
        page.evaluate(f"document.documentElement.dataset.theme = '{theme}'")
        assert page.evaluate(UNNAMED) == []
        low = [entry for entry in page.evaluate(COLOURS) if contrast(*entry[:2]) < 4.5]
        assert not low, (theme, low)


UNNAMED = """() => [...document.querySelectorAll('.sparse-explorer :is(input, select, button, canvas, [tabindex])')]
  .filter((node) => !node.getAttribute('aria-label') && !(node.labels && node.labels.length))
  .map((node) => node.outerHTML)"""
COLOURS = """() => {
  const pen = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const rgb = (colour) => {
    pen.clearRect(0, 0, 1, 1); pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1);
    return [...pen.getImageData(0, 0, 1, 1).data];
  };
  const ground = (node) => {
    const own = rgb(getComputedStyle(node).backgroundColor);
    return own[3] === 255 ? own : ground(node.parentElement);
  };
  return [...document.querySelectorAll('.sparse-explorer :is(p, h4, span, small, output, th, td, button, select)')]
    .filter((node) => node.textContent.trim() && node.offsetWidth > 1)
    .map((node) => [rgb(getComputedStyle(node).color), ground(node), node.className || node.tagName, node.textContent]);
}"""


def contrast(text: list[int], ground: list[int]) -> float:
    """The ratio of WCAG 2 between two sRGB colours."""
    def light(colour: list[int]) -> float:
        parts = [part / 255 for part in colour[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    high, low = sorted((light(text), light(ground)), reverse=True)
    return (high + 0.05) / (low + 0.05)
