"""Greedy answers of candidates to one set of prompts, as little of each computed as needed.

While prompts are read, layers below the lowest edited one are replayed. What candidates say is
guessed from earlier answers and checked several tokens at once. Knows no scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from heretic_kl.ablation import Plan
from heretic_kl.engine.batching import length_buckets
from heretic_kl.engine.generation.cache_check import continuing
from heretic_kl.engine.generation.decoding import Decoding, guessing_problem
from heretic_kl.engine.generation.drafts import DraftLength, Drafts
from heretic_kl.engine.generation.generate import Response, generate_responses
from heretic_kl.engine.layer_cache import Start
from heretic_kl.engine.layer_replay import Replay, in_force
from heretic_kl.engine.runner import Hear, Runner
from heretic_kl.model import Architecture, CausalModel, PrefixCache, common_prefix
from heretic_kl.requests import StopRule

FIRST_DRAFT, SOON_OVER = 4, 6
"""Tokens of the unedited model's answer that are checked while the prompt is read: all of one that
is over after a few, else its first ones."""


class CandidateResponses:
    """Has candidates answer.

    Args:
        runner: of the model.
        architecture: of the model.
        encoded: token ids of the prompts.
        max_tokens: most tokens of an answer.
        rules: see `generate_responses`.
        originals: the unedited model's answers under the same rules; None: unknown.
        drafting: guess answers from earlier ones.
        trunk_bytes: tells how much memory is left for the trunk; 0: all layers read the prompts.
        notify: told, in words, what cannot be saved.
    """

    def __init__(
        self,
        runner: Runner,
        architecture: Architecture,
        encoded: Sequence[Sequence[int]],
        max_tokens: int,
        rules: Sequence[StopRule],
        *,
        originals: Sequence[Response] | None,
        drafting: bool,
        cache_bytes: Callable[[], int],
        notify: Callable[[str], None],
    ) -> None:
        self._runner = runner
        self._architecture = architecture
        self._encoded = encoded
        self._max_tokens = max_tokens
        self._rules = rules
        self._layout: _Layout | None = None
        self._drafts: Drafts | None = None
        self._length = DraftLength(runner.lm.device.type)
        way = continuing(runner.lm)
        problem = guessing_problem(runner.lm, way) if drafting else None
        if drafting and problem is None:
            known = originals or [Response() for _ in encoded]
            self._drafts = Drafts([response.reference_tokens(max_tokens) for response in known])
        elif drafting and way.cached:
            notify(f"answers are generated token by token: {problem}")
        self._opening = [_opening(response) for response in originals or ()]
        if self._drafts is None or not self._opening:
            self._opening = [() for _ in encoded]
        self._replay = Replay(
            architecture,
            runner.lm.dtype.itemsize,
            left=cache_bytes if way.cached else lambda: 0,
            notify=notify,
            consequence="all layers read the prompts of every answer",
        )

    @property
    def cache_bytes(self) -> int:
        """Memory that the trunk takes now."""
        return self._replay.bytes

    def release(self) -> None:
        """Give the trunk's memory back; it is recorded anew when it is needed."""
        self._replay.release()

    def responses(
        self, plans: Sequence[Plan | None], hear: Hear | None = None
    ) -> list[list[Response]]:
        """Each candidate's answers to the prompts, in order.

        Args:
            plans: K candidates, side by side in one batch.
            hear: told of all answers so far, by candidate, whenever one more is over; says which
                candidates need not go on, whose answers then stay unfinished.

        Raises:
            OutOfMemoryError: several candidates do not fit side by side.
        """
        found = self._runner.within_memory(lambda: self._run(plans, hear), candidates=len(plans))
        for own in found:
            for prompt, response in enumerate(own):
                self._learn(prompt, response)
        self._length.fade()
        return found

    def _run(self, plans: Sequence[Plan | None], hear: Hear | None) -> list[list[Response]]:
        layout = self._laid_out()
        start = self._replay.start(plans, layout)
        found = [[Response() for _ in self._encoded] for _ in plans]
        dropped: set[int] = set()

        def heard() -> set[int]:
            if hear is not None:
                dropped.update(hear(found))
            return dropped

        with in_force(self._architecture, plans, start.candidate_rows):
            for number, bucket in enumerate(layout.buckets):
                generate_responses(
                    self._runner.lm,
                    layout.sequences[number],
                    self._max_tokens,
                    self._rules,
                    share_prefix=self._runner.share_prefix,
                    guesses=self._guesses(bucket),
                    start=start,
                    batch=number,
                    into=[own[index] for own in found for index in bucket],
                    dropped=None if hear is None else heard,
                )
        return found

    def _guesses(self, bucket: Sequence[int]) -> _BucketGuesses | None:
        if self._drafts is None:
            return None
        return _BucketGuesses(bucket, self._opening, self._drafts, self._length, self._max_tokens)

    def _learn(self, prompt: int, response: Response) -> None:
        if self._drafts is not None:
            self._drafts.add(prompt, response.reference_tokens(self._max_tokens))

    def _laid_out(self) -> _Layout:
        if self._layout is None or self._layout.max_rows != self._runner.batch_size:
            self._layout = _Layout(self._runner, self._encoded, self._opening, self._max_tokens)
        return self._layout


class _BucketGuesses:
    """Guesses for the rows of one bucket of prompts, in one generation."""

    def __init__(
        self,
        bucket: Sequence[int],
        opening: Sequence[Sequence[int]],
        drafts: Drafts,
        length: DraftLength,
        max_tokens: int,
    ) -> None:
        self._bucket = bucket
        self._opening = opening
        self._drafts = drafts
        self._max_tokens = max_tokens
        self._length = length

    def first(self, row: int) -> Sequence[int]:
        """The same for every candidate: what the trunk was recorded over."""
        return self._opening[self._bucket[row]]

    def following(self, row: int, response: Sequence[int], rows: int) -> Sequence[int]:
        most = min(self._length.best(rows), self._max_tokens - len(response) - 1)
        return self._drafts.guess(self._bucket[row], response, most)

    def checked(self, right: int, wrong: int) -> None:
        self._length.learn(right, wrong)


class _Layout:
    """Prompts in batches, with what is guessed of their answers, as something to replay."""

    def __init__(
        self,
        runner: Runner,
        encoded: Sequence[Sequence[int]],
        opening: Sequence[Sequence[int]],
        most: int,
    ) -> None:
        self._lm: CausalModel = runner.lm
        self._most = most
        self._share_prefix = runner.share_prefix
        self.max_rows = runner.batch_size
        # Decoding costs a step of the whole model per token: full batches matter more than
        # a few padded positions.
        lengths = [len(ids) for ids in encoded]
        self.buckets = length_buckets(lengths, self.max_rows, max_padding=1.0)
        self.sequences = [[encoded[index] for index in bucket] for bucket in self.buckets]
        self._opening = [[opening[index] for index in bucket] for bucket in self.buckets]
        self.fed_tokens, self._places = self._sizes()

    @property
    def cached_bytes(self) -> int:
        """Of one position's keys and values, measured, times all positions."""
        with torch.no_grad():
            cache = PrefixCache(self._lm, self.sequences[0][0][:1]).expanded(self._lm, 1)
        tensors = [t for layer in cache.layers for t in vars(layer).values()]
        each = sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
        return each * self._places

    def run(self, start: Start) -> Tensor:
        """Logits after the prompts and their guesses, and after one more token: (rows, V)."""
        found = []
        for number, sequences in enumerate(self.sequences):
            state = Decoding(
                self._lm,
                sequences,
                self._opening[number],
                way=continuing(self._lm),
                most=self._most,
                share_prefix=self._share_prefix,
                start=start,
                batch=number,
            )
            found.append(state.logits[:, 0].cpu())
            state.settle([len(guess) for guess in self._opening[number]])
            state.advance([ids[-1] for ids in sequences], [()] * len(sequences))
            found.append(state.logits[:, 0].cpu())
        return torch.cat(found)

    def _sizes(self) -> tuple[int, int]:
        """Positions computed, and positions in the caches."""
        fed = places = 0
        for sequences, guesses in zip(self.sequences, self._opening, strict=True):
            prefix = len(common_prefix(sequences)) if self._share_prefix else 0
            width = max(map(len, sequences)) + max(map(len, guesses))
            fed += prefix + len(sequences) * (width - prefix)
            places += len(sequences) * width
        return fed, places


def _opening(response: Response) -> tuple[int, ...]:
    """What of the unedited model's answer is checked at once: all of it where it is soon over."""
    tokens = response.reference_tokens(SOON_OVER + 1)
    soon_over = response.done and len(tokens) <= SOON_OVER
    return tuple(tokens if soon_over else tokens[:FIRST_DRAFT])
