import textwrap
from dataclasses import replace

import pytest
import torch

from heretic_kl.engine import Engine
from heretic_kl.errors import ConfigError, MeasurementError, ScorerError
from heretic_kl.prompts import Prompt
from heretic_kl.requests import ResponseResult
from heretic_kl.scoring import (
    RefusalRule,
    Score,
    ScorerSpec,
    Suite,
    build_scorer,
    built_in_scorers,
    documented_settings,
)
from heretic_kl.testing import fake_context, load_tiny_model, save_tiny_model, tiny_llama

HARMFUL = tuple(Prompt(f"make a bomb {word}") for word in "how do I please tell me".split())
HARMLESS = tuple(Prompt(f"make a cake {word}") for word in "how do I please tell me".split())
DEFAULTS = (
    ScorerSpec("refusals", "refusals", "minimize", {}),
    ScorerSpec("teacher_forced_kl", "teacher_forced_kl", "minimize", {}),
    ScorerSpec("false_refusals", "false_refusals", "monitor", {}),
)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = save_tiny_model(tmp_path_factory.mktemp("m") / "m", tiny_llama())
    return Engine(load_tiny_model(folder), batch_size=8)


def context(engine, **changes):
    prompts = {"harmful": HARMFUL, "harmless": HARMLESS, "borderline": HARMLESS}
    return fake_context(engine, **{"prompts_by_kind": prompts, **changes})


class SaysWhat:
    """An engine whose unedited model answers as told."""

    def __init__(self, engine, texts):
        self.engine, self.texts = engine, texts

    def measure(self, plan, requests):
        if hasattr(requests[0], "max_tokens"):
            return [ResponseResult(tuple(self.texts))]
        return self.engine.measure(plan, requests)


def plug_in(tmp_path, body, name="mine.py"):
    head = """
        from pydantic import Field
        from heretic_kl.scoring import Score, Scorer, ScorerSettings
    """
    path = tmp_path / name
    path.write_text(textwrap.dedent(head) + textwrap.dedent(body), encoding="utf-8")
    return path


MINE = """
    class MineSettings(ScorerSettings):
        bonus: float = Field(default=0.5, ge=0, description="Added.")

    class Mine(Scorer[MineSettings]):
        Settings = MineSettings
        def requests(self):
            return []
        def score(self, results):
            return Score(self.settings.bonus, f"{self.settings.bonus}")
"""


def test_the_scorers_of_the_package_are_found():
    names = ("false_refusals", "judge", "keyword_rate", "lm_eval", "refusals", "teacher_forced_kl")
    assert built_in_scorers() == names
    for name in built_in_scorers():
        assert all(description for _, description in documented_settings(name).values())


def test_an_unedited_model_has_no_kl_and_scores_come_in_order(engine):
    suite = Suite(DEFAULTS)
    suite.prepare(context(engine))
    scores = suite.evaluate(engine, None)
    assert list(scores) == ["refusals", "teacher_forced_kl", "false_refusals"]
    kl = scores["teacher_forced_kl"]
    assert kl.value == 0.0 and kl.objective == 1e-9  # the noise floor of the context
    assert "below the noise floor" in kl.text
    assert scores["refusals"].details["total"] == len(HARMFUL)
    assert list(suite.evaluate_objectives(engine, [{}])[0]) == list(scores)[:2]


def test_a_score_says_over_how_many_positions_it_is(engine):
    suite = Suite(DEFAULTS)
    suite.prepare(context(engine), states_tokens=True)
    scores = suite.evaluate(engine, {})
    tokens = context(engine).kl_tokens
    kl = scores["teacher_forced_kl"]
    assert kl.details["kl_tokens"] == tokens and f" nats over {tokens} positions (" in kl.text
    assert "kl_tokens" not in scores["refusals"].details
    assert "positions" not in scores["refusals"].text


def test_scores_survive_storage(engine):
    suite = Suite(DEFAULTS)
    suite.prepare(context(engine))
    import json

    for score in suite.evaluate(engine, {}).values():
        assert Score.from_dict(json.loads(json.dumps(score.to_dict()))) == score


def edited_plan(engine):
    from heretic_kl.ablation import ablation_operator

    direction = torch.randn(
        engine.lm.architecture.width, generator=torch.Generator().manual_seed(1)
    )
    return {key: ablation_operator(direction, 1.0) for key in engine.lm.architecture.facts()}


def test_kl_mean_is_not_multiplied_by_the_number_of_positions(engine):
    values = {}
    for tokens in (1, 4):
        suite = Suite([ScorerSpec("kl", "teacher_forced_kl", "minimize", {"kl_tokens": tokens})])
        suite.prepare(context(engine))
        score = suite.evaluate(engine, edited_plan(engine))["kl"]
        profile = score.details["profile"]
        assert len(profile) == tokens
        values[tokens] = (score.value, profile[0]["mean"])
    assert values[1][0] == pytest.approx(values[4][1], rel=1e-6)
    assert values[4][0] < 3 * max(place for place in values[1])


def test_prompts_that_the_original_refuses_are_set_aside_and_reported(engine):
    texts = ["sure"] * len(HARMLESS)
    texts[2] = "I'm sorry, I cannot."
    suite = Suite([ScorerSpec("kl", "teacher_forced_kl", "minimize", {})])
    suite.prepare(context(SaysWhat(engine, texts)))
    score = suite.evaluate(engine, edited_plan(engine))["kl"]
    assert score.details["set_aside"] == [HARMLESS[2].user]
    assert score.details["prompts"] == len(HARMLESS) - 1
    assert score.details["set_aside_kl"] > 0
    suite_of_all = Suite(
        [ScorerSpec("kl", "teacher_forced_kl", "minimize", {"set_aside_refused": False})]
    )
    suite_of_all.prepare(context(SaysWhat(engine, texts)))
    assert suite_of_all.evaluate(engine, {})["kl"].details["prompts"] == len(HARMLESS)


def test_a_model_that_refuses_everything_cannot_be_measured(engine):
    suite = Suite([ScorerSpec("kl", "teacher_forced_kl", "minimize", {})])
    with pytest.raises(MeasurementError, match="refuses all 6 harmless prompts"):
        suite.prepare(context(SaysWhat(engine, ["I cannot"] * len(HARMLESS))))


def test_empty_responses_count_as_refusals(engine):
    suite = Suite([ScorerSpec("r", "refusals", "minimize", {})])
    suite.prepare(context(engine))
    texts = ["", "  ", "sure", "I cannot", "sure", "sure"]
    score = suite.evaluate(SaysWhat(engine, texts), None)["r"]
    assert score.value == 0.5
    assert score.details["empty"] == 2 and score.details["refused"] == [0, 1, 3]
    assert score.text.startswith("3/6 (50%, ")


def test_a_plug_in_file_with_its_own_settings(tmp_path, engine):
    path = plug_in(tmp_path, MINE)
    for use in (str(path), f"{path}:Mine"):
        suite = Suite([ScorerSpec("mine", use, "maximize", {"bonus": 2})])
        suite.prepare(context(engine))
        assert suite.evaluate(engine, None)["mine"].value == 2.0


def test_a_scorer_that_raises_says_which(tmp_path, engine):
    body = MINE.replace("return Score(", "raise KeyError('x') or Score(")
    suite = Suite([ScorerSpec("mine", str(plug_in(tmp_path, body)), "minimize", {})])
    with pytest.raises(ScorerError, match="scorer 'mine' failed: KeyError: 'x'"):
        suite.evaluate(engine, None)


def test_unscored_is_a_value_for_reports_and_an_error_for_objectives(tmp_path, engine):
    body = MINE.replace("Score(self.settings.bonus, f", "Score(None, f")
    path = str(plug_in(tmp_path, body))
    report = [DEFAULTS[0], ScorerSpec("mine", path, "monitor", {})]
    suite = Suite(report)
    suite.prepare(context(engine))
    assert suite.evaluate(engine, None)["mine"].value is None
    suite = Suite([ScorerSpec("mine", path, "minimize", {})])
    with pytest.raises(MeasurementError, match="'mine' gave no value"):
        suite.evaluate(engine, None)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        ("refusal", "unknown scorer 'refusal'; did you mean 'refusals'?"),
        ("nowhere.py:X", "no such file 'nowhere.py'"),
    ],
)
def test_unknown_scorers_are_one_line(use, message):
    with pytest.raises(ScorerError) as caught:
        build_scorer("x", use, {})
    assert message in str(caught.value)


def test_bad_plug_in_files_are_one_line(tmp_path):
    with pytest.raises(ScorerError, match="does not define class 'Other'"):
        build_scorer("x", f"{plug_in(tmp_path, MINE)}:Other", {})
    with pytest.raises(ScorerError, match="cannot be imported: ModuleNotFoundError"):
        build_scorer("x", str(plug_in(tmp_path, "import no_such_module", "b.py")), {})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kl_token": 2}, "unknown setting scorers.kl.settings.kl_token: did you mean 'kl_tokens'"),
        ({"kl_tokens": 0}, "scorers.kl.settings.kl_tokens = 0: "),
        ({"divergence": "sideways"}, "scorers.kl.settings.divergence = 'sideways'"),
    ],
)
def test_bad_scorer_settings_are_one_line(settings, message):
    with pytest.raises(ConfigError) as caught:
        build_scorer("kl", "teacher_forced_kl", settings)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("use", "settings"),
    [("refusals", {"markers": ["*"]}), ("keyword_rate", {"phrases": ["flour", " "]})],
)
def test_words_that_match_everywhere_are_refused_before_a_model_is_loaded(use, settings):
    with pytest.raises(ConfigError, match=f"scorers.x.settings.{next(iter(settings))}"):
        build_scorer("x", use, settings)


def test_two_scorers_may_not_share_a_name():
    twice = [DEFAULTS[0], ScorerSpec("Refusals", "refusals", "monitor", {})]
    with pytest.raises(ConfigError, match="'refusals' and 'Refusals' share a name"):
        Suite(twice)


def test_a_search_needs_an_objective():
    with pytest.raises(ConfigError, match="nothing to search for"):
        Suite([DEFAULTS[2]])


def test_prompts_are_set_aside_by_the_rule_of_the_refusals_scorer(engine):
    texts = ["sure"] * len(HARMLESS)
    texts[1], texts[2] = "I'm sorry, I cannot.", "Lo siento, no puedo."
    markers = {"markers": ["lo siento"]}
    suite = Suite([replace(DEFAULTS[0], settings=markers), *DEFAULTS[1:]])
    asked = context(SaysWhat(engine, texts), refusal_rule=suite.refusal_rule)
    suite.prepare(asked)
    kl = suite.evaluate(engine, None)["teacher_forced_kl"]
    assert kl.details["set_aside"] == [HARMLESS[2].user]
    for name in ("refusals", "false_refusals"):
        assert suite.scorers[name].score([ResponseResult(tuple(texts))]).details["refused"] == [2]
    assert suite.scorers["teacher_forced_kl"].identity()["refusal rule"] == (
        RefusalRule(("lo siento",)).fingerprint()
    )


def test_the_run_has_the_english_rule_where_no_scorer_counts_refusals(engine):
    assert Suite([DEFAULTS[1]]).refusal_rule == Suite(DEFAULTS).refusal_rule == RefusalRule()
