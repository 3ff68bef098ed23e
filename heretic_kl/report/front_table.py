"""The front of trials as rows of text, then as a table or lines. Asks nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING, Final

from rich import box
from rich.table import Table
from rich.text import Text

from heretic_kl.report.wording import (
    MISSING,
    align,
    cell,
    describe_edit,
    label,
    other_tokens,
    to_ascii,
    tokens_note,
)
from heretic_kl.scoring import intervals_overlap
from heretic_kl.search import TrialRecord, knee

if TYPE_CHECKING:
    from heretic_kl.scoring import Score

KNEE_MARK: Final = "← knee"
MOST_ALIKE: Final = 6
"""Numbers of trials that are listed in one place."""


@dataclass(frozen=True)
class FrontRow:
    """One trial of the front, in words."""

    number: int | None
    """None: the unedited model."""
    validation: Mapping[str, str]
    """By scorer, on the prompts that steered the search."""
    test: Mapping[str, str] = field(default_factory=dict)
    """By scorer, on the test prompts; empty where they were not measured."""
    edit: str = ""
    knee: bool = False
    like_next: tuple[str, ...] = ()
    """Scorers whose 95% interval on the validation prompts overlaps that of the next trial."""
    like: tuple[int, ...] = ()
    """Trials behind the front that cannot be told from this one."""
    noise_floors: Mapping[str, float] = field(default_factory=dict)
    """In nats, by scorer that has one."""
    tokens: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Of scorers whose validation and test scores are over other numbers of positions: both."""

    @property
    def title(self) -> str:
        """`17`, `17 ← knee`, `unedited`."""
        if self.number is None:
            return "unedited"
        return f"{self.number} {KNEE_MARK}" if self.knee else str(self.number)


def front_rows(
    front: Sequence[TrialRecord],
    tested: Mapping[int, Mapping[str, Score]] | None = None,
    *,
    baseline: Mapping[str, Score] | None = None,
    test_baseline: Mapping[str, Score] | None = None,
    like: Mapping[int, Sequence[int]] | None = None,
) -> tuple[FrontRow, ...]:
    """The front as plain rows, in its own order.

    Args:
        front: the Pareto front, sorted.
        tested: scores on the test prompts by trial number, of those that have them.
        baseline: scores of the unedited model on the validation prompts; it comes first.
        test_baseline: its scores on the test prompts.
        like: see `heretic_kl.search.alike_behind`.
    """
    rows = []
    if baseline is not None:
        names = [name for trial in front[:1] for name in trial.scores] or list(baseline)
        shown = {name: cell(baseline[name]) for name in names if name in baseline}
        rows.append(FrontRow(None, shown, _cells(test_baseline or {}), "no edit"))
    best = knee(front).number if front else None
    for trial, following in zip_longest(front, front[1:]):
        test = (tested or {}).get(trial.number, {})
        rows.append(
            FrontRow(
                number=trial.number,
                validation=_cells(trial.scores),
                test=_cells(test),
                edit=describe_edit(trial.edit),
                knee=trial.number == best,
                like_next=() if following is None else _overlapping(trial, following),
                like=tuple((like or {}).get(trial.number, ())),
                noise_floors=_noise_floors(trial.scores),
                tokens=other_tokens(trial.scores, test),
            )
        )
    return tuple(rows)


def front_table(
    rows: Sequence[FrontRow], *, edits: bool = False, ascii_only: bool = False
) -> Table:
    """A table of at most 80 columns, one line a trial and set of prompts.

    Args:
        rows: from `front_rows`.
        edits: add a column with each edit in words (needs about 120 columns).
        ascii_only: for terminals that know nothing else.
    """
    worded = to_ascii if ascii_only else str
    names = _names(rows)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False)
    for heading in _headings(names, edits):
        table.add_column(Text(worded(heading)), overflow="fold")
    for row in rows:
        style = "bold" if row.knee else "dim" if row.number is None else None
        for cells in _row_lines(row, names, edits):
            table.add_row(*(Text(worded(text)) for text in cells), style=style)
    return table


def front_lines(rows: Sequence[FrontRow], *, ascii_only: bool = False) -> list[str]:
    """The same as aligned lines of plain text, edits included, of whatever width it takes."""
    names = _names(rows)
    cells = [_headings(names, True)]
    for row in rows:
        cells.extend(_row_lines(row, names, True))
    worded = to_ascii if ascii_only else str
    return align([[worded(text) for text in line] for line in cells])


def front_footnotes(rows: Sequence[FrontRow]) -> list[str]:
    """What a reader of the table has to know; nothing for an empty front."""
    trials = [row for row in rows if row.number is not None]
    if not trials:
        return []
    notes = ["In parentheses: 95% interval. After ±: one standard error."]
    notes.append("Validation scores chose these trials, so they flatter; test scores do not.")
    notes += tokens_note({name: pair for row in trials for name, pair in row.tokens.items()})
    for name, floor in trials[0].noise_floors.items():
        notes.append(
            f"{label(name)}: noise floor {floor:.1g} nats, seen when only batching differs."
        )
    for name in _names(trials):
        pairs = [
            f"{row.number}~{following.number}"
            for row, following in zip(trials, trials[1:], strict=False)
            if name in row.like_next
        ]
        if pairs:
            which = "all" if len(pairs) == len(trials) - 1 > 2 else ", ".join(pairs)
            notes.append(
                f"{label(name)}: the order of these neighbours may be chance (intervals overlap): "
                f"{which}."
            )
    if alike := alike_note({row.number: row.like for row in trials if row.number is not None}):
        notes.append(alike)
    return notes


def alike_note(like: Mapping[int, Sequence[int]]) -> str | None:
    """Which trials behind the front cannot be told from one of it; None: all can."""
    named = [f"{number} like {alike_text(others)}" for number, others in like.items() if others]
    if not named:
        return None
    return (
        "Behind the front, but not told from a trial of it (difference paired by prompt, intervals "
        f"of shares): {'; '.join(named)}."
    )


def alike_text(numbers: Sequence[int]) -> str:
    """`7, 12`; of many the first ones and how many more there are."""
    shown = ", ".join(map(str, numbers[:MOST_ALIKE]))
    more = len(numbers) - MOST_ALIKE
    return f"{shown} and {more} more" if more > 0 else shown


def _cells(scores: Mapping[str, Score]) -> dict[str, str]:
    return {name: cell(score) for name, score in scores.items()}


def _noise_floors(scores: Mapping[str, Score]) -> dict[str, float]:
    floors = {name: score.details.get("noise_floor") for name, score in scores.items()}
    return {name: floor for name, floor in floors.items() if isinstance(floor, float)}


def _names(rows: Sequence[FrontRow]) -> list[str]:
    on_validation = [name for row in rows for name in row.validation]
    return list(dict.fromkeys([*on_validation, *(name for row in rows for name in row.test)]))


def _headings(names: Sequence[str], edits: bool) -> list[str]:
    return ["trial", "prompts", *map(label, names), *(["edit"] if edits else [])]


def _row_lines(row: FrontRow, names: Sequence[str], edits: bool) -> list[list[str]]:
    """One line for the validation prompts, one for the test prompts where they were measured."""
    validation = [row.validation.get(name, MISSING) for name in names]
    lines = [[row.title, "validation", *validation, *([row.edit] if edits else [])]]
    if row.test:
        test = [row.test.get(name, MISSING) for name in names]
        lines.append(["", "test", *test, *([""] if edits else [])])
    return lines


def _overlapping(trial: TrialRecord, following: TrialRecord) -> tuple[str, ...]:
    others = following.scores
    return tuple(
        n for n, s in trial.scores.items() if n in others and intervals_overlap(s, others[n])
    )
