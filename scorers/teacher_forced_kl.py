"""KL divergence from the original model over N positions of the original's own greedy answers.

Both models are fed the same tokens, so position n of one is comparable with position n of the
other; comparing what each generates on its own would compare different inputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from heretic_kl.errors import MeasurementError
from heretic_kl.kl import (
    Direction,
    KLSummary,
    KLTable,
    RowStatistics,
    geometric_weights,
    row_statistics,
    summarize,
)
from heretic_kl.prompts import Prompt
from heretic_kl.scoring import (
    RefusalRule,
    Request,
    ResponseRequest,
    ResponseResult,
    Result,
    Score,
    Scorer,
    ScorerContext,
    ScorerSettings,
    TeacherForcedRequest,
    TeacherForcedResult,
)


class TeacherForcedKLSettings(ScorerSettings):
    """Settings of the teacher-forced KL."""

    kl_tokens: int | None = Field(
        default=None, ge=1, le=1024, description="Positions scored; unset: the run's kl_tokens."
    )
    direction: Direction = Field(
        default="forward",
        description="forward: KL(original || edited); reverse; or jensen_shannon.",
    )
    temperature: float = Field(
        default=1.0, gt=0, description="Both models' logits are divided by it."
    )
    position_decay: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Weight of each position relative to the one before; 1 weighs all alike.",
    )
    kl_target: float = Field(
        default=0.01,
        ge=0,
        description=(
            "Nats. Below it less is no better to the optimizer, which keeps the search from "
            "collecting edits that do nothing. Not multiplied by kl_tokens."
        ),
    )
    set_aside_refused: bool = Field(
        default=True,
        description=(
            "Leave out harmless prompts that the original refuses: change is the aim there. "
            "Their KL is reported apart."
        ),
    )


@dataclass(frozen=True)
class DivergenceReduction:
    """`row_statistics` with its options; equal options make equal requests."""

    direction: Direction
    temperature: float

    def __call__(self, reference: Tensor, candidate: Tensor, tokens: Tensor) -> RowStatistics:
        """Statistics of rows of logits (rows, V)."""
        return row_statistics(
            reference, candidate, tokens, direction=self.direction, temperature=self.temperature
        )


class TeacherForcedKL(Scorer[TeacherForcedKLSettings]):
    """Nats; mean over positions up to the end token, then over prompts. Never multiplied by N."""

    Settings = TeacherForcedKLSettings
    unit = "nats"

    def prepare(self, context: ScorerContext) -> None:
        """Have the original answer, and set aside the prompts that it refuses."""
        prompts = context.prompts("harmless")
        refused = self._refused(prompts, context) if self.settings.set_aside_refused else set()
        if len(refused) == len(prompts):
            raise MeasurementError(
                f"the model refuses all {len(prompts)} harmless prompts: no KL can be measured; "
                "use other prompts or set_aside_refused = false"
            )
        self._kept = [index for index in range(len(prompts)) if index not in refused]
        self._set_aside = sorted(refused)
        self._prompts = prompts
        self._positions = self.settings.kl_tokens or context.kl_tokens
        self._noise_floor = context.noise_floor
        reduction = DivergenceReduction(self.settings.direction, self.settings.temperature)
        self._request = TeacherForcedRequest(prompts, self._positions, reduction)

    def requests(self) -> Sequence[Request]:
        """One pass over every prompt, set aside or not."""
        return [self._request]

    def score(self, results: Sequence[Result]) -> Score:
        """Mean KL with its standard error, clustered by prompt."""
        (result,) = results
        assert isinstance(result, TeacherForcedResult)
        assert isinstance(result.columns, RowStatistics)
        table = KLTable.from_rows(
            result.columns,
            result.prompt_index,
            result.position,
            prompts=len(self._prompts),
            positions=self._positions,
            direction=self.settings.direction,
            temperature=self.settings.temperature,
        )
        summary = self._summary(table, self._kept)
        if summary.infinite_count:
            raise MeasurementError(
                f"{summary.infinite_count} positions have infinite KL: the edited model gives "
                "probability 0 to tokens that the original allows"
            )
        apart = self._summary(table, self._set_aside) if self._set_aside else None
        return Score(
            value=summary.mean,
            objective=max(summary.mean, self.settings.kl_target),
            text=_text(summary),
            standard_error=summary.standard_error,
            interval=summary.interval and (summary.interval.low, summary.interval.high),
            details={
                **summary.to_dict(),
                "set_aside": [self._prompts[index].user for index in self._set_aside],
                "set_aside_kl": None if apart is None else apart.mean,
            },
        )

    def _summary(self, table: KLTable, prompts: Sequence[int]) -> KLSummary:
        decay = self.settings.position_decay
        weights = None if decay == 1 else geometric_weights(self._positions, decay)
        chosen = table.select_prompts(torch.tensor(prompts))
        return summarize(chosen, position_weights=weights, noise_floor=self._noise_floor)

    def _refused(self, prompts: tuple[Prompt, ...], context: ScorerContext) -> set[int]:
        rule = RefusalRule()
        request = ResponseRequest(prompts, context.max_answer_tokens, rule)
        answers = context.ask_reference(request)
        assert isinstance(answers, ResponseResult)
        return {index for index, text in enumerate(answers.texts) if rule.is_refusal(text)}


def _text(summary: KLSummary) -> str:
    error = "" if summary.standard_error is None else f" ± {summary.standard_error:.4f}"
    below = " (below the noise floor)" if summary.below_noise_floor else ""
    return f"{summary.mean:.4f}{error} nats{below}"
