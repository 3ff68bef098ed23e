"""How scores, edits and times are worded in one line. Draws nothing and knows no terminal."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from heretic_kl.scoring import KL_TOKENS

if TYPE_CHECKING:  # the types a trial record is made of
    from heretic_kl.ablation import EditParameters, WeightKernel
    from heretic_kl.scoring import Score, Stopped

MISSING: Final = "–"
"""Stands where there is no score."""

_SHORT_LABELS: Final = {"teacher_forced_kl": "KL"}
_PARTS: Final = {"behaviour": "refusing or not", "remainder": "everything else"}
"""Detail of a KL -> which part of it that is."""
_COMPONENTS: Final = ("attention", "mlp")
_NORMS: Final = {"row": "row norms restored", "normalized_row": "normalized rows ablated"}
_NATS: Final = re.compile(
    r"^(?P<number>.+?) nats( over (?P<tokens>\d+) positions?)?"
    r"( \((?P<below>below the )?noise floor (?P<floor>\S+)\))?$"
)
_ASCII: Final = str.maketrans(
    {
        "±": "+/-",
        "–": "-",
        "—": "-",
        "…": "...",
        "←": "<-",
        "→": "->",
        "·": "-",
        "×": "x",
        "█": "#",
        "▌": "#",
        "━": "-",
        "‘": "'",
        "’": "'",
        "“": '"',
        "”": '"',
    }
)


def label(name: str) -> str:
    """What a score is called in front of people: `false refusals`, `KL`."""
    return _SHORT_LABELS.get(name, name.replace("_", " "))


def compact(score: Score) -> str:
    """A score in a trial's line: `3/64 (5%)`, `0.0312 ± 0.0041 (floor 3e-12)`; else its text.

    Degenerate responses are named where there are any: `3/64 (5%; 2 degenerate)`.
    """
    counted = _counted(score)
    if counted is not None:
        count, total = counted
        return f"{count}/{total} ({_percent(count, total)}%{_degenerate(score)})"
    return _without_unit(score.text, floor=True)


def cell(score: Score) -> str:
    """A score in a table, with its 95% interval or error: `3/64, 5% (2-13%); 2 degenerate`."""
    counted = _counted(score)
    if counted is None:
        return _without_unit(score.text)
    count, total = counted
    share = f"{count}/{total}, {_percent(count, total)}%"
    if score.interval is None:
        return f"{share}{_degenerate(score)}"
    low, high = (f"{100 * bound:.0f}" for bound in score.interval)
    return f"{share} ({low}-{high}%){_degenerate(score)}"


def _degenerate(score: Score) -> str:
    """What is no answer at all, beside what refuses: `; 2 degenerate`, or nothing."""
    kinds = score.details.get("degenerate")
    count = sum(kinds.values()) if isinstance(kinds, Mapping) else 0
    return f"; {count} degenerate" if count else ""


def scores_line(scores: Mapping[str, Score], *, full: bool = False) -> str:
    """Scores side by side: `refusals 3/64 (5%)  KL 0.0312 ± 0.0041`."""
    worded = (f"{label(n)} {s.text if full else compact(s)}" for n, s in scores.items())
    return "  ".join(worded) or "no scores"


def split_parts(score: Score) -> list[tuple[str, str]]:
    """Title and size of both parts of a KL: `refusing or not`, `0.0120 ± 0.0010`; [] without."""
    parts = [(title, score.details.get(key)) for key, title in _PARTS.items()]
    return [
        (title, f"{part['mean']:.4f} ± {part['standard_error']:.4f}")
        for title, part in parts
        if isinstance(part, Mapping) and part.get("standard_error") is not None
    ]


def split_lines(scores: Mapping[str, Score]) -> list[str]:
    """A line for each KL that is told apart: `of the KL 0.0120 ± 0.0010 refusing or not, ...`."""
    parts = {name: split_parts(score) for name, score in scores.items()}
    return [
        f"of the {label(name)} {', '.join(f'{size} {title}' for title, size in of_score)}"
        for name, of_score in parts.items()
        if of_score
    ]


def other_tokens(
    validation: Mapping[str, Score], test: Mapping[str, Score]
) -> dict[str, tuple[int, int]]:
    """N of a score on validation and on test prompts, by scorer, where the two differ."""
    pairs = {
        name: (validation[name].details.get(KL_TOKENS), score.details.get(KL_TOKENS))
        for name, score in test.items()
        if name in validation
    }
    return {
        name: (first, second)
        for name, (first, second) in pairs.items()
        if isinstance(first, int) and isinstance(second, int) and first != second
    }


def tokens_note(differing: Mapping[str, tuple[int, int]]) -> list[str]:
    """Says of each scorer in `other_tokens` that its validation and test scores do not compare."""
    return [
        f"{label(name)} on test prompts is over the first N = {second} positions of a response, on "
        f"validation prompts over {first}: the two do not compare."
        for name, (first, second) in differing.items()
    ]


def predicted_line(predicted: Mapping[str, float]) -> str:
    """What rung 1 says: `refusals 12% predicted`."""
    return "  ".join(f"{label(name)} {share:.0%} predicted" for name, share in predicted.items())


def stopped_line(stopped: Stopped) -> str:
    """What was measured of a stopped trial: `refusals at least 12/40 after 24 responses; ...`."""
    measured = ", ".join(f"{label(name)} {text}" for name, text in stopped.findings.items())
    return f"{measured or 'nothing measured'}; dominated by trial {stopped.dominated_by}"


def describe_edit(edit: EditParameters | None) -> str:
    """One edit in words; layers count from 0, fractions lie between two layers."""
    if edit is None:
        return "unknown edit"
    position = edit.direction_position
    direction = "own direction in each layer"
    if position is not None:
        direction = f"one direction at layer {number(position)}"
    kernels: Mapping[Any, WeightKernel] = edit.kernels
    names = [*_COMPONENTS, *(name for name in kernels if name not in _COMPONENTS)]
    parts = [_component(name, kernels.get(name)) for name in names]
    words = f"{direction}; {', '.join(parts)}"
    if edit.refinement is not None:
        learned = edit.refinement
        scaled = "" if learned.strength == 1 else f", at {learned.strength:.2f} times that strength"
        scaled += "" if learned.of is None else f" (trial {learned.of}'s edit)"
        words = (
            f"{learned.form} learned in {learned.steps} steps from trial {learned.start}{scaled}: "
            f"{words}"
        )
    return f"{words}; {_NORMS.get(edit.norm, edit.norm)}" if edit.norm != "none" else words


def duration(seconds: float) -> str:
    """A time for people: `4.2 s`, `2 min 10 s`, `1 h 05 min`."""
    if seconds < 9.95:
        return f"{max(seconds, 0.0):.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def number(value: float) -> str:
    """At most one decimal: `17.4`, `20`."""
    return f"{value:.1f}".removesuffix(".0")


def to_ascii(text: str) -> str:
    """The same text for a terminal that knows ASCII alone; what has no likeness becomes `?`."""
    return text.translate(_ASCII).encode("ascii", "replace").decode("ascii")


def align(rows: list[list[str]], gap: str = "  ") -> list[str]:
    """Rows of cells as lines with aligned columns, no blanks at the end."""
    columns = max((len(row) for row in rows), default=0)
    widths = [max((len(r[i]) for r in rows if i < len(r)), default=0) for i in range(columns)]
    return [
        gap.join(text.ljust(width) for text, width in zip(row, widths, strict=False)).rstrip()
        for row in rows
    ]


def _counted(score: Score) -> tuple[int, int] | None:
    count, total = score.details.get("count"), score.details.get("total")
    if isinstance(count, int) and isinstance(total, int) and total > 0:
        return count, total
    return None


def _percent(count: int, total: int) -> str:
    return f"{100 * count / total:.0f}"


def _without_unit(text: str, *, floor: bool = False) -> str:
    match = _NATS.match(text)
    if match is None:
        return text
    tokens = f", N {match['tokens']}" if match["tokens"] else ""
    if match["below"]:
        return f"{match['number']}{tokens} (noise)"
    shown = f" (floor {match['floor']})" if floor and match["floor"] else ""
    return f"{match['number']}{tokens}{shown}"


def _component(name: str, kernel: WeightKernel | None) -> str:
    if kernel is None:
        return f"{name} off"
    return f"{name} peak {kernel.peak_weight:.2f} at layer {number(kernel.peak_position)}"
