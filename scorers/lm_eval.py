"""A task of lm-eval as a score: what an edit costs, or gains, in a benchmark."""

from collections.abc import Sequence

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
    metric: str = Field(default="acc", description="Metric whose mean is the score")
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

    def prepare(self, context: ScorerContext) -> None:
        """Load the task now: what is wrong with it shows before the search."""
        settings = self.settings
        task = HarnessTask(
            settings.task,
            settings.metric,
            settings.tasks,
            settings.limit,
            settings.few_shot,
            settings.chat,
            settings.batch_size,
        )
        task.load()
        self._request = ModelRequest(task)

    def meaning(self) -> Meaning:
        """The task and its metric."""
        return Meaning(f"{self.settings.metric} of the task {self.settings.task}", "", "damage")

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
        return Score(
            value=estimate.mean,
            text=f"{self.settings.metric} {estimate.text(3)} ({len(values)} documents)",
            standard_error=estimate.standard_error,
            interval=estimate.interval,
            details={"documents": len(values)},
        )
