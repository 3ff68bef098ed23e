"""Text that is no answer: every kind is noticed, and what only looks like one is not."""

import itertools
import random
import re
from pathlib import Path
from statistics import fmean

import pytest
from scoring.refusal_sentences import HELPING

from heretic_kl.kl import wilson_interval
from heretic_kl.prompts import DatasetSpec, Prompt, load_prompts
from heretic_kl.report.details import score_sections
from heretic_kl.report.wording import compact
from heretic_kl.requests import PartialResponses, ResponseResult
from heretic_kl.scoring import build_scorer, degeneracy
from heretic_kl.scoring.degenerate import repeated_share
from heretic_kl.testing import fake_context

DOCS = Path(__file__).parents[2] / "docs"
ENGLISH = Prompt("How do I bake a cake?")
ANSWER = (
    "First heat the oven to 180 degrees. Mix two cups of flour with sugar, butter and three eggs. "
    "Stir until the dough is smooth, pour it into a tin and bake it for forty minutes. "
)
LOOPS = {
    "a sentence": "Mix the flour with water. " * 6,
    "behind an answer": ANSWER + "and then you wait " * 9,
    "two words": "cake bake " * 20,
    "characters": "Sure, " + "ha" * 40,
    "punctuation behind a word": "Sure" + "!" * 60,
    "without blanks": "\u86cb\u7cd5\u5f88\u597d\u5403" * 8,
    "lines": "\n".join(["- Mix the flour with the water"] * 6),
}
FINE = {
    "an answer": ANSWER,
    "a word": "Yes.",
    "a short echo": "No, no, no, no!",
    "a list": "\n".join(f"{n}. Take {n} eggs and put them aside" for n in range(1, 8)),
    "a table": "| day | cake |\n| --- | --- |\n" + "\n".join(f"| {n} | x |" for n in range(20)),
    "markup": "".join(f'<li><a href="p{n}.html">Part {n * n}</a></li>\n' for n in range(12)),
    "code": "\n".join(f'print("line {n}")\nprices[{n}] = {n * 7}' for n in range(12)),
    "records": str([{"name": f"cake {n}", "price": n * n, "eggs": n + 1} for n in range(12)]),
    "a rule": ANSWER + "\n" + "-" * 80 + "\n" + ANSWER.swapcase().replace("OVEN", "STOVE")[:60],
    "names and formulas": "Bj\u00f6rn says \u03b1 + \u03b2 = \u03b3, and \u6771\u4eac means Tokyo.",
    "a refrain": "Row, row, row your boat gently down the stream. Merrily, merrily, merrily, "
    "merrily, life is but a dream.",
}


@pytest.mark.parametrize("text", ["", " \n\t", "...", "**", "\u200b", "-- ?!"])
def test_text_without_words_is_empty(text):
    assert degeneracy(text, ENGLISH) == "empty"


@pytest.mark.parametrize("text", LOOPS.values(), ids=LOOPS)
def test_loops_are_noticed(text):
    prompt = Prompt("\u86cb\u7cd5?") if "\u86cb" in text else ENGLISH
    assert degeneracy(text, prompt) == "loop"


@pytest.mark.parametrize("text", FINE.values(), ids=FINE)
def test_what_repeats_parts_is_no_loop(text):
    assert degeneracy(text, ENGLISH) is None


def test_real_text_is_not_degenerate():
    kinds = ("harmful", "harmless", "borderline")
    sets = [DatasetSpec(f"builtin:{kind}", split="train") for kind in kinds]
    prompts = [prompt for spec in sets for prompt in load_prompts(spec)]
    texts = [prompt.user for prompt in prompts] + list(HELPING)
    assert len(texts) > 200
    assert [text for text in texts if degeneracy(text, Prompt(text))] == []


SALAD = (
    # SmolLM2 135M with noise in its weights
    "zymaticBatchNormymourassertIsellectlightenmentagarauscular Ingredientsterraneanardiavestonohyd"
    "axyifactsaneousighiliency inverteavage butincinninningsondylaughedovertyaxyoverty",
    "obyliscrim andardiaobylisticuscular pathlib upovertyevelopedcompetitive serializereltardiaoc"
    "les+'.obiaivitiesamiliar would]||ellectualaughed ellectiries backzymatic",
    " oneiriamustainingopyrighthemicalerviceenaissanceavers shouldenarios application whileastrous"
    "astrousarvation frontountainsicalsFastNoticeoaderustainingcraperscersiddospelellectual",
)


@pytest.mark.parametrize("text", SALAD)
def test_parts_of_words_are_noticed(text):
    assert degeneracy(text, ENGLISH) == "run together"


def test_long_words_and_names_are_fine():
    names = "DocumentQuestionAnsweringPipeline, MinLengthLogitsProcessor, StopStringCriteria"
    long = "Pneumonoultramicroscopicsilicovolcanoconiosis, that is silicosis."
    german = "Die Donaudampfschifffahrtsgesellschaft hat einen Kapit\u00e4n."
    link = "https://example.org/averyveryverylongnameofapagewithoutblanks"
    for text in (names, long, german, link):
        assert degeneracy(text, ENGLISH) is None


def test_of_the_prose_of_these_pages_nothing_is_degenerate():
    pages = [path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("**/*.md"))]
    pieces = [piece for page in pages for piece in re.split(r"\n{2,}", page)]
    words = [piece for piece in pieces if re.search(r"\w", piece) and piece[0] != "|"]
    assert len(words) > 500
    assert [piece for piece in words if degeneracy(piece, Prompt("What is a scorer?"))] == []


@pytest.mark.parametrize(
    ("prompt", "response", "expected"),
    [
        ("Hello, who are you?", "\u042f \u043c\u043e\u0434\u0435\u043b\u044c.", "wrong script"),
        ("\u041a\u0442\u043e \u0442\u044b?", "\u042f \u043c\u043e\u0434\u0435\u043b\u044c.", None),
        ("\u041a\u0442\u043e \u0442\u044b?", "I am a model.", None),
        ("\u4f60\u662f\u8c01?", "\u308f\u305f\u3057\u306f\u30e2\u30c7\u30eb\u3067\u3059", None),
        ("Say it in Russian.", "\u042f \u043c\u043e\u0434\u0435\u043b\u044c.", None),
        ("Hello", "Sure \u7684\u4e0d\u662f\u4e86 \u0441\u043b\u043e\u0432\u043e", "wrong script"),
        ("Hello", "Sure \ufffd\ufffd\ufffd\ufffd", "wrong script"),
        ("Hello", "\ufffd\ufffd\ufffd", "wrong script"),
    ],
)
def test_another_script_than_the_prompts_is_noticed(prompt, response, expected):
    assert degeneracy(response, Prompt(prompt)) == expected


def test_a_system_prompt_may_ask_for_another_script():
    prompt = Prompt("Hello, who are you?", system="Respond in Ukrainian")
    assert degeneracy("\u042f \u043c\u043e\u0434\u0435\u043b\u044c", prompt) is None


def test_the_repeated_share_counts_4_grams_that_occurred_before():
    assert repeated_share("a b c".split()) == 0.0
    assert repeated_share("a b c d e f".split()) == 0.0
    assert repeated_share("a b c d a b c d".split()) == pytest.approx(1 / 5)
    assert repeated_share(["a"] * 13) == pytest.approx(9 / 10)


TEXTS = (
    "I'm sorry, I can't help with that.",
    ANSWER,
    LOOPS["a sentence"],
    "I'm sorry, I can't help with that. " * 8,
    "",
    "\u042f \u043c\u043e\u0434\u0435\u043b\u044c",
    "... ?!",
)


def counted(role, **settings):
    scorer = build_scorer("r", "refusals", settings)
    scorer.prepare(fake_context(prompts_by_kind={"harmful": (ENGLISH,) * len(TEXTS)}, role=role))
    return scorer


@pytest.mark.parametrize("role", ["minimize", "monitor"])
@pytest.mark.parametrize(
    ("allowed", "count", "total"),
    [(0.0, 6, 7), (0.1, 6, 7), (0.2, 5, 6), (0.29, 4, 5), (0.45, 4, 5)],  # of 7 responses
)
def test_degenerate_responses_are_left_out_and_refusals_above_what_is_allowed(
    role, allowed, count, total
):
    scorer, results = counted(role, degenerate_allowed=allowed), [ResponseResult(TEXTS)]
    score, values = scorer.score(results), scorer.per_prompt(results)
    assert score.details["refused"] == [0, 3, 4, 6]
    assert (score.details["count"], score.details["total"]) == (count, total)
    assert score.details["prompts"] == len(TEXTS)
    assert score.value == count / total and score.interval == wilson_interval(count, total)
    assert values.count(1) == count and values.count(score.value) == len(TEXTS) - total
    assert fmean(values) == pytest.approx(score.value, rel=1e-12)
    assert score.details["degenerate"] == {"empty": 2, "loop": 1, "wrong script": 1}
    places = {"2": "loop", "4": "empty", "5": "wrong script", "6": "empty"}
    assert score.details["degenerate_at"] == places, "a decided refusal is none"
    assert score.text.startswith(f"{count}/{total} (") and score.text.endswith("; 4 degenerate")
    assert compact(score) == f"{count}/{total} ({100 * count / total:.0f}%; 4 degenerate)"
    (section,) = score_sections({"refusals": score}, "test prompts")
    left_out = f"; {7 - total} of 7 responses left out" if total < 7 else ""
    assert dict(section.rows)["degenerate responses"] == (
        f"2 empty, 1 loop, 1 wrong script{left_out}"
    )


def test_a_model_that_only_loops_has_stopped_no_refusal():
    scorer, results = counted("minimize", degenerate_allowed=1.0), [ResponseResult((TEXTS[2],) * 7)]
    score = scorer.score(results)
    assert score.value == 1 and (score.details["count"], score.details["total"]) == (7, 7)
    assert list(scorer.per_prompt(results)) == [1] * 7
    assert scorer.score([ResponseResult((TEXTS[2],) * 6 + (ANSWER,))]).value == 0


def test_no_degenerate_response_counts_where_refusals_are_maximized():
    scorer = counted("maximize")
    score = scorer.score([ResponseResult(TEXTS)])
    assert score.details["refused"] == [0] and score.value == 1 / len(TEXTS)
    assert score.details["total"] == score.details["prompts"] == len(TEXTS)
    assert score.details["degenerate"] == {"empty": 2, "loop": 2, "wrong script": 1}
    assert score.text.endswith("; 5 degenerate")
    assert scorer.requests()[0].stop is None  # a refusal that is cut may go on as a loop


@pytest.mark.parametrize("role", ["minimize", "maximize"])
@pytest.mark.parametrize("allowed", [0.0, 0.17, 0.5, 1.0])
def test_bounds_are_sure_with_degenerate_responses_that_end_in_any_order(role, allowed):
    scorer, draw = counted(role, degenerate_allowed=allowed), random.Random(0)
    for _ in range(60):
        few = draw.sample(sorted(set(TEXTS)), draw.randint(1, 3))
        texts = tuple(draw.choices(few, k=len(TEXTS)))
        final = scorer.score([ResponseResult(texts)]).value
        order, over, last = draw.sample(range(7), 7), [False] * 7, (0.0, 1.0)
        for index in (None, *order):
            if index is not None:
                over[index] = True
            begun = tuple(
                text if done else text[:40] for text, done in zip(texts, over, strict=True)
            )
            low, high, _ = scorer.bounds([PartialResponses(begun, tuple(over))])
            assert last[0] <= low <= final <= high <= last[1]
            last = (low, high)
        assert low == high == final


@pytest.mark.parametrize("allowed", [0.0, 0.5, 1.0])
def test_bounds_are_reached_by_some_rest(allowed):
    scorer, kinds = (
        counted("minimize", degenerate_allowed=allowed),
        (TEXTS[0], ANSWER, TEXTS[2], ""),
    )
    for begun in itertools.product(kinds, repeat=4):
        over = (True,) * 4 + (False,) * 3
        low, high, _ = scorer.bounds([PartialResponses((*begun, *("Well",) * 3), over)])
        rests = itertools.combinations_with_replacement(kinds, 3)
        finals = [scorer.score([ResponseResult((*begun, *rest))]).value for rest in rests]
        assert (low, high) == (min(finals), max(finals))
