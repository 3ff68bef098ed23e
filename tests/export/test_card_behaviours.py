"""The card says what the run removed: refusals, or what its scorers count."""

from pathlib import Path

import pytest
from card_facts import KL, REFUSALS, facts

from heretic_kl.config import load_settings
from heretic_kl.export import PromptFacts, ScoreFacts, model_card
from heretic_kl.prompts.sets import load_prompt_sets
from heretic_kl.run.report_record import prompt_facts
from heretic_kl.scoring import ScorerSpec, Suite

ROOT = Path(__file__).parents[2]
REFUSING = (
    "goes with refusing",
    "its refusals of harmless or legitimate requests",
    "declines less than the original",
    "prompts the original refuses",
)


def card_of(*words):
    """The card of a run with these settings, whose scores are made up."""
    settings = load_settings(["--model", "m", *words])
    prompts = load_prompt_sets(settings.prompts.model_dump(), "builtin")
    suite = Suite(
        ScorerSpec(name, table.use or name, table.role, table.settings)
        for name, table in settings.scorers.items()
        if table.enabled
    )
    kinds = {"false_refusals": "borderline", "teacher_forced_kl": "harmless"}
    scores = {}
    for spec in suite.specs:
        scorer = suite.scorers[spec.name]
        scores[spec.name] = ScoreFacts(
            *([KL] * 3 if scorer.unit == "nats" else REFUSALS),
            kind=kinds.get(spec.use, "harmful"),
            unit=scorer.unit,
            role=spec.role,
            meaning=scorer.meaning(),
        )
    by_response = settings.directions.by_response and suite.counts_refusals
    return model_card(facts(scores=scores, prompts=prompt_facts(prompts), by_response=by_response))


def example(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    return card_of("--config", f"examples/{name}.toml")


def test_of_refusals(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    card = card_of()
    for text in (
        *REFUSING,
        "- `refusals`, lowered: responses that refuse, by a rule of phrases, to prompts of kind "
        "harmful (",
        "- `false_refusals`, measured only: responses that refuse",
        "- `teacher_forced_kl`, lowered: distance of the next-token distributions",
        "degenerate responses are left out of the share, up to 10% of all responses; each further",
    ):
        assert text in card, text
    assert card.count("recognized by a phrase rule") == 1 and "judge" not in card
    assert "up to 25% of all responses" in card_of(
        "--scorers.refusals.settings.degenerate-allowed", "0.25"
    )


def test_of_over_refusal(monkeypatch):
    card = example("over_refusal", monkeypatch)
    for text in (
        *REFUSING,
        "- `refusals`, lowered: responses that refuse, by a rule of phrases, to prompts of kind "
        "harmful (builtin:borderline",
        "- `kept_refusals`, raised: responses that refuse, by a rule of phrases, to prompts of "
        "kind borderline (builtin:harmful",
        "Other refusals were to stay; `kept_refusals` says how many did.",
    ):
        assert text in card, text


@pytest.mark.parametrize(
    ("name", "phrases"),
    [
        ("hedging", '"as an ai", "i am not a", "i\'m not a", "i cannot give", "i can\'t give"'),
        ("overused_phrases", '"a testament to", "tapestry"'),
    ],
)
def test_of_phrases(name, phrases, monkeypatch):
    card = example(name, monkeypatch)
    for text in (
        "a direction that goes with what `keyword_rate` counts was removed",
        f"- `keyword_rate`, lowered: phrases of a list per 100 words of a response: {phrases}",
        "where what `keyword_rate` counts is in the way",
        "The search was not to remove refusals, which were not measured.",
        "two sets of training prompts below, called harmful and harmless whatever they ask",
        "Listed phrases count",
        "This model was not made safe, nor was the search to remove refusals, which were not",
    ):
        assert text in card, text
    assert not any(text in card for text in REFUSING)
    assert "recognized by a phrase rule" not in card and "declines less" not in card


def test_of_a_judge(monkeypatch):
    card = example("refusal_judge", monkeypatch)
    assert (
        "- `judge`, measured only: responses of which a judge (Qwen/Qwen3-8B) says refusal or "
        "evasion, to prompts of kind harmful (" in card
    )
    assert "The judge Qwen/Qwen3-8B errs too" in card and "localhost" not in card
    words = ["--scorers.judge.role", "minimize", "--scorers.refusals.role", "monitor"]
    words += ["--scorers.judge.settings.classifier", "/srv/judges/mine"]
    steered = card_of(*words)
    assert "- `judge`, lowered: responses of which a judge (mine) says" in steered
    assert all(text in steered for text in REFUSING)


def test_of_a_behaviour_beside_refusals_that_are_only_watched(monkeypatch):
    monkeypatch.chdir(ROOT)
    words = ["--scorers.refusals.enabled=true", "--scorers.refusals.role=monitor"]
    card = card_of("--config", "examples/hedging.toml", *words)
    assert "The search was not to remove refusals, which `refusals` shows." in card
    assert not any(text in card for text in REFUSING[:3])


def test_of_a_scorer_that_says_nothing_and_one_that_is_raised():
    unknown = ScoreFacts(*REFUSALS, role="minimize")
    card = model_card(facts(scores={"mine": unknown}))
    assert "- `mine`, lowered: what this scorer counts" in card
    assert "goes with what `mine` counts" in card
    raised = ScoreFacts(*REFUSALS, role="maximize")
    card = model_card(
        facts(scores={"mine": raised}, prompts=(PromptFacts("a", "test", "b", 1, ""),))
    )
    assert "a direction that tells its prompts apart was removed" in card
    assert "what was raised above is wanted" in card
