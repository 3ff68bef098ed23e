"""What was measured of candidates against one reference, as sections of lines. Measures nothing.

Every figure that a line shows is in the summaries it was made from; nothing is computed here but
means over runs of positions, where a profile is longer than a screen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, NamedTuple

from heretic_kl.kl.measurement import PROMPTS_TO_DISTINGUISH
from heretic_kl.report.details import BAR_WIDTH, MOST_BARS, DetailSection, details_lines
from heretic_kl.report.wording import MISSING

if TYPE_CHECKING:
    from heretic_kl.kl import Divergence, GroupMean, KLSummary, PairedComparison

WIDTH: Final = 80

BUCKETS_TITLE: Final = "Change of p(token), by the reference's probability of its best token"

_MEASURES: Final[dict[Divergence, str]] = {
    "forward_kl": "KL(reference || candidate)",
    "reverse_kl": "KL(candidate || reference)",
    "jensen_shannon": "Jensen-Shannon divergence",
}


@dataclass(frozen=True)
class MeasuredCandidate:
    """One candidate's figures."""

    name: str
    """As the user gave it."""
    dtype: str | None
    summary: KLSummary
    against_first: PairedComparison | None = None
    """This candidate minus the first one; None for the first."""
    groups: tuple[GroupMean, ...] = ()
    """Over text: by file or category."""
    macro: GroupMean | None = None
    """Of these."""
    back_end_floor: float | None = None
    """Nats between the reference's back end and the candidate's, on the candidate itself."""
    llama_rows: tuple[tuple[str, ...], ...] = ()
    """Against llama.cpp's base logits: its own figures beside ours, as cells."""
    figures: tuple[tuple[str, str], ...] = ()
    """More of them: labels and cells, shown below the others."""
    buckets: tuple[tuple[str, str], ...] = ()
    """How tokens' probabilities changed, by the reference's confidence: labels and cells."""
    verdict: str = ""
    """Where its KL lies, in one line."""
    places: tuple[DetailSection, ...] = ()
    """Its worst prompts and positions."""
    lower_bound: bool = False
    """All its divergences are lower bounds."""


@dataclass(frozen=True)
class MeasurementReport:
    """What was compared, how, and what came out."""

    reference: str
    """As the user gave it."""
    reference_dtype: str | None
    inputs: tuple[tuple[str, str], ...]
    """What all models read: labels and lines for people."""
    rounding_floor: float | None
    position_decay: float
    candidates: tuple[MeasuredCandidate, ...]
    over_text: bool = False
    """Instead of responses: prompts are windows or documents, and positions theirs."""
    ranking: tuple[tuple[str, ...], ...] = ()
    """Several candidates in order of their divergence, a heading first, as cells."""
    chain: tuple[tuple[str, ...], ...] = ()
    """Every pair of models that were made one from another, as cells."""
    bands: tuple[tuple[str, str], ...] = ()
    """The reference with its own weights rounded: labels and cells."""


def measurement_sections(
    report: MeasurementReport, width: int = WIDTH
) -> tuple[DetailSection, ...]:
    """Everything, no line wider than `width` but those that name models.

    Several candidates are columns; where they do not fit beside each other, further sections.
    """
    sections = [_compared(report)]
    numbered = list(enumerate(report.candidates, 1))
    measure = f"{_measure(report)}, nats"
    kinds = [_Kind(_figure_rows, "figure", measure)]
    if report.candidates[0].groups:
        kinds.append(_Kind(_group_rows, "group", f"{measure}, by file or category"))
    if not report.over_text:
        title = f"{measure}, by position of the response"
        kinds.append(_Kind(_profile_rows, "position", title))
    if any(candidate.buckets for candidate in report.candidates):
        kinds.append(_Kind(_bucket_rows, "confidence", BUCKETS_TITLE))
    for kind in kinds:
        start = 0
        while start < len(numbered):
            section, taken = _widest(report, numbered[start:], kind, width)
            sections.append(section)
            start += taken
    for number, candidate in numbered:
        whose = f" of candidate {number}" if len(numbered) > 1 else ""
        if candidate.llama_rows:
            title = f"As llama.cpp computes it{whose}, and ours; nats"
            sections.append(DetailSection(title, candidate.llama_rows))
        sections.extend(replace(part, title=f"{part.title}{whose}") for part in candidate.places)
    if report.bands:
        title = "The reference from itself, its own linear weights rounded; nats"
        sections.append(DetailSection(title, report.bands))
    if len(numbered) > 1:
        sections.append(_pairs(report, numbered))
    if report.ranking:
        sections.append(DetailSection("Nearest to the reference first", report.ranking))
    if report.chain:
        sections.append(DetailSection("From step to step, nats", report.chain))
    names = [str(number) if len(numbered) > 1 else "" for number, _ in numbered]
    verdicts = zip(names, (candidate.verdict for candidate in report.candidates), strict=True)
    sections.append(DetailSection("Verdict", tuple(row for row in verdicts if row[1])))
    return tuple(sections)


def measurement_footnotes(report: MeasurementReport) -> list[str]:
    """What a reader of the sections has to know."""
    notes = ["After ±: one standard error, clustered by prompt. In parentheses: counted."]
    if report.over_text:
        notes[0] = "After ±: one standard error over clusters. In parentheses: positions."
        notes.append("Clusters: documents, or the windows of a group that is one document.")
    summaries = [candidate.summary for candidate in report.candidates]
    if summaries and summaries[0].noise_floor is not None:
        notes.append("Floors: the reference against itself, batched or rounded differently.")
    if any(candidate.back_end_floor is not None for candidate in report.candidates):
        notes.append("Across back ends: the candidate's own file, in both.")
    if report.ranking:
        notes.append("Group: candidates of one letter cannot be told from the first of it.")
    if any(candidate.llama_rows for candidate in report.candidates):
        notes.append("A lower bound: tokens that the file clips are left out of both models.")
        notes.append("llama.cpp's errors treat tokens as independent, ours windows.")
    if any(summary.near_tie_share for summary in summaries):
        notes.append(
            f"Near ties: the reference's two best tokens are within {summaries[0].near_tie_margin}."
        )
    if any(candidate.figures for candidate in report.candidates):
        notes.append("Gain and loss: rise and fall of log p(token), in parentheses its positions.")
    if any(summary.infinite_count for summary in summaries):
        notes.append("Infinite positions (a token is excluded that the other allows): in no mean.")
    dtypes = {report.reference_dtype, *(c.dtype for c in report.candidates)} - {None}
    # Within llama.cpp, types of files differ, which is what is measured.
    if len(dtypes) > 1 and not all(str(dtype).endswith("llama.cpp") for dtype in dtypes):
        notes.append("Dtypes differ: part of the divergence is rounding.")
    return notes


# --- sections -------------------------------------------------------------------------------


class _Row(NamedTuple):
    """A label, and the cell of one candidate."""

    label: str
    cell: str


_Numbered = tuple[int, MeasuredCandidate]


class _Kind(NamedTuple):
    """A section with a column for each candidate."""

    rows: Callable[[MeasurementReport, MeasuredCandidate], list[_Row]]
    corner: str
    title: str


def _compared(report: MeasurementReport) -> DetailSection:
    summary = report.candidates[0].summary
    several = len(report.candidates) > 1
    named = [("reference", report.reference, report.reference_dtype)]
    for number, candidate in enumerate(report.candidates, 1):
        title = f"candidate {number}" if several else "candidate"
        named.append((title, candidate.name, candidate.dtype))
    rows = [(title, f"{name} ({dtype})" if dtype else name) for title, name, dtype in named]
    rows.extend(report.inputs)
    measure = f"{_measure(report)}, temperature {summary.temperature:g}"
    if report.position_decay != 1.0:
        measure += f", each position weighs {report.position_decay:g} of the one before"
    rows.append(("measure", measure))
    return DetailSection("What was compared", tuple(rows))


def _measure(report: MeasurementReport) -> str:
    first = report.candidates[0]
    return "lower bound of " * first.lower_bound + _MEASURES[first.summary.divergence]


def _widest(
    report: MeasurementReport, numbered: Sequence[_Numbered], kind: _Kind, width: int
) -> tuple[DetailSection, int]:
    """A section of as many of the first candidates as fit, and how many these are."""
    for count in range(len(numbered), 1, -1):
        section = _beside(report, numbered[:count], kind)
        if all(len(line) <= width for line in details_lines([section])):
            return section, count
    return _beside(report, numbered[:1], kind), 1


def _beside(report: MeasurementReport, numbered: Sequence[_Numbered], kind: _Kind) -> DetailSection:
    columns = [kind.rows(report, candidate) for _, candidate in numbered]
    labels = list(dict.fromkeys(row.label for column in columns for row in column))
    cells = [dict(column) for column in columns]
    lines: list[tuple[str, ...]] = []
    if len(report.candidates) > 1:
        lines.append((kind.corner, *(f"candidate {number}" for number, _ in numbered)))
    lines.extend((label, *(column.get(label, MISSING) for column in cells)) for label in labels)
    return DetailSection(kind.title, tuple(lines))


def _figure_rows(report: MeasurementReport, candidate: MeasuredCandidate) -> list[_Row]:
    summary = candidate.summary
    rows = [_Row("mean", _with_error(summary.mean, summary.standard_error))]
    low_high = summary.interval
    interval = MISSING if low_high is None else f"{low_high.low:.3g} to {low_high.high:.3g}"
    rows.append(_Row("95% interval", interval))
    if summary.noise_floor is not None:
        rows.append(_Row("noise floor, batching", f"{summary.noise_floor:.2g}"))
        if report.rounding_floor is not None:
            rows.append(_Row("noise floor, bfloat16", f"{report.rounding_floor:.2g}"))
    if candidate.back_end_floor is not None:
        rows.append(_Row("floor across back ends", f"{candidate.back_end_floor:.2g}"))
    if summary.noise_floor is not None:
        rows.append(_Row("the mean is", _standing(candidate, report.rounding_floor)))
    levels = [(level, value) for level, value in summary.quantiles]
    for level, value in sorted([*levels, (0.5, summary.median)]):
        title = "median" if level == 0.5 else f"{100 * level:g}% of positions below"
        rows.append(_Row(title, f"{value:.3g}"))
    rows.append(_Row("same best token", f"{summary.top1_agreement:.1%}"))
    token = "p(token of the text)" if report.over_text else "p(response token)"
    rows.append(_Row(token, f"{_signed(summary.mean_probability_change)} on average"))
    rows.append(_Row("from near ties", f"{summary.near_tie_share:.0%} of the mean"))
    rows.append(_Row("infinite positions", str(summary.infinite_count)))
    units = "clusters" if report.over_text else "prompts"
    rows.append(_Row(f"{units}, positions", f"{summary.prompts}, {summary.rows}"))
    return [*rows, *(_Row(*row) for row in candidate.figures)]


def _bucket_rows(report: MeasurementReport, candidate: MeasuredCandidate) -> list[_Row]:
    return [_Row(*row) for row in candidate.buckets]


def _standing(candidate: MeasuredCandidate, rounding_floor: float | None) -> str:
    mean = candidate.summary.mean
    if candidate.summary.below_noise_floor:
        return "below the noise floor"
    if candidate.back_end_floor is not None and mean <= candidate.back_end_floor:
        return "below the floor across back ends"
    if rounding_floor is not None and mean <= rounding_floor:
        return "below bfloat16's floor"
    return "above the noise floor"


def _profile_rows(report: MeasurementReport, candidate: MeasuredCandidate) -> list[_Row]:
    profile = candidate.summary.profile
    run = -(-len(profile) // MOST_BARS)
    groups = [profile[start : start + run] for start in range(0, len(profile), run)]
    means: list[float | None] = []
    for group in groups:
        count = sum(place.count for place in group)
        total = sum(place.mean * place.count for place in group if place.mean is not None)
        means.append(total / count if count else None)
    digits = len(str(len(profile)))
    largest = max((mean for mean in means if mean is not None), default=0.0)
    rows = []
    for group, mean in zip(groups, means, strict=True):
        first, last = group[0].position + 1, group[-1].position + 1
        place = f"{first:>{digits}}" if first == last else f"{first}-{last}"
        error = group[0].standard_error if run == 1 else None
        infinite = sum(place_mean.infinite for place_mean in group)
        value = MISSING if mean is None else _with_error(mean, error)
        cell = f"{value} ({sum(place_mean.count for place_mean in group)})"
        if infinite:
            cell += f", {infinite} infinite"
        if len(report.candidates) == 1 and mean is not None and largest > 0.0:
            bar = "█" * round(BAR_WIDTH * mean / largest)
            cell = f"{cell:<28} {bar}".rstrip()
        rows.append(_Row(place, cell))
    return rows


def _group_rows(report: MeasurementReport, candidate: MeasuredCandidate) -> list[_Row]:
    several = candidate.groups[1:] and candidate.macro is not None
    means = [*candidate.groups, *([candidate.macro] if several and candidate.macro else [])]
    return [
        _Row(group.name, f"{_with_error(group.mean, group.standard_error)} ({group.rows})")
        for group in means
    ]


def _pairs(report: MeasurementReport, numbered: Sequence[_Numbered]) -> DetailSection:
    rows: list[tuple[str, ...]] = [("candidate", "difference", "95% interval", "verdict")]
    for number, candidate in numbered:
        comparison = candidate.against_first
        if comparison is None:
            continue
        interval = MISSING
        if comparison.interval is not None:
            interval = f"{comparison.interval.low:+.3g} to {comparison.interval.high:+.3g}"
        difference = _with_error(comparison.mean_difference, comparison.standard_error, sign="+")
        rows.append((str(number), difference, interval, _verdict(comparison)))
    unit = "cluster" if report.over_text else "prompt"
    title = f"Minus candidate 1, paired by {unit} (negative: nearer to the reference)"
    return DetailSection(title, tuple(rows))


def _verdict(comparison: PairedComparison) -> str:
    if comparison.distinguishable:
        return "distinguishable"
    if comparison.prompts < PROMPTS_TO_DISTINGUISH:
        return "too few prompts to tell"
    return "not distinguishable"


def _signed(value: float) -> str:
    return f"{value:+.3g}" if value else "0"


def _with_error(value: float, error: float | None, sign: str = "") -> str:
    text = f"{value:{sign}.4g}"
    return text if error is None else f"{text} ± {error:.2g}"
