"""Choose where the pages take require.js, the widget manager and formulas from: vendored files, or the public CDN.

`make book` copies the vendored files with npm (see the Makefile). Where npm is missing the book still builds; its
pages then load those files from the CDN, so the build prints it and each page carries an announcement that says so.
"""

import shutil
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.config import Config

VENDORED = ("require.js", "embed-amd.js", "anywidget.js", "katex/katex.min.js", "katex/katex.min.css")
LATER = {"defer": "defer"}  # the page shows before 3.6 MB of script are read; deferred scripts keep their order
WIDGETS = {
    "vendor/require.js": LATER,
    "widgets-config.js": LATER,
    "vendor/embed-amd.js": {**LATER, "data-jupyter-widgets-cdn": "about:blank/"},  # unknown modules: not from a CDN
}
ANNOUNCEMENT = (
    "This copy was built without npm: formulas and widgets are loaded from a public CDN and do not work offline."
)


def missing(folder: Path) -> list[str]:
    """What the vendored front end lacks: files in ``folder``, or node to typeset formulas with."""
    absent = [name for name in VENDORED if not (folder / name).is_file()]
    return absent if absent or shutil.which("node") else ["node"]


def choose(app: Sphinx, config: Config) -> None:
    """Point Sphinx at the vendored files if all are there; else leave its CDN defaults and say so on each page."""
    absent = missing(Path(app.srcdir) / "book" / "_assets" / "vendor")
    config.html_math_renderer = "mathjax" if absent else "katex"
    if not absent:
        config.nb_ipywidgets_js = WIDGETS
        return
    print(f"front end: no {', '.join(absent)}; the pages load widgets and formulas from the public CDN and say so")
    config.html_theme_options = {**config.html_theme_options, "announcement": ANNOUNCEMENT}


def drop_icon_script(app: Sphinx, error: Exception | None) -> None:
    """The theme ships its icons twice, as a web font and as a script of 1.5 MB on every page; the font is enough."""
    script = Path(app.outdir) / "_static" / "scripts" / "fontawesome.js"
    if script.is_file():
        script.write_text("// The icons come from the web font.\n", encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    app.setup_extension("formulas")
    app.connect("config-inited", choose)
    app.connect("build-finished", drop_icon_script)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
