"""A task of lm-eval as a score: what an edit costs, or gains, in a benchmark."""

from collections.abc import Sequence
from functools import cached_property

import torch
from pydantic import Field

from heretic_kl.kl import mean_estimate
from heretic_kl.scoring import (
    HarnessTask,
    Meaning,
    ModelRequest,
    ModelResult,
    Request,
    Result,
    Score,
    Scorer,
    ScorerContext,
    ScorerSettings,
)


class LmEvalSettings(ScorerSettings):
    """Settings of a task."""

    task: str = Field(min_length=1, description="Name of the task")
    metric: str | None = Field(
        default=None,
        description="Metric whose mean is the score; unset: acc, the only one, or exact_match",
    )
    filter: str | None = Field(
        default=None,
        description="How answers are read from responses; unset: the first of the task's filters",
    )
    tasks: str | None = Field(
        default=None, description="Folder of further tasks (YAML); their code is run"
    )
    limit: int | None = Field(default=100, ge=1, description="Most documents; null: all")
    few_shot: int | None = Field(
        default=None, ge=0, description="Examples before each document; unset: the task's own"
    )
    chat: bool = Field(default=False, description="Put documents into the chat template")
    batch_size: int = Field(default=8, ge=1, description="Requests run together")


class LmEval(Scorer[LmEvalSettings]):
    """Mean of the metric over documents. The harness runs the model by itself, edit in force."""

    Settings = LmEvalSettings

    def check(self) -> None:
        """Load the task: what is wrong with it shows before a model is loaded."""
        self._task  # noqa: B018

    def prepare(self, context: ScorerContext) -> None:
        """The same request for every candidate."""
        self._request = ModelRequest(self._task)

    def meaning(self) -> Meaning:
        """The task, its metric and the filter."""
        task = vars(self).get("_task") or self._named()
        by = f", answers read by {task.filter}" if task.filter else ""
        metric = task.metric or "the main metric"
        return Meaning(f"{metric} of the task {task.name}{by}", "", "damage")

    def requests(self) -> Sequence[Request]:
        """The task."""
        return [self._request]

    def per_prompt(self, results: Sequence[Result]) -> Sequence[float]:
        """The metric of each document."""
        (result,) = results
        assert isinstance(result, ModelResult)
        return result.values

    def score(self, results: Sequence[Result]) -> Score:
        """The mean with its interval over documents."""
        values = torch.tensor(self.per_prompt(results), dtype=torch.float64)
        estimate = mean_estimate(values)
        task, count = self._task, f"{len(values)} documents"
        by = f"{count}, filter {task.filter}" if task.filter else count
        return Score(
            value=estimate.mean,
            text=f"{task.metric} {estimate.text(3)} ({by})",
            standard_error=estimate.standard_error,
            interval=estimate.interval,
            details={"documents": len(values), "metric": task.metric, "filter": task.filter},
        )

    @cached_property
    def _task(self) -> HarnessTask:
        """With metric and filter as the task has them."""
        return self._named().settled()

    def _named(self) -> HarnessTask:
        """As the settings say."""
        settings = self.settings
        return HarnessTask(
            settings.task,
            settings.metric,
            settings.tasks,
            settings.limit,
            settings.few_shot,
            settings.chat,
            settings.batch_size,
            settings.filter,
        )
