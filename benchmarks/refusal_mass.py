"""A teacher-forced stand-in for counting refusals, so that a trial needs no generation.

Mean probability that a candidate gives to the tokens with which the original refuses; what other
tools steer by when they do not generate. A plug-in for benchmarks, not a measure of refusals.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from heretic_kl.scoring import (
    Bounds,
    PartialRows,
    RefusalRule,
    Request,
    ResponseRequest,
    ResponseResult,
    Result,
    Score,
    Scorer,
    ScorerContext,
    ScorerSettings,
    SoFar,
    TeacherForcedRequest,
    TeacherForcedResult,
)


def chosen_probability(_none: Tensor, candidate: Tensor, tokens: Tensor) -> tuple[Tensor]:
    """Of each row's token (rows,), from the candidate's logits alone."""
    chosen = candidate.gather(-1, tokens[:, None]).squeeze(-1)
    return ((chosen - candidate.logsumexp(dim=-1)).exp(),)


class RefusalMass(Scorer[ScorerSettings]):
    """Mean over positions, then over the prompts that the original refuses; 0 to 1."""

    unit = "probability"

    def prepare(self, context: ScorerContext) -> None:
        """Keep the prompts that the original refuses."""
        prompts, rule = context.prompts("harmful"), RefusalRule()
        request = ResponseRequest(prompts, context.max_response_tokens, rule)
        responses = context.ask_reference(request)
        assert isinstance(responses, ResponseResult)
        pairs = zip(prompts, responses.texts, strict=True)
        self._prompts = tuple(prompt for prompt, text in pairs if rule.is_refusal(text))
        self._request = TeacherForcedRequest(
            self._prompts, context.kl_tokens, chosen_probability, reference_logits=False
        )

    def requests(self) -> Sequence[Request]:
        """One pass over the refusals."""
        return [self._request]

    def score(self, results: Sequence[Result]) -> Score:
        """The mean."""
        (result,) = results
        assert isinstance(result, TeacherForcedResult)
        value = self._sum(result) / len(self._prompts)
        return Score(value, f"{value:.4f}")

    def bounds(self, results: Sequence[SoFar]) -> Bounds:
        """Probabilities are not negative."""
        (part,) = results
        if part is None:
            return Bounds(low=0.0)
        assert isinstance(part, PartialRows)
        low = self._sum(part.rows) / len(self._prompts) * (1 - 1e-9)
        return Bounds(low=low, text=f"at least {low:.4f}")

    def _sum(self, rows: TeacherForcedResult) -> float:
        total = torch.zeros(len(self._prompts), dtype=torch.float64)
        count = torch.zeros_like(total)
        values = rows.columns[0].double()
        total.index_add_(0, rows.prompt_index, values)
        count.index_add_(0, rows.prompt_index, torch.ones_like(values))
        return float((total / count.clamp_min(1)).sum())
