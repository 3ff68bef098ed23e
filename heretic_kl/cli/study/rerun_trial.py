"""A trial of a study, run again beside it: nothing is written into the study itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from heretic_kl.errors import SelectionError

if TYPE_CHECKING:
    from heretic_kl.config import Settings
    from heretic_kl.events import Observer
    from heretic_kl.run import Session
    from heretic_kl.search import StoredStudy, TrialRecord


def measured_with_other_code(study: StoredStudy, settings: Settings) -> bool:
    """Whether other scorers measure than measured the study, or their code is another by now."""
    from heretic_kl.scoring import scorer_code

    tables = {name: table for name, table in settings.scorers.items() if table.enabled}
    return {n: scorer_code(table.use or n) for n, table in tables.items()} != study.scorer_code


@contextmanager
def session_beside(
    study: StoredStudy, record: TrialRecord, settings: Settings, observer: Observer
) -> Iterator[Session]:
    """A session that runs as the study did, on a study of its own that is thrown away.

    Args:
        study: what the trial is one of; it may be searched meanwhile.
        record: the trial; what it learned is brought along.
        settings: of the study.
        observer: told what happens.

    Raises:
        HereticKLError: see `Session`; or the trial has no edit, or what was learned is missing.
    """
    if record.edit is None:
        raise SelectionError(f"trial {record.number} was interrupted and has no edit")

    from heretic_kl.run import Session
    from heretic_kl.search import PlanStore, storage_for_reading

    url = settings.storage
    with TemporaryDirectory(prefix="heretic-kl-") as folder:
        anew = settings.model_copy(
            update={
                "study_dir": Path(folder),
                "study_name": None,
                "storage": None,
                "batch_size": settings.batch_size or study.batch_size or 0,
            }
        )
        with Session(anew, observer) as session:
            if record.refinement is not None:
                shared = None if url is None else storage_for_reading(url)
                plans = PlanStore(settings.study_dir, study.name, shared)
                session.parts.plans.save(plans.load(record.refinement.sha256))
            yield session
