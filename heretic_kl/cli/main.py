"""Dispatch to a command, and exit codes. Imports nothing heavy before a command needs it.

Exit codes, which docs/commands.md explains: 0 done, 1 an error of one line (`HereticKLError`),
2 a wrong setting or flag, 3 no trial meets the pick rule, 4 a model that is not reproduced,
5 a storage that cannot be reached any more, 70 an internal error, 130 interrupted (Ctrl+C),
141 the reader of the output went away, 143 terminated (TERM).
"""

import difflib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence

from heretic_kl import ranks
from heretic_kl._version import EVENTS_VERSION, __version__
from heretic_kl.cli.command import PROGRAM, SUMMARIES, Command, load_command, wants_help
from heretic_kl.cli.output import JSON_FLAG, Output, json_lines, take_json_flag, write, write_error
from heretic_kl.cli.signals import Terminated, stopping_on_term
from heretic_kl.config.retired import RETIRED_COMMANDS
from heretic_kl.errors import ConfigError, HereticKLError, StorageLostError, plain_line
from heretic_kl.files import without_secrets

TOGETHER = ("optimize", "worker", "score")
"""Commands that several processes of `torchrun` run as one."""
OTHERS_WAIT = 10.0
"""Seconds before a process that is not the first one says what is wrong: the first one says it."""
INTERNAL_ERROR = 70
BROKEN_PIPE = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (without the program's name); return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    errors: list[str] = []
    if os.environ.get("RANK", "0") != "0" and ranks.launched() > 1:
        _drop_stdout()
    with json_lines() as output:
        with stopping_on_term():
            code = _run(words, output, errors)
        if code and ranks.count() > 1:  # without waiting for what the others might still send
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        if output.as_json and code != BROKEN_PIPE:
            try:
                _end_events(errors, code)
            except BrokenPipeError:
                _drop_stdout()
                return BROKEN_PIPE
    return code


def _run(words: list[str], output: Output, errors: list[str]) -> int:
    """Run a command; return the exit code. What went wrong is printed, and added to `errors`."""
    kept_on_interrupt = ""
    try:
        if words[:1] in (["-V"], ["--version"]):
            write(f"{PROGRAM} {__version__}")
            return 0
        named = bool(words) and not words[0].startswith("-")
        asked, everything = wants_help(words)
        output.as_json = JSON_FLAG in words and not asked  # until the command is known
        name = words.pop(0) if named else "optimize"
        command = _command(name)
        kept_on_interrupt = command.kept
        if asked:
            write(command.help(everything=everything, commands=not named))
            code = 0
        else:
            names_file = command.json_may_name_file
            words, output.as_json = take_json_flag(words, may_name_file=names_file)
            _join(name)
            code = command.run(command.words(words))
            ranks.leave()
        sys.stdout.flush()
        return code
    except KeyboardInterrupt as interrupt:
        return _interrupted(interrupt, kept_on_interrupt, errors)
    except BrokenPipeError:
        # `heretic-kl --help | head`: nobody reads on, which is no error. Without a new target
        # Python would report the same broken pipe again when it flushes at exit.
        _drop_stdout()
        return BROKEN_PIPE
    except SystemExit as ending:  # see `ranks.check_together`
        write_error(str(ending.code))
        return 1
    except Exception as error:
        if (before := _interrupt_before(error)) is not None:
            return _interrupted(before, kept_on_interrupt, errors)
        return _report(error, kept_on_interrupt, errors, debug=_debugging(words))


def _interrupted(interrupt: KeyboardInterrupt, what: str, errors: list[str]) -> int:
    """Say that the command was interrupted, and what is kept; return the exit code."""
    more = f"; {what} in the study, and the same command continues it" if what else ""
    errors.append(f"interrupted{more}")
    write_error(f"\n{PROGRAM}: {errors[0]}")
    return 128 + (signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT)


def _interrupt_before(error: BaseException | None) -> KeyboardInterrupt | None:
    """What ended the command where its storage was gone when it let go of things."""
    if isinstance(error, StorageLostError):
        while error is not None and not isinstance(error, KeyboardInterrupt):
            error = error.__context__
        return error
    return None


def _join(name: str) -> None:
    """Under `torchrun`, run the command together with the other processes."""
    if ranks.launched() > 1 and name not in TOGETHER:
        raise ConfigError(
            f"{name} does not run under torchrun, only {', '.join(TOGETHER)}: start it by itself"
        )
    ranks.join()


def _command(name: str) -> Command:
    if name not in SUMMARIES:
        raise ConfigError(f"unknown command {name!r}; {_hint(name)}")
    return load_command(name)


def _hint(name: str) -> str:
    if name in RETIRED_COMMANDS:
        return f"it is now {RETIRED_COMMANDS[name]}"
    nearest = difflib.get_close_matches(name, SUMMARIES, n=1)
    return f"did you mean {nearest[0]}?" if nearest else f"a model is given as --model {name}"


def _report(error: Exception, kept_on_interrupt: str, errors: list[str], *, debug: bool) -> int:
    """Print an error in one line for each thing that is wrong; return the exit code."""
    if not ranks.is_first():
        time.sleep(OTHERS_WAIT)  # torchrun ends this process where the first one has ended
    if debug:
        write_error(without_secrets("".join(traceback.format_exception(error))))
    more = f"; {kept_on_interrupt}" if kept_on_interrupt else ""
    if isinstance(error, HereticKLError):
        lines, code = str(error).splitlines(), error.exit_code
    elif _is_out_of_memory(error):
        advice = "try a smaller --dtype, --device-map auto, or a larger device"
        lines, code = [f"out of memory: {advice}{more}"], 1
    elif isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        lines, code = [f"{error.strerror or error}{where}{more}"], 1
    else:
        first = (str(error).splitlines() or [""])[0]
        hint = "" if debug else "; --debug shows the traceback"
        lines = [f"internal error, please report it: {type(error).__name__}: {first}{hint}"]
        code = INTERNAL_ERROR
    lines = [plain_line(without_secrets(line), 1000) for line in lines]
    errors += lines
    for line in lines:
        write_error(f"{PROGRAM}: error: {line}")
    return code


def _is_out_of_memory(error: Exception) -> bool:
    model = sys.modules.get("heretic_kl.model")  # what cannot be imported is not imported again
    return isinstance(error, MemoryError) if model is None else bool(model.is_out_of_memory(error))


def _end_events(errors: Sequence[str], code: int) -> None:
    """Write the last JSON lines: `Failed` and `Ended` of `heretic_kl.events`, without torch."""
    events: list[dict[str, object]] = [{"event": "ended", "exit_code": code}]
    if errors:
        events.insert(0, {"event": "failed", "lines": list(errors)})
    for event in events:
        write(json.dumps({"v": EVENTS_VERSION, **event}))
        sys.stdout.flush()


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
