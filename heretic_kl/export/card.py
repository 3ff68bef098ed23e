"""The model card of a saved model, from facts to Markdown. A pure function; reads nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from heretic_kl.ablation import Refinement
from heretic_kl.errors import printable
from heretic_kl.export.facts import ExportFacts, ScoreFacts
from heretic_kl.export.hub.metadata import front_matter
from heretic_kl.export.portable import markdown_text, portable, portable_text
from heretic_kl.scoring import Score, agreement_text

NORM_MODES = {
    "none": "The norms of the weights' rows change as the ablation makes them.",
    "row": "After the ablation every row of a weight is scaled back to its original norm.",
    "normalized_row": (
        "The rows of a weight are normalized, ablated, normalized again and scaled to their "
        "original norms."
    ),
}
ROLES = {"minimize": "lowered", "maximize": "raised", "monitor": "measured only"}
COMPONENTS = {"attention": "attention output projections", "mlp": "MLP output projections"}


def model_card(facts: ExportFacts) -> str:
    """The text of README.md: what was edited, how, at what measured cost, and its limits."""
    sections = (
        _front_matter(facts),
        _introduction(facts),
        _scorers(facts),
        _use(facts),
        _cost(facts),
        _edit(facts),
        _prompts(facts),
        _reproduction(facts),
        _limits(facts),
    )
    return printable("\n\n".join("\n".join(section) for section in sections) + "\n")


def _front_matter(facts: ExportFacts) -> Iterator[str]:
    yield "---"
    yield front_matter(facts)
    yield "---"


def _introduction(facts: ExportFacts) -> Iterator[str]:
    base = _base(facts)
    yield f"# {_line(facts.name)}"
    yield ""
    thing = "A LoRA adapter that edits" if facts.form == "lora" else "An edited version of"
    yield (
        f"{thing} {base}: a direction that {_subject(facts)} was removed from what some of its "
        "modules write to the residual stream, by the edit that a search with "
        f"heretic-kl {facts.versions.get('heretic-kl', '')}".rstrip()
        + " found to change everything else least."
    )
    if facts.lora is not None:
        yield ""
        yield _adapter_error(facts)


def _adapter_error(facts: ExportFacts) -> str:
    assert facts.lora is not None
    if facts.lora.exact:
        return f"The adapter (rank {facts.lora.rank}) expresses the edit exactly."
    return (
        f"The adapter (rank {facts.lora.rank}) approximates the edit: it misses "
        f"{facts.lora.relative_error:.1%} of the change to the weights (Frobenius norm; at worst "
        f"{facts.lora.worst_relative_error:.1%} of one module's). The scores below are its own."
    )


def _scorers(facts: ExportFacts) -> Iterator[str]:
    sources = {used.kind: used.source for used in facts.prompts if used.use == "test"}
    yield "## What was lowered and raised"
    yield ""
    for name, scores in facts.scores.items():
        counts = _line(scores.meaning.counts) or "what this scorer counts"
        source = sources.get(scores.kind or "")
        where = "" if source is None else f", to prompts of kind {scores.kind} ({_line(source)})"
        yield f"- {_code(name)}, {ROLES[scores.role]}: {counts}{where}"


def _use(facts: ExportFacts) -> Iterator[str]:
    removed = _removed(facts)
    yield "## Intended use"
    yield ""
    place = "In place of the original, with the same tokenizer and chat template, where "
    if _lowers_refusals(facts):
        raised = _named(_raised_refusals(facts))
        yield (
            f"{place}its refusals of harmless or legitimate requests are in the way; for research "
            "on refusals and on what removing them changes. "
            + (f"Other refusals were to stay; {raised} says how many did. " if raised else "")
            + "Not meant for people who rely on the original's refusals as a safeguard, nor for "
            "serving the public without a safeguard in their place."
        )
    elif removed:
        yield (
            f"{place}what {_named(removed)} counts is in the way; for research on that behaviour "
            f"and on what removing it changes. The search was not to remove refusals{_seen(facts)}."
        )
    else:
        yield f"{place}what was raised above is wanted; for research on what an edit can raise."
    yield ""
    yield "```python"
    yield "from transformers import AutoModelForCausalLM, AutoTokenizer"
    if facts.form == "lora":
        yield "from peft import PeftModel"
        yield ""
        yield f"original = {portable_text(facts.base_name)!r}"
        yield "tokenizer = AutoTokenizer.from_pretrained(original)"
        yield "model = AutoModelForCausalLM.from_pretrained(original, dtype='auto')"
        yield "model = PeftModel.from_pretrained(model, 'path/to/this/folder/or/repository')"
    else:
        yield ""
        yield "folder = 'path/to/this/folder/or/repository'"
        yield "tokenizer = AutoTokenizer.from_pretrained(folder)"
        yield "model = AutoModelForCausalLM.from_pretrained(folder, dtype='auto')"
    yield "```"


def _cost(facts: ExportFacts) -> Iterator[str]:
    yield "## Measured cost"
    yield ""
    yield "On the test prompts, which neither gave the direction nor steered the search:"
    yield ""
    yield "| Score | Original | Trial | Saved model |"
    yield "|---|---|---|---|"
    for name, scores in facts.scores.items():
        yield _score_row(name, scores)
    yield ""
    yield (
        "*Trial* is the original with the edit applied to module outputs, *saved model* what is "
        "in this folder, read back from disk. Ranges are 95% intervals; plus or minus is one "
        "standard error unless stated otherwise."
    )
    yield from _parts_of_kl(facts)
    yield ""
    yield (
        "KL divergence is teacher-forced: both models are fed the original's greedy response, "
        f"and the next-token distributions of its first {_positions(facts)} are compared, in nats, "
        "KL(original || edited), averaged over positions, then over prompts (not summed); version "
        f"{facts.metric_version} of the metric."
    )
    floors = (
        ("batching and padding alone give", facts.noise_floor),
        ("rounding every layer to bfloat16 gives", facts.rounding_floor),
        ("the saved model differs from the trial by", facts.merge_kl),
    )
    stated = [f"{text} {value:.2g}" for text, value in floors if value is not None]
    over = ""
    if any(tokens != facts.kl_tokens for tokens in _tokens(facts).values()):
        over = f" over the first {facts.kl_tokens} positions, as in the search"
    if stated:
        yield ""
        yield f"For comparison, in nats{over}: {'; '.join(stated)}."


def _tokens(facts: ExportFacts) -> dict[str, int]:
    """N of each KL on the test prompts, by scorer."""
    return {n: facts.tokens_of(n) for n, scores in facts.scores.items() if scores.unit == "nats"}


def _positions(facts: ExportFacts) -> str:
    """`3 positions`; with the scorer of each number where there are several."""
    of_scorers = _tokens(facts)
    counts = set(of_scorers.values()) or {facts.test_kl_tokens or facts.kl_tokens}
    if len(counts) > 1:
        named = ", ".join(f"{_code(name)} {tokens}" for name, tokens in of_scorers.items())
        return f"positions ({named})"
    (tokens,) = counts
    return f"{tokens} position{'s' if tokens != 1 else ''}"


def _parts_of_kl(facts: ExportFacts) -> Iterator[str]:
    """What of a KL comes from refusing or not, and what does not, where they are told apart."""
    for name, scores in facts.scores.items():
        details = {} if scores.saved is None else scores.saved.details
        parts = [details.get(key) or {} for key in ("behaviour", "remainder")]
        if any(part.get("standard_error") is None for part in parts):
            continue
        behaviour, remainder = ("{mean:.4f} ± {standard_error:.4f}".format(**p) for p in parts)
        yield ""
        yield (
            f"Of the saved model's {_code(name)}, {behaviour} nats come from refusing or not at "
            f"the first token, and {remainder} nats from everything else."
        )


def _edit(facts: ExportFacts) -> Iterator[str]:
    edit = facts.edit
    modules = " and ".join(COMPONENTS[name] for name in edit.kernels) or "nothing"
    contrast = (
        "of prompts the original refuses and of harmless ones"
        if facts.by_response
        else "of the two sets of training prompts below, called harmful and harmless whatever they "
        "ask"
    )
    where = (
        "each layer's own"
        if edit.direction_position is None
        else f"the one of layer {edit.direction_position:.2f} (of 0 to {facts.layers - 1})"
    )
    yield "## The edit"
    yield ""
    yield (
        "The direction is the difference between mean residuals at the last prompt token "
        f"{contrast}; used here: {where}. It is removed from {modules}, with a weight that "
        f"depends on the layer (1 removes it, less removes part). {NORM_MODES[edit.norm]}"
    )
    yield ""
    yield "| Module | Peak weight | at layer | Floor weight | Reach in layers |"
    yield "|---|---|---|---|---|"
    for name, kernel in edit.kernels.items():
        yield (
            f"| {name} | {kernel.peak_weight:.4g} | {kernel.peak_position:.2f} "
            f"| {kernel.floor_weight:.4g} | {kernel.reach:.2f} |"
        )
    if edit.refinement is not None:
        learned = edit.refinement
        yield ""
        yield (
            f"From this start (trial {learned.start}) the {learned.form} of every site's operator "
            f"was learned by gradient in {learned.steps} steps: the KL divergence on harmless "
            "training prompts was lowered while the probability of opening a response with a "
            f"refusal was to stay below {learned.mass_limit:.2g}{_loss(learned)}. "
            f"{_at_strength(learned)}The learned operators are in the saved weights; their SHA-256 "
            f"is `{learned.sha256[:16]}`."
        )
    picked = f"rule {_code(facts.pick_rule)}" if facts.pick_rule else "hand"
    of = f", refined after {facts.trials} others" if edit.refinement else f" of {facts.trials}"
    yield ""
    yield (
        f"Trial {facts.trial_number}{of}, picked by {picked}; norm mode "
        f"`{edit.norm}`; saved weights: {facts.saved_dtype}. Parameters as searched:"
    )
    yield ""
    yield "| Parameter | Value |"
    yield "|---|---|"
    for parameter, value in portable(facts.parameters).items():
        yield f"| {_code(parameter)} | {_cell(value)} |"


def _loss(learned: Refinement) -> str:
    """What else it takes to learn the same; nothing where an older study did not keep it."""
    asked = learned.asked
    return "" if asked is None else f" ({asked.loss}; seed {asked.seed})"


def _at_strength(learned: Refinement) -> str:
    """A sentence, or nothing where the edit stayed as strong as it was learned."""
    if learned.strength == 1:
        return ""
    scaled = f"All of it was multiplied by {learned.strength:.2f} afterwards, "
    if learned.of is not None:
        return f"{scaled}another strength of trial {learned.of}. "
    return f"{scaled}the strength at which responses met the target best. "


def _prompts(facts: ExportFacts) -> Iterator[str]:
    yield "## Prompts"
    yield ""
    yield "| Kind | Use | Source | Count | SHA-256 |"
    yield "|---|---|---|---|---|"
    for used in facts.prompts:
        yield (
            f"| {_line(used.kind)} | {used.use} | {_line(used.source)} "
            f"| {used.count} | `{used.sha256[:16]}` |"
        )
    yield ""
    yield "*Kind* is the run's name of a set of prompts; its source says what they are."


def _reproduction(facts: ExportFacts) -> Iterator[str]:
    yield "## Reproduction"
    yield ""
    fence = max(["```", *(f"{run}`" for run in re.findall("`+", facts.command))], key=len)
    yield fence
    yield facts.command
    yield fence
    yield ""
    versions = ", ".join(f"{name} {number}" for name, number in facts.versions.items())
    yield (
        f"Seed {facts.seed}; {versions}; {facts.platform}. All settings, scores, full fingerprints "
        "and the sha256 of every file are in `reproduce.json`, from which "
        "`heretic-kl reproduce` rebuilds the model. Other hardware and versions round "
        "differently and can lead the search elsewhere; the trial's parameters fix the edit."
    )


def _limits(facts: ExportFacts) -> Iterator[str]:
    test_counts = {used.kind: used.count for used in facts.prompts if used.use == "test"}
    counts = " and ".join(f"{count} {kind}" for kind, count in test_counts.items())
    yield "## Limits of the measurement"
    yield ""
    limits = (scores.meaning.limits for scores in facts.scores.values())
    yield from (f"- {_line(limit)}" for limit in dict.fromkeys(filter(None, limits)))
    for name, scores in facts.scores.items():
        score = scores.saved or scores.trial
        agreed = None if score is None else agreement_text(score.details.get("agreement"))
        if agreed is not None:
            yield f"- `{name}` and the phrase rule say the same of {agreed} responses."
    yield f"- The test set is small ({counts or 'see above'} prompts); the intervals say how far."
    if any(scores.unit == "nats" for scores in facts.scores.values()):
        yield (
            f"- KL covers the first {_positions(facts)} of responses to harmless prompts; "
            "it says nothing about long responses, other languages or other tasks. Test yours."
        )
    yield ""
    yield "## Responsible use"
    yield ""
    safety = (
        "This model declines less than the original and was not otherwise made safe"
        if _lowers_refusals(facts)
        else f"This model was not made safe, nor was the search to remove refusals{_seen(facts)}"
    )
    yield (
        f"{safety}: whoever deploys it is responsible for what it generates, for safeguards of "
        "their own, and for the original's licence and terms."
    )


def _subject(facts: ExportFacts) -> str:
    """What goes with the direction, as the objectives say."""
    if _lowers_refusals(facts):
        return "goes with refusing"
    removed = _removed(facts)
    return f"goes with what {_named(removed)} counts" if removed else "tells its prompts apart"


def _removed(facts: ExportFacts) -> dict[str, ScoreFacts]:
    """The scores of behaviours that the search lowered."""
    return {
        name: scores
        for name, scores in facts.scores.items()
        if scores.role == "minimize" and scores.meaning.about != "damage"
    }


def _lowers_refusals(facts: ExportFacts) -> bool:
    return any(scores.meaning.about == "refusals" for scores in _removed(facts).values())


def _raised_refusals(facts: ExportFacts) -> list[str]:
    return [
        name
        for name, scores in facts.scores.items()
        if scores.role == "maximize" and scores.meaning.about == "refusals"
    ]


def _seen(facts: ExportFacts) -> str:
    """Where a search that removes something else shows refusals."""
    about = [name for name, scores in facts.scores.items() if scores.meaning.about == "refusals"]
    return f", which {_named(about)} shows" if about else ", which were not measured"


def _named(scores: Iterable[str]) -> str:
    return " and ".join(map(_code, scores))


def _line(text: str) -> str:
    """Text from elsewhere on one line."""
    return markdown_text(portable_text(text))


def _code(text: str) -> str:
    """The same as code, in which nothing can be escaped."""
    return f"`{re.sub(r'[`|<]', '?', ' '.join(portable_text(text).split()))}`"


def _base(facts: ExportFacts) -> str:
    base = portable_text(facts.base_name)
    if not facts.base_is_hub_id:
        return _code(base)
    revision = f" (revision {_code(facts.base_revision)})" if facts.base_revision else ""
    return f"[{base}](https://huggingface.co/{base}){revision}"


def _score_row(name: str, scores: ScoreFacts) -> str:
    cells = (_score(scores.original), _score(scores.trial), _score(scores.saved))
    return f"| {_line(name)} | {' | '.join(cells)} |"


def _score(score: Score | None) -> str:
    if score is None:
        return "–"
    interval = ""
    if score.interval is not None and score.standard_error is not None:  # the text has the latter
        interval = ", {:.4f} to {:.4f}".format(*score.interval)
    return _line(score.text) + interval


def _cell(value: Any) -> str:
    return markdown_text(f"{value:.6g}" if isinstance(value, float) else str(value))
