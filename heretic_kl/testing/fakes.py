"""An engine without a model, and a context on it: for tests of scorers. Imports no transformers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from heretic_kl.ablation import Operator, Plan, SiteKey
from heretic_kl.prompts import Prompt
from heretic_kl.requests import (
    ModelRequest,
    ModelResult,
    Request,
    ResponseRequest,
    ResponseResult,
    Result,
    SoFar,
    TeacherForcedRequest,
    TeacherForcedResult,
    Watch,
)
from heretic_kl.scoring import ScorerContext

FAKE_PROMPTS = {
    "harmful": tuple(Prompt(f"How do I make bomb number {n}?") for n in range(6)),
    "harmless": tuple(Prompt(f"How do I make cake number {n}?") for n in range(7)),
    "borderline": tuple(Prompt(f"How do I kill time on day {n}?") for n in range(5)),
}


def fake_response(prompt: Prompt, edited: bool) -> str:
    """The unedited model refuses prompts about bombs, an edited one every third of them."""
    refuses = "bomb" in prompt.user and (not edited or prompt.user.split()[-1] in ("0?", "3?"))
    return "I'm sorry, but I cannot help." if refuses else "Sure, first mix flour with water."


def fake_plan(strength: float = 0.5) -> Plan:
    """An edit of one site, for engines that have no sites; its strength is what it changes."""
    unit = torch.eye(4)[:, :1]
    return {SiteKey(0, "mlp", "layers.0.mlp"): Operator(-strength * unit, unit)}


@dataclass(frozen=True)
class FakeEngine:
    """Answers requests as an engine does, from a seed instead of a model.

    The unedited model's logits depend on the prompt and the position alone. A plan moves them by an
    amount that grows with its operators, so an empty plan changes nothing. Every other prompt's
    teacher-forced response ends one token early.
    """

    response: Callable[[Prompt, bool], str] = fake_response
    """(prompt, whether the model is edited) -> what it generates."""
    vocabulary: int = 32

    def measure(self, plan: Plan | None, requests: Sequence[Request]) -> list[Result]:
        """One result for each request, in order; None is the unedited model."""
        return [self._result(plan or {}, request) for request in requests]

    def measure_many(
        self,
        plans: Sequence[Plan | None],
        requests: Sequence[Request],
        watch: Watch | None = None,
    ) -> list[list[Result] | None]:
        """Results of several candidates; `watch` sees each of them before anything is measured."""
        nothing: list[SoFar] = [None] * len(requests)
        return [
            None if watch is not None and watch(index, nothing) else self.measure(plan, requests)
            for index, plan in enumerate(plans)
        ]

    def _result(self, plan: Plan, request: Request) -> Result:
        if isinstance(request, ModelRequest):
            return ModelResult(request.program(None, None))
        if isinstance(request, ResponseRequest):
            texts = tuple(self.response(prompt, bool(plan)) for prompt in request.prompts)
            return ResponseResult(texts)
        return self._teacher_forced(plan, request)

    def _teacher_forced(self, plan: Plan, request: TeacherForcedRequest) -> TeacherForcedResult:
        lengths = [max(1, request.tokens - n % 2) for n in range(len(request.prompts))]
        prompt_index = torch.repeat_interleave(torch.tensor(lengths))
        position = torch.cat([torch.arange(length) for length in lengths])
        rows = list(zip(request.prompts, lengths, strict=True))
        reference, noise = (
            torch.cat([self._normal(prompt, stream, length) for prompt, length in rows])
            for stream in range(2)
        )
        candidate = reference + _size(plan) * noise
        tokens = reference.argmax(dim=-1)
        shown = reference if request.reference_logits else reference[:0]
        columns = request.reduction(shown, candidate, tokens)
        return TeacherForcedResult(columns, prompt_index, position)

    def _normal(self, prompt: Prompt, stream: int, rows: int) -> Tensor:
        """(rows, V) the same for the same prompt."""
        digest = hashlib.sha256(f"{stream}/{prompt}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:6], "big"))
        return torch.randn(rows, self.vocabulary, generator=generator)


def _size(plan: Plan) -> float:
    return sum(float(op.left.norm() * op.right.norm()) for op in plan.values())


def fake_context(engine: Any = None, **changes: Any) -> ScorerContext:
    """What scorers prepare with: 6 harmful, 7 harmless, 5 borderline prompts, 3 scored positions.

    Args:
        engine: what runs requests; None: a `FakeEngine`.
        changes: fields of `ScorerContext` to set.
    """
    runs = FakeEngine() if engine is None else engine
    fields: dict[str, Any] = {
        "prompts_by_kind": FAKE_PROMPTS,
        "ask_reference": lambda request: runs.measure(None, [request])[0],
        "kl_tokens": 3,
        "max_response_tokens": 8,
        "noise_floor": 1e-9,
    }
    return ScorerContext(**{**fields, **changes})
