"""Counts the tokens that our engine generates in a search, trial by trial. Generates none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch


class TokenHistory:
    """Counts in a `with` block; as the observer of a session it notes what each trial adds.

    A token counts once for every response that it is part of, the end token too. Responses of the
    unedited model count if they are generated while the search runs: screening may need them.
    """

    def __init__(self) -> None:
        self.trials: list[dict[str, Any]] = []
        """`trial`, `state`, `objectives`, and `tokens` since the search began."""
        self.count = 0

    def __enter__(self) -> TokenHistory:
        from heretic_kl.engine import runner
        from heretic_kl.engine.generation import candidates

        with ExitStack() as stack:
            for module in (candidates, runner):
                counting = self._counting(module.generate_responses)
                stack.enter_context(patch.object(module, "generate_responses", counting))
            self._patches = stack.pop_all()
        return self

    def __exit__(self, *_error: object) -> None:
        self._patches.close()

    def begin(self) -> None:
        """The search begins: what was generated to set it up does not count."""
        self.trials, self.count = [], 0

    def __call__(self, event: Any) -> None:
        """Note a trial that is over."""
        from heretic_kl.events import TrialFinished

        if isinstance(event, TrialFinished):
            record = event.record
            self.trials.append(
                {
                    "trial": record.number,
                    "state": record.state,
                    "objectives": record.objectives,
                    "tokens": self.count,
                }
            )

    def _counting(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*words: Any, **options: Any) -> Any:
            responses = generate(*words, **options)
            self.count += sum(len(r.tokens) + (r.end_token is not None) for r in responses)
            return responses

        return counted


def with_volumes(trials: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Trials with `volume`, what the front so far dominates of [0, 1] in both objectives."""
    from heretic_kl.search.progress.hypervolume import hypervolume

    points: list[tuple[float, ...]] = []
    result = []
    for trial in trials:
        if trial["state"] == "complete":
            points.append(tuple(trial["objectives"]))
        result.append({**trial, "volume": hypervolume(points, (1.0, 1.0))})
    return result


def tokens_to(trials: Sequence[dict[str, Any]], volume: float) -> int | None:
    """Tokens generated until the front was that large, up to rounding; None: it never was."""
    reached = (t["tokens"] for t in trials if t["volume"] >= volume * (1 - 1e-9))
    return next(reached, None)
