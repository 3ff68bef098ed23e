"""Edits that somebody made, measured beside the original, as a page. Renders nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from heretic_kl.report import figures as draw
from heretic_kl.report.details import score_sections
from heretic_kl.report.evaluation_table import (
    EvaluatedCandidate,
    evaluation_footnotes,
    evaluation_sections,
)
from heretic_kl.report.figures import Figure
from heretic_kl.report.pages.measurement import detail_table
from heretic_kl.report.pages.page import Entry, Page, Section
from heretic_kl.report.pages.sections import made_section, responses_section, verdicts_section
from heretic_kl.report.planes import Plane, objective_titles, planes_of, with_interval
from heretic_kl.report.run_data import paired_responses, verdicts
from heretic_kl.report.study_data import profile_rows, score_rows
from heretic_kl.report.wording import compact, label, scores_line
from heretic_kl.scoring import Score

ORIGINAL: Final = "original"
Models = Mapping[str, Mapping[str, Score]]
"""Name -> scores, the original first."""
Responses = Mapping[str, Sequence[str]]
"""To the first prompts, by kind."""


@dataclass(frozen=True)
class EvaluationReport:
    """Everything that the page is made from.

    Args:
        original: its name; like settings and command fit to be shown to others.
        use: which prompts: `test`.
        prompts: by kind.
        roles: objective -> minimize or maximize, in the order of the settings.
        scores: of the original.
        candidates: under distinct names.
        responses: of the original; empty where none were generated.
        facts: versions, machine, calibration, prompts; see `made_section`.
        settings: all of them.
        command: a line for a shell that measures the same.
        harmful: show responses to harmful prompts.
    """

    original: str
    use: str
    prompts: Mapping[Any, Sequence[str]]
    roles: Mapping[str, str]
    scores: Mapping[str, Score]
    candidates: Sequence[EvaluatedCandidate]
    responses: Responses
    facts: Mapping[str, Any]
    settings: Mapping[str, Any]
    command: str
    harmful: bool = False

    def page(self) -> Page:
        """The page."""
        note = "This command measures the same again:"
        sections = (
            self._result(),
            self._trade_off(),
            self._positions(),
            self._responses(),
            self._verdicts(),
            self._figures(),
            made_section(self.facts, self.settings, [self.command], note),
        )
        count = len(self.candidates)
        edits = "1 candidate" if count == 1 else f"{count} candidates"
        prompts = [f"{len(texts)} {kind}" for kind, texts in self.prompts.items()]
        return Page(
            title=f"Edits of {self.original}",
            lead=f"{edits} beside the original, on {', '.join(prompts)} {self.use} prompts.",
            source="heretic-kl evaluate",
            sections=sections,
            keyboard_links=frozenset(f"#{anchor}" for anchor in self._anchors.values()),
            anchors=self._anchors,
        )

    @property
    def _models(self) -> Models:
        return {ORIGINAL: self.scores, **{c.name: c.scores for c in self.candidates}}

    @property
    def _anchors(self) -> dict[str, str]:
        return {name: f"model-{place}" for place, name in enumerate(self._models)}

    def _result(self) -> Section:
        use = self.use
        tables = evaluation_sections(self.scores, self.candidates, f"on the {use} prompts")
        rows = [row for name, scores in self._models.items() for row in score_rows(name, scores)]
        return Section(
            "result",
            "Result",
            evaluation_footnotes(self.scores, self.candidates),
            [draw.comparison_figure(rows, use, about="")] if rows else [],
            [detail_table(table) for table in tables],
        )

    def _trade_off(self) -> Section:
        title, roles = "Trade-off", self.roles
        if len(roles) < 2:
            return Section("front", title, ["There is one objective: no trade-off."])
        notes, shown = [], []
        for plane in planes_of(roles, objective_titles(roles, self.scores)):
            rows = trade_off_rows(self._models, plane, self._anchors)
            if len(rows) < 2:
                notes.append(f"{label(plane.y)} and {label(plane.x)}: no values.")
            else:
                shown.append(draw.candidates_figure(rows, plane, self.use))
        return Section("front", title, notes, shown)

    def _positions(self) -> Section:
        rows = [row for c in self.candidates for row in profile_rows(c.name, c.scores, self.use)]
        shown: list[Figure] = [draw.positions_figure(rows)] if rows else []
        notes = [] if shown else ["KL at each position: not shown, no scorer has a profile."]
        return Section("positions", "Where the KL is", notes, shown)

    def _responses(self) -> Section:
        pairs, left_out = paired_responses(
            self.prompts,
            self.responses,
            {c.name: c.responses for c in self.candidates},
            harmful=self.harmful,
            beside=len(self.candidates),
        )
        notes = []
        if not pairs and not left_out:
            notes.append("No responses: --keep-responses none.")
        elif "harmful" not in self.responses:
            notes.append(
                "Responses to harmful prompts are not shown, only whether they are refused; "
                "--harmful-responses shows them."
            )
        first = self.candidates[0].name if len(self.candidates) == 1 else "all candidates"
        return responses_section(pairs, left_out, notes, use=self.use, first=first)

    def _verdicts(self) -> Section:
        tables = verdicts(self.prompts, self.settings.get("scorers", {}), self._models)
        missing = "Verdicts by prompt: not shown, no scorer counts refusals."
        return verdicts_section(tables, self.use, missing)

    def _figures(self) -> Section:
        prompts = f"{self.use} prompts"
        entries = [
            Entry(
                self._anchors[name],
                name,
                f"{name}: {scores_line(scores)}",
                score_sections(scores, prompts),
            )
            for name, scores in self._models.items()
        ]
        notes = ["Each model opens with everything that was measured of it."]
        return Section("figures", "All figures", notes, entries=entries)


def trade_off_rows(
    models: Models, plane: Plane, anchors: Mapping[str, str]
) -> list[dict[str, Any]]:
    """A row a model that has both scores of the plane.

    A model is on the front if no other one is at least as good in both and better in one.
    """
    rows = []
    for name, scores in models.items():
        x, y = scores.get(plane.x), scores.get(plane.y)
        if x is None or y is None or x.value is None or y.value is None:
            continue
        rows.append(
            {
                "model": name,
                **with_interval("x", x),
                **with_interval("y", y),
                "text": f"{name}: {label(plane.y)} {compact(y)}, {label(plane.x)} {compact(x)}",
                "link": f"#{anchors[name]}",
            }
        )
    places = [
        tuple(
            -row[axis] if role == "maximize" else row[axis]
            for axis, role in zip("xy", plane.roles, strict=True)
        )
        for row in rows
    ]
    for row, (x_place, y_place) in zip(rows, places, strict=True):
        beaten = any(
            ours != (x_place, y_place) and ours[0] <= x_place and ours[1] <= y_place
            for ours in places
        )
        row |= {"front": not beaten, "kind": "beaten" if beaten else "not beaten"}
    return rows


def distinct(names: Sequence[str]) -> list[str]:
    """The names, numbered where one repeats or is that of the original."""
    seen = {ORIGINAL}
    distinct = []
    for name in names:
        shown, count = name, 1
        while shown in seen:
            count += 1
            shown = f"{name} ({count})"
        seen.add(shown)
        distinct.append(shown)
    return distinct
