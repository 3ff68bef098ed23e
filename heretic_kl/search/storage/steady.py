"""A storage behind a connection that may be lost: what it did not answer is asked again, in time.

An operation whose answer was lost may have been done. Reading and setting can be repeated; a new
trial is looked for by a token that it carries, a new state by what the trial says, before either
is asked for again.
"""

from __future__ import annotations

import copy
import secrets
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError

from heretic_kl.errors import StorageLostError, plain_line
from heretic_kl.files import without_secrets
from heretic_kl.search.storage import steps
from heretic_kl.search.storage.steps import CALL

PATIENCE_SECONDS: Final = 120.0
"""How long an operation is tried again; less than a lease lasts."""
PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.25, 5.0
"""Between two attempts: the first pause, which doubles, and the longest one."""
GONE: Final = "the storage cannot be reached"
_LOST_CODES: Final = ("UNAVAILABLE", "CANCELLED", "DEADLINE_EXCEEDED")
_NOT_DONE: Final = object()

Call = Callable[[BaseStorage], Any]


def _steadily(name: str) -> Any:
    """A method of a storage that can be repeated."""

    def method(self: SteadyStorage, *arguments: Any, **named: Any) -> Any:
        return self._ask(lambda storage: getattr(storage, name)(*arguments, **named))

    return method


class SteadyStorage(BaseStorage):
    """A storage whose connection may be lost for a while.

    Args:
        open_again: opens it, at first and after each failure, where that is not None.
        storage: it, where it finds back by itself.
        notify: told once for each loss.
        patience: seconds to try again; 0: a loss is an error at once.

    Raises:
        StorageLostError: by every method: the connection is lost, and did not come back.
    """

    def __init__(
        self,
        storage: BaseStorage,
        *,
        open_again: Callable[[], BaseStorage] | None = None,
        notify: Callable[[str], None] = lambda message: None,
        patience: float | None = None,
    ) -> None:
        self._storage, self._open_again, self._notify = storage, open_again, notify
        self._patience = PATIENCE_SECONDS if patience is None else patience
        self._lock, self._gave_up = threading.Lock(), threading.local()
        self._away = self._said = False
        self.interruptions = 0
        """How often the connection was lost so far."""

    create_new_study = _steadily("create_new_study")  # whoever creates one expects it to be there
    delete_study = _steadily("delete_study")
    set_study_user_attr = _steadily("set_study_user_attr")
    set_study_system_attr = _steadily("set_study_system_attr")
    get_study_id_from_name = _steadily("get_study_id_from_name")
    get_study_name_from_id = _steadily("get_study_name_from_id")
    get_study_directions = _steadily("get_study_directions")
    get_study_user_attrs = _steadily("get_study_user_attrs")
    get_study_system_attrs = _steadily("get_study_system_attrs")
    get_all_studies = _steadily("get_all_studies")
    set_trial_param = _steadily("set_trial_param")
    set_trial_intermediate_value = _steadily("set_trial_intermediate_value")
    set_trial_user_attr = _steadily("set_trial_user_attr")
    set_trial_system_attr = _steadily("set_trial_system_attr")
    get_trial_id_from_study_id_trial_number = _steadily("get_trial_id_from_study_id_trial_number")
    get_trial_number_from_id = _steadily("get_trial_number_from_id")
    get_trial = _steadily("get_trial")
    get_all_trials = _steadily("get_all_trials")
    get_n_trials = _steadily("get_n_trials")

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """Create a trial once; its token tells whether a lost call has created it."""
        if template_trial is None:
            return int(self._ask(lambda storage: storage.create_new_trial(study_id)))
        template, matching = self._marked(template_trial)

        def created(storage: BaseStorage) -> Any:
            trials = storage.get_all_trials(study_id, deepcopy=False)
            return next((t._trial_id for t in trials[::-1] if matching(t)), _NOT_DONE)

        return int(self._ask(lambda storage: storage.create_new_trial(study_id, template), created))

    @staticmethod
    def _marked(template: FrozenTrial) -> tuple[FrozenTrial, Callable[[FrozenTrial], bool]]:
        """A template with a token, and what tells the trial that was created from it."""
        template = copy.copy(template)
        template.system_attrs = {CALL: secrets.token_hex(8), **template.system_attrs}
        token = template.system_attrs[CALL]  # that of a client, in a proxy
        return template, lambda trial: trial.system_attrs.get(CALL) == token

    def begin_trial(
        self, study_id: int, template_trial: FrozenTrial, since: int
    ) -> list[FrozenTrial]:
        """Begin a trial once; see `steps.begin_trial`."""
        template, matching = self._marked(template_trial)

        def begun(storage: BaseStorage) -> Any:
            trials = storage.get_all_trials(study_id, deepcopy=False)
            number = next((t.number for t in trials[::-1] if matching(t)), None)
            return _NOT_DONE if number is None else trials[min(since, number) : number + 1]

        trials = self._ask(
            lambda storage: steps.begin_trial(storage, study_id, template, since), begun
        )
        return list(trials)

    def end_trial(self, study_id: int, trial: FrozenTrial, notes: Mapping[str, Any]) -> None:
        """End a trial once; see `steps.end_trial`."""

        def ended(storage: BaseStorage) -> Any:
            stored = storage.get_trial(trial._trial_id)
            return (
                None if (stored.state, stored.values) == (trial.state, trial.values) else _NOT_DONE
            )

        self._ask(lambda storage: steps.end_trial(storage, study_id, trial, notes), ended)

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        """Set a state once; a trial that a lost call may have begun counts as another process's."""

        def is_set(storage: BaseStorage) -> Any:
            trial = storage.get_trial(trial_id)
            if state == TrialState.RUNNING:
                return _NOT_DONE if trial.state == TrialState.WAITING else False
            same = trial.state == state and (values is None or trial.values == list(values))
            return True if same else _NOT_DONE

        return bool(
            self._ask(
                lambda storage: storage.set_trial_state_values(trial_id, state, values), is_set
            )
        )

    def remove_session(self) -> None:
        """Let go of this thread's connection."""
        self._storage.remove_session()

    def close(self) -> None:
        """Let go of a channel, where there is one."""
        if hasattr(self._storage, "close"):
            self._storage.close()

    def _ask(self, call: Call, done: Call = lambda storage: _NOT_DONE) -> Any:
        """Ask until there is an answer; after a loss, ask first whether it was done."""
        began: float | None = None
        pause = PAUSE_SECONDS
        while True:
            storage = self._storage
            try:
                answer = _NOT_DONE if began is None else done(storage)
                answer = call(storage) if answer is _NOT_DONE else answer
            except Exception as error:  # each driver raises its own
                if not is_lost(error):
                    raise
                began = time.monotonic() if began is None else began
                self._note_loss(storage, error, began)
            else:
                self._away = self._said = self._gave_up.now = False
                return answer
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _note_loss(self, storage: BaseStorage, error: Exception, began: float) -> None:
        reason = plain_line(without_secrets(_reason(error)))
        with self._lock:
            self.interruptions += not self._away
            self._away = True
            if self._open_again is not None and self._storage is storage:
                self._storage = self._open_again()
        hurry = _is_ending() or getattr(self._gave_up, "now", False)
        patience = 0.0 if hurry else self._patience
        if time.monotonic() - began >= patience:
            self._gave_up.now = True
            waited = "" if patience == 0 else f" for {patience:.0f} seconds"
            raise StorageLostError(
                f"{GONE}{waited} ({reason}): finished trials are kept; start again once it is back"
            ) from error
        if not self._said and not threading.current_thread().daemon:  # a heartbeat tells nobody
            self._said = True
            self._notify(f"{GONE} ({reason}): trying again for up to {patience:.0f} seconds")


def is_lost(error: BaseException | None) -> bool:
    """Whether an error says that the connection to a database or a proxy is lost."""
    while error is not None:
        if isinstance(error, OperationalError | InterfaceError | StorageLostError):
            return True
        if isinstance(error, DBAPIError) and error.connection_invalidated:
            return True
        code = getattr(error, "code", None)
        name = getattr(code(), "name", "") if callable(code) else ""  # of gRPC
        if name in _LOST_CODES or (name == "UNKNOWN" and GONE in str(error)):
            return True
        error = error.__cause__
    return False


def _reason(error: BaseException) -> str:
    """What the driver said, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    error = getattr(error, "orig", None) or error  # without the statement
    details = getattr(error, "details", None)  # of gRPC
    return " ".join(str(details() if callable(details) else error).split())


def _is_ending() -> bool:
    """Whether this thread lets go of things because the process is asked to end."""
    error = sys.exc_info()[1]
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__context__
    return False
