"""Results of several candidates as they come in, and which of them need not go on. Runs nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from heretic_kl.requests import Request, Result, SoFar, Watch


class Progress:
    """What is known of each candidate of one round.

    `watch` is asked whether a candidate need go on; None: all do.
    """

    def __init__(self, requests: Sequence[Request], candidates: int, watch: Watch | None) -> None:
        self.going = list(range(candidates))
        """Candidates still to be measured."""
        self._requests = tuple(requests)
        self._wanted = set(requests)
        self._watch = watch
        self._found: list[dict[Request, Result]] = [{} for _ in range(candidates)]

    @property
    def watched(self) -> bool:
        """Whether anybody wants to know of parts."""
        return self._watch is not None

    def keep(self, candidate: int, results: Mapping[Request, Result]) -> None:
        """Results are there; where more are to come, ask whether they need."""
        self._found[candidate].update(results)
        if self._wanted - self._found[candidate].keys():
            self._ask(candidate, {})

    def hear(self, candidate: int, parts: Mapping[Request, SoFar]) -> bool:
        """Parts of results are there; whether the candidate has to go on."""
        if candidate in self.going:
            self._ask(candidate, parts)
        return candidate in self.going

    def results(self) -> list[list[Result] | None]:
        """Of each candidate, in the order of the requests; None: it was not measured to the end."""
        return [
            [by_request[request] for request in self._requests] if index in self.going else None
            for index, by_request in enumerate(self._found)
        ]

    def _ask(self, candidate: int, parts: Mapping[Request, SoFar]) -> None:
        if self._watch is None:
            return
        so_far: dict[Request, SoFar] = {**parts, **self._found[candidate]}
        if self._watch(candidate, [so_far.get(request) for request in self._requests]):
            self.going.remove(candidate)
