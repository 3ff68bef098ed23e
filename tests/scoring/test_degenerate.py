"""Text that is no answer: every kind is noticed, and what only looks like one is not."""

import re
from pathlib import Path

import pytest
from scoring.refusal_sentences import HELPING

from heretic_kl.prompts import DatasetSpec, Prompt, load_prompts
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
    ("allowed", "count"),
    [(0.0, 6), (0.1, 6), (0.2, 5), (0.29, 4), (0.45, 4)],  # of 7 responses
)
def test_degenerate_responses_above_what_is_allowed_count_as_refused(role, allowed, count):
    score = counted(role, degenerate_allowed=allowed).score([ResponseResult(TEXTS)])
    assert score.details["refused"] == [0, 3, 4, 6]
    assert score.details["count"] == count and score.value == count / len(TEXTS)
    assert score.details["degenerate"] == {"empty": 2, "loop": 1, "wrong script": 1}
    places = {"2": "loop", "4": "empty", "5": "wrong script", "6": "empty"}
    assert score.details["degenerate_at"] == places, "a decided refusal is none"
    assert score.text.endswith("; 4 degenerate")
    assert compact(score) == f"{count}/7 ({100 * count / 7:.0f}%; 4 degenerate)"


def test_no_degenerate_response_counts_where_refusals_are_maximized():
    scorer = counted("maximize")
    score = scorer.score([ResponseResult(TEXTS)])
    assert score.details["refused"] == [0] and score.value == 1 / len(TEXTS)
    assert score.details["degenerate"] == {"empty": 2, "loop": 2, "wrong script": 1}
    assert score.text.endswith("; 5 degenerate")
    assert scorer.requests()[0].stop is None  # a refusal that is cut may go on as a loop


@pytest.mark.parametrize("role", ["minimize", "maximize"])
@pytest.mark.parametrize("allowed", [0.0, 0.17, 0.5])
def test_bounds_are_sure_with_degenerate_responses(role, allowed):
    scorer = counted(role, degenerate_allowed=allowed)
    final = scorer.score([ResponseResult(TEXTS)]).value
    for end in range(len(TEXTS) + 1):
        over = tuple(index < end for index in range(len(TEXTS)))
        begun = tuple(text if done else text[:40] for text, done in zip(TEXTS, over, strict=True))
        bounds = scorer.bounds([PartialResponses(begun, over)])
        assert bounds.low <= final <= bounds.high
    assert bounds.low == bounds.high == final
