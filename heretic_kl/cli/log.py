"""The log file of a run, beside its study: versions, settings, events, tracebacks. No secrets."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import traceback
from logging.handlers import MemoryHandler
from typing import Final

from heretic_kl.cli.output import write_error
from heretic_kl.config import Settings
from heretic_kl.errors import HereticKLError, printable
from heretic_kl.events import Event, Notice, Observer, StageAdvanced, StudyOpened, TrialFinished
from heretic_kl.files import redacted

KEPT_LINES: Final = 10_000
"""So many lines wait for the study's name, which is known once the model is calibrated."""


class RunLog:
    """Writes what happens to `STUDY.log` in the folder of studies, and passes it on.

    Args:
        settings: of the run; with `debug` the tracebacks of failed trials go to stderr too.
        observer: told every event.
    """

    def __init__(self, settings: Settings, observer: Observer) -> None:
        self._settings, self._observer = settings, observer
        self._logger = logging.Logger("heretic_kl", logging.INFO)
        self._memory = MemoryHandler(KEPT_LINES, logging.CRITICAL + 1, flushOnClose=False)
        self._handler: logging.Handler = self._memory
        self._logger.addHandler(self._memory)

    def __enter__(self) -> RunLog:
        from heretic_kl.export import installed_versions, machine

        versions = {**installed_versions(), "machine": machine()}
        self._logger.info("versions %s", json.dumps(versions, default=str, ensure_ascii=False))
        self._logger.info("settings %s", self._settings.model_dump_json())
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, HereticKLError | KeyboardInterrupt):
            self._logger.error("ended by %s: %s", type(error).__name__, error)
        elif error is not None:
            self._logger.error("ended by an error\n%s", "".join(traceback.format_exception(error)))
        else:
            self._logger.info("ended")
        self._handler.close()

    def __call__(self, event: Event) -> None:
        """Log an event, then pass it on."""
        if isinstance(event, StudyOpened):
            self._open(event.name)
        if isinstance(event, Notice):
            self._logger.warning("notice %s", event.message)
        elif not isinstance(event, StageAdvanced):
            self._logger.info("%s %s", type(event).__name__, _facts(event))
        self._observer(event)
        if isinstance(event, TrialFinished):
            self._keep_traceback(event)

    def _keep_traceback(self, event: TrialFinished) -> None:
        text = event.record.traceback
        if text is not None:
            self._logger.error("trial %d failed\n%s", event.record.number, text)
            if self._settings.debug:
                write_error(text.rstrip())

    def _open(self, study: str) -> None:
        """Open the file and write what was kept; a folder that is read-only costs the log alone."""
        folder = self._settings.study_dir
        name = re.sub(r"[^\w.-]", "_", study)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = logging.FileHandler(folder / f"{name}.log", encoding="utf-8")
        except OSError as error:
            self._observer(Notice(f"no log file is written: {error.strerror}"))
            return
        file.setFormatter(_Redacting("%(asctime)s %(levelname)s %(message)s"))
        self._memory.setTarget(file)
        self._memory.flush()
        self._logger.removeHandler(self._memory)
        self._logger.addHandler(file)
        self._handler = file


class _Redacting(logging.Formatter):
    """Leaves out passwords, tokens, the home folder and control characters."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(redacted(super().format(record)))


def _facts(event: Event) -> str:
    """The fields of an event in one line; of a trial, its number, state and scores."""
    if isinstance(event, TrialFinished):
        record = event.record
        scores = {name: score.text for name, score in record.scores.items()}
        return json.dumps(
            {"trial": record.number, "parameters": record.parameters, "scores": scores},
            default=str,
            ensure_ascii=False,
        )
    facts = {field.name: getattr(event, field.name) for field in dataclasses.fields(event)}
    return json.dumps(
        {name: _plain(value) for name, value in facts.items()}, default=str, ensure_ascii=False
    )


def _plain(value: object) -> object:
    """Scores as their text, records as their number, the rest as it is."""
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    return getattr(value, "text", getattr(value, "number", value))
