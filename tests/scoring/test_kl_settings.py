"""The settings of the teacher-forced KL that change what is measured."""

import pytest
import torch

from heretic_kl.ablation import ablation_operator
from heretic_kl.engine import Engine
from heretic_kl.errors import ConfigError, MeasurementError
from heretic_kl.prompts import Prompt
from heretic_kl.scoring import ScorerSpec, Suite, build_scorer
from heretic_kl.testing import fake_context, load_tiny_model, save_tiny_model, tiny_llama

PROMPTS = tuple(Prompt(text) for text in ("make a cake", "tell me about Rome", "wait please"))
KEEP_ALL = {"set_aside_refused": False}


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = save_tiny_model(tmp_path_factory.mktemp("m") / "m", tiny_llama())
    return Engine(load_tiny_model(folder), batch_size=4)


@pytest.fixture
def plan(engine):
    direction = torch.randn(
        engine.lm.architecture.width, generator=torch.Generator().manual_seed(1)
    )
    return {key: ablation_operator(direction, 0.5) for key in engine.lm.architecture.facts()}


def kl(engine, plan, *, use="validation", context=None, **settings):
    suite = Suite([ScorerSpec("kl", "teacher_forced_kl", "minimize", {**KEEP_ALL, **settings})])
    prompts = {"harmful": PROMPTS, "harmless": PROMPTS}
    suite.prepare(
        fake_context(
            engine,
            prompts_by_kind=prompts,
            kl_tokens=4,
            use=use,
            noise_floor=1e-12,
            **(context or {}),
        )
    )
    return suite, suite.evaluate(engine, plan)["kl"]


def test_drawn_responses_are_another_measurement_and_repeat(engine, plan):
    greedy = kl(engine, plan)[1].value
    first = kl(engine, plan, response="sampled(1)")[1].value
    assert first == kl(engine, plan, response="sampled(1)")[1].value
    assert len({greedy, first, kl(engine, plan, response="sampled(2)")[1].value}) == 3
    assert kl(engine, None, response="sampled(1)")[1].value == 0.0


def test_its_own_prompts_are_measured_in_their_own_split(engine, plan, tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("make a bomb\nsorry\nmix flour with water\nsure\n", encoding="utf-8")
    source = {"source": str(file), "limit": 3}
    suite, score = kl(engine, plan, prompts=source)
    assert score.details["prompts"] == 3
    assert score.value != kl(engine, plan)[1].value
    other, unchanged = kl(engine, plan, use="test", prompts=source)
    assert unchanged.value == kl(engine, plan)[1].value
    _, there = kl(engine, plan, use="test", test_prompts=source)
    assert there.value == score.value
    assert suite.scorers["kl"].identity() != other.scorers["kl"].identity()


def test_behaviour_and_remainder_add_to_the_whole_and_one_can_be_minimized(engine, plan):
    openers = {"refusal_openers": (5, 9)}
    _, whole = kl(engine, plan, context=openers)
    behaviour, remainder = whole.details["behaviour"], whole.details["remainder"]
    assert behaviour["mean"] > 0 and remainder["mean"] > behaviour["mean"]
    assert behaviour["mean"] + remainder["mean"] == pytest.approx(whole.value, rel=1e-9)
    assert whole.objective == whole.value == kl(engine, plan)[1].value
    _, score = kl(engine, plan, context=openers, objective="remainder")
    assert score.value == whole.value and score.objective == remainder["mean"]
    assert "remainder" not in kl(engine, plan, context=openers, divergence="reverse_kl")[1].details
    with pytest.raises(MeasurementError, match="the remainder needs forward_kl"):
        kl(engine, plan, objective="remainder")


def test_the_noise_floor_stands_beside_the_value(engine, plan):
    assert kl(engine, plan)[1].text.endswith(" nats (noise floor 1e-12)")
    assert kl(engine, None)[1].text == "0.0000 ± 0.0000 nats (below the noise floor 1e-12)"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"response": "sampled"}, "scorers.kl.settings.response = 'sampled'"),
        ({"response": "sampled(x)"}, "scorers.kl.settings.response = 'sampled(x)'"),
        ({"prompts": {"source": ""}}, "scorers.kl.settings.prompts.source = ''"),
        (
            {"prompts": {"source": "x", "sufix": "x"}},
            "unknown setting scorers.kl.settings.prompts.sufix: did you mean 'suffix'",
        ),
    ],
)
def test_wrong_settings_are_one_line(settings, message):
    with pytest.raises(ConfigError) as caught:
        build_scorer("kl", "teacher_forced_kl", settings)
    assert message in str(caught.value) and "\n" not in str(caught.value)
