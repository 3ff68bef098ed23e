"""Reads a split and a slice of it, `train[:400]`, as `datasets` writes them. Loads nothing.

`datasets` can read them too, but takes a second to import, and files of lines do not need it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from heretic_kl.errors import PromptError
from heretic_kl.prompts.source import DatasetSpec

_BOUND = r"(?:(-?\d{1,18})(%?))?"
_SPLIT = re.compile(rf"([\w.-]*)(?:\[{_BOUND}:{_BOUND}\])?")


@dataclass(frozen=True)
class Bound:
    """A row, or a percentage of the rows."""

    number: int
    percent: bool

    def of(self, rows: int) -> int:
        """Return the row it means, of so many."""
        # Rounded as `datasets` rounds: to the closest row.
        return round(self.number * rows / 100) if self.percent else self.number


@dataclass(frozen=True)
class Part:
    """The rows from one bound to another; None: from the first, or to the last."""

    start: Bound | None
    stop: Bound | None

    def of(self, rows: int) -> slice:
        """Return the slice it means, of so many rows."""
        start = 0 if self.start is None else self.start.of(rows)
        stop = rows if self.stop is None else self.stop.of(rows)
        return slice(start, stop)


def read_split(spec: DatasetSpec, names: Sequence[str]) -> tuple[str, Part]:
    """Return the split's name, which must be one of `names`, and the slice of it.

    Raises:
        PromptError: the split cannot be read, or is none of `names`.
    """
    match = _SPLIT.fullmatch(re.sub(r"\s", "", spec.split or ""))
    if match is None:
        raise PromptError(
            f"{spec.source}: cannot read split {spec.split!r}; written like train, train[:400], "
            "test[10:50], train[-20%:] or [:20]"
        )
    name, start, start_percent, stop, stop_percent = match.groups()
    listed = ", ".join(names)
    if not name:
        if len(names) != 1:
            raise PromptError(f"{spec.source}: has several splits; name one with split: {listed}")
        name = names[0]
    if name not in names:
        raise PromptError(f"{spec.source}: no split {name!r}; there is: {listed}")
    return name, Part(
        None if start is None else Bound(int(start), bool(start_percent)),
        None if stop is None else Bound(int(stop), bool(stop_percent)),
    )
