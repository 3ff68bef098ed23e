"""A database of Optuna's whose studies are read fast. Changes nothing that is stored."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Mapping
from types import SimpleNamespace
from typing import Any

from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import ColumnElement, Row, or_, select
from sqlalchemy.orm import Session

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
    """Optuna's database storage, which reads trials in six queries for plain rows.

    Optuna makes an object that can be written back of each parameter, value and attribute: most
    of the time that opening a study of 10,000 trials took. What rows mean is left to Optuna.
    """

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
            models.StudyModel.find_or_raise_by_id(study_id, session)
            query = select(trial).where(trial.study_id == study_id, wanted)
            # Before their parts: then whatever is over has all of them.
            trials = session.scalars(query.order_by(trial.trial_id)).all()
            if not trials:
                return []
            parts = {
                name: _by_trial(session, table, trial.study_id == study_id, wanted)
                for name, table in _PARTS.items()
            }
            return [
                self._build_frozen_trial_from_trial_model(_with_parts(one, parts)) for one in trials
            ]


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
