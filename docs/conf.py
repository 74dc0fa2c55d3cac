"""How the pages in this folder become a site: `make docs`, without any network."""

import re
import tomllib
from pathlib import Path

from docutils import nodes

from fastpair.cli.examples import EXAMPLES

_about = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]

project, release, author = "fastpair", _about["version"], "the fastpair authors"
project_copyright = "the fastpair authors"
smartquotes = False  # options have two dashes, and z' is no quotation
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_click",
    "sphinx_copybutton",
]

myst_enable_extensions = ["attrs_block", "colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["figures"]
suppress_warnings = ["misc.highlighting_failure"]

# A name between single backticks is a name of this project, and a link where the site has it.
default_role = "py:obj"
nitpick_ignore_regex = [("py:obj", ".*"), ("py:class", ".*"), ("py:exc", ".*")]

autodoc_typehints = "none"  # the text says more: shapes, units, defaults
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = True
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = ["Fields"]

html_theme = "furo"
html_title = "fastpair"
html_static_path = ["static"]
html_css_files = ["pages.css"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "light_css_variables": {
        "color-brand-primary": "#1f5f8b",
        "color-brand-content": "#1f5f8b",
        "font-stack": "system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif",
    },
    "dark_css_variables": {
        "color-brand-primary": "#7cc0ee",
        "color-brand-content": "#7cc0ee",
    },
}


def _described(_app, _what, _name, _object, _options, lines: list[str]) -> None:
    """Put what stands behind ``name : `` of a docstring below it: here it is no type."""
    section, field = "", re.compile(r"(\*{0,2}[\w.*, ]+?) : (\S.*)")
    for number in range(len(lines) - 1, -1, -1):
        match = field.fullmatch(lines[number])
        if match is None:
            continue
        above = lines[: number + 1]
        section = next((above[n - 1] for n in range(number, 0, -1) if set(above[n]) == {"-"}), "")
        if section in ("Parameters", "Returns", "Raises", "Yields"):
            lines[number : number + 1] = [match[1], f"    {match[2]}"]
        elif section == "Attributes":  # as a list: a field would lose the last "_" of a name
            names = ", ".join(f"``{name}``" for name in match[1].split(", "))
            lines[number] = f"-   {names} – {match[2]}"  # noqa: RUF001
    if "Attributes" in lines:
        at = lines.index("Attributes")
        lines[at : at + 2] = ["Fields", "------"]


def _with_a_dash(_app, tree, _name) -> None:
    """Put a dash between a parameter and what is said of it, which smart quotes would do."""
    for text in list(tree.findall(nodes.Text)):
        if text.startswith(" -- "):
            text.parent.replace(text, nodes.Text(text.replace(" -- ", " – ", 1)))  # noqa: RUF001


def _with_long_code(_app, tree, name: str) -> None:
    """Mark tables whose code has to wrap, so that what stands beside it is seen."""
    for table in tree.findall(nodes.table):
        if any(len(code.astext()) > 40 for code in table.findall(nodes.literal)):
            table["classes"].append("long-code")
        if name.startswith("coming-from/"):
            table["classes"].append("calls")


def _with_examples(_app, context, lines: list[str]) -> None:
    """Put the examples of a command where its help has them."""
    for words, line in EXAMPLES.get(context.command.name, []):
        lines += [".. code-block:: sh", "", f"   # {words}", f"   {line}", ""]


def setup(app):
    app.connect("autodoc-process-docstring", _described, priority=400)
    app.connect("sphinx-click-process-epilog", _with_examples)
    app.connect("doctree-resolved", _with_a_dash)
    app.connect("doctree-resolved", _with_long_code)
