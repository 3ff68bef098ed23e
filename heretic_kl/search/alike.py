"""Which trials behind the front cannot be told from one of it. Knows nothing about Optuna."""

from __future__ import annotations

from collections.abc import Sequence

from heretic_kl.scoring import alike, intervals_overlap
from heretic_kl.search.records import TrialRecord


def alike_behind(
    front: Sequence[TrialRecord], trials: Sequence[TrialRecord]
) -> dict[int, tuple[int, ...]]:
    """Numbers of complete trials off the front by the number of a front's trial they are like.

    Every score of the two is `alike`. Trials of the front that are like none are left out.
    """
    members = {member.number for member in front}
    behind = [t for t in trials if t.state == "complete" and t.number not in members]
    like = {
        member.number: tuple(t.number for t in behind if _are_alike(member, t)) for member in front
    }
    return {number: numbers for number, numbers in like.items() if numbers}


def _are_alike(member: TrialRecord, other: TrialRecord) -> bool:
    pairs = [(s, other.scores[name]) for name, s in member.scores.items() if name in other.scores]
    if not pairs or len(pairs) != len(member.scores):
        return False
    # The cheap question first: of most pairs it leaves nothing to ask.
    return all(intervals_overlap(*pair) for pair in pairs) and all(alike(*pair) for pair in pairs)
