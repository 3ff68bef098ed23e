"""One trial of each of several studies, and the settings that differ. Measures nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from heretic_kl.report.details import DetailSection
from heretic_kl.report.wording import MISSING, cell, label

if TYPE_CHECKING:
    from heretic_kl.scoring import Score
    from heretic_kl.search import StoredStudy, TrialRecord

KL_TOKENS: Final = "kl_tokens"
TEST_KL_TOKENS: Final = "test_kl_tokens"
APART: Final = {"study_name", "study_dir", "storage", "save", "overwrite", "quiet"}
"""Settings that say where a study is, not what it does."""


@dataclass(frozen=True)
class StudyRow:
    """One study."""

    name: str
    settings: Mapping[str, Any]
    """Those that are not the same in all studies, flat."""
    trials: int
    """That were measured."""
    picked: int | None
    """Number of the trial that the rule picks."""
    validation: Mapping[str, Score]
    test: Mapping[str, Score]
    problem: str = ""
    """Why there is nothing to show."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        scores = {
            use: {name: score.to_dict() for name, score in values.items()}
            for use, values in (("validation", self.validation), ("test", self.test))
        }
        return {**vars(self), **scores, "settings": dict(self.settings)}


def study_rows(
    studies: Mapping[str, StoredStudy | str], picked: Mapping[str, TrialRecord | None]
) -> tuple[StudyRow, ...]:
    """A row a study, in order.

    Args:
        studies: by name; in the place of one that cannot be read, why.
        picked: the trial to show of each that can be read; None where no trial meets the rule.
    """
    flat = {
        name: dict(_flat(study.settings))
        for name, study in studies.items()
        if not isinstance(study, str)
    }
    names = dict.fromkeys(key for values in flat.values() for key in values)
    differing = [key for key in names if len({json.dumps(v.get(key)) for v in flat.values()}) > 1]
    rows = []
    for name, study in studies.items():
        if isinstance(study, str):
            rows.append(StudyRow(name, {}, 0, None, {}, {}, study))
            continue
        trial = picked[name]
        rows.append(
            StudyRow(
                name,
                {key: flat[name].get(key) for key in differing},
                sum(record.state == "complete" for record in study.records),
                None if trial is None else trial.number,
                {} if trial is None else trial.scores,
                {} if trial is None else study.tested.get(trial.number, {}),
                "no trial meets the rule" if trial is None else "",
            )
        )
    return tuple(rows)


def studies_section(rows: Sequence[StudyRow], rule: str) -> DetailSection:
    """The rows as a table: one line a study."""
    scorers = dict.fromkeys(name for row in rows for name in row.validation)
    settings = dict.fromkeys(name for row in rows for name in row.settings)
    heads = [f"{label(name)}{more}" for more in ("", ", test") for name in scorers]
    lines = [("study", *settings, "trials", "trial", *heads)]
    for row in rows:
        values = (_text(row.settings.get(name)) for name in settings)
        start = (row.name, *values, str(row.trials), _text(row.picked))
        cells = (
            cell(scores[name]) if name in scores else MISSING
            for scores in (row.validation, row.test)
            for name in scorers
        )
        lines.append((*start, *((row.problem,) if row.problem else cells)))
    return DetailSection(f"The trial that {rule} picks of each study", tuple(lines))


def studies_footnotes(rows: Sequence[StudyRow]) -> list[str]:
    """What a reader of the table has to know."""
    notes = ["In parentheses: 95% interval. After ±: one standard error."]
    if any(KL_TOKENS in row.settings for row in rows):
        notes.append(f"KL is over {KL_TOKENS} positions: not comparable where that differs.")
    if any(TEST_KL_TOKENS in row.settings for row in rows):
        notes.append(
            f"KL on test prompts is over {TEST_KL_TOKENS} positions, {KL_TOKENS} where that is not "
            "set: not comparable where that differs."
        )
    return notes


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif prefix or name not in APART:
            yield f"{prefix}{name}", value


def _text(value: object) -> str:
    return MISSING if value is None else str(value)
