"""Finished tables on stdout for people, or JSON for programs. Measures nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from rich.console import Console

from heretic_kl.report import (
    DetailSection,
    MeasurementReport,
    TrialComparison,
    comparison_footnotes,
    comparison_sections,
    details_lines,
    measurement_footnotes,
    measurement_sections,
)
from heretic_kl.ui.terminal import say

PIPE_WIDTH: Final = 80


def print_measurement(console: Console, report: MeasurementReport) -> None:
    """The sections and the footnotes."""
    width = console.width if console.is_terminal else PIPE_WIDTH
    print_sections(console, measurement_sections(report, width))
    console.print()
    for note in measurement_footnotes(report):
        say(console, note, "dim")


def print_comparison(console: Console, comparison: TrialComparison) -> None:
    """Two trials side by side, with their differences."""
    print_sections(console, comparison_sections(comparison))
    console.print()
    for note in comparison_footnotes(comparison):
        say(console, note, "dim")


def print_sections(console: Console, sections: Sequence[DetailSection]) -> None:
    """Sections, headings in bold on a terminal."""
    for position, section in enumerate(sections):
        if position or console.is_terminal:
            console.print()
        heading, *lines = details_lines([section])
        say(console, heading, "bold")
        for line in lines:
            say(console, line)


def print_raw(console: Console, text: str) -> None:
    """Text as it is, never wrapped: it is meant for a program."""
    console.file.write(text)
    console.file.flush()
