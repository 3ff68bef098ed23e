"""Dispatch to a command, and exit codes. Imports nothing heavy before a command needs it.

Exit codes: 0 done, 1 an error of one line (`HereticKLError`), 2 a wrong setting or flag,
70 an internal error, 130 interrupted (Ctrl+C), 141 the reader of the output went away.
"""

import difflib
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence

from heretic_kl._version import __version__
from heretic_kl.cli.command import PROGRAM, SUMMARIES, Command, wants_help
from heretic_kl.config.retired import RETIRED_COMMANDS
from heretic_kl.errors import ConfigError, HereticKLError

INTERNAL_ERROR = 70


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (without the program's name); return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    kept_on_interrupt = ""
    try:
        if words[:1] in (["-V"], ["--version"]):
            print(f"{PROGRAM} {__version__}")
            return 0
        named = bool(words) and not words[0].startswith("-")
        command = _command(words.pop(0) if named else "optimize")
        kept_on_interrupt = command.kept
        asked, everything = wants_help(words)
        if asked:
            print(command.help(everything=everything, commands=not named))
        code = 0 if asked else command.run(words)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        more = (
            f"; {kept_on_interrupt} in the study, and the same command continues it"
            if kept_on_interrupt
            else ""
        )
        print(f"\n{PROGRAM}: interrupted{more}", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # `heretic-kl --help | head`: nobody reads on, which is no error. Without a new target
        # Python would report the same broken pipe again when it flushes at exit.
        _drop_stdout()
        return 141
    except Exception as error:
        return _report(error, kept_on_interrupt, debug=_debugging(words))


def _command(name: str) -> Command:
    if name not in SUMMARIES:
        raise ConfigError(f"unknown command {name!r}; {_hint(name)}")
    command: Command = importlib.import_module(f"{__package__}.{name}").COMMAND
    return command


def _hint(name: str) -> str:
    if name in RETIRED_COMMANDS:
        return f"it is now {RETIRED_COMMANDS[name]}"
    nearest = difflib.get_close_matches(name, SUMMARIES, n=1)
    return f"did you mean {nearest[0]}?" if nearest else f"a model is given as --model {name}"


def _report(error: Exception, kept_on_interrupt: str, *, debug: bool) -> int:
    """Print an error in one line for each thing that is wrong; return the exit code."""
    if debug:
        traceback.print_exception(error)
    if isinstance(error, HereticKLError):
        lines, code = str(error).splitlines(), error.exit_code
    elif isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        more = f"; {kept_on_interrupt}" if kept_on_interrupt else ""
        lines, code = [f"{error.strerror or error}{where}{more}"], 1
    else:
        first = (str(error).splitlines() or [""])[0]
        hint = "" if debug else "; --debug shows the traceback"
        lines = [f"internal error, please report it: {type(error).__name__}: {first}{hint}"]
        code = INTERNAL_ERROR
    for line in lines:
        print(f"{PROGRAM}: error: {line}", file=sys.stderr)
    return code


def _debugging(words: Sequence[str]) -> bool:
    """Whether tracebacks are wanted, also where the settings could not be read."""
    variable = os.environ.get("HERETIC_KL_DEBUG", "").lower()
    return "--debug" in words or variable in ("1", "true", "yes", "on")


def _drop_stdout() -> None:
    try:
        target = os.open(os.devnull, os.O_WRONLY)
        os.dup2(target, sys.stdout.fileno())
    except (OSError, ValueError):  # stdout is closed, or is no file: then nothing is flushed
        pass
