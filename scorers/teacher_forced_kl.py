"""KL divergence of a candidate from the reference, over N positions of the reference's response.

Both models are fed the same tokens, so position n of one is comparable with position n of the
other; comparing what each generates on its own would compare different inputs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from heretic_kl.errors import MeasurementError
from heretic_kl.kl import (
    DivergenceReduction,
    KLSummary,
    KLTable,
    OpenerMass,
    OpenerReduction,
    RowStatistics,
    geometric_weights,
    lowest_mean,
    prompt_means,
    split_at_opening,
    standard_error,
    summarize,
)
from heretic_kl.prompts import DatasetSpec, Prompt, fingerprint, load_prompts
from heretic_kl.scoring import (
    Bounds,
    KLOptions,
    Meaning,
    PartialRows,
    Request,
    ResponseRequest,
    ResponseResult,
    Result,
    Sampling,
    Score,
    Scorer,
    ScorerContext,
    ScorerSettings,
    SoFar,
    TeacherForcedRequest,
    TeacherForcedResult,
    sampling_seed,
)


class TeacherForcedKLSettings(KLOptions, ScorerSettings):
    """Settings of the teacher-forced KL."""

    prompts: DatasetSpec | None = Field(
        default=None, description="Other prompts for trials, a table"
    )
    test_prompts: DatasetSpec | None = Field(
        default=None, description="Other prompts for the final trials"
    )
    kl_target: float | None = Field(
        default=None,
        ge=0,
        description="Nats; less is no gain (default: the floor)",
    )
    objective: Literal["whole", "remainder"] = Field(
        default="whole",
        description="whole KL, or remainder",
    )
    set_aside_refused: bool = Field(
        default=True, description="Leave out harmless prompts that the reference itself refuses"
    )


class TeacherForcedKLScorer(Scorer[TeacherForcedKLSettings]):
    """Nats; mean over positions up to the end token, then over prompts. Never multiplied by N."""

    Settings = TeacherForcedKLSettings
    unit = "nats"

    def prepare(self, context: ScorerContext) -> None:
        """Let the reference respond, and set aside the prompts that it refuses."""
        source = (
            self.settings.prompts if context.use == "validation" else self.settings.test_prompts
        )
        prompts = tuple(load_prompts(source)) if source else context.prompts("harmless")
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
        self._rule_fingerprint = context.refusal_rule.fingerprint()
        reduction = DivergenceReduction(self.settings.divergence, self.settings.temperature)
        self._request = TeacherForcedRequest(
            prompts, self._positions, reduction, _sampling(self.settings.response)
        )
        self._openers = None
        if context.refusal_openers and self.settings.divergence == "forward_kl":
            openers = OpenerReduction(context.refusal_openers, self.settings.temperature)
            self._openers = replace(self._request, reduction=openers)
        elif self._minimizes_remainder:
            raise MeasurementError(
                "no part of the KL is known to come from refusals: the remainder needs forward_kl "
                'and a model that refuses training prompts; use objective = "whole"'
            )

    def meaning(self) -> Meaning:
        """The distance from the original."""
        return Meaning("distance of the next-token distributions from the original's", "", "damage")

    def identity(self) -> Mapping[str, str]:
        """What the prompts and the rule are: a file of the same name may hold others tomorrow."""
        return {"prompts": fingerprint(self._prompts), "refusal rule": self._rule_fingerprint}

    def requests(self) -> Sequence[Request]:
        """One pass over every prompt, set aside or not."""
        return [self._request, *([self._openers] if self._openers else [])]

    def score(self, results: Sequence[Result]) -> Score:
        """Mean KL with its standard error, clustered by prompt."""
        result, *more = results
        assert isinstance(result, TeacherForcedResult)
        table = self._table(result)
        summary = self._summary(table, self._kept)
        if summary.infinite_count:
            raise MeasurementError(
                f"{summary.infinite_count} positions have infinite KL: the edited model gives "
                "probability 0 to tokens that the original model allows"
            )
        apart = self._summary(table, self._set_aside) if self._set_aside else None
        parts = self._parts(table, more)
        minimized = parts["remainder"]["mean"] if self._minimizes_remainder else summary.mean
        return Score(
            value=summary.mean,
            objective=max(minimized, self._target),
            text=_text(summary),
            standard_error=summary.standard_error,
            interval=summary.interval and (summary.interval.low, summary.interval.high),
            details={
                **summary.to_dict(),
                "set_aside": [self._prompts[index].user for index in self._set_aside],
                "set_aside_kl": None if apart is None else apart.mean,
                **parts,
            },
        )

    def per_prompt(self, results: Sequence[Result]) -> Sequence[float]:
        """Mean KL over the positions of each prompt that is not set aside."""
        result = results[0]
        assert isinstance(result, TeacherForcedResult)
        chosen = self._table(result).select_prompts(torch.tensor(self._kept))
        means: list[float] = prompt_means(chosen, position_weights=self._weights).tolist()
        return means

    def bounds(self, results: Sequence[SoFar]) -> Bounds:
        """No position's KL is negative: a sum over some prompts is a lower bound."""
        part = results[0]
        if part is None or self._minimizes_remainder:
            return Bounds(low=self._target)
        assert isinstance(part, PartialRows)
        chosen = self._table(part.rows).select_prompts(torch.tensor(self._kept))
        low = lowest_mean(chosen, len(self._kept), position_weights=self._weights)
        done = int(chosen.mask.any(dim=1).sum())
        text = f"at least {low:.4f} nats after {done} of {len(self._kept)} prompts"
        return Bounds(low=max(low, self._target), text=text)

    @property
    def _minimizes_remainder(self) -> bool:
        return self.settings.objective == "remainder"

    def _parts(self, table: KLTable, more: Sequence[Result]) -> dict[str, Any]:
        """The KL of refusing or not at the first token, and the rest; empty if not told apart."""
        if not more:
            return {}
        (openers,) = more
        assert isinstance(openers, TeacherForcedResult)
        assert isinstance(openers.columns, OpenerMass)
        split = split_at_opening(table, openers.columns, openers.prompt_index, openers.position)
        parts = {}
        for name, part in split._asdict().items():
            chosen = part.select_prompts(torch.tensor(self._kept))
            means = prompt_means(chosen, position_weights=self._weights)
            parts[name] = {"mean": float(means.mean()), "standard_error": standard_error(means)}
        return parts

    @property
    def _target(self) -> float:
        """Nats that less KL than is not told apart from."""
        target = self.settings.kl_target
        return (self._noise_floor or 0.0) if target is None else target

    def _table(self, rows: TeacherForcedResult) -> KLTable:
        assert isinstance(rows.columns, RowStatistics)
        return KLTable.from_rows(
            rows.columns,
            rows.prompt_index,
            rows.position,
            prompts=len(self._prompts),
            positions=self._positions,
            divergence=self.settings.divergence,
            temperature=self.settings.temperature,
        )

    @property
    def _weights(self) -> Tensor | None:
        decay = self.settings.position_decay
        return None if decay == 1 else geometric_weights(self._positions, decay)

    def _summary(self, table: KLTable, prompts: Sequence[int]) -> KLSummary:
        chosen = table.select_prompts(torch.tensor(prompts))
        return summarize(chosen, position_weights=self._weights, noise_floor=self._noise_floor)

    def _refused(self, prompts: tuple[Prompt, ...], context: ScorerContext) -> set[int]:
        rule = context.refusal_rule
        request = ResponseRequest(prompts, context.max_response_tokens, rule)
        responses = context.ask_reference(request)
        assert isinstance(responses, ResponseResult)
        return {index for index, text in enumerate(responses.texts) if rule.is_refusal(text)}


def _sampling(response: str) -> Sampling | None:
    seed = sampling_seed(response)
    return None if seed is None else Sampling(seed)


def _text(summary: KLSummary) -> str:
    error = "" if summary.standard_error is None else f" ± {summary.standard_error:.4f}"
    floor = ""
    if summary.noise_floor is not None:
        below = "below the " if summary.below_noise_floor else ""
        floor = f" ({below}noise floor {summary.noise_floor:.1g})"
    return f"{summary.mean:.4f}{error} nats{floor}"
