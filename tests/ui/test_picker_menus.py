"""The menus, driven by key presses against a fake session; no terminal, no waiting."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from emulator import Emulator
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput
from ui_samples import EDIT, FakeSession, recorded, trial, written

from heretic_kl.ablation import Refinement
from heretic_kl.errors import ExportError, NotEmptyError, StudyError, UploadError
from heretic_kl.ui.chat import chat
from heretic_kl.ui.picker import Picker

DOWN, UP, ENTER, CTRL_C, CTRL_D, CTRL_U = "\x1b[B", "\x1b[A", "\r", "\x03", "\x04", "\x15"
LORA, PREVIEW, TALK, DETAILS, COMPARE, MEASURE = (DOWN * n + ENTER for n in range(1, 7))
BACK = UP + ENTER
"""From the first entry of a menu."""


@pytest.fixture
def keys() -> Iterator[PipeInput]:
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        yield pipe


@pytest.fixture
def session() -> FakeSession:
    """A front of trials 1, 0, 2, with the knee at 0, in the middle."""
    return FakeSession(trial(0, 10, 0.02), trial(1, 0, 0.09), trial(2, 60, 0.001))


def drive(
    keys: PipeInput,
    session: FakeSession,
    text: str,
    *,
    folder: Path = Path("nowhere/trial"),
    upload: Callable[[Path, str, bool], object] | None = None,
    settle: Callable[[], None] = lambda: None,
) -> str:
    """Press keys and then Ctrl+C until the menus are left; what was printed."""
    keys.send_text(text + CTRL_C * 4)
    console = recorded(terminal=True)
    picker = Picker(
        session, console, default_folder=lambda record: folder, upload=upload, settle=settle
    )
    assert picker.run() == 0
    return written(console)


def test_exit_and_ctrl_c_leave(keys: PipeInput, session: FakeSession) -> None:
    drive(keys, session, "")
    printed = drive(keys, session, UP * 2 + ENTER)
    assert "one direction" not in printed
    assert "10/64, 16%" in printed


def test_the_cursor_starts_at_the_knee(keys: PipeInput, session: FakeSession) -> None:
    printed = drive(keys, session, ENTER + CTRL_C)
    assert "Trial 0: one direction at layer 17.4" in printed


def test_saving_takes_the_default_folder(keys: PipeInput, session: FakeSession) -> None:
    settled: list[int] = []
    drive(keys, session, ENTER + ENTER + ENTER + CTRL_C, settle=lambda: settled.append(1))
    assert session.saves == [(0, Path("nowhere/trial"), "merged", False)]
    assert len(settled) == 2


def test_a_typed_folder_and_an_adapter(
    keys: PipeInput, session: FakeSession, tmp_path: Path
) -> None:
    target = tmp_path / "mine"
    drive(keys, session, UP + ENTER + LORA + CTRL_U + str(target) + ENTER + CTRL_C)
    assert session.saves == [(1, target, "lora", False)]


def test_home_is_expanded(
    keys: PipeInput, session: FakeSession, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    drive(keys, session, ENTER + ENTER + CTRL_U + "~/x" + ENTER + CTRL_C)
    assert session.saves[0][1] == tmp_path / "x"


@pytest.mark.parametrize(("answer", "overwrites"), [("y", [True]), ("n", []), (ENTER, [])])
def test_a_folder_with_files_is_asked_about(
    keys: PipeInput, session: FakeSession, tmp_path: Path, answer: str, overwrites: list[bool]
) -> None:
    (tmp_path / "model.safetensors").touch()
    printed = drive(keys, session, ENTER + ENTER + ENTER + answer + CTRL_C, folder=tmp_path)
    assert [save[3] for save in session.saves] == overwrites
    assert ("not saved" in printed) is not bool(overwrites)


@pytest.mark.parametrize("leave", [CTRL_C, CTRL_U + ENTER])
def test_no_folder_is_no_save(keys: PipeInput, session: FakeSession, leave: str) -> None:
    drive(keys, session, ENTER + ENTER + leave + CTRL_C)
    assert session.saves == []


@pytest.mark.parametrize(
    ("trouble", "line"),
    [
        (ExportError("disk full at [out]"), "error: disk full at [out]"),
        (OSError(28, "No space left on device"), "error: [Errno 28] No space left on device"),
        (KeyboardInterrupt(), "stopped; nowhere/trial may hold part of a model"),
    ],
)
def test_trouble_is_a_line_and_the_menu_comes_back(
    keys: PipeInput, session: FakeSession, trouble: BaseException, line: str
) -> None:
    session.trouble = trouble
    printed = drive(keys, session, ENTER + ENTER + ENTER + ENTER + ENTER + CTRL_C)
    assert printed.count(line) == 1
    assert len(session.saves) == 2, "the second one went through"


SAVE = ENTER + ENTER
UPLOAD = UP * 2 + ENTER
"""From the first entry of a menu: the last one but `back`."""


@pytest.mark.parametrize(
    ("text", "repo"),
    [
        (SAVE + UPLOAD + ENTER, "trial"),  # the folder's name
        (SAVE + UPLOAD + CTRL_U + " team/mine " + ENTER, "team/mine"),
        (SAVE + UPLOAD + CTRL_U + ENTER, None),
        (UPLOAD, None),  # nothing is saved yet: it is another entry
    ],
)
def test_a_saved_model_can_be_uploaded(
    keys: PipeInput, session: FakeSession, text: str, repo: str | None
) -> None:
    uploads: list[tuple[Path, str, bool]] = []

    def upload(folder: Path, repo: str, overwrite: bool) -> None:
        uploads.append((folder, repo, overwrite))

    drive(keys, session, ENTER + text + CTRL_C, upload=upload)
    assert uploads == ([] if repo is None else [(Path("nowhere/trial"), repo, False)])


@pytest.mark.parametrize(("answer", "overwrites"), [("y", [False, True]), ("n", [False])])
def test_a_repository_with_files_is_asked_about(
    keys: PipeInput, session: FakeSession, answer: str, overwrites: list[bool]
) -> None:
    asked: list[bool] = []

    def upload(folder: Path, repo: str, overwrite: bool) -> None:
        asked.append(overwrite)
        if not overwrite:
            raise NotEmptyError("it holds files")

    text = ENTER + SAVE + UPLOAD + ENTER + answer + CTRL_C
    printed = drive(keys, session, text, upload=upload)
    assert asked == overwrites
    assert ("not uploaded" in printed) is (answer == "n")


@pytest.mark.parametrize("trouble", [UploadError("not logged in"), KeyboardInterrupt()])
def test_an_upload_that_fails_is_a_line(
    keys: PipeInput, session: FakeSession, trouble: BaseException
) -> None:
    def upload(folder: Path, repo: str, overwrite: bool) -> None:
        raise trouble

    text = ENTER + SAVE + UPLOAD + ENTER + ENTER + ENTER + CTRL_C
    printed = drive(keys, session, text, upload=upload)
    assert "error: not logged in" in printed or "the model is in nowhere/trial" in printed


def test_what_was_not_saved_is_not_uploaded(keys: PipeInput, session: FakeSession) -> None:
    session.trouble = ExportError("disk full")
    uploads: list[object] = []
    text = ENTER + SAVE + UPLOAD + CTRL_C
    drive(keys, session, text, upload=lambda *words: uploads.append(words))
    assert uploads == []


def test_measuring_shows_the_scores_and_is_offered_once(
    keys: PipeInput, session: FakeSession
) -> None:
    printed = drive(keys, session, ENTER + MEASURE + BACK)
    assert session.tested.keys() == {0}
    assert "test prompts: refusals 4/64" in printed
    printed = drive(keys, session, ENTER + DOWN * 6 + ENTER)
    assert "measuring" not in printed


@pytest.mark.parametrize("trouble", [StudyError("storage is gone"), KeyboardInterrupt()])
def test_a_measurement_that_fails(
    keys: PipeInput, session: FakeSession, trouble: BaseException
) -> None:
    session.trouble = trouble
    printed = drive(keys, session, ENTER + MEASURE + CTRL_C)
    assert session.tested == {}
    assert "storage is gone" in printed or "nothing was kept of it" in printed


@pytest.mark.parametrize("tested", [False, True])
def test_two_trials_are_compared(keys: PipeInput, session: FakeSession, tested: bool) -> None:
    values = {0: (0.01, 0.02, 0.03), 1: (0.10, 0.08, 0.09), 2: None}
    for number, per_prompt in values.items():
        kl = session.trials[number].scores["teacher_forced_kl"]
        scores = {**session.trials[number].scores}
        scores["teacher_forced_kl"] = replace(kl, per_prompt=per_prompt)
        record = replace(session.trials[number], scores=scores)
        session.trials = (*session.trials[:number], record, *session.trials[number + 1 :])
        if tested:
            session.tested[number] = scores
    printed = drive(keys, session, ENTER + COMPARE + ENTER + ENTER + DOWN + ENTER + CTRL_C)
    assert printed.count("Trial 0 minus trial 1, validation prompts") == 1
    assert printed.count("Trial 0 minus trial 2, validation prompts") == 1
    assert printed.count("-0.07 (-0.09 to -0.06)") == 1 + tested
    assert printed.count(", test prompts") == 2 * tested
    assert "measured before values of single prompts were kept" in " ".join(printed.split())
    assert ("measure both on the test prompts" in " ".join(printed.split())) is not tested


def test_a_single_trial_is_compared_with_nothing(keys: PipeInput) -> None:
    printed = drive(keys, FakeSession(trial(0, 10, 0.02)), ENTER + COMPARE)
    assert "no other trial to compare with" in printed


def test_responses_are_seen_before_anything_is_saved(keys: PipeInput, session: FakeSession) -> None:
    session.previewed = {
        (None, "harmless"): [("bread?", "Mix flour.", False), ("tea?", "Boil\x1b[2J it.", False)],
        (1, "harmless"): [("bread?", "Take flour.", False), ("tea?", "Boil\x1b[2J it.", False)],
    }
    printed = drive(keys, session, UP + ENTER + PREVIEW + ENTER + CTRL_C)
    shown = [line.rstrip() for line in printed.split("responding ...")[1].splitlines()]
    rows = [line for line in shown if "Mix flour." in line and "Take flour." in line]
    assert len(rows) == 1 and "> bread?" in printed
    assert printed.count("Boil[2J it.") == 1 and "both, word for word" in printed
    assert session.saves == []


def test_responses_to_harmful_prompts_are_verdicts_alone(
    keys: PipeInput, session: FakeSession
) -> None:
    session.previewed = {
        (None, "harmful"): [("a\nlock " + "y" * 200, "I'm sorry", True)],
        (0, "harmful"): [("a\nlock " + "y" * 200, "Take a pin", False)],
    }
    printed = drive(keys, session, ENTER + PREVIEW + DOWN + ENTER + CTRL_C)
    assert "refuses   responds  a lock yyy" in printed
    assert "sorry" not in printed and "pin" not in printed and "y" * 100 not in printed


@pytest.mark.parametrize("trouble", [StudyError("operators are gone"), KeyboardInterrupt()])
def test_a_preview_that_fails(
    keys: PipeInput, session: FakeSession, trouble: BaseException
) -> None:
    session.trouble = trouble
    printed = drive(keys, session, ENTER + PREVIEW + ENTER + DOWN * 2 + ENTER + CTRL_C)
    assert "operators are gone" in printed or "stopped" in printed
    assert "falling to 0.460" in printed, "the menu came back"


def test_details(keys: PipeInput, session: FakeSession) -> None:
    printed = drive(keys, session, ENTER + DETAILS + CTRL_C)
    assert "falling to 0.460 at 12 layers from it" in printed


def test_more_trials_continue_the_count_and_show_the_new_front(
    keys: PipeInput, session: FakeSession
) -> None:
    learned = Refinement("0" * 64, 0, 5, "strength", 1, 0.1)
    refined = replace(trial(3, 64, 0.5), edit=replace(EDIT, refinement=learned))
    session.trials = (*session.trials, refined)
    printed = drive(keys, session, DOWN * 3 + ENTER + CTRL_U + "no" + ENTER + CTRL_U + "7" + ENTER)
    assert session.searches == [3 + 7], "a refined trial is none that was searched"
    assert "4 ← knee" in printed


def test_a_search_that_is_stopped_keeps_what_it_has(keys: PipeInput, session: FakeSession) -> None:
    session.trouble = KeyboardInterrupt()
    printed = drive(keys, session, DOWN * 3 + ENTER + ENTER)
    assert session.searches == [23]
    assert "stopped; finished trials are kept" in printed


def test_the_table_can_be_seen_again(keys: PipeInput, session: FakeSession) -> None:
    printed = drive(keys, session, DOWN * 2 + ENTER)
    assert printed.count("0 ← knee") == 2


def test_the_list_is_sorted(keys: PipeInput, session: FakeSession) -> None:
    printed = drive(keys, session, UP * 3 + ENTER + DOWN + ENTER + UP + ENTER)
    assert "Trial 2: one direction" in printed, "the smallest KL stands first"


@pytest.mark.parametrize("whole_again", [False, True])
def test_the_list_is_filtered(keys: PipeInput, session: FakeSession, whole_again: bool) -> None:
    text = UP * 3 + ENTER + DOWN * 2 + ENTER + "max-refusals=0.2" + ENTER
    if whole_again:
        text += UP * 3 + ENTER + DOWN * 3 + ENTER
    printed = drive(keys, session, text + DOWN + ENTER)
    assert ("Trial 2: one direction" in printed) is whole_again
    assert printed.count("0 ← knee") == 2 - whole_again, "below trial 0 is the table, or trial 2"


@pytest.mark.parametrize(
    ("limits", "line"),
    [
        ("max-odd=1", "error: no score 'odd'; there are refusals, teacher_forced_kl"),
        ("knee", "error: unknown pick rule 'knee'"),
        ("max-refusals=-1", "no trial of the front meets max-refusals=-1"),
    ],
)
def test_limits_that_select_nothing_are_a_line(
    keys: PipeInput, session: FakeSession, limits: str, line: str
) -> None:
    text = UP * 3 + ENTER + DOWN * 2 + ENTER + limits + ENTER + DOWN + ENTER
    printed = drive(keys, session, text)
    assert line in " ".join(printed.split())
    assert "Trial 2: one direction" in printed, "the list is as it was"


def test_without_any_trial_there_is_still_a_way_on(keys: PipeInput) -> None:
    session = FakeSession()
    printed = drive(keys, session, ENTER + ENTER)
    assert "no finished trial to pick from yet" in printed
    assert session.searches == [20]


def talk(keys: PipeInput, session: FakeSession, text: str, *, width: int = 60) -> str:
    keys.send_text(text)
    console = recorded(terminal=False, width=width)
    chat(session, session.trials[0], console)
    return written(console)


class TestChat:
    def test_both_respond_with_its_own_past(self, keys: PipeInput, session: FakeSession) -> None:
        session.response = lambda number: iter(["I ", "am ", f"{number}."])
        printed = talk(keys, session, f"hello{ENTER}{ENTER}  and you? {ENTER}/exit{ENTER}")
        assert session.asked == [
            (None, ["hello"]),
            (0, ["hello"]),
            (None, ["hello", "I am None.", "and you?"]),
            (0, ["hello", "I am 0.", "and you?"]),
        ]
        assert "original:\nI am None.\nedited, trial 0:\nI am 0.\n" in printed

    def test_commands(self, keys: PipeInput, session: FakeSession) -> None:
        lines = ["/edited", "one", "/both", "two", "/reset", "three", "/original", "four", "/what"]
        printed = talk(keys, session, "".join(line + ENTER for line in lines) + CTRL_D)
        assert session.asked == [
            (0, ["one"]),
            (None, ["two"]),
            (0, ["one", "fine", "two"]),
            (None, ["three"]),
            (0, ["three"]),
            (None, ["three", "fine", "four"]),
        ]
        assert "unknown command /what" in printed

    def test_both_stream_beside_each_other(self, keys: PipeInput, session: FakeSession) -> None:
        turns: list[int | None] = []

        def response(number: int | None) -> Iterator[str]:
            for piece in ("I ", "am ", f"{number}.\n", "Bye"):
                turns.append(number)
                yield piece

        session.response = response
        keys.send_text(f"hello{ENTER}/history{ENTER}" + CTRL_D)
        console = recorded(terminal=True, width=80)
        chat(session, session.trials[0], console)
        assert turns == [None, 0] * 4, "a piece of each in turn"
        rows = [line for line in written(console).splitlines() if "I am None." in line]
        assert len([line for line in rows if "I am 0." in line]) >= 2, (
            "streamed, and in the history"
        )

    def test_one_of_two_may_fail_or_be_empty(self, keys: PipeInput, session: FakeSession) -> None:
        def response(number: int | None) -> Iterator[str]:
            if number is None:
                raise ExportError("no system prompt")
            yield " "

        session.response = response
        keys.send_text(f"a{ENTER}b{ENTER}" + CTRL_D)
        console = recorded(terminal=True, width=80)
        chat(session, session.trials[0], console)
        assert written(console).count("original: error: no system prompt") == 2
        assert written(console).count("edited, trial 0: (empty response)") == 2
        assert session.asked[2:] == [(None, ["b"]), (0, ["a", " ", "b"])]

    def test_ctrl_c_stops_both(self, keys: PipeInput, session: FakeSession) -> None:
        def response(number: int | None) -> Iterator[str]:
            yield "so far"
            raise KeyboardInterrupt

        session.response = response
        keys.send_text(f"a{ENTER}b{ENTER}" + CTRL_C)
        console = recorded(terminal=True, width=80)
        chat(session, session.trials[0], console)
        assert written(console).count("(stopped)") == 2
        assert session.asked[2:] == [(None, ["a", "so far", "b"]), (0, ["a", "so far", "b"])]

    @pytest.mark.parametrize(("width", "beside"), [(120, True), (80, True), (60, False)])
    def test_the_history_stands_side_by_side(
        self, keys: PipeInput, session: FakeSession, width: int, beside: bool
    ) -> None:
        session.response = lambda number: iter([f"[b]I am {number}[/b]\x1b[31m"])
        lines = ["/history", "hello", "/edited", "and you?", "/history", "/reset", "/history"]
        printed = talk(keys, session, "".join(line + ENTER for line in lines) + CTRL_D, width=width)
        assert printed.count("nothing was said yet") == 2
        shown = [line.rstrip() for line in printed.split("> hello")[1].splitlines()]
        both = [line for line in shown if "[b]I am None[/b]" in line and "[b]I am 0[/b]" in line]
        assert len(both) == beside
        assert "> and you?" in printed and "\x1b[31m" not in printed

    def test_ctrl_c_stops_one_response_and_keeps_what_came(
        self, keys: PipeInput, session: FakeSession
    ) -> None:
        def stopped(number: int | None) -> Iterator[str]:
            yield "so far"
            if number is None:
                raise KeyboardInterrupt

        session.response = stopped
        printed = talk(keys, session, f"a{ENTER}b{ENTER}" + CTRL_C)
        assert "so far\n(stopped)\nedited, trial 0:\nso far\n" in printed
        assert session.asked[2] == (None, ["a", "so far", "b"])

    def test_an_error_is_a_line_and_the_turn_is_forgotten(
        self, keys: PipeInput, session: FakeSession
    ) -> None:
        def broken(number: int | None) -> Iterator[str]:
            yield "half"
            raise ExportError("the chat template wants a system prompt")

        session.response = broken
        printed = talk(keys, session, f"a{ENTER}b{ENTER}" + CTRL_D)
        assert printed.count("error: the chat template wants") == 4
        assert session.asked[2] == (None, ["b"])

    def test_an_empty_response_is_named(self, keys: PipeInput, session: FakeSession) -> None:
        session.response = lambda number: iter(["", " "])
        assert "(empty response)" in talk(keys, session, f"a{ENTER}" + CTRL_D)

    def test_responses_break_between_words_and_obey_no_control_codes(
        self, keys: PipeInput, session: FakeSession
    ) -> None:
        session.response = lambda number: iter(
            ["\x1b[2Jal", "pha ", "beta\n\n", "gam", "ma", "x" * 30]
        )
        keys.send_text(f"a{ENTER}" + CTRL_D)
        terminal = Emulator(12)
        chat(session, session.trials[0], terminal.console)
        start = terminal.lines.index("[2Jalpha")
        expected = ["[2Jalpha", "beta", "", "gammaxxxxxxx", "x" * 12, "x" * 11]
        assert terminal.lines[start : start + 6] == expected
