"""The contract of scorers: our own keep it, and it notices scorers that break it."""

import textwrap

import pytest

from heretic_kl.kl import row_statistics
from heretic_kl.requests import ResponseRequest, TeacherForcedRequest
from heretic_kl.testing import (
    FAKE_PROMPTS,
    FakeEngine,
    ScorerContract,
    fake_context,
    fake_plan,
    fake_response,
)


class TestRefusals(ScorerContract):
    use = "refusals"


class TestFalseRefusals(ScorerContract):
    use = "false_refusals"


class TestTeacherForcedKL(ScorerContract):
    use = "teacher_forced_kl"


class TestTeacherForcedKLWithOtherSettings(ScorerContract):
    use = "teacher_forced_kl"
    settings = {"position_decay": 0.8, "temperature": 2.0, "response": "sampled(3)"}


PLUG_IN = """
    from itertools import count

    from pydantic import Field

    from heretic_kl.scoring import Bounds, ResponseRequest, Score, Scorer, ScorerSettings

    class WordsSettings(ScorerSettings):
        most: int = Field(default=8, ge=1, description="Tokens of a response.")

    class Words(Scorer[WordsSettings]):
        Settings = WordsSettings

        def prepare(self, context):
            self._prompts = context.prompts("harmless")
            self._calls = count()

        def requests(self):
            return [ResponseRequest(self._prompts, self.settings.most)]

        def score(self, results):
            words = sum(len(text.split()) for text in results[0].texts) / len(self._prompts)
            return Score(words, f"{words:.1f} words")
"""
LAWS = [name for name in dir(ScorerContract) if name.startswith("test_")]


def contract(tmp_path, *changes):
    """The contract of the plug-in with some of its text replaced."""
    body = textwrap.dedent(PLUG_IN)
    for old, new in changes:
        assert old in body
        body = body.replace(old, new)
    path = tmp_path / "words.py"
    path.write_text(body, encoding="utf-8")
    return type("TestWords", (ScorerContract,), {"use": str(path)})()


def broken_laws(tested):
    broken = []
    for law in LAWS:
        try:
            getattr(tested, law)()
        except Exception:  # as a test run counts failures
            broken.append(law)
    return broken


def test_a_good_plug_in_keeps_every_law(tmp_path):
    assert len(LAWS) == 10
    assert broken_laws(contract(tmp_path)) == []


@pytest.mark.parametrize(
    ("old", "new", "law"),
    [
        ('Field(default=8, ge=1, description="Tokens of a response.")', "8", "described"),
        ("class WordsSettings(ScorerSettings):", "class WordsSettings(Loose):", "unknown_settings"),
        ("self.settings.most)]", "self.settings.most + next(self._calls))]", "same_each_time"),
        ("return Score(words, ", "return Score(words + next(self._calls), ", "results_alone"),
        ('return Score(words, f"{words:.1f} words")', 'return Score(words, "")', "finite"),
        ("return Score(words, ", "return Score(float('inf'), ", "finite"),
        ('words")', 'words", interval=(words + 1, words + 2))', "finite"),
        ('words")', "words\", details={'prompts': self._prompts})", "finite"),
        (
            "def requests",
            "def bounds(self, _): return Bounds(high=1.0)\n\n    def requests",
            "bounds",
        ),
        (
            "def requests",
            "def per_prompt(self, results): return [0.0, 1.0]\n\n    def requests",
            "mean_of_the_prompts",
        ),
        (
            "def requests",
            "def identity(self): return {'most': 8}\n\n    def requests",
            "identity_is",
        ),
    ],
)
def test_a_scorer_that_breaks_a_law_is_noticed(tmp_path, old, new, law):
    loose = (
        "class WordsSettings",
        "class Loose(ScorerSettings):\n"
        "    model_config = {'extra': 'ignore'}\n\n"
        "class WordsSettings",
    )
    broken = broken_laws(contract(tmp_path, (old, new), *([loose] if "Loose" in new else [])))
    assert any(law in name for name in broken), broken


def test_the_fake_engine_answers_as_an_engine():
    prompts = FAKE_PROMPTS["harmless"]
    forced = TeacherForcedRequest(prompts, 3, row_statistics)
    responses = ResponseRequest(prompts, 8)
    engine = FakeEngine()
    unedited = engine.measure(None, [forced, responses])
    assert not unedited[0].columns.values.any()
    assert engine.measure({}, [responses])[0] == unedited[1]
    weak, strong = (engine.measure(fake_plan(size), [forced])[0] for size in (0.1, 1.0))
    assert 0 < weak.columns.values.mean() < strong.columns.values.mean()
    assert weak.prompt_index.tolist() == sorted(weak.prompt_index.tolist())
    assert set(weak.prompt_index.tolist()) == set(range(len(prompts)))
    assert weak.columns.values.shape == weak.position.shape
    (alone,) = engine.measure(
        fake_plan(1.0), [TeacherForcedRequest(prompts[:1], 3, row_statistics)]
    )
    assert alone.columns.values.tolist() == strong.columns.values[:3].tolist()
    many = engine.measure_many([None, fake_plan(1.0)], [forced], lambda index, _so_far: index == 0)
    assert many[0] is None
    assert many[1][0].columns.values.tolist() == strong.columns.values.tolist()


def test_the_fake_context_is_changed_by_field():
    context = fake_context(FakeEngine(response=lambda prompt, edited: "yes"), kl_tokens=5)
    assert context.kl_tokens == 5
    (first, *_) = context.ask_reference(ResponseRequest(context.prompts("harmful"), 8)).texts
    assert first == "yes"
    assert fake_response(FAKE_PROMPTS["harmful"][1], edited=False).startswith("I'm sorry")
    assert fake_response(FAKE_PROMPTS["harmful"][1], edited=True).startswith("Sure")
