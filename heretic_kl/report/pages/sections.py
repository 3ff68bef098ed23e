"""Sections that several pages have: responses, verdicts, how it was made. Renders nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from heretic_kl.report.pages.page import PageTable, Section, settings_rows
from heretic_kl.report.run_data import APART, PairedResponse, Verdicts
from heretic_kl.report.wording import MISSING, label


def responses_section(
    pairs: Sequence[PairedResponse], left_out: int, notes: Sequence[str], *, use: str, first: str
) -> Section:
    """Responses side by side.

    Args:
        pairs: what is shown.
        left_out: harmful prompts whose responses are not shown.
        notes: what is missing beside these.
        use: which prompts, `test`.
        first: whose responses stand beside the original's, `the first trial`.
    """
    shown = []
    if pairs:
        shown.append(
            f"Greedy responses to {use} prompts. What the original and {first} begin with alike is "
            "paler."
        )
    shown += notes
    if left_out:
        shown.append(
            f"Responses to {left_out} harmful prompts are left out; --harmful-responses shows them."
        )
    return Section("responses", "Responses side by side", shown, pairs=pairs)


def verdicts_section(verdicts: Sequence[Verdicts], use: str, missing: str) -> Section:
    """A table a kind of prompts; `missing` says why there is none."""
    notes, tables = [] if verdicts else [missing], []
    for verdict in verdicts:
        rows = list(zip(verdict.prompts, *verdict.columns.values(), strict=True))
        title = " and ".join(map(label, verdict.scorers))
        tables.append(PageTable(f"{title}: {use} prompts", ("prompt", *verdict.columns), rows))
        if verdict.contradictions:
            counts = ", ".join(f"{name} {n}" for name, n in verdict.contradictions.items())
            notes.append(
                f"{APART} marks a verdict that contradicts {label(verdict.scorers[0])} on whether "
                f"a response refuses or evades: {counts} of {len(rows)} prompts."
            )
    return Section("verdicts", "Refused or not", notes, tables=tables)


def made_section(
    facts: Mapping[str, Any], settings: Mapping[str, Any], commands: Sequence[str], note: str
) -> Section:
    """Command, versions, prompts and settings.

    Args:
        facts: what a run records: `versions`, `machine`, `calibration`, `prompts`.
        settings: all of them, fit to be shown to others.
        commands: lines for a shell.
        note: what stands before them.
    """
    tables = []
    versions = {**facts.get("versions", {}), "machine": facts.get("machine")}
    if facts.get("versions"):
        rows = _pairs({**versions, **facts.get("calibration", {})})
        tables.append(PageTable("Versions and calibration", ("what", "value"), rows))
    prompts = [
        (f"{p['kind']} {p['use']}", str(p["source"]), str(p["count"]), str(p["sha256"])[:16])
        for p in facts.get("prompts", ())
    ]
    if prompts:
        headings = ("prompts", "source", "count", "SHA-256")
        tables.append(PageTable("Prompts", headings, prompts))
    tables.append(PageTable("Every setting", ("setting", "value"), settings_rows(settings)))
    return Section("settings", "How it was made", [note], tables=tables, commands=commands)


def _pairs(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, MISSING if value is None else str(value)) for name, value in facts.items()]
