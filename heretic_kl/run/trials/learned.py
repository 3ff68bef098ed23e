"""Which refined trials of a study were learned with other settings. Learns nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from heretic_kl.config.tables import RefinementTable
from heretic_kl.search import TrialRecord


def learned_otherwise(refined: Sequence[TrialRecord], table: RefinementTable) -> str | None:
    """A line for people: which, what differs, and whether more are learned; None: all the same.

    Trials of older studies do not say what they were learned with.
    """
    wanted = table.learning
    changes: set[str] = set()
    others: list[str] = []
    for record in refined:
        if record.refinement is None or record.refinement.asked is None:
            continue
        asked = asdict(record.refinement.asked)
        different = [name for name in wanted if asked[name] != wanted[name]]
        changes |= {f"{n} {_text(asked[n])}, now {_text(wanted[n])}" for n in different}
        others += [str(record.number)] if different else []
    if not others:
        return None
    end = "further ones are learned with these"
    if len(refined) >= table.trials:
        end = "no other is learned: raise --refinement.trials or name another --study-name"
    return (
        f"refined trials learned with other settings ({'; '.join(sorted(changes))}): "
        f"{', '.join(others)}; {end}"
    )


def _text(value: object) -> str:
    return "unset" if value is None else str(value)
