"""Chromium for the tests that look at pages as a reader does."""

import os
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--no-first-run"]
HARMLESS = (
    "Got invalid theme mode",  # the theme, on a first visit
    "Syncing error: no comm channel defined",  # a widget without a kernel
)


def absent(what: str) -> None:
    """Skip the test because something is not here; in continuous integration fail it."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what}, and CI=true")
    pytest.skip(what)


@pytest.fixture(scope="session")
def chromium():
    """Debian's Chromium, driven by Playwright."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not program:
        absent("no Chromium on this machine (Debian: apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install -e .[test]")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=FLAGS)
        yield browser
        browser.close()


class Watch:
    """What goes wrong on a page: page errors, console errors, failed responses, requests that leave the machine."""

    def __init__(self, page):
        self.page, self.problems, self.sizes = page, [], {}
        page.route("**/*", self._route)
        page.on("pageerror", lambda error: self.problems.append(f"page error: {error}"))
        page.on("console", self._console)
        page.on("response", self._response)

    def _route(self, route):
        url = route.request.url
        if url.startswith(("http://127.0.0.1:", "ws://127.0.0.1:", "data:", "blob:")):
            route.continue_()
        else:
            self.problems.append(f"a request leaves the machine: {url}")
            route.abort()

    def _console(self, message):
        if message.type == "error" and not any(text in message.text for text in HARMLESS):
            self.problems.append(f"console: {message.text}")

    def _response(self, response):
        if response.status >= 400:
            self.problems.append(f"{response.status}: {response.url}")

    def check(self) -> None:
        assert not self.problems, "\n".join(self.problems)


@pytest.fixture
def watch():
    return Watch
