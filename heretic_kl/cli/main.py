"""Arguments to a run and its exit code. Imports nothing heavy before a command needs it.

Exit codes: 0 done, 1 an error of one line (`HereticKLError`), 2 a wrong setting or flag,
130 interrupted (Ctrl+C), 141 the reader of the output went away.
"""

import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from heretic_kl._version import __version__
from heretic_kl.errors import ConfigError, HereticKLError

if TYPE_CHECKING:
    from rich.console import Console

    from heretic_kl.config import Settings
    from heretic_kl.events import Observer
    from heretic_kl.report.front_table import FrontRow
    from heretic_kl.run import Session
    from heretic_kl.search import TrialRecord
    from heretic_kl.ui.console import ConsoleObserver

PROGRAM = "heretic-kl"


class Command(NamedTuple):
    """A word after `heretic-kl`."""

    summary: str
    run: Callable[[Sequence[str]], int]  # arguments after the command -> exit code
    kept: str = ""  # what an interrupt or a full disk leaves, for people


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (without the program's name); return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    kept = ""
    try:
        command = _command(words)
        kept = command.kept
        code = command.run(words)
        sys.stdout.flush()
        return code
    except HereticKLError as error:
        for line in str(error).splitlines():
            print(f"{PROGRAM}: error: {line}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        more = f"; {kept} in the study, and the same command continues it" if kept else ""
        print(f"\n{PROGRAM}: interrupted{more}", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # `heretic-kl --help | head`: nobody reads on, which is no error. Without a new target
        # Python would report the same broken pipe again when it flushes at exit.
        _drop_stdout()
        return 141
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        more = f"; {kept}" if kept else ""
        print(f"{PROGRAM}: error: {error.strerror or error}{where}{more}", file=sys.stderr)
        return 1


def _command(words: list[str]) -> Command:
    """Take the command's name off the words; flags alone are those of `run`."""
    name = "run"
    if words and not words[0].startswith("-"):
        name = words.pop(0)
        if name not in COMMANDS:
            raise ConfigError(_unknown_command(name))
    elif words[:1] in (["-V"], ["--version"]):
        return Command("", _version)
    return COMMANDS[name]


def _version(words: Sequence[str]) -> int:
    print(f"{PROGRAM} {__version__}")
    return 0


def _search(words: Sequence[str]) -> int:
    from heretic_kl.config import load_settings

    if _asks_for_help(words):
        print(_help("run"))
        return 0
    settings = load_settings(words)
    if settings.model is None:
        raise ConfigError(
            "no model given: name one with --model (a hub id, a local folder or a .gguf file), "
            f"or try `{PROGRAM} demo`"
        )
    return _run(settings, demo=False)


def _demo(words: Sequence[str]) -> int:
    from heretic_kl.config import load_settings
    from heretic_kl.config.presets import DEMO_PRESET

    if _asks_for_help(words):
        print(_help("demo"))
        return 0
    if any(word.partition("=")[0] == "--model" for word in words):
        raise ConfigError(
            f"`{PROGRAM} demo` runs on the demo model; for another one leave out the word demo"
        )
    return _run(load_settings(words, defaults=DEMO_PRESET), demo=True)


def _score(words: Sequence[str]) -> int:
    if _asks_for_help(words):
        from heretic_kl.cli.score_arguments import score_help

        print(score_help(_help_width()))
        return 0
    from heretic_kl.cli.score import run_score

    return run_score(words)


def _inspect(words: Sequence[str]) -> int:
    from heretic_kl.cli.inspect import ABOUT, USAGE, run_inspect

    if _asks_for_help(words):
        print(f"{USAGE}\n{ABOUT}")
        return 0
    return run_inspect(words)


def _config(words: Sequence[str]) -> int:
    if _asks_for_help(words):
        print(f"usage: {PROGRAM} config\n\n{COMMANDS['config'].summary}.")
        return 0
    if words:
        raise ConfigError(f"unexpected argument {words[0]!r}; `{PROGRAM} config` takes none")
    print(default_configuration(), end="")
    return 0


def default_configuration() -> str:
    """The text of config.default.toml: every setting, the scorers' own included."""
    from heretic_kl.config import DEFAULT_SCORERS
    from heretic_kl.config.rendering import default_config_toml
    from heretic_kl.scoring import documented_settings

    return default_config_toml({name: documented_settings(name) for name in DEFAULT_SCORERS})


def _run(settings: "Settings", *, demo: bool) -> int:
    """Search, choose and save, as `settings` say; with `demo`, on the demo model."""
    interactive = settings.pick is None and sys.stdin.isatty() and sys.stdout.isatty()
    if settings.save is not None and settings.pick is None and not interactive:
        raise ConfigError("--save without a terminal needs --pick, for instance --pick knee")
    from heretic_kl.run import Session
    from heretic_kl.search import quiet_optuna
    from heretic_kl.ui.console import make_observer, print_front
    from heretic_kl.ui.terminal import make_console

    quiet_optuna()
    results = make_console()
    with make_observer(quiet=settings.quiet, results=results) as observer:
        if demo:
            settings = settings.model_copy(update={"model": _demo_model(observer)})
        with Session(settings, observer) as session:
            session.search()
            session.test()
            if interactive:
                return _ask(settings, session, observer, results)
            observer.settle()
            print_front(results, _front_rows(session))
            if settings.pick is not None:
                record = session.pick(settings.pick)
                session.test_one(record.number)
                if settings.save is not None:
                    form, overwrite = settings.save_as, settings.overwrite
                    session.save(record, settings.save, form, overwrite=overwrite)
            return 0


def _front_rows(session: "Session") -> "Sequence[FrontRow]":
    from heretic_kl.report.front_table import front_rows
    from heretic_kl.search import UNEDITED

    return front_rows(
        session.front,
        session.tested,
        baseline=session.baseline,
        test_baseline=session.test_scores(UNEDITED),
    )


def _ask(
    settings: "Settings", session: "Session", observer: "ConsoleObserver", results: "Console"
) -> int:
    """Let a person choose what becomes of the front."""
    from heretic_kl.ui.picker import Picker

    name = Path(str(settings.model)).stem

    def default_folder(record: "TrialRecord") -> Path:
        return settings.save or Path(f"{name}-edited-trial-{record.number}")

    picker = Picker(
        session,
        results,
        default_folder=default_folder,
        settle=observer.settle,
        response_tokens=max(settings.max_response_tokens, 200),
    )
    return picker.run()


def _demo_model(observer: "Observer") -> str:
    from heretic_kl.demo import ensure_demo_model
    from heretic_kl.events import Notice

    return str(ensure_demo_model(notify=lambda message: observer(Notice(message))))


TRIALS_KEPT = "finished trials are kept"
COMMANDS = {
    "run": Command("Search for edits of --model (also without this word)", _search, TRIALS_KEPT),
    "demo": Command(
        "The same on the demo model, with settings for a short run", _demo, TRIALS_KEPT
    ),
    "score": Command("Measure any models against a reference (flags: score --help)", _score),
    "inspect": Command("Show a model's layers and sites, and what a run would edit", _inspect),
    "config": Command("Print the default configuration, documented, for a config.toml", _config),
}


def _asks_for_help(words: Sequence[str]) -> bool:
    return any(word in ("-h", "--help") for word in words)


def _help(command: str) -> str:
    from heretic_kl.config.presets import DEMO_PRESET
    from heretic_kl.config.rendering import help_entry, settings_help

    width = _help_width()
    usage = "--model MODEL [--SETTING VALUE ...]" if command == "run" else "[--SETTING VALUE ...]"
    lines = [
        f"usage: {PROGRAM} {'' if command == 'run' else command + ' '}{usage}",
        "",
        "Finds the edit of a language model that removes a behaviour (by default: refusing) and",
        "changes everything else least, measured by teacher-forced KL divergence.",
        "",
        "Commands:",
        *(line for n, c in COMMANDS.items() for line in help_entry(n, c.summary, width)),
        "",
        "Options:",
        *help_entry("-h, --help", "Show this", width),
        *help_entry("-V, --version", "Show the version", width),
        *help_entry("--config FILE", "Settings file (default: config.toml if it exists)", width),
        "",
        settings_help(DEMO_PRESET if command == "demo" else None, width),
        "",
        "[x] is the default. Lists: --edit.components attention,mlp or a JSON array; null unsets",
        "an optional setting. The command line goes over environment variables",
        "(HERETIC_KL_KL_TOKENS, HERETIC_KL_EDIT__NORM), these over the settings file.",
    ]
    return "\n".join(lines)


def _help_width() -> int:
    return max(60, min(shutil.get_terminal_size((100, 24)).columns, 100))


def _unknown_command(name: str) -> str:
    import difflib

    nearest = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"a model is given as --model {name}"
    return f"unknown command {name!r}; {hint}"


def _drop_stdout() -> None:
    try:
        target = os.open(os.devnull, os.O_WRONLY)
        os.dup2(target, sys.stdout.fileno())
    except (OSError, ValueError):  # stdout is closed, or is no file: then nothing is flushed
        pass
