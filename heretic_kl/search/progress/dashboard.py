"""What optuna-dashboard shows of a study beyond its values: names of objectives, notes of trials.

Written as that program stores them; nothing of it is imported or needed.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import optuna

from heretic_kl.search.records import TrialRecord

MOST_CHARACTERS = 2000
"""Of a note: databases keep it in one column."""


def name_objectives(study: optuna.Study, names: Sequence[str]) -> None:
    """Give the objectives their names, unless they have them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if study.metric_names != list(names):
            study.set_metric_names(list(names))


def trial_notes(trial_id: int, record: TrialRecord) -> dict[str, Any]:
    """A trial's note in Markdown, as system attributes of its study.

    It says the trial's scores, or what became of it.
    """
    prefix = f"dashboard:{trial_id}:note"
    return {f"{prefix}_str:0": _note(record)[:MOST_CHARACTERS], f"{prefix}_ver": 1}


def _note(record: TrialRecord) -> str:
    lines = [f"- {name}: {score.text}" for name, score in record.scores.items()]
    for name, share in record.predicted.items():
        lines.append(f"- {name}: {share:.0%} predicted by teacher forcing")
    if record.state == "screened":
        lines.append("- screened: no responses were generated")
    if (learned := record.refinement) is not None:
        scaled = "" if learned.strength == 1 else f", {learned.strength:.2f} times as strong"
        lines.append(f"- refined from trial {learned.start} in {learned.steps} steps{scaled}")
    if record.stopped is not None:
        lines += [f"- {name}: {text}" for name, text in record.stopped.findings.items()]
        lines.append(f"- stopped: trial {record.stopped.dominated_by} is better")
    if record.error:
        lines.append(f"- error: `{record.error}`")
    return "\n".join(lines)
