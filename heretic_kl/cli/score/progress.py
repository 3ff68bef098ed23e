"""How far a measurement is, as events: parts done of all, and the time left. Measures nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from heretic_kl.events import Observer, StageAdvanced, StageFinished, StageStarted

SHORTEST: Final = 0.2
"""Seconds between two events of one part; the last one of a part is always sent."""


class MeasuringStages:
    """Tells an observer of stages; called by whatever runs a model, see `Loading.progress`.

    Args:
        observer: told.
        unit: what sequences are, for people: prompts or windows.
    """

    def __init__(self, observer: Observer, unit: str) -> None:
        self._observer, self._unit = observer, unit
        self._later = 0
        self._part = ("", 0)
        self._stage_began = self._began = self._told = 0.0

    @contextmanager
    def stage(self, title: str, *, later: int = 0) -> Iterator[None]:
        """Say that a stage begins, and, where nothing is raised, that it is over.

        `later` candidates follow, which are expected to take as long as this one.
        """
        self._later, self._part = later, ("", 0)
        self._stage_began = time.monotonic()
        self._observer(StageStarted("measure", title))
        yield
        self._observer(StageFinished("measure", time.monotonic() - self._stage_began))

    def __call__(self, part: str, done: int, total: int) -> None:
        """So many of all sequences have been run."""
        now = time.monotonic()
        if (part, total) != self._part or not done:
            self._part, self._began, self._told = (part, total), now, 0.0
        if now - self._told < SHORTEST and done < total:
            return
        self._told = now
        left = None
        if done:
            left = (now - self._began) / done * (total - done)
            if part == "candidate":
                left += self._later * (now - self._stage_began + left)
        self._observer(StageAdvanced("measure", self._note(part), done, total, left))

    def _note(self, part: str) -> str:
        if part in ("candidate", "reference"):
            return self._unit
        return part if part == "responses" else f"{self._unit}, {part}"
