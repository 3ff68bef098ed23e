"""Prompts as token ids: chat template, response prefix, stop tokens. Runs no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from heretic_kl.errors import UnsupportedModelError
from heretic_kl.prompts import Prompt

CLOSED_THOUGHTS: tuple[tuple[str, str], ...] = (
    ("<think>", "<think></think>"),
    ("<thought>", "<thought></thought>"),
    ("[THINK]", "[THINK][/THINK]"),
    (
        "<|channel|>analysis<|message|>",
        "<|channel|>analysis<|message|><|end|><|start|>assistant<|channel|>final<|message|>",
    ),
)
"""(how a response opens a chain of thought, the same thought closed at once)."""


@dataclass(frozen=True)
class ChatEncoder:
    """Turns prompts into the token ids after which the model responds."""

    tokenizer: Any
    """A `transformers` tokenizer."""
    template: str | None
    """Jinja chat template; None: plain text."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """Further variables of the template. `enable_thinking` is False where nobody sets it."""
    response_prefix: str = ""
    """Text at the start of every response."""

    def with_response_prefix(self, prefix: str) -> ChatEncoder:
        """The same encoder with another response prefix."""
        return replace(self, response_prefix=prefix)

    def text(self, prompt: Prompt) -> str:
        """The model's input as text, response prefix included."""
        if self.template is None:
            parts = [part for part in (prompt.system, prompt.user) if part]
            return "\n\n".join(parts) + self.response_prefix
        return self.conversation(_messages(prompt))

    def conversation(self, messages: Sequence[dict[str, str]]) -> str:
        """The text of a whole conversation up to where the next response starts.

        Raises:
            UnsupportedModelError: the template rejects it (some have no system role).
        """
        if self.template is None:
            return "\n\n".join(message["content"] for message in messages) + self.response_prefix
        switch = {"enable_thinking": False} if "enable_thinking" in self.template else {}
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages),
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=True,
                **{**switch, **self.variables},
            )
        except Exception as error:  # templates raise whatever their author chose
            raise UnsupportedModelError(
                f"the model's chat template cannot render the prompt: {_first_line(error)}"
            ) from error
        return str(text) + self.response_prefix

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of one prompt.

        Raises:
            UnsupportedModelError: the tokenizer gives no token at all for it.
        """
        return self.encode_text(self.text(prompt))

    def encode_text(self, text: str) -> tuple[int, ...]:
        """Token ids of a rendered text; templates contain their special tokens."""
        ids = self.tokenizer(text, add_special_tokens=self.template is None)["input_ids"]
        if not ids:
            raise UnsupportedModelError(f"the tokenizer gives no token for the prompt {text!r}")
        return tuple(int(token) for token in ids)

    def decode(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """Text of response tokens, without special tokens unless `special`."""
        text = self.tokenizer.decode(
            list(tokens), skip_special_tokens=not special, clean_up_tokenization_spaces=False
        )
        return str(text)


def chat_template(tokenizer: Any, setting: str) -> str | None:
    """The Jinja template to use.

    Args:
        tokenizer: a `transformers` tokenizer.
        setting: `model` for the tokenizer's own, `none` for plain text, else a Jinja file.

    Returns:
        None for plain text: set so, or the tokenizer has no template, as those of base models.

    Raises:
        UnsupportedModelError: the file does not exist or is not UTF-8 text.
    """
    if setting == "none":
        return None
    if setting == "model":
        template = getattr(tokenizer, "chat_template", None)
        if isinstance(template, dict):
            template = template.get("default") or next(iter(template.values()), None)
        return str(template) if template else None
    path = Path(setting)
    if not path.is_file():
        raise UnsupportedModelError(
            f"chat template file {setting!r} does not exist (use model, none or a Jinja file)"
        )
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UnsupportedModelError(
            f"chat template file {setting!r} cannot be read as UTF-8 text"
        ) from error


def stop_token_ids(tokenizer: Any, generation_config: Any) -> frozenset[int]:
    """Ids that end a response: the end tokens of the generation config and of the tokenizer."""
    ids: set[int] = set()
    for value in (getattr(generation_config, "eos_token_id", None), tokenizer.eos_token_id):
        if isinstance(value, int):
            ids.add(value)
        elif value is not None:
            ids.update(int(token) for token in value)
    return frozenset(ids)


def close_thought(prefix: str) -> str:
    """A common opening of responses; a chain of thought that it opens is closed at once."""
    for opening, closed in CLOSED_THOUGHTS:
        if prefix.lstrip().startswith(opening):
            return closed
    return prefix


def thought_left_open(text: str) -> str | None:
    """What closes a chain of thought that the chat template has opened; None: there is none."""
    for opening, closed in CLOSED_THOUGHTS:
        if text.rstrip().endswith(opening):
            return closed.removeprefix(opening)
    return None


def thought_length(prompt: str, response: str) -> int:
    """How many first characters of a response are a chain of thought, its marks included.

    Args:
        prompt: the model's input as text, which may have opened the thought.
        response: with special tokens; a thought that it does not close is all of it.
    """
    for opening, closed in CLOSED_THOUGHTS:
        if prompt.rstrip().endswith(opening) or response.lstrip().startswith(opening):
            closing = closed.removeprefix(opening)
            end = response.find(closing)
            return len(response) if end < 0 else end + len(closing)
    return 0


def _messages(prompt: Prompt) -> list[dict[str, str]]:
    system = [{"role": "system", "content": prompt.system}] if prompt.system else []
    return [*system, {"role": "user", "content": prompt.user}]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
