"""What workers ask of the proxy beyond Optuna's own calls, so that a trial takes few. Needs gRPC.

`BeginTrial` and `EndTrial` are `steps`. `ReadTrials` is Optuna's `GetTrials`, but of trials that
the client has read and that still run it tells only what may have changed: with 200 workers
their parameters were most of what a server and its clients computed. A server that does not know
these calls is asked Optuna's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import grpc
import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage, GrpcStorageProxy
from optuna.storages._grpc.auto_generated import api_pb2
from optuna.storages._grpc.client import GrpcClientCache, GrpcClientCacheEntry
from optuna.storages._grpc.servicer import (
    DATETIME_FORMAT,
    _from_proto_trial,
    _to_proto_trial,
    _to_proto_trial_state,
)
from optuna.trial import FrozenTrial, TrialState

from heretic_kl.search.storage import steps
from heretic_kl.search.storage.steps import stored_whole

SERVICE = "heretic_kl.Storage"
_LACKING = (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.RESOURCE_EXHAUSTED)
"""An older server, or Optuna's; a message above a server's limit."""


class Proxy(GrpcStorageProxy):
    """Optuna's client, with these calls."""

    def _setup(self) -> None:
        super()._setup()
        self._cache = _Cache(self._stub, self._channel)

    def begin_trial(self, study_id: int, template: FrozenTrial, since: int) -> list[FrozenTrial]:
        """See `steps.begin_trial`."""
        trial = _to_proto_trial(template)
        trial.number = since  # it has none yet
        request = api_pb2.CreateNewTrialRequest(study_id=study_id, template_trial=trial)
        reply = _ask(self._channel, "BeginTrial", request.SerializeToString())
        if reply is None:
            return steps.begin_by_calls(self, study_id, template, since)
        return _trials(reply)

    def end_trial(self, study_id: int, trial: FrozenTrial, notes: Mapping[str, Any]) -> None:
        """See `steps.end_trial`."""
        content = {
            "study": study_id,
            "trial": trial._trial_id,
            "state": trial.state.name,
            "values": trial.values,
            "user": trial.user_attrs,
            "system": trial.system_attrs,
            "notes": dict(notes),
        }
        if _ask(self._channel, "EndTrial", json.dumps(content).encode()) is None:
            steps.end_by_calls(self, study_id, trial, notes)


class _Cache(GrpcClientCache):
    """Optuna's cache of trials, which asks for what may have changed."""

    def __init__(self, stub: Any, channel: grpc.Channel) -> None:
        super().__init__(stub)
        self._channel = channel

    def _read_trials_from_remote_storage(self, study_id: int) -> None:
        study = self.studies.get(study_id, GrpcClientCacheEntry())
        request = api_pb2.GetTrialsRequest(
            study_id=study_id,
            included_trial_ids=study.unfinished_trial_ids,
            trial_id_greater_than=study.last_finished_trial_id,
        )
        reply = _ask(self._channel, "ReadTrials", request.SerializeToString())
        if reply is None:
            super()._read_trials_from_remote_storage(study_id)
            return
        self.studies[study_id] = study
        for trial in _trials(reply):
            before = study.trials.get(trial.number)
            if before is not None and not trial.params and stored_whole(before):
                trial.params, trial.distributions = before.params, before.distributions
                trial.system_attrs = before.system_attrs
            self._add_trial_to_cache(study_id, trial)


def handler(storage: BaseStorage) -> Any:
    """Answers these calls for a storage; to be added to a server."""

    def read(request: bytes) -> bytes:
        asked = api_pb2.GetTrialsRequest.FromString(request)
        running, latest = set(asked.included_trial_ids), asked.trial_id_greater_than
        return _reply(
            (_changing if trial._trial_id in running else _to_proto_trial)(trial)
            for trial in storage.get_all_trials(asked.study_id, deepcopy=False)
            if trial._trial_id > latest or trial._trial_id in running
        )

    def begin(request: bytes) -> bytes:
        asked = api_pb2.CreateNewTrialRequest.FromString(request)
        template = _from_proto_trial(asked.template_trial)
        trials = steps.begin_trial(storage, asked.study_id, template, template.number)
        return _reply(map(_to_proto_trial, trials))

    def end(request: bytes) -> bytes:
        asked = json.loads(request)
        trial = optuna.create_trial(
            state=TrialState.FAIL, user_attrs=asked["user"], system_attrs=asked["system"]
        )
        trial._trial_id = asked["trial"]
        trial.state, trial.values = TrialState[asked["state"]], asked["values"]
        steps.end_trial(storage, asked["study"], trial, asked["notes"])
        return b""

    calls = {"ReadTrials": read, "BeginTrial": begin, "EndTrial": end}
    methods = {
        name: grpc.unary_unary_rpc_method_handler(_answering(call)) for name, call in calls.items()
    }
    return grpc.method_handlers_generic_handler(SERVICE, methods)


def _answering(call: Callable[[bytes], bytes]) -> Callable[[bytes, Any], bytes]:
    """A call that tells its client why it failed, as Optuna's do."""

    def answer(request: bytes, context: Any) -> bytes:
        try:
            return call(request)
        except KeyError as error:
            context.abort(grpc.StatusCode.NOT_FOUND, str(error))
            raise
        except UpdateFinishedTrialError as error:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
            raise

    return answer


def _ask(channel: grpc.Channel, name: str, request: bytes) -> bytes | None:
    """The reply to a call; None: the server does not take it."""
    try:
        reply: bytes = channel.unary_unary(f"/{SERVICE}/{name}")(request)
        return reply
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.NOT_FOUND:
            raise KeyError(error.details()) from error
        if error.code() == grpc.StatusCode.FAILED_PRECONDITION:
            raise UpdateFinishedTrialError(error.details()) from error
        if error.code() not in _LACKING:
            raise
        return None


def _reply(trials: Iterable[Any]) -> bytes:
    message: bytes = api_pb2.GetTrialsReply(trials=trials).SerializeToString()
    return message


def _trials(reply: bytes) -> list[FrozenTrial]:
    return [_from_proto_trial(trial) for trial in api_pb2.GetTrialsReply.FromString(reply).trials]


def _changing(trial: FrozenTrial) -> Any:
    """A message of a trial that the client has read, without what it had then and still has."""
    if not stored_whole(trial):
        return _to_proto_trial(trial)
    start = trial.datetime_start
    return api_pb2.Trial(
        trial_id=trial._trial_id,
        number=trial.number,
        state=_to_proto_trial_state(trial.state),
        datetime_start=start.strftime(DATETIME_FORMAT) if start else "",
        user_attributes={name: json.dumps(value) for name, value in trial.user_attrs.items()},
    )
