"""What a model allows, found by running it once when it is loaded. Holds facts, runs nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

NOT_TRIED = "this was not tried"


@dataclass(frozen=True)
class Capabilities:
    """Ways of computing the same with less work, and why some of them are not exact.

    A problem is a reason for people; None: there is none, and the way is used.
    See `heretic_kl.model.forward.probing.find_capabilities`.
    """

    cache_argument: str = "past_key_values"
    """Under which name the model takes its cache."""
    window: int | None = None
    """The fewest positions back that some layer sees, gaps included; None: all see everything."""
    cache_problem: str | None = NOT_TRIED
    """Of rows of different lengths, padded on the left, that grow in a cache and leave it."""
    gap_problem: str | None = NOT_TRIED
    """Of padding between a shared prefix and the rest while rows grow in a cache."""
    prefix_problem: str | None = NOT_TRIED
    """Of running the tokens that all sequences begin with once, teacher-forced."""
    tree_problem: str | None = NOT_TRIED
    """Of running sequences as one tree of tokens."""
    resume_problem: str | None = NOT_TRIED
    """Of starting a teacher-forced pass at a layer, from kept hidden states."""
    cached_resume_problem: str | None = NOT_TRIED
    """Of the same while prompts are read into a cache that goes on growing."""
    rows_problem: str | None = NOT_TRIED
    """Of editing rows of one batch differently."""

    def shares_prefix(self, longest: int) -> bool:
        """Whether teacher-forced sequences of at most so many tokens may share a prefix."""
        return self.prefix_problem is None and (self.window is None or longest <= self.window)

    def shares_prefix_in_cache(self, sequences: Sequence[Sequence[int]], most: int) -> bool:
        """Whether sequences may grow by up to `most` tokens behind what they have in common."""
        if self.cache_problem is not None or self.gap_problem is not None:
            return False
        lengths = [len(sequence) for sequence in sequences]
        if min(lengths) == max(lengths):
            return True  # nothing is padded
        return self.window is None or max(lengths) + most <= self.window

    def runs_trees(self, longest: int) -> bool:
        """Whether sequences of at most so many tokens may run as trees, where all is seen."""
        return self.tree_problem is None and (self.window is None or longest <= self.window)

    def lines(self) -> list[tuple[str, str]]:
        """Each capability and whether it is used, for people."""
        problems = {
            "key-value cache": self.cache_problem,
            "shared prefix in the cache": self.gap_problem,
            "shared prefix": self.prefix_problem,
            "trees of tokens": self.tree_problem,
            "layer cache": self.resume_problem,
            "layer cache in generation": self.cached_resume_problem,
            "several candidates in a batch": self.rows_problem,
        }
        lines = [
            (name, "yes" if problem is None else f"no: {problem}")
            for name, problem in problems.items()
        ]
        window = "none" if self.window is None else f"{self.window} tokens"
        return [*lines, ("shortest attention window", window)]
