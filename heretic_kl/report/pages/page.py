"""A page of sections as one HTML file that needs no network. Knows nothing about studies.

Whatever comes from a model, a prompt or a plug-in is text: it is escaped, and its control
characters are made visible. The page's own script and style are named by their hashes; no other
runs.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from heretic_kl._version import __version__
from heretic_kl.report.details import DetailSection
from heretic_kl.report.drawing import svg
from heretic_kl.report.figures import Figure
from heretic_kl.report.run_data import PairedResponse, visible

FOLDER: Final = Path(__file__).parent


@dataclass(frozen=True)
class PageTable:
    """A table of text."""

    title: str
    headings: tuple[str, ...]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Entry:
    """Everything about one trial or model, to be opened."""

    anchor: str
    """`trial-17`."""
    name: str
    summary: str
    parts: Sequence[DetailSection]


@dataclass(frozen=True)
class TrialRow:
    """One trial in the list of all."""

    number: int
    cells: tuple[str, ...]
    anchor: bool
    """Links to the trial lead here, since it has no entry of its own."""


@dataclass(frozen=True)
class TrialList:
    """All trials in a table."""

    headings: tuple[str, ...]
    rows: Sequence[TrialRow]


@dataclass(frozen=True)
class Section:
    """A part of the page: notes, then whatever it has of the rest, in this order."""

    name: str
    title: str
    notes: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[PageTable] = ()
    pairs: Sequence[PairedResponse] = ()
    commands: Sequence[str] = ()
    entries: Sequence[Entry] = ()
    all_trials: TrialList | None = None


@dataclass(frozen=True)
class Page:
    """A report before it is rendered."""

    title: str
    lead: str
    source: str
    """What it was made from: `study NAME`."""
    sections: Sequence[Section]
    keyboard_links: frozenset[str] = frozenset()
    """Links in charts that the Tab key reaches."""
    anchors: Mapping[str, str] = field(default_factory=dict)
    """Name of a trial or model -> where the page has everything about it."""
    version: str = field(default=__version__)

    @property
    def figures(self) -> tuple[Figure, ...]:
        """All of them, in order."""
        return tuple(figure for section in self.sections for figure in section.figures)


def render(page: Page) -> str:
    """The page as HTML.

    Raises:
        ExportError: the library that draws is not installed.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: visible(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = ((FOLDER / f"page.{kind}").read_text("utf-8") for kind in ("css", "js"))
    drawings = {figure.name: svg(figure.drawing, page.keyboard_links) for figure in page.figures}
    return environment.get_template("page.html.j2").render(
        page=page,
        drawings=drawings,
        cells=_cells,
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
    )


def _cells(figure: Figure) -> list[list[str]]:
    return [[_cell(row.get(name)) for name in figure.columns] for row in figure.rows]


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _hash(text: str) -> str:
    """As a Content-Security-Policy names an inline script or style."""
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"sha256-{digest}"


def settings_rows(settings: Mapping[str, Any], above: str = "") -> list[tuple[str, str]]:
    """Every setting as a dotted key and its value, tables entered."""
    rows: list[tuple[str, str]] = []
    for key, value in settings.items():
        name = f"{above}{key}"
        if isinstance(value, Mapping) and value:
            rows += settings_rows(value, f"{name}.")
        else:
            rows.append((name, "–" if value is None else str(value)))
    return rows
