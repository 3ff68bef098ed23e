"""What a run tells whoever watches it. Plain data; knows nothing about terminals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import ConfigDict, PlainSerializer

from heretic_kl.scoring import Score
from heretic_kl.search import TrialRecord

Stage = Literal[
    "load",
    "calibrate",
    "directions",
    "baseline",
    "search",
    "refine",
    "test",
    "save",
    "upload",
    "measure",
]

Front = Annotated[
    tuple[TrialRecord, ...],
    PlainSerializer(lambda front: [record.number for record in front], return_type=list[int]),
]
"""A Pareto front, by the first objective; as JSON, the numbers of its trials."""


class _Event:
    """What pydantic is told of every event, for the schema: comments below fields describe them."""

    __pydantic_config__: ClassVar = ConfigDict(use_attribute_docstrings=True)


@dataclass(frozen=True)
class StageStarted(_Event):
    """A stage begins; more events of it may follow."""

    stage: Stage
    title: str
    """For people: `Loading SmolLM2-135M`."""
    steps: int | None = None
    """How many `StageAdvanced` will follow, where that is known."""


@dataclass(frozen=True)
class StageAdvanced(_Event):
    """One step of a stage is done, or some."""

    stage: Stage
    note: str = ""
    done: int | None = None
    """So many steps are done; null: one more."""
    steps: int | None = None
    """Of so many; null: as the stage was begun."""
    seconds_left: float | None = None
    """Estimate for the rest of the stage, and of those like it that follow."""


@dataclass(frozen=True)
class StageFinished(_Event):
    """A stage is over."""

    stage: Stage
    seconds: float


@dataclass(frozen=True)
class Notice(_Event):
    """Something the user should know; not an error."""

    message: str


@dataclass(frozen=True)
class ModelLoaded(_Event):
    """The model is in memory and its sites are verified."""

    name: str
    parameters: int
    layers: int
    sites: int
    dtype: str
    device: str


@dataclass(frozen=True)
class CalibrationStep(_Event):
    """One fact found out before the search, as shown to people."""

    name: str
    value: str


@dataclass(frozen=True)
class BaselineMeasured(_Event):
    """Scores of the unedited model."""

    use: Literal["validation", "test"]
    scores: Mapping[str, Score]


@dataclass(frozen=True)
class StudyOpened(_Event):
    """The study is there, new or resumed."""

    name: str
    location: str
    finished: int
    """Trials it already holds."""
    wanted: int


@dataclass(frozen=True)
class TrialFinished(_Event):
    """A trial is over."""

    record: TrialRecord
    finished: int
    wanted: int
    front: Front
    """After this trial."""
    seconds_left: float | None
    """Estimate for the rest of the search."""


@dataclass(frozen=True)
class TrialTested(_Event):
    """A trial of the front was measured on the test prompts."""

    record: TrialRecord
    scores: Mapping[str, Score]


@dataclass(frozen=True)
class ResponsesJudged(_Event):
    """What the judge of one scorer was asked in this run, at its end."""

    scorer: str
    by: str
    """The judge's name and address."""
    requests: int = 0
    """Retries included."""
    retries: int = 0
    timeouts: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    cost: float | None = None
    """In the unit of the prices in the settings; null where none is set."""


@dataclass(frozen=True)
class TrialPicked(_Event):
    """A trial was chosen, by a rule or a person."""

    record: TrialRecord
    rule: str


@dataclass(frozen=True)
class ModelSaved(_Event):
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


@dataclass(frozen=True)
class ModelUploaded(_Event):
    """A saved model is on the hub."""

    folder: Path
    repo: str
    """`USER/NAME`."""
    url: str
    """Of the branch."""
    commit: str
    private: bool
    files: int
    """So many were uploaded, or were there already."""


@dataclass(frozen=True)
class TrialShown(_Event):
    """One trial of a study, as asked for."""

    study: str
    record: TrialRecord
    on_front: bool
    test_scores: Mapping[str, Score] | None
    """On the test prompts; None where they were not measured."""


@dataclass(frozen=True)
class FrontShown(_Event):
    """The Pareto front of a study, as asked for or at the end of a search."""

    study: str
    front: Front
    tested: Mapping[int, Mapping[str, Score]]
    """Scores on the test prompts of the trials that have them, by trial number."""
    baseline: Mapping[str, Score]
    """The unedited model on the validation prompts."""
    test_baseline: Mapping[str, Score] | None
    """The same on the test prompts, if they were measured."""
    like: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """Trials behind the front that cannot be told from one of it on the validation prompts, by the
    number of that one."""


@dataclass(frozen=True)
class Result(_Event):
    """What a command found out that has no event of its own."""

    command: str
    content: Mapping[str, Any]


@dataclass(frozen=True)
class Failed(_Event):
    """The command ends with an error that has these lines; `Ended` follows."""

    lines: tuple[str, ...]


@dataclass(frozen=True)
class Ended(_Event):
    """The last event of every command."""

    exit_code: int


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
    | ResponsesJudged
    | TrialPicked
    | ModelSaved
    | ModelUploaded
    | TrialShown
    | FrontShown
    | Result
    | Failed
    | Ended
)

Observer: TypeAlias = Callable[[Event], None]
