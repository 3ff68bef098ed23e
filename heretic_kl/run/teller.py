"""Tells an observer what a run does. Decides nothing, prints nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from heretic_kl.events import (
    CalibrationStep,
    Event,
    Notice,
    Observer,
    ResponsesJudged,
    Stage,
    StageAdvanced,
    StageFinished,
    StageStarted,
)


class Teller:
    """An observer, and the events that every step sends."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._judged: dict[str, ResponsesJudged] = {}

    def __call__(self, event: Event) -> None:
        """Send an event."""
        self._observer(event)

    def notice(self, message: str) -> None:
        """Say what the user should know."""
        self(Notice(message))

    def finding(self, name: str, value: str) -> None:
        """Show one fact that calibration found out."""
        self(CalibrationStep(name, value))

    @contextmanager
    def stage(self, stage: Stage, title: str, steps: int | None = None) -> Iterator[None]:
        """Say that a stage begins, and, where nothing is raised, that it is over."""
        self(StageStarted(stage, title, steps))
        start = time.perf_counter()
        yield
        self(StageFinished(stage, time.perf_counter() - start))

    def judged(self, sums: Mapping[str, Mapping[str, Any]]) -> None:
        """Say what judges were asked (`summed_judging`), unless it was said already."""
        for name, counts in sums.items():
            event = ResponsesJudged(name, **counts)
            if self._judged.get(name) != event:
                self._judged[name] = event
                self(event)

    def advance(self, stage: Stage, note: str = "") -> None:
        """Say that one step of a stage is done, and what came of it."""
        self(StageAdvanced(stage, note))
