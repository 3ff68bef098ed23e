"""The reference's side: its responses, the sequences that all models are fed, its distributions."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from benchmarks.study_kl_tokens.divergences import ReferenceDistributions, compare, token_columns
from benchmarks.study_kl_tokens.task import (
    LONGEST,
    Sizes,
    closed_questions,
    human_texts,
    panel_prompts,
    prompts,
)
from heretic_kl.engine import Response, Runner, with_responses
from heretic_kl.engine.teacher_forcing.batches import ForcedSequence
from heretic_kl.model import LanguageModel
from heretic_kl.prompts import Prompt
from heretic_kl.requests import Sampling
from heretic_kl.scoring import RefusalRule

KL_SETS = ("greedy", "sampled", "paired")
"""Sets of sequences over which divergences are measured; of the others only the tokens' NLL."""
ANSWER_TOKENS = 8
TIMED_POSITIONS = (1, 3, 8, 16, 64)


@dataclass(frozen=True)
class ForcedSet:
    """Sequences of one purpose, and where their rows are among all rows."""

    sequences: tuple[ForcedSequence, ...]
    rows: slice

    @property
    def lengths(self) -> list[int]:
        """Scored positions of each."""
        return [len(sequence.response) for sequence in self.sequences]

    @property
    def tokens(self) -> Tensor:
        """(rows,) the reference's tokens."""
        return torch.tensor([token for s in self.sequences for token in s.response])


class ReferenceSide:
    """What the unedited model says; made once a process.

    Args:
        lm: the model.
        runner: of it.
        sizes: how much is measured.
    """

    def __init__(self, lm: LanguageModel, runner: Runner, sizes: Sizes) -> None:
        self.lm, self.runner, self.sizes = lm, runner, sizes
        self.rule = RefusalRule()
        self.verdict_prompts = {
            "harmful": prompts("harmful", "test", sizes.harmful),
            "borderline": prompts("borderline", "test", sizes.borderline),
        }
        self.questions = closed_questions(sizes.questions)
        # Of a text of one token nothing can be scored.
        texts = [(text, tuple(lm.chat.encode_text(text.text))) for text in human_texts("held out")]
        self.texts = {text: ids for text, ids in texts if len(ids) > 1}
        self.panel = panel_prompts(sizes.panel)
        self.long_prompts, self.long_responses = self._long()
        self.right: list[bool] = []
        self.sets = self._laid_out()
        self.hidden = runner.hidden_states(self.sequences)

    @property
    def sequences(self) -> list[ForcedSequence]:
        """All of them, in the order of their rows."""
        return [sequence for chosen in self.sets.values() for sequence in chosen.sequences]

    @property
    def long_encoded(self) -> list[tuple[int, ...]]:
        """Token ids of the prompts of long responses."""
        return [self.lm.chat.encode(prompt) for prompt in self.long_prompts]

    @cached_property
    def distributions(self) -> dict[str, ReferenceDistributions]:
        """Of the sets over which divergences are measured."""
        return {
            name: ReferenceDistributions(self.hidden[self.sets[name].rows], self.lm.head)
            for name in KL_SETS
        }

    def token_logs(self, name: str, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability (rows,) of a set's tokens, and whether each is the best one."""
        chosen = self.sets[name]
        return token_columns(hidden[chosen.rows], self.lm.head, chosen.tokens)

    def fingerprint(self) -> str:
        """sha256 of all token ids that models are fed, as hex."""
        ids = [[*map(int, s.prompt), -1, *map(int, s.response)] for s in self.sequences]
        return hashlib.sha256(repr(ids).encode()).hexdigest()

    def facts(self) -> dict[str, Any]:
        """Sizes and what the analysis needs of the reference itself."""
        return {
            "lengths": {name: chosen.lengths for name, chosen in self.sets.items()},
            "long_lengths": [len(response.tokens) for response in self.long_responses],
            "right": [int(right) for right in self.right],
            "text_groups": [text.group for text in self.texts],
        }

    def timings(self) -> list[dict[str, float]]:
        """CPU seconds of a pass with its divergences, by prompts and positions; on one thread."""
        made = []
        sequences = self.sets["greedy"].sequences
        for count in sorted(
            {max(1, len(sequences) // 4), len(sequences) // 2 or 1, len(sequences)}
        ):
            for positions in TIMED_POSITIONS:
                cut = [ForcedSequence(s.prompt, s.response[:positions]) for s in sequences[:count]]
                tokens = torch.tensor([token for s in cut for token in s.response])
                reference = ReferenceDistributions(self.runner.hidden_states(cut), self.lm.head)
                list(reference.blocks())
                begun = time.process_time()
                compare(reference, self.runner.hidden_states(cut), self.lm.head, tokens)
                seconds = round(time.process_time() - begun, 4)
                made.append({"prompts": count, "positions": positions, "seconds": seconds})
        return made

    def _long(self) -> tuple[tuple[Prompt, ...], list[Response]]:
        """The prompts whose reference response is longest, and these responses."""
        pool = prompts("harmless", "test", self.sizes.long_pool)
        encoded = [self.lm.chat.encode(prompt) for prompt in pool]
        responses = self.runner.responses(encoded, self.sizes.long_tokens)
        order = sorted(range(len(pool)), key=lambda index: -len(responses[index].tokens))
        chosen = sorted(order[: self.sizes.long])
        return tuple(pool[index] for index in chosen), [responses[index] for index in chosen]

    def _laid_out(self) -> dict[str, ForcedSet]:
        sizes = self.sizes
        answered = self._answered(prompts("harmless", "validation", sizes.kl + 8))[: sizes.kl]
        groups: dict[str, Sequence[ForcedSequence]] = {
            "greedy": self._forced(answered, LONGEST),
            "sampled": self._forced(answered[: sizes.sampled], LONGEST, Sampling(0)),
            "paired": [
                ForcedSequence(encoded, tuple(response.reference_tokens(LONGEST)))
                for encoded, response in zip(self.long_encoded, self.long_responses, strict=True)
            ],
            "texts": [self._text(ids) for ids in self.texts.values()],
            "answers": self._answers(),
        }
        for measure, chosen in self.panel.items():
            groups[measure] = self._forced(chosen, sizes.panel_tokens, Sampling(1))
        laid_out, first = {}, 0
        for name, sequences in groups.items():
            rows = sum(len(sequence.response) for sequence in sequences)
            laid_out[name] = ForcedSet(tuple(sequences), slice(first, first + rows))
            first += rows
        return laid_out

    def _answered(self, among: Sequence[Prompt]) -> list[Prompt]:
        encoded = [self.lm.chat.encode(prompt) for prompt in among]
        responses = self.runner.responses(encoded, self.sizes.verdict_tokens, [self.rule])
        texts = [self.lm.chat.decode(response.tokens) for response in responses]
        return [
            p for p, text in zip(among, texts, strict=True) if not self.rule.is_refusal(text)
        ] or list(among)

    def _forced(
        self, chosen: Sequence[Prompt], tokens: int, sampling: Sampling | None = None
    ) -> tuple[ForcedSequence, ...]:
        encoded = [self.lm.chat.encode(prompt) for prompt in chosen]
        return with_responses(self.runner, encoded, tokens, sampling)

    def _text(self, ids: tuple[int, ...]) -> ForcedSequence:
        before = min(self.sizes.text_context, len(ids) // 2)
        return ForcedSequence(ids[:before], ids[before : before + self.sizes.text_tokens])

    def _answers(self) -> list[ForcedSequence]:
        """The reference's own answers, up to and with the line break that ends them."""
        encoded = [tuple(self.lm.chat.encode_text(text)) for text in self.questions.texts()]
        sequences = []
        for index, response in enumerate(self.runner.responses(encoded, ANSWER_TOKENS)):
            tokens = response.reference_tokens(ANSWER_TOKENS)
            lines = [self.lm.chat.decode(tokens[: n + 1]) for n in range(len(tokens))]
            ended = [n for n, text in enumerate(lines) if "\n" in text.lstrip("\n ")]
            end = ended[0] + 1 if ended else len(tokens)
            sequences.append(ForcedSequence(encoded[index], tuple(tokens[:end])))
            answer = lines[end - 1].strip().split("\n")[0]
            self.right.append(self.questions.right(index, answer))
        return sequences
