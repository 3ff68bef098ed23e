"""Everything a user can mend, as exceptions of one line each. Imports nothing of ours.

A `HereticKLError` reaches the terminal as its message alone: no traceback, exit code 1
(2 for `ConfigError`, 3 for `NoTrialError`, 5 for `StorageLostError`). Its message names what is
wrong, the offending value and what to do.

    HereticKLError
    ├── ConfigError             a setting, a flag, an environment variable, a config file
    ├── PromptError             a prompt source, its column, its split
    ├── ModelError
    │   ├── ModelNotFoundError  no such folder, file or hub id
    │   └── UnsupportedModelError  a layout, a format or a chat template we cannot handle
    ├── ScorerError             a plug-in that cannot be found, built or run
    ├── MeasurementError        NaN logits, an empty mask, mismatched references
    ├── StudyError              a storage that cannot be read or belongs to another study
    │   └── StorageLostError    a connection to a storage that was lost and did not come back
    ├── SessionError            a session used outside its `with` block
    ├── SelectionError          a pick rule that is unknown
    │   └── NoTrialError        a pick rule that no trial meets
    ├── ReproductionError       a reproduction file that cannot be read or trusted
    ├── ExportError             a model that could not be saved or did not verify
    ├── UploadError             the hub refuses, cannot be reached, or is not asked for good reason
    │   └── NotEmptyError       a repository that holds files, which nobody agreed to replace
    ├── CacheError              no writable cache folder
    └── DemoModelError          the demo model could not be fetched or built
"""

import re

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class HereticKLError(Exception):
    """Base of every error that a user can mend; `exit_code` is the process's."""

    exit_code = 1


class ConfigError(HereticKLError):
    """A setting is unknown, of the wrong type or out of range."""

    exit_code = 2


class PromptError(HereticKLError):
    """A prompt source cannot be read, or holds no prompts."""


class ModelError(HereticKLError):
    """A model cannot be used."""


class ModelNotFoundError(ModelError):
    """The model's source does not exist or cannot be reached."""


class UnsupportedModelError(ModelError):
    """The model loads, but its layout or tokenizer is one we cannot handle."""


class ScorerError(HereticKLError):
    """A scorer plug-in cannot be found, configured or run."""


class MeasurementError(HereticKLError):
    """A measurement has no meaning: NaN logits, nothing left to score, another reference."""


class StudyError(HereticKLError):
    """The study's storage cannot be opened, or holds a different study."""


class StorageLostError(StudyError):
    """The connection to a study's storage was lost and did not come back in time."""

    exit_code = 5


class SessionError(HereticKLError):
    """A session is used outside its `with` block."""


class SelectionError(HereticKLError):
    """A pick rule is unknown, or no trial satisfies it."""


class NoTrialError(SelectionError):
    """No trial meets a pick rule; `nearest` is the number of the one that comes nearest."""

    exit_code = 3

    def __init__(self, message: str, nearest: int | None = None) -> None:
        super().__init__(message)
        self.nearest = nearest


class ReproductionError(HereticKLError):
    """A reproduction file cannot be read, or names what a file from elsewhere may not."""


class ExportError(HereticKLError):
    """A model could not be saved, or the saved model does not reproduce the trial."""


class UploadError(HereticKLError):
    """A saved model could not be uploaded; what was saved stays as it is."""


class NotEmptyError(UploadError):
    """The repository holds files: they are replaced if that is said."""


class CacheError(HereticKLError):
    """No cache folder can be written."""


class DemoModelError(HereticKLError):
    """The demo model could not be fetched, checked or built."""


def innermost(error: BaseException) -> str:
    """Return, on one line, what the first of a chain of errors said."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:299] + "…"


def printable(text: str) -> str:
    """Text without control characters but newlines and tabs: a terminal would obey them."""
    return _CONTROL.sub("", text)


def plain_line(text: str, longest: int = 300) -> str:
    """Fit to be shown: no control characters, of a length that can be read."""
    printable = "".join(character if character.isprintable() else "?" for character in text)
    if len(printable) <= longest:
        return printable
    return f"{printable[: longest // 2]}…{printable[1 - longest // 2 :]}"
