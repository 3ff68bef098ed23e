"""The picker's chat with the original and the edited model."""

from collections.abc import Iterator

import pytest
from emulator import Emulator
from picker_keys import (
    CTRL_C,
    CTRL_D,
    ENTER,
)
from prompt_toolkit.input import PipeInput
from ui_samples import FakeSession, recorded, written

from heretic_kl.errors import ExportError
from heretic_kl.ui.chat import chat


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

    def test_above_temperature_0_both_draw_with_the_seed_of_the_turn(
        self, keys: PipeInput, session: FakeSession
    ) -> None:
        lines = ["a", "/temperature 0.7", "b", "/temperature -1", "/temperature warm", "c"]
        lines += ["/reset", "/temperature", "a", "/temperature 0", "b"]
        printed = talk(keys, session, "".join(line + ENTER for line in lines) + CTRL_D)
        assert session.drawn[::2] == [(0, 0), (0.7, 1), (0.7, 2), (0.7, 0), (0, 1)]
        assert session.drawn[::2] == session.drawn[1::2]
        assert printed.count("a number from 0 (greedy), please") == 2
        assert printed.count("temperature 0.7: responses are drawn") == 2
        assert "Responses are greedy" in " ".join(printed.split())

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
