"""What makes the trials of a study comparable, and what differs where they are not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import optuna
from optuna.storages import BaseStorage

from heretic_kl.errors import StudyError
from heretic_kl.files import without_home
from heretic_kl.ranks import on_first
from heretic_kl.search.storage.pieces import keep, whole

FINGERPRINT = "heretic-kl:fingerprint"
BATCH_SIZE = "heretic-kl:batch-size"
VERSIONS = "heretic-kl:versions"
"""Attributes of a study."""


def check_before(storage: BaseStorage, name: str, fingerprint: Mapping[str, Any]) -> None:
    """Compare a study that is there with what makes scores comparable; write nothing.

    Raises:
        StudyError: they differ.
    """
    if name in optuna.get_all_study_names(storage):
        study = optuna.load_study(study_name=name, storage=storage)
        if FINGERPRINT in study.user_attrs:
            check_fingerprint(study, fingerprint)


def check_fingerprint(study: optuna.Study, fingerprint: Mapping[str, Any]) -> None:
    """Tie a new study to what makes its scores comparable, or compare it with what is stored.

    Raises:
        StudyError: they differ.
    """
    stored = stored_fingerprint(study.user_attrs)
    if stored is None:
        keep(study, FINGERPRINT, json.dumps(_as_stored(fingerprint), sort_keys=True))
        return
    if different := changes(stored, fingerprint):
        raise StudyError(
            f"study {study.study_name!r} was made with other settings "
            f"({', '.join(different)}): its scores cannot be compared; use those settings or "
            "another --study-name"
        )


def stored_fingerprint(attributes: Mapping[str, Any]) -> dict[str, Any] | None:
    """The fingerprint in a study's attributes; None: there is none."""
    text = whole(attributes, FINGERPRINT)
    return None if text is None else dict(json.loads(without_home(text)))


def changes(stored: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> tuple[str, ...]:
    """What differs between a stored fingerprint and that of a run, in words."""
    # Studies that do not say so were made with the only version there was.
    return tuple(differences({"optuna": "5", **stored}, _as_stored(fingerprint)))


def _as_stored(fingerprint: Mapping[str, Any]) -> Any:
    facts = {**fingerprint, "optuna": optuna.__version__.split(".")[0]}
    return json.loads(without_home(json.dumps(facts)))


def other_versions(study: optuna.Study, versions: Mapping[str, str]) -> str:
    """Keep the versions that a study is begun with; later, what differs from them, in words.

    A study whose trials were begun without them never says what differs.
    """
    stored = study.user_attrs.get(VERSIONS)
    if stored is None or not versions:
        if versions and not study.get_trials(deepcopy=False):
            study.set_user_attr(VERSIONS, dict(versions))
        return ""
    return ", ".join(differences(dict(stored), dict(versions)))


def differences(stored: Any, wanted: Any, name: str = "") -> Iterator[str]:
    """What differs between two fingerprints, in words: `edit.norm: row there, none here`."""
    if isinstance(stored, dict) and isinstance(wanted, dict):
        for key in sorted(stored.keys() | wanted.keys()):
            inner = f"{name}.{key}" if name else key
            yield from differences(stored.get(key), wanted.get(key), inner)
    elif stored != wanted:
        values = f": {_shown(stored)} there, {_shown(wanted)} here"
        yield name + (values if len(values) < 100 else "")


@on_first
def stored_batch_size(storage: BaseStorage, name: str) -> int | None:
    """The batch size that a study was begun with; None where there is no such study.

    Raises:
        StudyError: the storage cannot be read.
    """
    try:
        if name not in optuna.get_all_study_names(storage):
            return None
        attributes = optuna.load_study(study_name=name, storage=storage).user_attrs
    except Exception as error:  # each storage raises its own
        raise StudyError(f"cannot open study {name!r}: {reason(error)}") from error
    stored = attributes.get(BATCH_SIZE)
    return None if stored is None else int(stored)


def _shown(value: Any) -> str:
    """A value of a fingerprint, hashes cut short."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text[:8] if len(text) == 64 else text or "none"


def reason(error: Exception) -> str:
    """The first line of whatever a storage raised."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
