"""Formulas as HTML that is ready when the page loads: KaTeX runs in the build, so that no reader has to wait for it.

MathJax in the page is 1.2 MB of script. A formula that KaTeX cannot read is a warning, which fails the build.
"""

import json
import re
import shutil
import subprocess
from html import escape
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.locale import _
from sphinx.util import logging
from sphinx.util.math import get_node_equation_number
from sphinx.writers.html5 import HTML5Translator

NAME = "katex"
FOLDER = "vendor/katex"
LOGGER = logging.getLogger(__name__)


class Renderer:
    """One process of node for the whole build."""

    def __init__(self, library: Path) -> None:
        command = [shutil.which("node"), str(Path(__file__).with_name("formulas.cjs")), str(library)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")

    def html(self, node: nodes.Element, tex: str, display: bool) -> str:
        """The formula as HTML; where KaTeX cannot read it a warning, and the source."""
        self.process.stdin.write(json.dumps({"tex": tex, "display": display}) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        if "error" in answer:
            LOGGER.warning("formula %r: %s", tex, answer["error"], location=node)
        return answer.get("html") or escape(tex)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def renderer(app: Sphinx) -> Renderer:
    if not hasattr(app, "formulas"):
        app.formulas = Renderer(Path(app.srcdir) / "book" / "_assets" / FOLDER / "katex.min.js")
    return app.formulas


def inline(self: HTML5Translator, node: nodes.math) -> None:
    html = renderer(self.builder.app).html(node, node.astext(), display=False)
    self.body.append(self.starttag(node, "span", "", CLASS="math notranslate nohighlight") + html + "</span>")
    raise nodes.SkipNode


def display(self: HTML5Translator, node: nodes.math_block) -> None:
    self.body.append(self.starttag(node, "div", CLASS="math notranslate nohighlight"))
    if node["number"]:
        self.body.append(f'<span class="eqno">({get_node_equation_number(self, node)})')
        self.add_permalink_ref(node, _("Link to this equation"))
        self.body.append("</span>")
    tex = unnumbered(node.astext()) if node["nowrap"] else aligned(node.astext())
    self.body.append(renderer(self.builder.app).html(node, tex, display=True) + "</div>\n")
    raise nodes.SkipNode


def aligned(tex: str) -> str:
    """Lines that end in a double backslash under each other, as Sphinx does for MathJax."""
    return rf"\begin{{aligned}}{tex}\end{{aligned}}" if r"\\" in tex and r"\begin" not in tex else tex


def unnumbered(tex: str) -> str:
    """The environments of amsmath without their own numbers; Sphinx numbers the formula as a whole."""
    return re.sub(r"\\(begin|end)\{(equation|align|alignat|gather)\}", r"\\\1{\2*}", tex)


def add_style(app: Sphinx, page: str, template: str, context: dict, doctree: nodes.document | None) -> None:
    """The style sheet, on pages that have a formula."""
    if app.config.html_math_renderer == NAME and doctree and next(doctree.findall(is_formula), None):
        app.add_css_file(f"{FOLDER}/katex.min.css")


def is_formula(node: nodes.Node) -> bool:
    return isinstance(node, (nodes.math, nodes.math_block))


def finish(app: Sphinx, error: Exception | None) -> None:
    if hasattr(app, "formulas"):
        app.formulas.close()


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer(NAME, (inline, None), (display, None))
    app.connect("html-page-context", add_style)
    app.connect("build-finished", finish)
    return {"parallel_read_safe": True, "parallel_write_safe": False}
