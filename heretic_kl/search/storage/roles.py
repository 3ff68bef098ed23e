"""One process at a time in a role, on any storage. Knows nothing about what the role is for.

Storages have no locks, but they number trials in one order that all processes see. A role is held
by a ticket: a running trial of a study of its own. The ticket with the lowest number whose owner
is alive holds the role; the others wait in order.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count, islice

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from heretic_kl.search.storage.lease import Heartbeat, Watch, lease_attributes

ROLES_SUFFIX = ".roles"
ROLE = "role"
"""Attribute of a ticket."""
POLL_SECONDS = 0.2


class Roles:
    """The roles of one study.

    Args:
        storage: of the study.
        name: of the study.
        heartbeat: renews the tickets of this process.
        watch: tells which tickets' owners are gone.
    """

    def __init__(self, storage: BaseStorage, name: str, heartbeat: Heartbeat, watch: Watch) -> None:
        self._storage, self._heartbeat, self._watch = storage, heartbeat, watch
        self._study_id = study_id(storage, f"{name}{ROLES_SUFFIX}")

    @contextmanager
    def hold(self, role: str) -> Iterator[None]:
        """Hold a role for the block; waits for its turn."""
        ticket = self._draw(role)
        try:
            while self._somebody_is_before(ticket, role):
                time.sleep(POLL_SECONDS)
            yield
        finally:
            self._end(ticket)

    @contextmanager
    def hold_numbered(self, role: str) -> Iterator[int]:
        """Hold the first free one of the roles `role:0`, `role:1`, ...; yields its number.

        Where several processes reach for it at the same moment, most of them get a later one.
        """
        for attempt in count():
            taken = {
                t.user_attrs.get(ROLE) for t in self._running() if not self._watch.abandoned(t)
            }
            free = (number for number in count() if f"{role}:{number}" not in taken)
            number = random.choice(list(islice(free, 1 + 4 * attempt)))
            ticket = self._draw(f"{role}:{number}")
            try:
                if not self._somebody_is_before(ticket, f"{role}:{number}"):
                    yield number
                    return
            finally:
                self._end(ticket)

    def _running(self) -> list[FrozenTrial]:
        return self._storage.get_all_trials(
            self._study_id, deepcopy=False, states=(TrialState.RUNNING,)
        )

    def _draw(self, role: str) -> int:
        attributes = {ROLE: role, **lease_attributes()}
        template = optuna.create_trial(state=TrialState.RUNNING, user_attrs=attributes)
        ticket = self._storage.create_new_trial(self._study_id, template)
        self._heartbeat.add(ticket)
        return ticket

    def _somebody_is_before(self, ticket: int, role: str) -> bool:
        for other in self._running():
            if other._trial_id == ticket:
                return False
            if other.user_attrs.get(ROLE) == role:
                if not self._watch.abandoned(other):
                    return True
                self._end(other._trial_id)
        return False  # our own was taken for dead: a second one in the role costs time, no trial

    def _end(self, ticket: int) -> None:
        self._heartbeat.remove(ticket)
        try:
            self._storage.set_trial_state_values(ticket, TrialState.FAIL)
        except optuna.exceptions.UpdateFinishedTrialError:
            pass  # another process was faster


def study_id(storage: BaseStorage, name: str) -> int:
    """A study that holds something else than trials; made where it is missing."""
    try:
        return storage.get_study_id_from_name(name)
    except KeyError:
        try:
            return storage.create_new_study([optuna.study.StudyDirection.MINIMIZE], name)
        except optuna.exceptions.DuplicatedStudyError:  # another process was faster
            return storage.get_study_id_from_name(name)
