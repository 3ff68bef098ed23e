"""A study as a page: which sections there are, and what stands in them. Renders nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from heretic_kl.report import figures as draw
from heretic_kl.report.details import trial_details
from heretic_kl.report.figures import Figure
from heretic_kl.report.front_table import alike_note
from heretic_kl.report.pages.page import Entry, Page, PageTable, Section, TrialList, TrialRow
from heretic_kl.report.pages.sections import made_section, responses_section, verdicts_section
from heretic_kl.report.planes import objective_titles, planes_of, value_of
from heretic_kl.report.run_data import (
    norm_rows,
    projection_rows,
    separation_rows,
    study_responses,
    verdicts,
)
from heretic_kl.report.study_data import (
    REFUSALS,
    Chosen,
    choose,
    compared,
    comparison_rows,
    front_rows_of,
    history_rows,
    hypervolume_rows,
    position_rows,
    refinement_rows,
    strength_rows,
)
from heretic_kl.report.wording import (
    MISSING,
    cell,
    describe_edit,
    duration,
    label,
    other_tokens,
    scores_line,
    split_parts,
    tokens_note,
)
from heretic_kl.scoring import Score
from heretic_kl.search import PlanStore, StoredStudy, TrialRecord, alike_behind, foretold

MOST_ENTRIES: Final = 60
"""Trials with an entry of their own; all stand in the table."""
NOT_RECORDED: Final = "not shown: the run that made this study did not record it"
PICTURES: Final = ("front", "comparison", "refined", "positions", "strength")
"""Figures that are worth a picture of their own, in a model card for instance."""


@dataclass(frozen=True)
class StudyReport:
    """Everything that the page is made from.

    Args:
        study: as its storage holds it.
        run: what the run recorded beside it; {} where it recorded nothing.
        plans: learned operators beside the study.
        importances: shares by parameter, for each objective; [] with too few trials.
        settings: the study's, fit to be shown to others.
        rule: picks the trial that the report is about.
        harmful: show responses to harmful prompts that were kept.
    """

    study: StoredStudy
    run: Mapping[str, Any]
    plans: PlanStore
    importances: Sequence[Mapping[str, float]]
    settings: Mapping[str, Any]
    rule: str | None = None
    harmful: bool = False

    def page(self) -> Page:
        """The page.

        Raises:
            SelectionError: no trial satisfies the rule.
        """
        study = self.study
        saved = self.run.get("saved", {}).get("trial")
        chosen = choose(study, saved, self.rule)
        trials = compared(study, chosen)
        sections = (
            self._result(chosen, trials),
            self._front(),
            self._edit(trials),
            self._search(),
            self._directions(),
            self._responses(chosen),
            self._verdicts(trials),
            self._trials(chosen),
            self._settings(chosen),
        )
        model = str(self.run.get("model") or self.settings.get("model") or study.name)
        return Page(
            title=f"Edits of {model}",
            lead=self._lead(),
            source=f"study {study.name}",
            sections=sections,
            keyboard_links=frozenset(f"#trial-{r.number}" for r in study.front),
            anchors={f"trial {r.number}": f"trial-{r.number}" for r in study.records},
        )

    def _lead(self) -> str:
        records = self.study.records
        states = Counter(record.state for record in records)
        counts = [
            f"{states.pop('complete', 0)} complete trials",
            f"{sum(1 for r in records if r.refinement)} of them refined",
            *(f"{count} {state}" for state, count in sorted(states.items())),
            f"{len(self.study.front)} on the front",
            f"{duration(sum(record.seconds for record in records))} of trials",
        ]
        wanted = int(self.settings.get("trials") or 0)
        searched = sum(1 for r in records if r.state != "interrupted" and not r.refinement)
        running = (
            f" The search holds {searched} of {wanted} trials so far." if searched < wanted else ""
        )
        return f"Study {self.study.name}: {', '.join(counts)}.{running}"

    def _result(self, chosen: Chosen | None, trials: Sequence[TrialRecord]) -> Section:
        notes = ["No trial is complete."] if chosen is None else []
        tables = []
        if chosen is not None:
            record = next(r for r in self.study.records if r.number == chosen.number)
            notes.append(f"Trial {chosen.number}, {chosen.reason}: {describe_edit(record.edit)}.")
            tested = self.study.tested.get(chosen.number)
            before, after = self.study.baseline, record.scores
            if tested is not None:
                before, after = self.study.test_baseline or {}, tested
            use = "validation" if tested is None else "test"
            notes += tokens_note(other_tokens(record.scores, tested or {}))
            if tested is None:
                notes.append(f"Trial {chosen.number} was not measured on the test prompts.")
            names = list(dict.fromkeys([*before, *after]))
            rows = [row for n in names for row in _score_rows(n, before.get(n), after.get(n))]
            headings = ("score", "original", f"trial {chosen.number}")
            tables.append(PageTable(f"Scores on the {use} prompts", headings, rows))
        rows_compared = comparison_rows(self.study, trials)
        shown = [draw.comparison_figure(rows_compared)] if rows_compared else []
        if not shown:
            notes.append("Original against edited: not shown, no trial was tested yet.")
        return Section("result", "Result", notes, shown, tables)

    def _front(self) -> Section:
        if len(self.study.roles) < 2:
            return Section("front", "Trade-off", ["The search has one objective: no front."])
        planes = planes_of(self.study.roles, self._titles())
        like = alike_behind(self.study.front, self.study.records)
        fronts = [(plane, front_rows_of(self.study, plane, like)) for plane in planes]
        shown = [draw.front_figure(r, p, self._limits(p.y)) for p, r in fronts if r]
        if not shown:
            return Section("front", "Trade-off", ["Pareto front: no trial is complete."])
        refined = [(plane, refinement_rows(self.study, plane)) for plane in planes]
        gains = [draw.refinement_figure(rows, plane) for plane, rows in refined if rows]
        notes = [] if gains else ["Refined against unrefined: no trial was refined."]
        if alike := alike_note(like):
            notes.append(alike)
        return Section("front", "Trade-off", notes, [*shown, *gains])

    def _edit(self, trials: Sequence[TrialRecord]) -> Section:
        notes, shown = [], []
        if positions := position_rows(self.study, trials):
            shown.append(draw.positions_figure(positions))
        else:
            notes.append("KL at each position: not shown, no scorer of these trials has a profile.")
        if strengths := strength_rows(self.study, trials, self.plans):
            shown.append(draw.strength_figure(strengths))
        drawn = {row["model"] for row in strengths}
        missing = [str(r.number) for r in trials if f"trial {r.number}" not in drawn]
        if missing:
            notes.append(
                f"Edit strength of trial {', '.join(missing)}: not shown, what was learned is not "
                "beside the study."
            )
        return Section("edit", "What the edit does", notes, shown)

    def _search(self) -> Section:
        notes, shown = [], []
        if rows := history_rows(self.study):
            shown.append(draw.history_figure(rows))
            shown.append(draw.hypervolume_figure(hypervolume_rows(self.study)))
        if self.importances:
            shares = [
                {"score": title, "parameter": parameter, "share": share}
                for title, of_score in zip(self._titles().values(), self.importances, strict=True)
                for parameter, share in of_score.items()
            ]
            shown.append(draw.importance_figure(shares))
        else:
            notes.append("Parameter importance: not shown, too few complete trials.")
        for name in sorted({name for record in self.study.records for name in record.predicted}):
            correlation = foretold(self.study.records, name)
            notes.append(
                f"Rank correlation of {label(name)}, predicted by rung 1 and counted, with its 95% "
                f"interval: {correlation or 'not known, too few trials have both'}."
            )
        return Section("search", "Search", notes, shown)

    def _directions(self) -> Section:
        title = "Directions"
        rows = separation_rows(self.run)
        if not rows:
            return Section("directions", title, [f"Separation of the directions: {NOT_RECORDED}."])
        table = self.run["directions"]
        groups = "refused harmful and answered harmless"
        groups = groups if table["by_response"] else "harmful and harmless"
        note = f"{table['harmful']} and {table['harmless']} training prompts: {groups} ones."
        shown = [draw.separation_figure(rows, groups)]
        if points := projection_rows(self.run):
            shown.append(draw.projection_figure(points))
        if norms := norm_rows(self.run):
            shown.append(draw.norms_figure(norms))
        return Section("directions", title, [note], shown)

    def _responses(self, chosen: Chosen | None) -> Section:
        first = None if chosen is None else chosen.number
        pairs, left_out = study_responses(self.run, first, harmful=self.harmful)
        notes = [] if pairs or left_out else [f"Paired responses: {NOT_RECORDED}."]
        if pairs and first is not None and f"trial {first}" not in pairs[0].edited:
            notes.append(f"Responses of trial {first}: {NOT_RECORDED}.")
        if self.harmful and not any(pair.kind == "harmful" for pair in pairs):
            notes.append("Responses to harmful prompts were not kept: --keep-responses all does.")
        return responses_section(pairs, left_out, notes, use="test", first="the first trial")

    def _verdicts(self, trials: Sequence[TrialRecord]) -> Section:
        scores = {"original": self.study.test_baseline or {}}
        scores |= {f"trial {r.number}": self.study.tested.get(r.number, {}) for r in trials}
        scorers = self.study.settings.get("scorers", {})
        tables = verdicts(self.run.get("test_prompts", {}), scorers, scores)
        return verdicts_section(tables, "test", f"Verdicts by prompt: {NOT_RECORDED}.")

    def _trials(self, chosen: Chosen | None) -> Section:
        study = self.study
        wanted = {record.number for record in study.front} | {*study.tested}
        wanted |= set() if chosen is None else {chosen.number}
        detailed = [r for r in study.records if r.number in wanted][:MOST_ENTRIES]
        entries = [
            Entry(
                f"trial-{record.number}",
                f"Trial {record.number}",
                f"Trial {record.number}: {scores_line(record.scores)}",
                trial_details(record, study.tested.get(record.number)),
            )
            for record in detailed
        ]
        numbers = {record.number for record in detailed}
        scores = list(study.roles)
        rows = [
            TrialRow(
                record.number,
                (
                    record.state,
                    *(_cell(value_of(record, name)) for name in scores),
                    duration(record.seconds),
                    record.error or describe_edit(record.edit),
                ),
                anchor=record.number not in numbers,
            )
            for record in study.records
        ]
        headings = ("trial", "state", *map(label, scores), "time", "edit")
        notes = ["Trials on the front and tested trials open with everything known of them."]
        return Section(
            "trials", "Trials", notes, entries=entries, all_trials=TrialList(headings, rows)
        )

    def _settings(self, chosen: Chosen | None) -> Section:
        commands = self.run.get("commands", {})
        command = None if chosen is None else commands.get(str(chosen.number))
        note = f"The command that finds the trial again: {NOT_RECORDED}."
        if command is not None and chosen is not None:
            note = f"This command finds trial {chosen.number} again and saves it:"
        section = made_section(self.run, self.settings, [command] if command else [], note)
        if self.run.get("versions"):
            return section
        return replace(section, notes=[*section.notes, f"Versions: {NOT_RECORDED}."])

    def _titles(self) -> dict[str, str]:
        """Titles of the objectives, with units."""
        measured = (self.study.baseline, *(record.scores for record in self.study.records))
        return objective_titles(self.study.roles, *measured)

    def _limits(self, name: str) -> dict[str, float]:
        """Lines on the axis of an objective."""
        limits = {}
        score = self.study.baseline.get(name)
        if score is not None and score.value is not None:
            limits["original"] = score.value
        target = self.settings.get("target_refusals")
        if name == REFUSALS and isinstance(target, float):
            limits["target"] = target
        return limits


def pictures(page: Page) -> tuple[Figure, ...]:
    """The figures that are worth a picture of their own."""
    return tuple(f for f in page.figures if f.name.partition("-")[0] in PICTURES)


def _score_rows(
    name: str, before: Score | None, after: Score | None
) -> Iterator[tuple[str, str, str]]:
    """A score, and below it the parts of a KL."""
    yield label(name), _cell(before), _cell(after)
    first, second = (dict(split_parts(score)) if score else {} for score in (before, after))
    for title in dict.fromkeys([*first, *second]):
        yield f"{label(name)}: {title}", first.get(title, MISSING), second.get(title, MISSING)


def _cell(score: Score | None) -> str:
    return MISSING if score is None else cell(score)
