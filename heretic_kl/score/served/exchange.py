"""What a server is asked for log-probabilities, and how its replies are read. Knows no reference.

Prompt and response go in as token ids. A server answers in one of two forms:

`prompt_logprobs`, vLLM's: for each token of the prompt an object from token ids to
`{"logprob": ..., "decoded_token": ...}`, the likeliest ones and the token itself.

`echo` with `logprobs`, OpenAI's older one: for each token its own log-probability and an object
from tokens to log-probabilities. Tokens are `token_id:ID` where a server can name them so, else
text.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import Tensor

from heretic_kl.engine.teacher_forcing.batches import ForcedSequence
from heretic_kl.errors import ConfigError, MeasurementError
from heretic_kl.judging import Connection, Reply, ServedModel, endpoint_problem

Form = Literal["prompt_logprobs", "echo"]
NO_PROBABILITY: Final = -9999.0
"""What vLLM writes for minus infinity, which JSON does not know."""
ID_PREFIX: Final = "token_id:"
ENTRY_BYTES: Final = 256
"""Most of a reply that one token of one position takes."""
MOST_TEXTS: Final = 64
"""Of tokens of a position, compared with the tokenizer's."""
SAME_TEXT: Final = 0.9
"""Share of tokens whose text must be the same; servers show parts of characters in other ways."""


class KnownRows(NamedTuple):
    """What a server told of a sequence's scored positions, as in a `TopBlock`."""

    tokens: Tensor  # (n, k) int64, -1: none
    log_probabilities: Tensor  # (n, k) float64


class ServedTokens:
    """The reference's tokens, as what a server's are understood.

    Args:
        tokenizer: the reference's; None: tokens cannot be told by text.
        vocabulary: number of tokens that the reference knows.
    """

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary

    def text(self, token: int) -> str:
        """A token alone, as text."""
        return str(self.tokenizer.decode([token], skip_special_tokens=False))

    def index(self, name: str) -> int:
        """The id of `token_id:ID` or text; -1: the reference has none, or several of that text."""
        if not name.startswith(ID_PREFIX):
            return self._by_text.get(name, -1)
        token = int(name.removeprefix(ID_PREFIX))
        return token if 0 <= token < self.vocabulary else -1

    def check(self, texts: Sequence[tuple[int, str]]) -> None:
        """Compare what a server shows as tokens' text with the tokenizer's.

        Raises:
            MeasurementError: more than one token in ten is another.
        """
        if self.tokenizer is None:
            return
        shown = {token: text.strip() for token, text in texts if "\ufffd" not in text}
        other = [token for token, text in shown.items() if self.text(token).strip() != text]
        if len(other) > (1.0 - SAME_TEXT) * len(shown):
            token = min(other)
            raise MeasurementError(
                f"another tokenizer than the reference's: {len(other)} of {len(shown)} tokens "
                f"differ, for instance {token} (reference {self.text(token)!r}, candidate "
                f"{shown[token]!r})"
            )

    @cached_property
    def _by_text(self) -> dict[str, int]:
        if self.tokenizer is None:
            return {}
        texts = [self.text(token) for token in range(min(self.vocabulary, len(self.tokenizer)))]
        counts = Counter(texts)
        return {text: token for token, text in enumerate(texts) if counts[text] == 1}


@dataclass(frozen=True)
class PromptEndpoint(ServedModel):
    """A model of a server that tells log-probabilities of a prompt's tokens."""

    top: int = 20
    """So many of the likeliest tokens; 0: all tokens."""
    form: Form = "prompt_logprobs"

    role = "candidate"
    failure = MeasurementError
    hints = ("check --key-variable", "check the address and the model after #")

    @classmethod
    def named(cls, name: str, **options: Any) -> PromptEndpoint:
        """The model of `URL#MODEL`.

        Raises:
            ConfigError: the name has no address or no model.
        """
        url, _, model = name.partition("#")
        problem = endpoint_problem(url)
        if problem is None and not model:
            problem = f"= {url!r} names no model: write {url}#MODEL"
        if problem is not None:
            raise ConfigError(f"candidate {problem}")
        return cls(url, model, **options)

    def parent(self) -> str | None:
        """What the server says that the model is an adapter of; None: it says nothing of the kind.

        Raises:
            MeasurementError: it cannot be reached, or lists other models only.
        """
        [reply] = self.each([None], lambda connection, _: self._answer(connection, "models"))
        cards = self._read(reply).get("data")
        models = [card for card in cards if isinstance(card, dict)] if cards else []
        names = [str(card.get("id")) for card in models]
        if names and self.model not in names:
            raise MeasurementError(
                f"{self.url} serves no model {self.model!r}, but {', '.join(names[:10])}"
            )
        card = models[names.index(self.model)] if names else {}
        return card["parent"] if isinstance(card.get("parent"), str) else None

    def answering(self, sequence: ForcedSequence, tokens: ServedTokens) -> PromptEndpoint:
        """The same in the form that the server answers in.

        Raises:
            MeasurementError: it answers in neither.
        """
        problems = []
        for form in ("prompt_logprobs", "echo"):
            endpoint = replace(self, form=form)
            try:
                endpoint.log_probabilities([sequence], tokens)
            except _NoLogProbabilitiesError as error:
                problems.append(str(error))
                continue
            return endpoint
        raise MeasurementError(f"no log-probabilities of a prompt: {'; '.join(problems)}")

    def log_probabilities(
        self, sequences: Sequence[ForcedSequence], tokens: ServedTokens
    ) -> list[KnownRows]:
        """What the server knows of each sequence's response, given what precedes it.

        Raises:
            MeasurementError: it cannot be had, or is of other tokens than those that were sent.
        """
        return self.each(sequences, lambda c, sequence: self._asked(c, sequence, tokens))

    def _asked(
        self, connection: Connection, sequence: ForcedSequence, tokens: ServedTokens
    ) -> KnownRows:
        sent = [*sequence.prompt, *sequence.response]
        count = self.top or -1
        request: dict[str, Any] = {"prompt": sent, "max_tokens": 1, "temperature": 1.0}
        if self.form == "prompt_logprobs":
            request |= {"prompt_logprobs": count, "return_token_ids": True}
        else:
            request |= {"echo": True, "logprobs": count, "return_tokens_as_token_ids": True}
        largest = (1 << 20) + ENTRY_BYTES * len(sent) * (self.top or tokens.vocabulary)
        reply = self._answer(connection, "completions", request, largest)
        if reply.problem:
            reason = f" ({reply.reason})" if reply.reason else ""
            raise _NoLogProbabilitiesError(f"{self.name}: {self.form}: {reply.problem}{reason}")
        choices = self._read(reply).get("choices")
        choice = choices[0] if isinstance(choices, list) and choices else None
        if not isinstance(choice, dict):
            raise self._malformed("no choices")
        read = _prompt_rows if self.form == "prompt_logprobs" else _echo_rows
        try:
            rows = read(choice, sent, len(sequence.prompt), tokens)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._malformed(f"{type(error).__name__} in {self.form}") from None
        except MeasurementError as error:
            raise type(error)(f"{self.name}: {error}") from None
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), -1)
        values = torch.zeros(len(rows), width, dtype=torch.float64)
        for place, row in enumerate(rows):
            ids[place, : len(row)] = torch.tensor(list(row))
            values[place, : len(row)] = torch.tensor(list(row.values()), dtype=torch.float64)
        return KnownRows(ids, values)

    def _answer(
        self, connection: Connection, path: str, request: Any = None, largest: int = 1 << 20
    ) -> Reply:
        """A reply, or the last problem where no retry is left.

        Raises:
            MeasurementError: the server is not there.
        """
        for attempt in range(self.pace.retries + 1):
            reply = self.send(connection, path, request, largest)
            if not self.may_retry(connection, attempt, reply.pause):
                break
        if reply.problem and not reply.problem.startswith("HTTP"):
            raise MeasurementError(f"{self.role} {self.name}: {reply.problem}")
        return reply

    def _read(self, reply: Reply) -> Mapping[str, Any]:
        try:
            content = json.loads(reply.content)
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict):
            raise self._malformed("no JSON object")
        return content

    def _malformed(self, what: str) -> MeasurementError:
        return MeasurementError(f"{self.role} {self.name}: a malformed reply ({what})")


class _NoLogProbabilitiesError(MeasurementError):
    """A server does not answer in this form."""


def is_served(name: Any) -> bool:
    """Whether a candidate is named by the address of a server."""
    return isinstance(name, str) and name.startswith(("http://", "https://"))


def _prompt_rows(
    choice: Mapping[str, Any], sent: Sequence[int], first: int, tokens: ServedTokens
) -> list[dict[int, float]]:
    """The rows from `first` on, by token id."""
    entries = choice.get("prompt_logprobs")
    if not isinstance(entries, list):
        raise _NoLogProbabilitiesError("prompt_logprobs: not in the reply")
    echoed = choice.get("prompt_token_ids")
    if len(entries) != len(sent) or (echoed is not None and echoed != list(sent)):
        raise MeasurementError("the server read other tokens than those that were sent")
    rows, texts = [], []
    for token, entry in zip(sent[first:], entries[first:], strict=True):
        ids = {name: tokens.index(ID_PREFIX + name) for name in entry}
        row = {ids[name]: _number(value["logprob"]) for name, value in entry.items()}
        row.pop(-1, None)
        if token not in row:
            raise MeasurementError("the server read other tokens than those that were sent")
        rows.append(row)
        shown = ((ids[name], value.get("decoded_token")) for name, value in entry.items())
        texts += [(i, text) for i, text in islice(shown, MOST_TEXTS) if i >= 0 and text]
    tokens.check(texts)
    return rows


def _echo_rows(
    choice: Mapping[str, Any], sent: Sequence[int], first: int, tokens: ServedTokens
) -> list[dict[int, float]]:
    """The same of the other form; what is text may be no token's alone, and is left out then."""
    logprobs = choice.get("logprobs")
    if not isinstance(logprobs, Mapping) or not isinstance(logprobs.get("top_logprobs"), list):
        raise _NoLogProbabilitiesError("echo: no logprobs in the reply")
    shown, logs, top = (logprobs[name] for name in ("tokens", "token_logprobs", "top_logprobs"))
    if min(map(len, (shown, logs, top))) < len(sent):
        raise _NoLogProbabilitiesError("echo: no logprobs of the prompt in the reply")
    if not shown[0].startswith(ID_PREFIX) and tokens.tokenizer is None:
        raise MeasurementError(
            "the server shows tokens as text, and a stored reference has no tokenizer to read them"
        )
    for token, text in zip(sent, shown, strict=False):
        if text.startswith(ID_PREFIX):
            same = text == f"{ID_PREFIX}{token}"
        else:
            same = "\ufffd" in text or text.strip() == tokens.text(token).strip()
        if not same:
            raise MeasurementError(
                f"the server read {text!r} where token {token} was sent: it must take token ids"
            )
    rows = []
    for place in range(first, len(sent)):
        row = {
            tokens.index(key): _number(value)
            for key, value in top[place].items()
            if key != shown[place]  # the token itself, or one that looks like it
        }
        row.pop(-1, None)
        rows.append({**row, sent[place]: _number(logs[place])})
    return rows


def _number(value: Any) -> float:
    """A log-probability.

    Raises:
        ValueError: it is none.
    """
    number = float(value)
    if isinstance(value, bool | str) or not number <= 1e-3:
        raise ValueError
    return number if number > NO_PROBABILITY else -math.inf
