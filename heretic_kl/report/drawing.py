"""Vega-Lite specifications as SVG and PNG, without a browser. Knows nothing about studies."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import ModuleType
from typing import Any, Final

from heretic_kl.errors import ExportError

COLOURS: Final = ("#2878c8", "#c8641e", "#2d8f4e", "#9a5bd0", "#c2417c", "#7f7f7f")
"""Each has a contrast of at least 3 against white and against the dark page."""
DASHES: Final = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3])
LINK_BASE: Final = "https://page.invalid/"
"""The drawing library resolves links against an address; it is taken out again."""
_LINK: Final = re.compile(r'<a xlink:href="([^"]*)"')
_ALPHA: Final = {"gridOpacity": 0.15, "domainOpacity": 0.6, "tickOpacity": 0.6}
THEME: Final[Mapping[str, Any]] = {
    "background": None,
    "font": "Arial, Liberation Sans, sans-serif",  # the library measures with the second one
    "padding": 8,
    "view": {"stroke": None},
    "title": {"color": "currentColor"},
    "axis": {
        **{f"{part}Color": "currentColor" for part in ("label", "title", "domain", "tick", "grid")},
        **_ALPHA,
        "labelFontSize": 11,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
    },
    "legend": {
        **{f"{part}Color": "currentColor" for part in ("label", "title")},
        "labelFontSize": 11,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "orient": "top",
        "columnPadding": 24,
        "symbolOpacity": 1,
    },
    "header": {
        **{f"{part}Color": "currentColor" for part in ("label", "title")},
        "labelFontSize": 12,
    },
    "range": {"category": list(COLOURS)},
}


def svg(spec: Mapping[str, Any], keyboard_links: frozenset[str] = frozenset()) -> str:
    """An SVG element to be put into a page; colours of text and axes are the page's.

    Args:
        spec: Vega-Lite, with its data; marks with a link begin it with `LINK_BASE`.
        keyboard_links: links, without the base, that the Tab key reaches; others take a click.

    Raises:
        ExportError: the drawing library is not installed.
    """
    drawn: str = _library().vegalite_to_svg({**spec, "config": THEME})

    def link(match: re.Match[str]) -> str:
        target = match[1].removeprefix(LINK_BASE)
        skipped = "" if target in keyboard_links else ' tabindex="-1"'
        return f'<a href="{target}"{skipped}'

    return _LINK.sub(link, drawn)


def png(spec: Mapping[str, Any], scale: float = 2) -> bytes:
    """A PNG on white.

    Raises:
        ExportError: the drawing library is not installed.
    """
    drawn: bytes = _library().vegalite_to_png(
        {**spec, "config": {**THEME, "background": "white"}, "padding": 12}, scale=scale
    )
    return drawn


def check_drawing() -> None:
    """See that pictures can be drawn.

    Raises:
        ExportError: the drawing library is not installed.
    """
    _library()


def _library() -> ModuleType:
    try:
        import vl_convert
    except ImportError:
        raise ExportError(
            "the report draws with vl-convert-python, which is not installed: "
            "pip install 'heretic-kl[report]'"
        ) from None
    library: ModuleType = vl_convert
    return library
