"""Everything known of one trial, as sections of lines. Reads what scores hold, whoever made them.

A scorer's details are recognized by their keys, never by the scorer's name; what is missing or
of another type is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from heretic_kl.report.wording import (
    align,
    describe_edit,
    duration,
    label,
    number,
    predicted_line,
    split_parts,
    stopped_line,
)
from heretic_kl.scoring import KL_TOKENS, agreement_text
from heretic_kl.search import TrialRecord

if TYPE_CHECKING:
    from heretic_kl.ablation import EditParameters
    from heretic_kl.scoring import Score

BAR_WIDTH: Final = 24
MOST_BARS: Final = 16
"""Longer profiles are averaged over runs of positions."""
JUDGING: Final = (*("requests", "retries", "timeouts", "prompt_tokens", "answer_tokens"),)
"""What a judge behind an endpoint counts."""


@dataclass(frozen=True)
class DetailSection:
    """A heading and lines of cells under it."""

    title: str
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class ProfileBar:
    """The KL over a run of positions, counted from 1; nats."""

    first: int
    last: int
    mean: float
    count: int
    """Rows averaged."""


def trial_details(
    record: TrialRecord, test_scores: Mapping[str, Score] | None = None
) -> tuple[DetailSection, ...]:
    """All sections of one trial, with its scores on the test prompts if they were measured."""
    state = f"{record.state}, {duration(record.seconds)}"
    rows = [("state", state), ("edit", describe_edit(record.edit))]
    if record.predicted:
        rows.append(("by teacher forcing", predicted_line(record.predicted)))
    if record.stopped is not None:
        rows.append(("measured", stopped_line(record.stopped)))
    if record.error:
        rows.append(("error", record.error))
    sections = [DetailSection(f"Trial {record.number}", tuple(rows))]
    if record.edit is not None:
        sections.append(DetailSection("Edit", tuple(_edit_rows(record.edit))))
    if record.parameters:
        drawn = tuple((name, _plain(value)) for name, value in record.parameters.items())
        sections.append(DetailSection("Parameters as drawn (shares of the depth)", drawn))
    sections.extend(score_sections(record.scores, "validation prompts"))
    sections.extend(score_sections(test_scores or {}, "test prompts"))
    return tuple(sections)


def details_lines(sections: Sequence[DetailSection]) -> list[str]:
    """The sections as plain lines, cells aligned within a section."""
    lines: list[str] = []
    for section in sections:
        lines.extend(["", section.title] if lines else [section.title])
        lines.extend(f"  {line}" for line in align([list(row) for row in section.rows]))
    return lines


def profile_bars(details: Mapping[str, Any], most: int = MOST_BARS) -> tuple[ProfileBar, ...]:
    """A score's profile over positions, in at most `most` bars; empty where it has none.

    A bar over several positions is their mean, each weighing as many rows as it has.
    """
    profile = details.get("profile")
    if not isinstance(profile, list | tuple):
        return ()
    places = [place for place in map(_place, profile) if place is not None]
    run = -(-len(places) // most) if places else 1
    bars = []
    for start in range(0, len(places), run):
        group = places[start : start + run]
        count = sum(rows for _, _, rows in group)
        mean = sum(value * rows for _, value, rows in group) / count
        bars.append(ProfileBar(group[0][0] + 1, group[-1][0] + 1, mean, count))
    return tuple(bars)


def _edit_rows(edit: EditParameters) -> list[tuple[str, ...]]:
    position = edit.direction_position
    rows: list[tuple[str, ...]] = [
        ("direction", "each layer's own" if position is None else f"of layer {number(position)}")
    ]
    for name, kernel in edit.kernels.items():
        rows.append(
            (
                name,
                f"weight {kernel.peak_weight:.3f} at layer {number(kernel.peak_position)}, "
                f"falling to {kernel.floor_weight:.3f} at {number(kernel.reach)} layers from it",
            )
        )
    rows.append(("norm mode", edit.norm))
    if (learned := edit.refinement) is not None and (asked := learned.asked) is not None:
        steps = f"{asked.steps} steps asked for, first limit on refusal mass {asked.mass_limit:g}"
        rows.append(("learned with", f"{asked.loss}; {steps}, seed {asked.seed}"))
    return rows


def score_sections(scores: Mapping[str, Score], prompts: str) -> list[DetailSection]:
    """A section a score, and one of its profile over positions where it has one."""
    sections = []
    for name, score in scores.items():
        rows = [("score", score.text), *_error_rows(score), *_response_rows(score.details)]
        rows.extend(_judge_rows(score.details))
        rows.extend((f"of it {title}", f"{size} nats") for title, size in split_parts(score))
        rows.extend(_divergence_rows(score.details))
        sections.append(DetailSection(f"{label(name)} on the {prompts}", tuple(rows)))
        bars = _bar_rows(profile_bars(score.details))
        if bars:
            title = f"{label(name)} over positions, nats ({prompts})"
            sections.append(DetailSection(title, tuple(bars)))
    return sections


def _error_rows(score: Score) -> list[tuple[str, str]]:
    rows = []
    if score.standard_error is not None:
        rows.append(("standard error", f"{score.standard_error:.3g}"))
    if score.interval is not None:
        low, high = score.interval
        rows.append(("95% interval", f"{low:.4g} to {high:.4g}"))
    if score.objective is not None and score.objective != score.value:
        rows.append(("optimizer saw", f"{score.objective:.4g}"))
    return rows


def _response_rows(details: Mapping[str, Any]) -> list[tuple[str, str]]:
    degenerate = details.get("degenerate")
    if isinstance(degenerate, Mapping):
        reasons = ", ".join(f"{count} {reason}" for reason, count in degenerate.items())
        prompts, total = _number(details, "prompts"), _number(details, "total")
        if prompts is not None and total is not None and total < prompts:
            reasons += f"; {prompts - total:.0f} of {prompts:.0f} responses left out"
        return [("degenerate responses", reasons or "none")]
    empty = _number(details, "empty")  # all that older studies counted
    return [] if empty is None else [("empty responses", f"{empty:.0f}")]


def _judge_rows(details: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    classes, problems = details.get("classes"), details.get("problems")
    if isinstance(classes, Mapping):
        rows.append(("verdicts", ", ".join(f"{count} {name}" for name, count in classes.items())))
    if isinstance(problems, Mapping) and problems:
        listed = ", ".join(f"{count} {problem}" for problem, count in problems.items())
        rows.append(("not judged", listed))
    agreement, judging = details.get("agreement"), details.get("judging")
    if isinstance(agreement, Mapping):
        rows.extend(_agreement_rows(agreement))
    if isinstance(judging, Mapping):
        rows.append(("judged by", str(judging.get("by"))))
        if _number(judging, "requests") is not None:
            at_once = f" ({_number(judging, 'concurrency') or 1:.0f} at once)"
            rows.append(("judging", judging_line(judging, at_once)))
    return rows


def _agreement_rows(agreement: Mapping[str, Any]) -> list[tuple[str, str]]:
    line = agreement_text(agreement)
    if line is None:
        return []
    first, second = agreement["first_only"], agreement["second_only"]
    kappa, interval = _number(agreement, "kappa"), agreement.get("kappa_interval")
    if kappa is not None and interval:
        line += f", kappa {kappa:.2f} ({interval[0]:.2f} to {interval[1]:.2f})"
    apart = f"{first} by the judge alone, {second} by the phrases alone"
    return [("agreement with phrases", line), ("refused or evaded", apart)]


def judging_line(judging: Mapping[str, Any], at_once: str = "") -> str:
    """What a judge behind an endpoint was asked, from its counts."""
    counts = {key: int(_number(judging, key) or 0) for key in JUDGING}
    line = (
        "{requests} requests{at_once}, {retries} retries, {timeouts} timeouts, "
        "{prompt_tokens} + {answer_tokens} tokens"
    ).format(**counts, at_once=at_once)
    cost = _number(judging, "cost")
    return line if cost is None else f"{line}, cost {cost:.4g}"


def _divergence_rows(details: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    prompts, positions = _number(details, "prompts"), _number(details, "rows")
    if prompts is not None and positions is not None:
        tokens = _number(details, KL_TOKENS)
        of_each = "" if tokens is None else f", the first {tokens:.0f} of each response"
        rows.append(("measured on", f"{prompts:.0f} prompts, {positions:.0f} positions{of_each}"))
    quantiles = _quantiles(details)
    if quantiles:
        rows.append(("quantiles", quantiles))
    for key, title, form in (
        ("top1_agreement", "same top token", "{:.1%} of positions"),
        ("mean_probability_change", "probability", "{:+.4f} of the original's token, on average"),
        (
            "near_tie_share",
            "near ties",
            "{:.0%} of the KL is where the original hesitates between two tokens",
        ),
        ("noise_floor", "noise floor", "{:.2g} nats"),
        ("infinite_count", "infinite", "{:.0f} positions"),
    ):
        value = _number(details, key)
        if value is not None:
            rows.append((title, form.format(value)))
    apart = details.get("set_aside")
    if isinstance(apart, list | tuple) and apart:
        kl = _number(details, "set_aside_kl")
        theirs = "" if kl is None else f", KL {kl:.4f} nats"
        rows.append(("set aside", f"{len(apart)} prompts that the original refuses{theirs}"))
    return rows


def _quantiles(details: Mapping[str, Any]) -> str:
    worded = []
    median = _number(details, "median")
    if median is not None:
        worded.append((0.5, f"50% {median:.4f}"))
    entries = details.get("quantiles")
    for entry in entries if isinstance(entries, list | tuple) else ():
        if isinstance(entry, Mapping):
            level, value = _number(entry, "level"), _number(entry, "value")
            if level is not None and value is not None:
                worded.append((level, f"{100 * level:.4g}% {value:.4f}"))
    return "  ".join(text for _, text in sorted(worded))


def _bar_rows(bars: Sequence[ProfileBar]) -> list[tuple[str, ...]]:
    largest = max((bar.mean for bar in bars), default=0.0)
    rows: list[tuple[str, ...]] = []
    for bar in bars:
        length = round(BAR_WIDTH * bar.mean / largest) if largest > 0 else 0
        place = str(bar.first) if bar.first == bar.last else f"{bar.first}-{bar.last}"
        drawn = ("█" * length).ljust(BAR_WIDTH)
        rows.append((place.rjust(3), f"{bar.mean:.4f}", drawn, f"{bar.count} rows"))
    return rows


def _place(entry: object) -> tuple[int, float, int] | None:
    if not isinstance(entry, Mapping):
        return None
    position, mean, count = (_number(entry, key) for key in ("position", "mean", "count"))
    if position is None or mean is None or not count:
        return None
    return int(position), mean, int(count)


def _number(details: Mapping[str, Any], key: str) -> float | None:
    value = details.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value)


def _plain(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
