"""A database of Optuna's, read and written in few statements. What is stored is as Optuna's."""

from __future__ import annotations

import copy
import itertools
import json
import threading
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping
from datetime import datetime
from types import SimpleNamespace
from typing import Any

from optuna.distributions import distribution_to_json
from optuna.storages import RDBStorage
from optuna.storages._cached_storage import _CachedStorage
from optuna.storages._rdb import models
from optuna.storages._rdb.storage import _create_scoped_session
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import ColumnElement, Row, func, insert, or_, select, update
from sqlalchemy.orm import Session

from heretic_kl.search.storage.steps import stored_whole

_PARTS = {
    "params": models.TrialParamModel,
    "values": models.TrialValueModel,
    "user_attributes": models.TrialUserAttributeModel,
    "system_attributes": models.TrialSystemAttributeModel,
    "intermediate_values": models.TrialIntermediateValueModel,
}
"""Of a trial, by what Optuna calls them -> their table."""
_OF_TRIAL = ("number", "state", "datetime_start", "datetime_complete", "trial_id")
_MOST_NAMED = 1000
"""Trials that a query names; databases limit its variables."""


class Database(RDBStorage):
    """Optuna's database storage, which reads trials in few queries for plain rows.

    Optuna makes an object that can be written back of each parameter, value and attribute: most
    of the time that opening a study of 10,000 trials took. What rows mean is left to Optuna. Of
    trials that run, and that this process has read, only user attributes are read again. Trials
    begin and end in one transaction each; see `steps`.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._whole: dict[int, FrozenTrial] = {}
        """Trials that are `stored_whole`, as they were read, by identifier."""
        self._compatible: set[tuple[int, str, str]] = set()
        """Study, parameter and distribution that Optuna has compared with the study's."""

    def begin_trial(self, study_id: int, template: FrozenTrial, since: int) -> list[FrozenTrial]:
        """See `steps.begin_trial`."""
        trial = models.TrialModel
        with _create_scoped_session(self.scoped_session) as session:
            # Numbers are counted: one process at a time.
            models.StudyModel.find_or_raise_by_id(study_id, session, for_update=True)
            stored = self._get_prepared_new_trial(study_id, template, session)
            begun = copy.copy(template)
            begun.number, begun._trial_id = stored.number, stored.trial_id
            if since >= begun.number:
                return [begun]
            between = (trial.number >= since, trial.trial_id < begun._trial_id)
            return [*self._read(session, trial.study_id == study_id, *between), begun]

    def end_trial(self, study_id: int, trial: FrozenTrial, notes: Mapping[str, Any]) -> None:
        """See `steps.end_trial`."""
        trial_id = trial._trial_id
        with _create_scoped_session(self.scoped_session) as session:
            stored: Any = models.TrialModel.find_or_raise_by_id(trial_id, session, for_update=True)
            self.check_trial_is_updatable(trial_id, stored.state)
            for model, attributes in _attributes(trial):
                _keep(session, model, {"trial_id": trial_id}, attributes)
            for objective, value in enumerate(trial.values or ()):
                number, kind = models.TrialValueModel.value_to_stored_repr(value)
                row = {"objective": objective, "value": number, "value_type": kind}
                session.add(models.TrialValueModel(trial_id=trial_id, **row))
            stored.state, stored.datetime_complete = trial.state, datetime.now()
            _keep(session, models.StudySystemAttributeModel, {"study_id": study_id}, notes)

    def _get_prepared_new_trial(
        self, study_id: int, template_trial: FrozenTrial | None, session: Session
    ) -> Any:
        """Optuna's, in one statement for each table once it has compared the distributions."""
        new = template_trial
        if new is None or new.values or new.intermediate_values:
            return super()._get_prepared_new_trial(study_id, new, session)
        texts = {name: distribution_to_json(d) for name, d in new.distributions.items()}
        kinds = {(study_id, *kind) for kind in texts.items()}
        if kinds - self._compatible:
            prepared = super()._get_prepared_new_trial(study_id, new, session)
            self._compatible |= kinds
            return prepared
        count = select(func.count()).where(models.TrialModel.study_id == study_id)
        trial: Any = models.TrialModel(
            study_id=study_id,
            number=session.scalar(count),
            state=new.state,
            datetime_start=new.datetime_start,
            datetime_complete=new.datetime_complete,
        )
        session.add(trial)
        session.flush()
        rows = [
            {
                "trial_id": trial.trial_id,
                "param_name": name,
                "param_value": new.distributions[name].to_internal_repr(new.params[name]),
                "distribution_json": texts[name],
            }
            for name in new.params
        ]
        if rows:
            session.execute(insert(models.TrialParamModel), rows)
        for model, attributes in _attributes(new):
            _keep(session, model, {"trial_id": trial.trial_id}, attributes, new=True)
        return trial

    def _get_trials(
        self,
        study_id: int,
        states: Container[TrialState] | None,
        included_trial_ids: set[int],
        trial_id_greater_than: int,
    ) -> list[FrozenTrial]:
        if states is not None or len(included_trial_ids) > _MOST_NAMED:
            return super()._get_trials(study_id, states, included_trial_ids, trial_id_greater_than)
        trial = models.TrialModel
        later = trial.trial_id > trial_id_greater_than
        wanted = or_(later, trial.trial_id.in_(included_trial_ids)) if included_trial_ids else later
        with Session(self.engine) as session:
            trials = self._read(session, trial.study_id == study_id, wanted)
            if not trials:
                models.StudyModel.find_or_raise_by_id(study_id, session)
            return trials

    def _read(self, session: Session, *wanted: ColumnElement[bool]) -> list[FrozenTrial]:
        """Trials by identifier, those of `_whole` with their user attributes read anew."""
        trial = models.TrialModel
        # Before their parts: then whatever is over has all of them.
        query = select(trial.trial_id, trial.state).where(*wanted).order_by(trial.trial_id)
        states = {row.trial_id: row.state for row in session.execute(query)}
        whole: dict[int, FrozenTrial] = {}
        for trial_id, state in states.items():
            before = self._whole.get(trial_id)
            if before is not None and before.state == state:
                whole[trial_id] = before
        result: dict[int, FrozenTrial | None] = dict.fromkeys(states)
        if whole:
            attributes = _by_trial(session, models.TrialUserAttributeModel, *_named(whole))
            for trial_id, before in whole.items():
                result[trial_id] = _renewed(before, attributes[trial_id])
        if unread := states.keys() - whole.keys():
            named = _named(unread) if len(unread) <= _MOST_NAMED else wanted
            rows: Any = session.scalars(select(trial).where(*named)).all()
            parts = {name: _by_trial(session, model, *named) for name, model in _PARTS.items()}
            for row in rows:
                if row.trial_id in unread:
                    result[row.trial_id] = self._build_frozen_trial_from_trial_model(
                        _with_parts(row, parts)
                    )
        trials = [read for read in result.values() if read is not None]
        for read in trials:
            if stored_whole(read):
                self._whole[read._trial_id] = read
            else:
                self._whole.pop(read._trial_id, None)
        return trials


class CachedDatabase(_CachedStorage):
    """Optuna's cache of a database, with `steps`; those who ask at once are told from one read."""

    def __init__(self, backend: Database) -> None:
        super().__init__(backend)
        self._database = backend
        self._reading, self._clock = threading.Lock(), itertools.count()
        self._read_at: dict[int, int] = {}

    def begin_trial(self, study_id: int, template: FrozenTrial, since: int) -> list[FrozenTrial]:
        """See `steps.begin_trial`."""
        return self._database.begin_trial(study_id, template, since)

    def end_trial(self, study_id: int, trial: FrozenTrial, notes: Mapping[str, Any]) -> None:
        """See `steps.end_trial`."""
        self._database.end_trial(study_id, trial, notes)

    def _read_trials_from_remote_storage(self, study_id: int) -> None:
        asked = next(self._clock)
        with self._reading:
            if self._read_at.get(study_id, -1) < asked:  # otherwise it was read since
                began = next(self._clock)
                super()._read_trials_from_remote_storage(study_id)
                self._read_at[study_id] = began


def _named(trial_ids: Iterable[int]) -> tuple[ColumnElement[bool]]:
    return (models.TrialModel.trial_id.in_(list(trial_ids)),)


def _renewed(trial: FrozenTrial, rows: Iterable[Row[Any]]) -> FrozenTrial:
    """A trial with user attributes as they are now: itself where they are the same."""
    attributes = {row.key: json.loads(row.value_json) for row in rows}
    if attributes == trial.user_attrs:
        return trial
    trial = copy.copy(trial)
    trial.user_attrs = attributes
    return trial


def _attributes(trial: FrozenTrial) -> tuple[tuple[Any, Mapping[str, Any]], ...]:
    """Tables of attributes, and what of a trial belongs there."""
    return (
        (models.TrialUserAttributeModel, trial.user_attrs),
        (models.TrialSystemAttributeModel, trial.system_attrs),
    )


def _keep(
    session: Session,
    model: Any,
    owner: Mapping[str, int],
    attributes: Mapping[str, Any],
    new: bool = False,
) -> None:
    """Write attributes of a trial or study, by its identifier; a `new` one has none yet."""
    if not attributes:
        return
    texts = {name: json.dumps(value) for name, value in attributes.items()}
    mine = [getattr(model, column) == value for column, value in owner.items()]
    stored = set[str]()
    if not new:
        stored |= set(session.scalars(select(model.key).where(*mine, model.key.in_(texts))))
    rows = [{**owner, "key": n, "value_json": text} for n, text in texts.items() if n not in stored]
    if rows:
        session.execute(insert(model), rows)
    for name in stored:
        change = update(model).where(*mine, model.key == name)
        session.execute(change.values(value_json=texts[name]))


def _with_parts(trial: Any, parts: Mapping[str, Mapping[int, Any]]) -> Any:
    """What has the attributes of a trial of Optuna's in a database."""
    rows = {name: of_trials[trial.trial_id] for name, of_trials in parts.items()}
    return SimpleNamespace(**{name: getattr(trial, name) for name in _OF_TRIAL}, **rows)


def _by_trial(
    session: Session, model: Any, *wanted: ColumnElement[bool]
) -> defaultdict[Any, list[Row[Any]]]:
    """The rows of one table that belong to the wanted trials, by trial."""
    table, trials = model.__table__, models.TrialModel.__table__
    query = select(table).join(trials, table.c.trial_id == trials.c.trial_id)
    rows: defaultdict[Any, list[Row[Any]]] = defaultdict(list)
    # As they were written: MySQL would give them in the order of their names.
    for row in session.execute(query.where(*wanted).order_by(*table.primary_key.columns)):
        rows[row.trial_id].append(row)
    return rows
