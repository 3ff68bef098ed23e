"""What a run tells whoever watches it. Plain data; knows nothing about terminals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from heretic_kl.scoring import Score
from heretic_kl.search import TrialRecord

Stage = Literal[
    "load", "calibrate", "directions", "baseline", "search", "refine", "test", "save", "measure"
]


@dataclass(frozen=True)
class StageStarted:
    """A stage begins; more events of it may follow."""

    stage: Stage
    title: str
    """For people: `Loading SmolLM2-135M`."""
    steps: int | None = None
    """How many `StageAdvanced` will follow, where that is known."""


@dataclass(frozen=True)
class StageAdvanced:
    """One step of a stage is done."""

    stage: Stage
    note: str = ""


@dataclass(frozen=True)
class StageFinished:
    """A stage is over."""

    stage: Stage
    seconds: float


@dataclass(frozen=True)
class Notice:
    """Something the user should know; not an error."""

    message: str


@dataclass(frozen=True)
class ModelLoaded:
    """The model is in memory and its sites are verified."""

    name: str
    parameters: int
    layers: int
    sites: int
    dtype: str
    device: str


@dataclass(frozen=True)
class CalibrationStep:
    """One fact found out before the search, as shown to people."""

    name: str
    value: str


@dataclass(frozen=True)
class BaselineMeasured:
    """Scores of the unedited model."""

    use: Literal["validation", "test"]
    scores: Mapping[str, Score]


@dataclass(frozen=True)
class StudyOpened:
    """The study is there, new or resumed."""

    name: str
    location: str
    finished: int
    """Trials it already holds."""
    wanted: int


@dataclass(frozen=True)
class TrialFinished:
    """A trial is over."""

    record: TrialRecord
    finished: int
    wanted: int
    front: tuple[TrialRecord, ...]
    """After this trial."""
    seconds_left: float | None
    """Estimate for the rest of the search."""


@dataclass(frozen=True)
class TrialTested:
    """A trial of the front was measured on the test prompts."""

    record: TrialRecord
    scores: Mapping[str, Score]


@dataclass(frozen=True)
class TrialPicked:
    """A trial was chosen, by a rule or a person."""

    record: TrialRecord
    rule: str


@dataclass(frozen=True)
class ModelSaved:
    """A model was written, read back and measured again."""

    folder: Path
    form: Literal["merged", "lora"]
    saved_scores: Mapping[str, Score]
    """Of the saved model on the test prompts."""
    trial_scores: Mapping[str, Score]
    """Of the trial, its operators in force, on the same prompts."""
    merge_kl: float
    """Nats, KL(operators || saved model), mean over positions, then prompts."""
    noise_floor: float
    """What rounding to the saved dtype costs an unchanged model, nats."""


Event: TypeAlias = (
    StageStarted
    | StageAdvanced
    | StageFinished
    | Notice
    | ModelLoaded
    | CalibrationStep
    | BaselineMeasured
    | StudyOpened
    | TrialFinished
    | TrialTested
    | TrialPicked
    | ModelSaved
)

Observer: TypeAlias = Callable[[Event], None]
