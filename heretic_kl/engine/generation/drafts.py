"""Earlier answers to the same prompts, as guesses of what a candidate says next. Runs no model.

Guessed tokens are checked by the model, several in one pass, and count only as far as greedy
decoding agrees: a bad guess costs time and changes nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

RESPONSES_KEPT = 16
"""Of each prompt, beside the unedited model's own."""
SHORTEST_MATCH = 3
"""Tokens that must agree with an earlier answer where the answers began differently."""
LONGEST_MATCH = 8
LONGEST_DRAFT = 12
EXPECTED_RIGHT, EXPECTED_WRONG = 2, 2
"""Guessed tokens thought to have been checked before the first one is: few, and half of them
wrong, so that guessing begins where it is cheap, in steps of few rows."""
MEMORY = 0.5
"""What checks of one generation count in the next one."""
STEP_COSTS = {"cpu": 40, "cuda": 200}
"""What a decoding step costs whatever is in it, in tokens (read all weights, grow the cache)."""


class Drafts:
    """Token ids of answers to one set of prompts.

    Args:
        originals: the unedited model's answers, end tokens included, by prompt; () where unknown.
    """

    def __init__(self, originals: Sequence[Sequence[int]]) -> None:
        self._originals = [tuple(response) for response in originals]
        self._later: list[deque[tuple[int, ...]]] = [
            deque(maxlen=RESPONSES_KEPT) for _ in originals
        ]

    def add(self, prompt: int, response: Sequence[int]) -> None:
        """Keep what a candidate said."""
        known = tuple(response)
        if known and known != self._originals[prompt] and known not in self._later[prompt]:
            self._later[prompt].append(known)

    def guess(self, prompt: int, response: Sequence[int], most: int) -> tuple[int, ...]:
        """What may follow an unfinished answer: what followed it in an earlier one.

        The latest answer that began alike comes first; else the one that agrees in most of the
        last tokens.
        """
        if most < 1:
            return ()
        said = tuple(response)
        known = [*reversed(self._later[prompt]), self._originals[prompt]]
        for earlier in known:
            if len(earlier) > len(said) and earlier[: len(said)] == said:
                return earlier[len(said) : len(said) + most]
        best: tuple[int, ...] = ()
        length = SHORTEST_MATCH - 1
        for earlier in known:
            for end in range(1, len(earlier)):
                agreed = _agreed_before(earlier, end, said)
                if agreed > length:
                    best, length = earlier[end : end + most], agreed
        return best


class DraftLength:
    """How many tokens to guess in the next step, from how many were right so far.

    With a share of right guesses p, a step of G guessed tokens a row gives (1 - p^(G+1)) / (1 - p)
    tokens; it costs its fixed part and rows * (1 + G). The best G is taken: 0 where guesses fail.
    Depends on no clock, so that a run can be repeated.

    Args:
        device: type of the device.
    """

    def __init__(self, device: str) -> None:
        self._fixed = STEP_COSTS.get(device, STEP_COSTS["cuda"])
        self._right = self._wrong = 0.0

    def fade(self) -> None:
        """A generation is over: what it taught counts less from now on."""
        self._right *= MEMORY
        self._wrong *= MEMORY

    def learn(self, right: int, wrong: int) -> None:
        """So many guessed tokens were checked; those after a wrong one were not."""
        self._right += right
        self._wrong += wrong

    def best(self, rows: int) -> int:
        """Tokens to guess for each of so many rows."""
        right, wrong = self._right + EXPECTED_RIGHT, self._wrong + EXPECTED_WRONG
        share = right / (right + wrong)

        def rate(guessed: int) -> float:
            given = (1 - share ** (guessed + 1)) / (1 - share)
            return given / (self._fixed + rows * (1 + guessed))

        return max(range(LONGEST_DRAFT + 1), key=rate)


def _agreed_before(earlier: Sequence[int], end: int, said: Sequence[int]) -> int:
    """How many tokens before `end` are the last ones of what was said."""
    agreed = 0
    most = min(end, len(said), LONGEST_MATCH)
    while agreed < most and earlier[end - 1 - agreed] == said[-1 - agreed]:
        agreed += 1
    return agreed
