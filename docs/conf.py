"""How the documentation is built: `make docs`.

The source folder is the repository: README.md, docs/, benchmarks/README.md and the plugins' cards are pages,
and a link to any other file takes that file along into the site. So a link is written once, as a git host
reads it, and Sphinx checks all of them.
"""

import re
import sys
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import BaseModel
from sphinx.application import Sphinx
from sphinx.ext.napoleon import Config, GoogleDocstring

from variator_export.core.environment import DISTRIBUTION, installed_version

project = DISTRIBUTION
version = release = installed_version(DISTRIBUTION) or ""
copyright = f"the authors of {DISTRIBUTION}"

extensions = ["myst_parser", "sphinx.ext.autodoc"]
root_doc = "docs/index"
include_patterns = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "benchmarks/README.md",
    "docs/**.md",
    "examples/serving/README.md",
    "examples/serving/triton/README.md",
    "examples/t5-demo/README.md",
    "recipes/**/README.md",
]
# Folders that need not be searched for those; some hold very many files.
exclude_patterns = [".*", "artifacts", "build", "dist", "tests", "variator_export"]

html_theme = "furo"
html_title = f"{project} {release}"
html_copy_source = False
html_show_sphinx = False
html_static_path = ["style"]
html_css_files = ["custom.css"]
pygments_style = "default"
# Blocks without a language are commands and what they print.
highlight_language = "text"

myst_heading_anchors = 3

# In docstrings `this` is code.
default_role = "code"
autodoc_default_options = {"exclude-members": "model_config"}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 90
nitpick_ignore_regex = [
    # Names of other projects: their documentation is not here, and the build needs no network.
    ("py:.*", r"(collections|concurrent|importlib|ir|nn|numpy|pathlib|tokenizers|torch)\..+"),
    # A type variable, and a class that only its own module imports when it runs.
    ("py:class", r"variator_export\.core\.registry\.Member|Backbone(Info)?"),
]

_UNNAMED = re.compile(r"<(?:[^<>]|<[^<>]*>)*>")


def setup(app: Sphinx) -> None:
    """Say what autodoc and the HTML builder are to do besides."""
    app.connect("autodoc-process-docstring", _google_style)
    app.connect("autodoc-process-signature", _signature)
    app.connect("build-finished", _first_page)


def _google_style(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    # An attribute's docstring is plain text here; napoleon takes what stands before a colon for its type.
    if what not in ("attribute", "property"):
        config = Config(napoleon_custom_sections=[("Attributes", "params_style")])
        lines[:] = GoogleDocstring(lines, config, app, what, name, thing, options).lines()


def _signature(
    app: Sphinx, what: str, name: str, thing: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str, str | None] | None:
    """A pydantic model is its fields: without pydantic's constructor, and types without their constraints."""
    del app, name, options
    if not signature:
        return None
    if what != "class" or not issubclass(thing, BaseModel):
        # A default that has no name cannot be parsed, nor its signature be linked.
        return _UNNAMED.sub("...", signature), returns
    fields = type("Fields", (), {"__annotations__": thing.__annotations__})
    thing.__annotations__ = get_type_hints(fields, vars(sys.modules[thing.__module__]))
    return "", returns


def _first_page(app: Sphinx, error: Exception | None) -> None:
    """Web servers open index.html, and Sphinx has the first page where its source is."""
    if error is None and app.builder.format == "html":
        page = f'<!doctype html><meta http-equiv="refresh" content="0; url={root_doc}.html">\n'
        (Path(app.outdir) / "index.html").write_text(page, encoding="utf-8")
