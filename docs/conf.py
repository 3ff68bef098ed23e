"""The documentation site: `make docs` builds it into build/docs.

The pages are plain Markdown that reads well without the site too. What the site adds to them (the
sidebar, the generated reference) is in `_extensions/`.
"""

import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS / "_extensions"), str(DOCS.parent)]

from heretic_kl import __version__  # noqa: E402 - found by the line above

project = "heretic-kl"
author = "The heretic-kl authors"
copyright = author
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "mathml",
    "pages",
    "reference",
]
exclude_patterns = ["_extensions"]

myst_enable_extensions = ["attrs_inline", "dollarmath"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 3
html_math_renderer = "mathml"

default_role = "literal"
highlight_language = "text"
maximum_signature_line_length = 120
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_type_aliases = {
    name: name for name in ("Observer", "Plan", "PromptsLike", "Request", "Result", "DtypeName")
}
autodoc_member_order = "bysource"

html_theme = "furo"
html_title = f"heretic-kl {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
pygments_style = "friendly"
pygments_dark_style = "github-dark"
