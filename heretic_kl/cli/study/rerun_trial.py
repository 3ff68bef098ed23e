"""A trial of a study, run again beside it: nothing is written into the study itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from heretic_kl.errors import SelectionError
from heretic_kl.ranks import is_first

if TYPE_CHECKING:
    from heretic_kl.config import Settings
    from heretic_kl.events import Observer
    from heretic_kl.run import Session
    from heretic_kl.run.parts import RunParts
    from heretic_kl.search import StoredStudy, TrialRecord


def measured_with_other_code(study: StoredStudy, settings: Settings) -> bool:
    """Whether other scorers measure than measured the study, or their code is another by now."""
    from heretic_kl.scoring import scorer_code

    tables = {name: table for name, table in settings.scorers.items() if table.enabled}
    return {n: scorer_code(table.use or n) for n, table in tables.items()} != study.scorer_code


@contextmanager
def session_beside(
    study: StoredStudy,
    record: TrialRecord,
    settings: Settings,
    observer: Observer,
    *,
    measures: bool,
) -> Iterator[Session]:
    """A session that runs as the study did, on a study of its own that is thrown away.

    What the study's runs computed of the original model is read. Where model or settings are not
    those of the study, a notice says what differs.

    Args:
        study: what the trial is one of; it may be searched meanwhile.
        record: the trial; what it learned is brought along.
        settings: of the study.
        observer: told what happens.
        measures: the study's scorers measure; otherwise they need nothing.

    Raises:
        HereticKLError: see `Session`; or the trial has no edit, or what was learned is missing.
    """
    if record.edit is None:
        raise SelectionError(f"trial {record.number} was interrupted and has no edit")

    from heretic_kl.run import Session
    from heretic_kl.run.saving.rebuild import check_fits
    from heretic_kl.run.setup.open_run import Beside
    from heretic_kl.search import PlanStore, ReferenceStore, storage_for_reading

    url = settings.storage if is_first() else None
    place = settings.study_dir, study.name, None if url is None else storage_for_reading(url)
    beside = Beside(ReferenceStore(*place, reads_only=True), measures)
    with TemporaryDirectory(prefix="heretic-kl-") as folder:
        anew = settings.model_copy(
            update={
                "study_dir": Path(folder),
                "study_name": None,
                "storage": None,
                "batch_size": settings.batch_size or study.batch_size or 0,
            }
        )
        with Session(anew, observer, beside=beside) as session:
            _say_what_differs(study, session.parts)
            if record.refinement is not None:
                plan = PlanStore(*place).load(record.refinement.sha256)
                check_fits(plan, session.parts)
                session.parts.plans.save(plan)
            yield session


def _say_what_differs(study: StoredStudy, run: RunParts) -> None:
    """Compare what an edit and its responses depend on: scorers only if they count refusals."""
    from heretic_kl.search import changes

    others = {spec.name for spec in run.suite.specs} - run.suite.refusal_scorers
    stored, here = (
        {
            **{name: fact for name, fact in facts.items() if name != "scorers' data"},
            "scorers": {n: t for n, t in facts.get("scorers", {}).items() if n not in others},
        }
        for facts in (study.fingerprint, run.identity)
    )
    if different := changes(stored, here):
        run.tell.notice(
            f"study {study.name} was made with another model, tokenizer or other settings "
            f"({', '.join(different)}): the edit may do something else than its trial"
        )
