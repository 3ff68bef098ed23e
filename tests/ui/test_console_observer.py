"""The observer in every mode: what is said where, and that nothing breaks a terminal or a log."""

import re
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text
from ui_samples import TEST_SCORES, failed, recorded, refusals, saved, stopped, trial, written

from heretic_kl.errors import printable
from heretic_kl.events import (
    BaselineMeasured,
    CalibrationStep,
    Event,
    ModelLoaded,
    Notice,
    StageAdvanced,
    StageFinished,
    StageStarted,
    StudyOpened,
    TrialFinished,
    TrialPicked,
    TrialTested,
)
from heretic_kl.report import front_rows
from heretic_kl.scoring import Score
from heretic_kl.search import TrialRecord, pareto_front
from heretic_kl.ui.event_lines import ConsoleObserver, print_front
from heretic_kl.ui.terminal import make_console, say

TRIALS = (trial(0, 30, 0.01), trial(1, 3, 0.0312), failed(2), trial(3, 40, 0.05))


def whole_run() -> Iterator[Event]:
    yield StageStarted("load", "Loading SmolLM2-135M")
    yield ModelLoaded("SmolLM2-135M", 134_515_008, 30, 60, "float32", "cpu")
    yield StageFinished("load", 3.24)
    yield StageStarted("calibrate", "Calibrating", 2)
    yield CalibrationStep("dtype", "float32")
    yield StageAdvanced("calibrate", "dtype")
    yield StageAdvanced("calibrate")
    yield StageFinished("calibrate", 0.01)
    yield BaselineMeasured("validation", {"refusals": refusals(61)})
    yield Notice("built-in prompts are used [hub unreachable]")
    yield StudyOpened("demo", "studies/demo.log", 0, 4)
    yield StudyOpened("demo", "studies/demo.log", 2, 4)
    yield StageStarted("search", "Searching", 4)
    for index, record in enumerate(TRIALS):
        front = pareto_front(TRIALS[: index + 1])
        yield TrialFinished(record, index + 1, 4, front, 60.0 * (3 - index))
    yield StageFinished("search", 12.0)
    yield TrialTested(TRIALS[1], TEST_SCORES)
    yield TrialPicked(TRIALS[1], "knee")
    yield saved()


def plain_log(*, quiet: bool = False) -> list[str]:
    console = recorded(terminal=False)
    with ConsoleObserver(quiet=quiet, console=console) as observer:
        for event in whole_run():
            observer(event)
    return written(console).splitlines()


def test_a_log_has_one_line_a_trial_and_no_control_codes() -> None:
    lines = plain_log()
    assert "1/4  trial 0  refusals 30/64 (47%)  KL 0.0100 ± 0.0041  on the front  4.2 s" in lines
    assert "3/4  trial 2  failed: NaN logits in 8 positions  1.0 s" in lines
    assert "4/4  trial 3  refusals 40/64 (62%)  KL 0.0500 ± 0.0041  4.2 s" in lines
    assert "\x1b" not in "\n".join(lines)


def test_a_log_tells_every_fact() -> None:
    text = "\n".join(plain_log())
    for expected in (
        "SmolLM2-135M: 135M parameters, 30 layers, 60 sites, float32 on cpu",
        "  took 3.2 s",
        "  dtype:                   float32",
        "  1/2 dtype",
        "unedited, validation prompts: refusals 61/64",
        "note: built-in prompts are used [hub unreachable]",
        "study demo in studies/demo.log: 4 trials to run",
        "study demo in studies/demo.log: 2 of 4 trials are there already",
        "front 2, knee trial 0: refusals 30/64 (47%)  KL 0.0100 ± 0.0041; best refusals 3/64 (5%)"
        "  KL 0.0100 ± 0.0041",
        "trial 1, test prompts: refusals 4/64 (6%",
        "picked trial 1 (knee)",
        "one direction at layer 17.4",
    ):
        assert expected in text
    assert "took 0.0 s" not in text


def test_a_log_is_never_wrapped() -> None:
    console = recorded(terminal=False, width=30)
    with ConsoleObserver(quiet=False, console=console) as observer:
        observer(Notice("word " * 100))
    assert len(written(console).splitlines()) == 1


def test_a_saved_model_shows_both_columns_and_the_merge() -> None:
    lines = plain_log()
    start = lines.index("saved merged model to out")
    assert lines[start + 1].split() == ["test", "prompts", "trial", "saved", "model"]
    place = lines[start + 1].index("saved")
    assert all(line[place - 1] == " " != line[place] for line in lines[start + 2 : start + 5])
    assert "1.3e-07 nats, within what rounding costs" in lines[start + 5]


def test_a_pick_states_both_parts_of_its_kl() -> None:
    parts = {"behaviour": {"mean": 0.02, "standard_error": 0.003}}
    parts["remainder"] = {"mean": 0.03, "standard_error": 0.004}
    scores = {**TRIALS[1].scores, "teacher_forced_kl": Score(0.05, "0.05 nats", details=parts)}
    console = recorded(terminal=False)
    ConsoleObserver(quiet=False, console=console)(
        TrialPicked(replace(TRIALS[1], scores=scores), "knee")
    )
    line = "  of the KL 0.0200 ± 0.0030 refusing or not, 0.0300 ± 0.0040 everything else"
    assert line in written(console).splitlines()
    assert not any("of the KL" in line for line in plain_log())  # it is not told apart there


def test_a_merge_above_the_floor_is_said_loudly() -> None:
    console = recorded(terminal=False)
    ConsoleObserver(quiet=False, console=console)(saved(merge_kl=0.01))
    assert "0.01 nats, MORE than what rounding costs" in written(console)


def test_quiet_leaves_notices_and_results() -> None:
    lines = plain_log(quiet=True)
    assert lines[0].startswith("note: ")
    assert lines[1] == "picked trial 1 (knee)"
    assert "saved merged model to out" in lines
    assert not any("Loading" in line or "1/4" in line for line in lines)


def test_progress_goes_to_stderr_and_results_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    with ConsoleObserver(quiet=False) as observer:
        for event in whole_run():
            observer(event)
    out, err = capsys.readouterr()
    assert out.startswith("picked trial 1")
    assert "saved merged model" in out
    assert "1/4  trial 0" in err
    assert "picked" not in err


@pytest.mark.parametrize("width", [1, 10, 40, 80, 200])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_terminal_of_any_width_and_encoding(width: int, encoding: str) -> None:
    console = recorded(terminal=True, width=width, encoding=encoding)
    with ConsoleObserver(quiet=False, console=console) as observer:
        for event in whole_run():
            observer(event)
    text = written(console)
    assert "\x1b" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h"), "the cursor comes back"
    if encoding == "ascii":
        assert text.isascii()
    if width >= 80:
        assert "3/4" in text
        assert "2 min 00 s left" in text
        assert "front 2, knee trial 0" in text


def test_an_error_leaves_the_terminal_as_it_was() -> None:
    console = recorded(terminal=True)
    with (
        pytest.raises(KeyboardInterrupt),
        ConsoleObserver(quiet=False, console=console) as observer,
    ):
        observer(StageStarted("load", "Loading"))
        raise KeyboardInterrupt
    text = written(console)
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1


def test_trials_without_a_stage_or_scores() -> None:
    for terminal in (True, False):
        console = recorded(terminal=terminal)
        with ConsoleObserver(quiet=False, console=console) as observer:
            observer(StageAdvanced("load", "lost"))
            observer(StageFinished("load", 1.0))
            bare = TrialRecord(0, "complete", {}, None, {}, (0.5,))
            observer(TrialFinished(bare, 1, 1, (bare,), None))
            observer(TrialFinished(failed(1), 2, 1, (), None))
            odd = TrialRecord(5, "complete", {}, None, {"mine": Score(None, "unscored")}, (1.0,))
            observer(TrialFinished(odd, 3, 3, (bare, odd), 0.0))
        assert "no scores" in written(console)
        assert "mine unscored" in written(console)


def test_long_stages_do_not_flood_a_log() -> None:
    console = recorded(terminal=False)
    observer = ConsoleObserver(quiet=False, console=console)
    observer(StageStarted("directions", "Finding directions", 1000))
    for step in range(1000):
        observer(StageAdvanced("directions", f"batch {step}"))
    assert len(written(console).splitlines()) <= 22


def test_steps_that_are_counted_show_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    for terminal in (True, False):
        console = recorded(terminal=terminal)
        with ConsoleObserver(quiet=False, console=console) as observer:
            observer(StageStarted("measure", "Measuring b, candidate 2 of 3"))
            for done in range(33):
                observer(StageAdvanced("measure", "prompts", done, 32, 64.0 - 2 * done))
                now[0] += 2.0
        text = written(console)
        assert "Measuring b, candidate 2 of 3" in text
        if terminal:
            assert "16/32" in text and "32 s left" in text
        else:  # a line about every ten seconds
            assert "  5/32 prompts, 54 s left" in text and len(text.splitlines()) == 7


def test_the_front_is_a_table_on_terminals_and_lines_elsewhere() -> None:
    rows = front_rows(pareto_front(TRIALS), {1: TEST_SCORES})
    for terminal in (True, False):
        console = recorded(terminal=terminal, width=80)
        print_front(console, rows)
        text = written(console)
        assert "3/64, 5% (2-13%)" in text
        assert ("one direction" in text) is not terminal
        assert "95% interval" in text


class TestMakeConsole:
    def test_a_file_gets_no_control_codes_whatever_the_environment_says(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TTY_COMPATIBLE", "1")
        stream = StringIO()
        with ConsoleObserver(quiet=False, console=make_console(stream=stream)) as observer:
            for event in whole_run():
                observer(event)
        assert "\x1b" not in stream.getvalue()

    @pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
    def test_no_text_is_too_much_for_an_encoding(self, encoding: str) -> None:
        raw = BytesIO()
        stream = TextIOWrapper(raw, encoding=encoding, errors="strict")
        console = make_console(stream=stream)
        say(console, "0.1 ± 0.2 – 本 🙂 \udcff [red]x[/red]")
        console.print("━ straight to rich ±")
        stream.flush()
        text = raw.getvalue().decode(encoding)
        assert "[red]x[/red]" in text
        assert "±" in text or "0.1 +/- 0.2" in text

    def test_a_broken_pipe_is_the_callers_business(self, tmp_path: Path) -> None:
        class Closed(StringIO):
            def write(self, text: str) -> int:
                raise BrokenPipeError

        with pytest.raises(BrokenPipeError):
            say(make_console(stream=Closed()), "anyone?")


def test_control_codes_of_a_model_are_dropped() -> None:
    assert printable("a\x1b[31mb\r\x07\nc\td\x9b") == "a[31mb\nc\td"


def test_a_terminal_is_sent_no_control_codes_of_a_text() -> None:
    stream = StringIO()
    stream.isatty = lambda: True
    console = make_console(stream=stream)
    bad = "\x1b]52;c;ZXZpbA==\x07\x1b[2J\x9b31m"
    table = Table(bad, title=bad)
    table.add_row(Text(f"cell{bad}"))
    say(console, f"  a line{bad}", "bold")
    console.print(table, bad)
    shown = stream.getvalue()
    assert "a line]52;c;ZXZpbA==[2J31m" in shown and "cell]52" in shown
    plain = re.sub(r"\x1b\[[\d;]*m", "", shown)  # without rich's own styles
    assert plain.replace("\n", "") == printable(plain).replace("\n", "")


def test_a_stopped_trial_says_what_was_measured_and_what_beats_it() -> None:
    console = recorded(terminal=False)
    with ConsoleObserver(quiet=False, console=console) as observer:
        observer(TrialFinished(stopped(2), 3, 4, (trial(0, 3, 0.03),), None))
    assert written(console).splitlines()[0] == (
        "3/4  trial 2  stopped: refusals at least 12/64 after 20 responses, "
        "KL 0.3100 ± 0.0100 nats; dominated by trial 7  1.0 s"
    )
