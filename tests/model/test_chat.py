from types import SimpleNamespace

import pytest

from heretic_kl.errors import UnsupportedModelError
from heretic_kl.model import ChatEncoder, close_thought
from heretic_kl.model.loading.chat import chat_template, stop_token_ids
from heretic_kl.prompts import Prompt
from heretic_kl.testing import tiny_tokenizer

THINKING = "{% if enable_thinking %}think{% else %}quiet{% endif %} {{ messages[-1]['content'] }}"


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def test_template_system_prompt_and_response_prefix(tokenizer):
    encoder = ChatEncoder(tokenizer, chat_template(tokenizer, "model"))
    text = encoder.text(Prompt("make a cake", system="you wait"))
    assert text == (
        "<|start|> system you wait <|end|> <|start|> user make a cake <|end|> <|start|> assistant "
    )
    assert encoder.with_response_prefix("sure").text(Prompt("a")).endswith("assistant sure")
    assert encoder.decode(encoder.encode(Prompt("make a cake")), special=False) != ""


@pytest.mark.parametrize(("switch", "word"), [(None, "quiet"), (False, "quiet"), (True, "think")])
def test_a_template_that_knows_thinking_is_told(tokenizer, switch, word):
    variables = {} if switch is None else {"enable_thinking": switch}
    encoder = ChatEncoder(tokenizer, THINKING, variables)
    assert encoder.text(Prompt("a cake")) == f"{word} a cake"


def test_a_template_is_told_its_variables(tokenizer):
    template = "{{ effort }} {{ messages[-1]['content'] }}"
    assert ChatEncoder(tokenizer, template, {"effort": "low"}).text(Prompt("cake")) == "low cake"
    assert ChatEncoder(tokenizer, template).text(Prompt("cake")) == " cake"


def test_plain_text_prompting(tokenizer):
    encoder = ChatEncoder(tokenizer, chat_template(tokenizer, "none"))
    assert encoder.text(Prompt("make a cake", system="you wait")) == "you wait\n\nmake a cake"


def test_without_a_template_prompts_are_plain_text_unless_a_file_is_given(tmp_path):
    bare = SimpleNamespace(chat_template=None)
    assert chat_template(bare, "model") is None
    with pytest.raises(UnsupportedModelError, match="does not exist"):
        chat_template(bare, str(tmp_path / "missing.jinja"))
    file = tmp_path / "own.jinja"
    file.write_text("{{ messages[0]['content'] }}", encoding="utf-8")
    assert chat_template(bare, str(file)) == "{{ messages[0]['content'] }}"


def test_a_template_that_refuses_is_one_line(tokenizer):
    encoder = ChatEncoder(tokenizer, "{{ raise_exception('no system role') }}")
    with pytest.raises(UnsupportedModelError, match="cannot render the prompt: no system role"):
        encoder.text(Prompt("a"))


@pytest.mark.parametrize(
    "code",
    [
        "''.__class__.__mro__[1].__subclasses__()",
        "cycler.__init__.__globals__.os.system('true')",
        "messages.append(1)",
    ],
)
def test_a_template_reaches_no_code(tokenizer, code):
    encoder = ChatEncoder(tokenizer, "{{ " + code + " }}")
    with pytest.raises(UnsupportedModelError, match="cannot render the prompt: ") as raised:
        encoder.text(Prompt("a"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("opening", "closed"),
    [
        ("<think>\nOkay, the user", "<think></think>"),
        ("[THINK]Let me", "[THINK][/THINK]"),
        (
            "<|channel|>analysis<|message|>We need",
            "<|channel|>analysis<|message|><|end|><|start|>assistant<|channel|>final<|message|>",
        ),
        ("Sure", "Sure"),
        ("", ""),
    ],
)
def test_chains_of_thought_are_closed_at_once(opening, closed):
    assert close_thought(opening) == closed


def test_stop_tokens_come_from_model_and_tokenizer(tokenizer):
    config = SimpleNamespace(eos_token_id=[5, 6])
    assert stop_token_ids(tokenizer, config) == {5, 6, tokenizer.eos_token_id}
    assert stop_token_ids(tokenizer, SimpleNamespace()) == {tokenizer.eos_token_id}
