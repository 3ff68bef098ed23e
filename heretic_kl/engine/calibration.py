"""What is found out about a model before the search, and kept. Mutates nothing, prints nothing."""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from heretic_kl.engine.engine import Engine
from heretic_kl.engine.generation.generate import ChosenTokens, generate_responses
from heretic_kl.engine.memory_limits import if_memory_allows
from heretic_kl.engine.noise import NoiseFloor
from heretic_kl.model import LanguageModel, close_thought, thought_left_open
from heretic_kl.prompts import Prompt
from heretic_kl.ranks import from_first

PREFIX_TOKENS = 24
"""Response tokens generated to look for a common opening."""
SMALLEST_BATCH = 8
LARGEST_BATCH = 256
WORTHWHILE_GAIN = 1.08
"""A doubled batch must decode at least this much faster per response to be kept."""
DECODED_TOKENS = 6
TOKENS_READ_ON_CPU = 4
"""Last tokens of each prompt: there reading takes longest and memory is seldom the limit."""


@dataclass(frozen=True)
class Calibration:
    """Facts measured at the start of a run; every later step reads them, none changes them."""

    dtype: str
    """What the model computes in, for instance `float32`."""
    device: str
    threads: int
    batch_size: int
    response_prefix: str
    """Text put at the start of every response: a chain of thought closed at once, or nothing."""
    noise_floor: NoiseFloor
    site_residue: float
    """Largest share of a direction that any layer still adds once all sites remove it."""


def find_batch_size(lm: LanguageModel, prompts: Sequence[Prompt]) -> int:
    """The batch size beyond which decoding gets no faster per response, or memory runs out.

    From `SMALLEST_BATCH` to `LARGEST_BATCH`, and less than twice as many as there are prompts.
    """
    encoded = sorted((lm.chat.encode(prompt) for prompt in prompts), key=len)
    if lm.device.type == "cpu":
        encoded = [ids[-TOKENS_READ_ON_CPU:] for ids in encoded]
    best, best_rate, size, misses = 1, 0.0, SMALLEST_BATCH, 0
    while size <= LARGEST_BATCH and misses < 2:
        batch = [encoded[index * len(encoded) // size] for index in range(size)]
        seconds = if_memory_allows(partial(_decoding_seconds, lm, batch))
        if seconds is None:
            break
        rate = size / seconds
        if rate >= best_rate * WORTHWHILE_GAIN:
            best, best_rate, misses = size, rate, 0
        else:
            misses += 1  # one may be a disturbance of the clock
        if size >= len(encoded):
            break
        size *= 2
    return best


def find_response_prefix(engine: Engine, prompts: Sequence[Prompt]) -> str:
    """The opening common to all responses, its chain of thought closed; "" where there is none.

    A common opening says nothing about a prompt, and behind it first tokens carry no verdict.
    """
    opened = thought_left_open(engine.lm.chat.text(prompts[0]))
    if opened is not None:
        return opened
    responses = engine.responses(tuple(prompts), PREFIX_TOKENS)
    # Whole tokens: half a word put before a response would not be how the model begins it.
    common = os.path.commonprefix([tuple(response.tokens) for response in responses])
    return close_thought(engine.lm.chat.decode(common, special=True).rstrip(" "))


class _TimedTokens(ChosenTokens):
    """The most likely tokens, and the time at which each step had them."""

    def __init__(self) -> None:
        super().__init__((), None)
        self.times: list[float] = []

    def __call__(self, logits: Tensor, rows: Sequence[int]) -> list[int]:
        tokens = super().__call__(logits, rows)  # waits for the device
        self.times.append(time.perf_counter())
        return tokens


def _decoding_seconds(lm: LanguageModel, batch: Sequence[Sequence[int]]) -> float:
    """Seconds of a step of decoding, the median; reading the prompts is not among them."""
    chosen = _TimedTokens()
    generate_responses(lm, batch, 1 + DECODED_TOKENS, chosen=chosen)
    steps = [end - start for start, end in itertools.pairwise(chosen.times)]
    return from_first(lambda: max(statistics.median(steps), 1e-6) if steps else 1e-6)
