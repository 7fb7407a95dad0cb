"""Choose where the pages load require.js, the widget manager and MathJax from: vendored copies, or the public CDN.

`make book` copies the vendored files with npm (see the Makefile). Where npm is missing the book still builds; its
pages then load those files from the CDN, so the build prints it and each page carries an announcement that says so.
"""

from pathlib import Path

from sphinx.application import Sphinx
from sphinx.config import Config

VENDORED = ("require.js", "embed-amd.js", "anywidget.js", "mathjax/tex-mml-chtml.js")
WIDGETS = {  # the order matters
    "vendor/require.js": {},
    "widgets-config.js": {},
    "vendor/embed-amd.js": {"data-jupyter-widgets-cdn": "about:blank/"},  # an unknown module must not go to a CDN
}
ANNOUNCEMENT = (
    "This copy was built without npm: formulas and widgets are loaded from a public CDN and do not work offline."
)


def missing(folder: Path) -> list[str]:
    """The vendored files that are not in ``folder``."""
    return [name for name in VENDORED if not (folder / name).is_file()]


def choose(app: Sphinx, config: Config) -> None:
    """Point Sphinx at the vendored files if all are there; else leave its CDN defaults and say so on each page."""
    absent = missing(Path(app.srcdir) / "book" / "_assets" / "vendor")
    if not absent:
        config.nb_ipywidgets_js = WIDGETS
        config.mathjax_path = "vendor/mathjax/tex-mml-chtml.js"
        return
    print(f"front end: no {', '.join(absent)} in book/_assets/vendor, so the pages load from the public CDN and say so")
    config.html_theme_options = {**config.html_theme_options, "announcement": ANNOUNCEMENT}


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("config-inited", choose)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
