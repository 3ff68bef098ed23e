"""What was measured of candidates as a page, with the report's own template. Renders nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from heretic_kl.report.details import DetailSection
from heretic_kl.report.figures import size_figure
from heretic_kl.report.measurement_table import (
    MeasurementReport,
    measurement_footnotes,
    measurement_sections,
)
from heretic_kl.report.pages.page import Page, PageTable, Section

CORNERS = frozenset(
    {"figure", "group", "position", "confidence", "candidate", "prompt", "place", "model"}
)
"""What stands first in a heading."""
WIDE = 10_000
"""Columns of a page: it scrolls."""


def measurement_page(
    report: MeasurementReport,
    points: Sequence[Mapping[str, Any]] = (),
    levels: Mapping[str, float] | None = None,
) -> Page:
    """The page.

    Args:
        report: what was measured.
        points: see `size_figure`; none: sizes are not known, and there is no plot.
        levels: likewise.
    """
    compared, *others, verdict = measurement_sections(report, WIDE)
    figures = [size_figure(points, levels or {})] if points else []
    notes = [" ".join(filter(None, row)) for row in verdict.rows]
    if not points:
        notes.append("KL against size: not shown, no candidate is on this disk.")
    return Page(
        title=f"How far from {report.reference}",
        lead=f"{len(report.candidates)} measured from {report.reference}.",
        source="heretic-kl score",
        sections=(
            Section("verdict", "Verdict", notes, figures),
            Section("compared", "Models and inputs", tables=[detail_table(compared)]),
            Section("figures", "Figures", measurement_footnotes(report), tables=_tables(others)),
        ),
    )


def _tables(sections: Sequence[DetailSection]) -> list[PageTable]:
    return [detail_table(section) for section in sections if section.rows]


def detail_table(section: DetailSection) -> PageTable:
    """A section as a table; without a heading of its own it gets one."""
    rows = list(section.rows)
    width = max(len(row) for row in rows)
    has_heading = len(rows) > 1 and (rows[0][0] in CORNERS or not rows[0][0])
    heading = rows.pop(0) if has_heading else ("what", "value")
    headings = tuple(name or "–" for name in (*heading, *[""] * (width - len(heading))))
    filled = [(*row, *[""] * (width - len(row))) for row in rows]
    return PageTable(section.title, headings, filled)
