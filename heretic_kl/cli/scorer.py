"""`heretic-kl scorer`: a new scorer from a template, and the laws that every scorer keeps."""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal

from heretic_kl.cli.command import SUMMARIES, Command
from heretic_kl.cli.output import observing, write, writes_json
from heretic_kl.config import ProgramSettings, read_settings
from heretic_kl.config.tables import Text, setting
from heretic_kl.errors import ConfigError, ScorerError
from heretic_kl.files import expanded

if TYPE_CHECKING:
    from heretic_kl.testing import ScorerContract

TEMPLATE: Final = '''\
"""What this scorer measures, and of which prompts. One file: settings, scorer."""

from pydantic import Field

from heretic_kl.scoring import ResponseRequest, Score, Scorer, ScorerSettings


class NewSettings(ScorerSettings):
    """What a config may set below scorers.NAME.settings."""

    word: str = Field(default="certainly", min_length=1, description="Word that is looked for")


class NewScorer(Scorer[NewSettings]):
    """Share of responses to harmless prompts that hold the word."""

    Settings = NewSettings
    unit = "share"

    def prepare(self, context):
        """Once before any candidate: choose prompts, ask the reference what is needed."""
        self.request = ResponseRequest(context.prompts("harmless"), context.max_response_tokens)

    def requests(self):
        """What is needed of every candidate; the same each time."""
        return [self.request]

    def per_prompt(self, results):
        """One value for each prompt, whose mean is the score; leave it out where there is none."""
        return [float(self.settings.word in text.lower()) for text in results[0].texts]

    def score(self, results):
        """From one result for each request to one score."""
        values = self.per_prompt(results)
        share = sum(values) / len(values)
        return Score(value=share, text=f"{share:.0%}")
'''


class ScorerCommandSettings(ProgramSettings):
    """What is done with which file."""

    headings: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "Scorer": ("action", "file", "scorer_settings"),
        "Output": ("quiet", "debug"),
    }
    shown_first: ClassVar[tuple[str, ...]] = ("Scorer", "Output")

    action: Literal["new", "test"] | None = setting(
        None, "new writes a template, test checks a scorer against the laws (required)"
    )
    file: Text | None = setting(
        None, "File of the scorer, FILE:CLASS or the name of a built-in one (required)"
    )
    scorer_settings: Text = setting(
        "{}", "Settings to test it with, as a JSON object", metavar="JSON", short="settings"
    )


def run(words: Sequence[str]) -> int:
    """Write or test a scorer as the command line says; return the exit code."""
    settings = read_settings(ScorerCommandSettings, words)
    if settings.action is None or settings.file is None:
        raise ConfigError("say what to do with which file: scorer new FILE, or scorer test FILE")
    if settings.action == "new":
        return _new(expanded(settings.file))
    try:
        values = json.loads(settings.scorer_settings)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise ConfigError(f"--settings must be a JSON object, got {settings.scorer_settings!r}")
    return _test(settings.file, values)


def _new(path: Path) -> int:
    from heretic_kl.events import Result

    if path.suffix != ".py":
        raise ConfigError(f"a scorer is a Python file: {str(path)!r} does not end in .py")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(TEMPLATE)
    except OSError as error:
        raise ScorerError(f"cannot write {str(path)!r}: {error.strerror}") from error
    with observing() as observer:
        observer(Result("scorer", {"file": str(path)}))
    if not writes_json():
        write(f"{path}: use it as\n\n[scorers.{path.stem}]\nuse = {json.dumps(str(path))}")
        write(f'role = "monitor"\n\nand test it with `heretic-kl scorer test {path}`')
    return 0


def _test(use: str, settings: Mapping[str, Any]) -> int:
    from heretic_kl.events import Result
    from heretic_kl.scoring import build_scorer
    from heretic_kl.testing import ScorerContract

    build_scorer("tested", use, settings)  # what is wrong with the file or settings is one line
    contract = type("Contract", (ScorerContract,), {"use": use, "settings": settings})()
    broken: dict[str, str] = {}
    with observing() as observer:
        for law in _laws():
            problem = _problem(contract, law)
            if problem is not None:
                broken[law] = problem
            if not writes_json():
                write(f"{'ok    ' if problem is None else 'BROKEN'}  {law.replace('_', ' ')}")
                if problem is not None:
                    write(f"        {problem}")
        laws = [law for law in _laws() if law not in broken]
        observer(Result("scorer", {"use": use, "kept": laws, "broken": broken}))
    if broken:
        raise ScorerError(f"scorer {use!r} breaks {len(broken)} of {len(list(_laws()))} laws")
    return 0


def _laws() -> Iterator[str]:
    """The names of the contract's laws, without `test_`."""
    from heretic_kl.testing import ScorerContract

    return (name[len("test_") :] for name in vars(ScorerContract) if name.startswith("test_"))


def _problem(contract: ScorerContract, law: str) -> str | None:
    """How the scorer breaks a law, in a line; None: it keeps it."""
    test = getattr(contract, f"test_{law}")
    try:
        test()
    except Exception as error:  # a plug-in may raise anything
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(str(error).split()) or (test.__doc__ or "").strip()
        return f"{type(error).__name__}: {text} ({Path(frame.filename).name}:{frame.lineno})"
    return None


COMMAND = Command(
    "scorer new|test FILE [--settings JSON]",
    f"{SUMMARIES['scorer']}: `new` writes a file to begin with, `test` runs the laws of "
    "heretic_kl.testing.ScorerContract on a scorer, without a model. The file's code is run.",
    run,
    ScorerCommandSettings,
    first_words=("--action", "--file"),
)
