"""The built book as a reader sees it: Chromium opens every page with the network blocked, in light and dark.

Run after `make book`; without a built book or Chromium these tests are skipped, and with CI=true they fail.
"""

import functools
import http.server
import json
import re
import threading
import urllib.request
from pathlib import Path

import pytest
from chapters import pages
from conftest import absent

pytestmark = pytest.mark.browser

ROOT = Path(__file__).parent.parent
HTML = ROOT / "_build" / "html"
PAGES = pages(ROOT)
WIDTHS = (1280, 390)
WIDGET_BUNDLE = re.compile(r"embed-amd|require\.js|anywidget\.js|widgets-config|@jupyter-widgets|blob:")
MOST = 1_750_000  # bytes of a page without the widget bundle, as files, not compressed
LOADED = """
[...performance.getEntriesByType("navigation"), ...performance.getEntriesByType("resource")].map(e => [e.name, e.decodedBodySize])
"""
LEAST_CONTRAST = 4.5  # WCAG AA


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *words):
        pass


@pytest.fixture(scope="module")
def site():
    """The address of the built book on the loopback."""
    if not (HTML / "index.html").is_file():
        absent("there is no built book: run make book first")
    old = [name for name in PAGES if not (HTML / f"{name}.html").is_file()]
    assert not old, f"the built book has no {', '.join(old)}: run make book again"
    if "built without npm" in (HTML / f"{PAGES[0]}.html").read_text(encoding="utf-8"):
        absent("the book was built without npm: its pages load files from the public CDN")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=HTML))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module", params=["light", "dark"])
def theme(request):
    return request.param


@pytest.fixture(scope="module")
def themed(chromium, theme):
    """One browser profile a theme, so that the second page finds the scripts in its cache as a reader's does."""
    context = chromium.new_context(color_scheme=theme, viewport={"width": WIDTHS[0], "height": 900})
    context.set_default_timeout(15_000)
    yield context
    context.close()


@pytest.fixture
def page(themed, watch):
    """A page that is watched; what went wrong on it fails the test at its end."""
    page = themed.new_page()
    page.set_viewport_size({"width": WIDTHS[0], "height": 900})
    page.watch = watch(page)
    yield page
    page.watch.check()
    page.close()


def visit(page, site: str, name: str) -> None:
    page.goto(f"{site}/{name}.html", wait_until="load")
    page.wait_for_function("document.fonts.status === 'loaded'")


def waits_for_math(page) -> int:
    """How many formulas the page has, once all are rendered."""
    page.wait_for_function(
        "[...document.querySelectorAll('.bd-article .math')].every(f => f.querySelector('.katex, mjx-container'))"
    )
    return page.locator(".bd-article .math").count()


@pytest.fixture(scope="module")
def reader(chromium):
    """A profile that opens one page after the other, and in the middle of each asks for the dark theme."""
    context = chromium.new_context(viewport={"width": WIDTHS[0], "height": 900})
    context.set_default_timeout(15_000)
    yield context
    context.close()


@pytest.mark.parametrize("name", PAGES)
def test_page_is_whole(reader, watch, site, name):
    page = reader.new_page()
    watched = watch(page)
    page.emulate_media(color_scheme="light")
    visit(page, site, name)
    assert page.locator(".bd-article h1").count() == 1
    assert page.locator("html").get_attribute("data-theme") == "light"
    page.emulate_media(color_scheme="dark")
    page.wait_for_function("document.documentElement.dataset.theme === 'dark'")
    waits_for_math(page)
    broken = page.evaluate("[...document.images].filter(i => !(i.complete && i.naturalWidth)).map(i => i.src)")
    assert broken == []
    text = page.locator(".bd-article").inner_text()
    for trace in ("Traceback (most recent call last)", "{cite", "{math}", "<Figure size", "state of the build -->"):
        assert trace not in text
    counted = {url: size for url, size in page.evaluate(LOADED) if not WIDGET_BUNDLE.search(url)}
    heaviest = sorted(counted.items(), key=lambda item: -item[1])[:5]
    assert 50_000 < sum(counted.values()) < MOST, heaviest
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        over = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert over <= 1, f"at {width} px the page is {over} px too wide"
    watched.check()
    page.close()


def test_first_page_leads_to_the_book(page, site):
    page.goto(f"{site}/index.html")
    page.wait_for_url(f"**/{PAGES[0]}.html")


def test_contents_name_every_page(page, site):
    visit(page, site, PAGES[0])
    links = page.eval_on_selector_all("nav.bd-links a", "all => all.map(a => a.href.split('#')[0])")
    found = {link.removeprefix(f"{site}/").removesuffix(".html") for link in links if link.startswith(site)}
    assert found >= set(PAGES[1:])


def test_search_finds_a_page(page, site):
    page.goto(f"{site}/search.html?q=density")
    page.wait_for_selector('#search-results li a[href*="notation"]')


def test_theme_button_turns_the_page_dark_and_light(page, site):
    visit(page, site, PAGES[0])
    seen = set()
    for _ in range(3):
        page.locator("button.theme-switch-button").first.click()
        seen.add(page.locator("html").get_attribute("data-theme"))
    assert seen == {"light", "dark"}


def test_every_chapter_can_be_downloaded(site):
    """The button of the page leads to the notebook with what it printed."""
    for name in PAGES:
        if (ROOT / f"{name}.ipynb").is_file():
            button = re.search(r'<a href="([^"]+\.ipynb)"[^>]*btn-download-source-button', (HTML / f"{name}.html").read_text(encoding="utf-8"), re.S)
            assert button, f"{name} has no button that downloads the notebook"
            with urllib.request.urlopen(f"{site}/{name.rsplit('/', 1)[0]}/{button[1]}") as got:
                assert any(cell.get("outputs") for cell in json.load(got)["cells"])


def test_status_page_tells_what_was_built(page, site):
    visit(page, site, "book/status")
    text = page.locator(".bd-article").inner_text()
    for word in ("Built 20", "commit", "torch", "measured here", "recorded", "seconds"):
        assert word in text


def explorers(page, site):
    """Each page with an explorer, opened until the explorer has drawn."""
    for name in PAGES:
        if "sparse-explorer" in (HTML / f"{name}.html").read_text(encoding="utf-8"):
            visit(page, site, name)
            page.wait_for_selector(".sparse-explorer select")
            yield name
        elif name.endswith("/explorer"):
            pytest.fail(f"{name} has no explorer in it")


def shown(page) -> str:
    """What the first explorer says: all text that is not a control's caption, and its drawing."""
    return page.locator(".sparse-explorer").first.inner_text() + page.evaluate(
        "[...document.querySelectorAll('.sparse-explorer canvas')].map(c => c.toDataURL()).join()"
    )


def test_explorer_changes_a_value_at_both_ends_of_every_control(page, site):
    visited = 0
    for _ in explorers(page, site):
        box = page.locator(".sparse-explorer").first
        for choice in range(box.locator("select").count()):
            select = box.locator("select").nth(choice)
            for value in select.locator("option").evaluate_all("all => all.map(o => o.value)"):
                before, old = shown(page), select.input_value()
                select.select_option(value)
                assert value == old or shown(page) != before, f"select {choice} to {value} changed nothing"
                if choice == 0:
                    move_sliders(page, box)
        visited += 1
    if not visited:
        absent("no page of the book has an explorer")


def move_sliders(page, box) -> None:
    """Every slider of the structure that is chosen, to its minimum and its maximum."""
    for number in range(box.locator("input[type=range]").count()):
        slider = box.locator("input[type=range]").nth(number)
        slider.fill(slider.get_attribute("min"))
        low = shown(page)
        slider.fill(slider.get_attribute("max"))
        assert shown(page) != low, f"slider {slider.get_attribute('aria-label')} shows the same at both ends"
        page.watch.check()


def test_explorer_is_usable_by_keyboard(page, site):
    for _ in explorers(page, site):
        slider = page.locator(".sparse-explorer input[type=range]").first
        slider.fill(slider.get_attribute("min"))
        before = shown(page)
        slider.press("ArrowRight")
        assert shown(page) != before
        unnamed = page.eval_on_selector_all(
            ".sparse-explorer :is(select, input, canvas, button)",
            "all => all.filter(e => !(e.labels?.length || e.ariaLabel || e.textContent.trim())).length",
        )
        assert unnamed == 0


CONTRAST = """
() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (node) => {
    for (; node; node = node.parentElement) {
      const colour = parse(getComputedStyle(node).backgroundColor);
      if (colour.length < 4 || colour[3] > 0.5) return colour;
    }
    return [255, 255, 255];
  };
  const own = (node) => [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
  return [...document.querySelectorAll(".sparse-explorer *")]
    .filter((node) => own(node) && node.getClientRects().length && !(node instanceof SVGElement))
    .map((node) => {
      const [a, b] = [light(parse(getComputedStyle(node).color)), light(ground(node))];
      return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), node.className, node.textContent.trim().slice(0, 40)];
    });
}
"""


def test_explorer_can_be_read(page, site):
    for name in explorers(page, site):
        faint = [entry for entry in page.evaluate(CONTRAST) if entry[0] < LEAST_CONTRAST]
        assert not faint, name
