"""The front matter of a model card: what the hub reads of it. A pure function; reads nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from heretic_kl.export.facts import ExportFacts, PromptFacts, ScoreFacts
from heretic_kl.export.portable import portable_text
from heretic_kl.scoring import Score

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

TASK = "text-generation"


def front_matter(facts: ExportFacts) -> str:
    """YAML: base model and relation, licence, tags, and the scores as `model-index`."""
    from huggingface_hub import ModelCardData

    adapter = facts.form == "lora"
    licence: dict[str, Any] = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in facts.license.items()
    }
    results = list(_results(facts)) or None
    data = ModelCardData(
        base_model=facts.base_name if facts.base_is_hub_id else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag=TASK,
        tags=["heretic-kl", "directional-ablation", *(["lora"] if adapter else [])],
        model_name=None if results is None else portable_text(facts.name),
        eval_results=results,
        **licence,
    )
    if facts.base_is_hub_id:
        data["base_model_relation"] = "adapter" if adapter else "finetune"
    return re.sub("<(?=[A-Za-z/!?])", "‹", str(data.to_yaml()))  # no tag, whoever shows it


def _results(facts: ExportFacts) -> Iterator[EvalResult]:
    """One for each score of the saved model that is a number, on the test prompts."""
    test_prompts = {used.kind: used for used in facts.prompts if used.use == "test"}
    for name, scores in facts.scores.items():
        saved = scores.saved
        if saved is not None and saved.value is not None and math.isfinite(saved.value):
            yield _result(facts, name, scores, saved, test_prompts.get(scores.kind or ""))


def _result(
    facts: ExportFacts, name: str, scores: ScoreFacts, saved: Score, prompts: PromptFacts | None
) -> EvalResult:
    from huggingface_hub import EvalResult

    source = "prompts of its own" if prompts is None else portable_text(prompts.source)
    what = "test prompts" if prompts is None else f"{prompts.count} {prompts.kind} test prompts"
    args = {
        "unit": scores.unit or None,
        "interval_95": None if saved.interval is None else list(saved.interval),
        "standard_error": saved.standard_error,
        "original": None if scores.original is None else scores.original.value,
        "kl_tokens": facts.tokens_of(name) if scores.unit == "nats" else None,
        "metric_version": facts.metric_version if scores.unit == "nats" else None,
        "heretic_kl": facts.versions.get("heretic-kl"),
    }
    return EvalResult(
        task_type=TASK,
        dataset_type="own" if prompts is None else _identifier(source),
        dataset_name=f"{what} ({source})",
        dataset_config=None if prompts is None else prompts.kind,
        dataset_split="test",
        dataset_revision=None if prompts is None else prompts.revision,
        dataset_args=None
        if prompts is None
        else {"count": prompts.count, "sha256": prompts.sha256},
        metric_type=name,
        metric_value=saved.value,
        metric_name=f"{name}: {portable_text(saved.text)}",  # the hub's page shows no more
        metric_args={key: value for key, value in args.items() if _is_plain(value)},
    )


def _identifier(source: str) -> str:
    """The name of a source of prompts, of the characters that a dataset of the hub may have."""
    return re.sub(r"[^\w./-]+", "-", source.split()[0]).strip("-")


def _is_plain(value: Any) -> bool:
    """Whether there is a value, and JSON has it: no NaN, no infinity."""
    numbers = value if isinstance(value, list) else [value]
    return value is not None and all(
        not isinstance(number, float) or math.isfinite(number) for number in numbers
    )
