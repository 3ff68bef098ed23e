"""Whole responses to a few prompts, under a plan or without one. Scores nothing, keeps nothing."""

from __future__ import annotations

from heretic_kl.ablation import Plan
from heretic_kl.prompts import Kind, Prompt
from heretic_kl.requests import ResponseRequest, ResponseResult
from heretic_kl.run.parts import RunParts
from heretic_kl.scoring import MeasuringEngine, PreviewedResponse, RefusalRule, degeneracy


def previewed_responses(
    run: RunParts, plan: Plan | None, kind: Kind, count: int
) -> tuple[PreviewedResponse, ...]:
    """Responses to the first validation prompts of a kind, those to harmful ones until decided.

    What is degenerate is found as scorers of refusals find it: a decided response is none.
    """
    prompts, rule = run.prompts[kind, "validation"][:count], run.suite.refusal_rule
    stop = rule if kind == "harmful" else None
    texts = respond(run.engine, plan, prompts, run.settings.max_response_tokens, stop)
    return tuple(
        PreviewedResponse(
            prompt.user,
            text,
            rule.is_refusal(text),
            None if stop is not None and stop.decided(text) else degeneracy(text, prompt),
        )
        for prompt, text in zip(prompts, texts, strict=True)
    )


def respond(
    engine: MeasuringEngine,
    plan: Plan | None,  # None: the unedited model
    prompts: tuple[Prompt, ...],
    max_tokens: int,
    stop: RefusalRule | None = None,
) -> tuple[str, ...]:
    """The responses' texts; with `stop` each as far as its verdict needs."""
    (result,) = engine.measure(plan, [ResponseRequest(prompts, max_tokens, stop)])
    assert isinstance(result, ResponseResult)
    return result.texts
