"""A study read back without its model, also while a search runs. Measures and changes no trial."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial

from heretic_kl.errors import StudyError
from heretic_kl.files import expanded, is_file_name, without_home
from heretic_kl.scoring import Role, Score, ScorerSpec
from heretic_kl.search.fingerprint_check import BATCH_SIZE, stored_fingerprint
from heretic_kl.search.pareto import pareto_front
from heretic_kl.search.records import (
    UNEDITED,
    TrialRecord,
    one_line,
    read_record,
    scores_from_json,
    scores_to_json,
    tested_prefix,
)
from heretic_kl.search.space import SearchSpace
from heretic_kl.search.storage import JOURNAL_SUFFIX, storage_for_reading, study_names
from heretic_kl.search.storage.backends import NOT_AS_WRITTEN
from heretic_kl.search.storage.pieces import keep, whole

RUN = "heretic-kl:run"
"""Attribute of a study: what its latest run was made with."""


@dataclass(frozen=True)
class StoredStudy:
    """A study as its storage holds it."""

    name: str
    folder: Path | None
    """Of its journal file; None: a storage URL holds it."""
    settings: Mapping[str, Any]
    """Of its latest run, JSON-ready; where it is stored and what was picked are left out."""
    space: SearchSpace
    roles: Mapping[str, Role]
    """Of its objectives, in order."""
    records: tuple[TrialRecord, ...]
    """Every trial that is over, by number."""
    baseline: Mapping[str, Score]
    """The unedited model on the validation prompts."""
    test_baseline: Mapping[str, Score] | None
    """The same on the test prompts, if they were measured."""
    tested: Mapping[int, Mapping[str, Score]]
    """Scores on the test prompts of every trial that has them, by trial number."""
    trials: tuple[FrozenTrial, ...] = field(default=(), repr=False, compare=False)
    """The records as Optuna keeps them."""
    batch_size: int | None = None
    """What it was begun with."""
    scorer_code: Mapping[str, str] = field(default_factory=dict)
    """sha256 of the code that its scores were measured with, by scorer."""
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    """All that makes its scores comparable."""

    @property
    def front(self) -> tuple[TrialRecord, ...]:
        """The Pareto front, by the first objective."""
        return pareto_front(self.records)


def keep_run(
    storage: BaseStorage,
    name: str,
    settings: Mapping[str, Any],
    space: SearchSpace,
    objectives: Sequence[ScorerSpec],
    baseline: Mapping[str, Score],
) -> None:
    """Write into a study what `read_study` needs; the latest run's settings stand."""
    content = {
        "settings": settings,
        "space": asdict(space),
        "roles": {spec.name: spec.role for spec in objectives},
        "baseline": scores_to_json(baseline),
    }
    study = optuna.load_study(study_name=name, storage=storage)
    keep(study, RUN, without_home(json.dumps(content)))


def read_study(
    study: str | None, folder: Path, url: str | None = None, *, test_tokens: int | None = None
) -> StoredStudy:
    """The study of this name, or in this journal file.

    Args:
        study: a name or the path of a journal file; None: the only one of a storage, or the
            newest of a folder.
        folder: where journal files are kept.
        url: an Optuna storage URL in place of the folder.
        test_tokens: which test scores are read, by N of their KL; None: those of the latest run's.

    Raises:
        StudyError: there is none, or it cannot be read.
    """
    if url is None:
        journal = _journal(study, folder)
        name, folder_of_journal = journal.name.removesuffix(JOURNAL_SUFFIX), journal.parent
        storage = storage_for_reading(journal)
    else:
        storage, folder_of_journal = storage_for_reading(url), None
        name = _only(study, storage)
    if name not in study_names(storage):
        raise StudyError(f"there is no study {name!r}; {_names_in(storage)}")
    try:
        return _read(storage, name, folder_of_journal, test_tokens)
    except NOT_AS_WRITTEN as error:
        what = f"study {name!r} is damaged, or another program wrote it"
        raise StudyError(f"{what}: {one_line(error)[:200]}") from error


def _read(
    storage: BaseStorage, name: str, folder: Path | None, test_tokens: int | None
) -> StoredStudy:
    study = optuna.load_study(study_name=name, storage=storage)
    attributes = study.user_attrs
    if RUN not in attributes:
        raise StudyError(
            f"study {name!r} does not say what it was made with: run its command once more"
        )
    content = json.loads(whole(attributes, RUN))
    space = SearchSpace(
        layers=content["space"]["layers"],
        components=tuple(content["space"]["components"]),
        norm=content["space"]["norm"],
    )
    settings = content["settings"]
    tokens = test_tokens or settings.get("test_kl_tokens")
    prefix = tested_prefix(None if tokens == settings.get("kl_tokens") else tokens)
    tested = {
        int(key.removeprefix(prefix)): scores_from_json(whole(attributes, key))
        for key in attributes
        if key.startswith(prefix)
    }
    fingerprint = stored_fingerprint(attributes) or {}
    trials = tuple(t for t in study.get_trials(deepcopy=False) if t.state.is_finished())
    return StoredStudy(
        name=name,
        folder=folder,
        settings=settings,
        space=space,
        roles=content["roles"],
        records=tuple(read_record(trial, space) for trial in trials),
        baseline=scores_from_json(content["baseline"]),
        test_baseline=tested.pop(UNEDITED, None),
        tested=tested,
        trials=trials,
        batch_size=attributes.get(BATCH_SIZE),
        scorer_code={n: table["code"] for n, table in fingerprint.get("scorers", {}).items()},
        fingerprint=fingerprint,
    )


def _journal(study: str | None, folder: Path) -> Path:
    if study is not None and study.endswith(JOURNAL_SUFFIX):
        path = expanded(study)
        if not path.is_file():
            raise StudyError(f"there is no study file {study!r}")
        return path
    journals = {
        path.name.removesuffix(JOURNAL_SUFFIX): path for path in folder.glob(f"*{JOURNAL_SUFFIX}")
    }
    if not journals:
        raise StudyError(f"there is no study in {str(folder)!r}; --study-dir names another folder")
    if study is None:
        return max(journals.values(), key=lambda path: path.stat().st_mtime)
    if study not in journals:
        raise StudyError(f"there is no study {study!r} in {str(folder)!r}{_hint(study, journals)}")
    return journals[study]


def _only(study: str | None, storage: BaseStorage) -> str:
    names = study_names(storage)
    if study is None and len(names) != 1:
        raise StudyError(f"name one study: {_names_in(storage)}")
    name = study or names[0]
    if not is_file_name(name):  # files of its name are written
        raise StudyError(f"study {name!r} has a name that no file could have: rename it")
    return name


def _names_in(storage: BaseStorage) -> str:
    names = study_names(storage)
    return f"the storage holds {', '.join(names) or 'none'}"


def _hint(study: str, names: Mapping[str, Path]) -> str:
    nearest = difflib.get_close_matches(study, names, n=1)
    return f"; did you mean {nearest[0]}?" if nearest else f"; there are {', '.join(names)}"
