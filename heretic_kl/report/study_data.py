"""Trials of a study as rows of plain values, for figures and tables. Draws nothing.

A row is a mapping of names to numbers and text, JSON-ready; `None` where nothing was measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from heretic_kl.ablation import EditParameters, Plan
from heretic_kl.errors import SelectionError, StudyError
from heretic_kl.report.front_table import alike_text
from heretic_kl.report.planes import (
    Plane,
    axis_title,
    is_predicted,
    objective_titles,
    value_of,
    with_interval,
)
from heretic_kl.report.wording import MISSING, compact, label
from heretic_kl.scoring import Score
from heretic_kl.search import PlanStore, StoredStudy, TrialRecord, knee, pick, spread
from heretic_kl.search.progress.hypervolume import hypervolume_history

Row = Mapping[str, Any]
MOST_COMPARED: Final = 4
"""Trials that are told apart in one chart."""
REFUSALS: Final = "refusals"
Z_95: Final = 1.959964
"""Standard errors to either side of a mean that hold 95% of a normal distribution."""


@dataclass(frozen=True)
class Chosen:
    """The trial that the report is about."""

    number: int
    reason: str
    """`saved as model`, `picked by likely-refusals=0.05`."""


def choose(study: StoredStudy, saved: int | None, rule: str | None) -> Chosen | None:
    """The trial that a rule picks; without one, the saved trial, the target's or the knee's.

    Raises:
        SelectionError: no trial satisfies the given rule.
    """
    front, numbers = study.front, {record.number for record in study.records}
    if rule is not None:
        return Chosen(pick(rule, front, study.records).number, f"picked by {rule}")
    if saved in numbers:
        assert saved is not None
        return Chosen(saved, "the trial that was saved last")
    if not front:
        return None
    target = f"likely-{REFUSALS}={float(study.settings.get('target_refusals', 0.05)):g}"
    try:
        return Chosen(pick(target, front, study.records).number, f"what {target} picks")
    except SelectionError:
        return Chosen(knee(front).number, "the knee of the front")


def compared(study: StoredStudy, chosen: Chosen | None) -> tuple[TrialRecord, ...]:
    """At most four trials to compare: the chosen one, tested ones, those of the front."""
    tested = [record for record in study.records if record.number in study.tested]
    tested.sort(key=lambda record: (record.objectives, record.number))
    first = [r for r in study.records if chosen is not None and r.number == chosen.number]
    others = (*spread(tested, MOST_COMPARED), *spread(study.front, MOST_COMPARED))
    by_number = {record.number: record for record in (*first, *others)}
    shown = list(by_number.values())[:MOST_COMPARED]
    return tuple(sorted(shown, key=lambda record: (record.objectives, record.number)))


def front_rows_of(
    study: StoredStudy, plane: Plane, like: Mapping[int, Sequence[int]]
) -> list[dict[str, Any]]:
    """Every trial that has a place in the plane, with its 95% intervals.

    What a screened trial did not count is predicted. Sorted by kind, so that the front is drawn
    last. `like` is what `alike_behind` gives.
    """
    on_front = {record.number for record in study.front}
    rows = []
    for record in _measured(study):
        x, y = value_of(record, plane.x), value_of(record, plane.y)
        if x is None or y is None or x.value is None or y.value is None:
            continue
        predicted = is_predicted(x) or is_predicted(y)
        front = record.number in on_front and not predicted
        where = "predicted" if predicted else "on the front" if front else "dominated"
        kind = f"{_kind(record)}, {where}"
        rows.append(
            {
                "trial": record.number,
                "kind": kind,
                "front": front,
                "predicted": predicted,
                "like": alike_text(like.get(record.number, ())),
                **with_interval("x", x),
                **with_interval("y", y),
                "text": f"Trial {record.number}, {kind}: {_place(plane, record)}",
                "link": f"#trial-{record.number}",
            }
        )
    return sorted(rows, key=lambda row: (row["front"], not row["predicted"], row["kind"]))


def refinement_rows(study: StoredStudy, plane: Plane) -> list[dict[str, Any]]:
    """Every refined trial beside the trial that it started from, without its other strengths.

    What a start that was screened did not count is predicted.
    """
    by_number = {record.number: record for record in study.records}
    rows = []
    for record in _measured(study):
        learned = record.refinement
        start = None if learned is None else by_number.get(learned.start)
        if learned is None or start is None or learned.of is not None:
            continue
        row: dict[str, Any] = {
            "trial": record.number,
            "start": start.number,
            "form": learned.form,
            "steps": learned.steps,
            "mass_limit": learned.mass_limit,
            "loss": MISSING if learned.asked is None else learned.asked.loss,
            "predicted": False,
        }
        for axis, name in (("y", plane.y), ("x", plane.x)):
            before, after = value_of(start, name), value_of(record, name)
            row[f"{axis}_before"] = None if before is None else before.value
            row["predicted"] |= before is not None and is_predicted(before)
            row |= {axis: None} if after is None else with_interval(axis, after)
            row[f"{axis}_before_text"] = MISSING if before is None else compact(before)
            row[f"{axis}_text"] = MISSING if after is None else compact(after)
        row["before_text"] = f"Trial {start.number}: {_place(plane, start)}"
        row["text"] = f"Trial {record.number}: {_place(plane, record)}"
        rows.append(row)
    return rows


def history_rows(study: StoredStudy) -> list[dict[str, Any]]:
    """Every trial's objectives in the order of trials, with the best measured so far.

    One row a score. What a screened trial did not count is predicted, and never the best.
    """
    rows: list[dict[str, Any]] = []
    best: dict[str, float] = {}
    titles = objective_titles(study.roles, study.baseline, *(r.scores for r in study.records))
    for record in _measured(study):
        for name, role in study.roles.items():
            score = value_of(record, name)
            if score is None or score.value is None:
                continue
            if not is_predicted(score):
                better = max if role == "maximize" else min
                best[name] = better(best.get(name, score.value), score.value)
            rows.append(
                {
                    "trial": record.number,
                    "score": titles[name],
                    "role": role,
                    "value": score.value,
                    "best": best.get(name),
                    "kind": "predicted" if is_predicted(score) else _kind(record),
                    "text": f"Trial {record.number}: {label(name)} {compact(score)}",
                    "link": f"#trial-{record.number}",
                }
            )
    return rows


def hypervolume_rows(study: StoredStudy) -> list[dict[str, Any]]:
    """The share of the box of all objectives that the front dominates, over the trials' time."""
    points = [r.objectives if r.state == "complete" else None for r in study.records]
    seconds = 0.0
    rows = []
    for record, volume in zip(study.records, hypervolume_history(points), strict=True):
        seconds += record.seconds
        rows.append(
            {
                "trial": record.number,
                "minutes": seconds / 60,
                "hypervolume": volume,
                "kind": _kind(record),
            }
        )
    return rows


def comparison_rows(study: StoredStudy, trials: Sequence[TrialRecord]) -> list[dict[str, Any]]:
    """Original and compared trials on the test prompts, one row a model and score."""
    models = [("original", study.test_baseline)]
    models += [(f"trial {r.number}", study.tested.get(r.number)) for r in trials]
    return [row for model, scores in models for row in score_rows(model, scores or {})]


def score_rows(model: str, scores: Mapping[str, Score]) -> list[dict[str, Any]]:
    """Every score of one model that has a value, with its 95% interval."""
    return [
        {
            "model": model,
            "score": axis_title(name, score),
            **with_interval("value", score),
            "text": score.text,
        }
        for name, score in scores.items()
        if score.value is not None and math.isfinite(score.value)
    ]


def position_rows(study: StoredStudy, trials: Sequence[TrialRecord]) -> list[dict[str, Any]]:
    """The KL at every position with its 95% interval, on the test prompts where measured.

    Trials without test scores give their validation profile; `prompts` says which it is.
    """
    rows: list[dict[str, Any]] = []
    for record in trials:
        tested = study.tested.get(record.number)
        use = "test" if tested else "validation"
        rows += profile_rows(f"trial {record.number}", tested or record.scores, use)
    return rows


def profile_rows(model: str, scores: Mapping[str, Score], use: str) -> list[dict[str, Any]]:
    """The KL of one model at every position, with its 95% interval, scorer by scorer."""
    rows = []
    for name, score in scores.items():
        for place in _profile(score):
            error = place.get("standard_error")
            half = None if error is None else Z_95 * error
            mean = place["mean"]
            rows.append(
                {
                    "model": model,
                    "score": label(name),
                    "prompts": use,
                    "position": int(place["position"]) + 1,
                    "mean": mean,
                    "low": mean if half is None else max(0.0, mean - half),
                    "high": mean if half is None else mean + half,
                    "count": place.get("count"),
                }
            )
    return rows


def strength_rows(
    study: StoredStudy, trials: Sequence[TrialRecord], plans: PlanStore
) -> list[dict[str, Any]]:
    """How strongly a trial edits each layer's components.

    Of a searched edit, the weight of the ablation; of a refined one, the Frobenius norm of
    `U V^T` of the operator that was learned, which is the same number before learning. Refined
    trials whose operators are not beside the study are left out.
    """
    rows = []
    for record in trials:
        strengths = None if record.edit is None else _strengths(study, record.edit, plans)
        for component, values in (strengths or {}).items():
            for layer, value in enumerate(values):
                rows.append(
                    {
                        "model": f"trial {record.number}",
                        "component": component,
                        "layer": layer,
                        "strength": value,
                    }
                )
    return rows


def _measured(study: StoredStudy) -> list[TrialRecord]:
    """Trials of which something was measured to an end."""
    return [record for record in study.records if record.state in ("complete", "screened")]


def _kind(record: TrialRecord) -> str:
    return "refined" if record.refinement else "searched"


def _place(plane: Plane, record: TrialRecord) -> str:
    """`refusals 3/64 (5%), KL 0.0312 ± 0.0041`."""
    scores = {name: value_of(record, name) for name in (plane.y, plane.x)}
    words = (f"{label(n)} {MISSING if s is None else compact(s)}" for n, s in scores.items())
    return ", ".join(words)


def _profile(score: Score) -> list[Mapping[str, Any]]:
    profile = score.details.get("profile")
    entries = profile if isinstance(profile, list) else []
    return [e for e in entries if isinstance(e, Mapping) and isinstance(e.get("mean"), float)]


def _strengths(
    study: StoredStudy, edit: EditParameters, plans: PlanStore
) -> dict[str, list[float]] | None:
    layers = range(study.space.layers)
    if edit.refinement is None:
        kernels = {name: edit.kernels.get(name) for name in study.space.components}
        return {
            name: [0.0 if kernel is None else kernel.weight_at(layer) for layer in layers]
            for name, kernel in kernels.items()
        }
    try:
        plan = plans.load(edit.refinement.sha256)
    except StudyError:
        return None
    return {name: [_norm(plan, layer, name) for layer in layers] for name in study.space.components}


def _norm(plan: Plan, layer: int, component: str) -> float:
    """Frobenius norm of `U V^T`, averaged over the sites of a layer's component; 0 without one."""
    operators = [o for key, o in plan.items() if (key.layer, key.component) == (layer, component)]
    squares = [((o.left.T @ o.left) * (o.right.T @ o.right)).sum() for o in operators]
    norms = [float(square.clamp_min(0).sqrt()) for square in squares]
    return sum(norms) / len(norms) if norms else 0.0
