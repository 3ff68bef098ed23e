"""Two texts beside each other: as they grow, when the terminal is resized, taller than it is."""

import pytest
from emulator import Emulator
from ui_samples import recorded, written

from heretic_kl.ui.columns import GrowingColumns, Heading, print_columns
from heretic_kl.ui.live import ResizableLive

HEADINGS = Heading("original", "bold"), Heading("edited, trial 7")
WORDS = "one two three four five six seven eight nine ten eleven twelve".split()


def column(lines: list[str], place: int) -> str:
    """The words of a column, without its heading."""
    return " ".join(" ".join(line.split("│")[place] for line in lines[1:]).split())


@pytest.mark.parametrize("height", [6, 24])
@pytest.mark.parametrize("width", [50, 80])
def test_both_texts_are_whole_in_the_end_and_every_row_stands_once(width: int, height: int) -> None:
    terminal = Emulator(width, height)
    left = [f"{word}{' ' if n % 5 else chr(10)}" for n, word in enumerate(WORDS * 6)]
    right = [f"{word.upper()} " for word in WORDS * 6]
    with GrowingColumns(terminal.console, HEADINGS) as columns:
        for pieces in zip(left, right, strict=True):
            for place, piece in enumerate(pieces):
                columns.add(place, piece)
    assert [cell.strip() for cell in terminal.lines[0].split("│")] == [
        "original:",
        "edited, trial 7:",
    ]
    assert column(terminal.lines, 0) == " ".join(WORDS * 6)
    assert column(terminal.lines, 1) == " ".join(WORDS * 6).upper()


def test_what_was_written_so_far_can_be_read() -> None:
    terminal = Emulator()
    with GrowingColumns(terminal.console, HEADINGS) as columns:
        columns.add(0, "first line\nsecond")
        columns.add(1, "FIRST LINE\nSECOND")
        assert column(terminal.lines, 0) == "first line second"
        columns.end(1)
        columns.add(0, " is long\nthird\nfourth")
        assert "third" in column(terminal.lines, 0)
    assert column(terminal.lines, 1) == "FIRST LINE SECOND"


def test_one_text_may_be_much_longer_than_the_other_and_than_the_terminal() -> None:
    terminal = Emulator(80, 8)
    with GrowingColumns(terminal.console, HEADINGS) as columns:
        columns.add(1, "short")
        for number in range(40):
            columns.add(0, f"{number}\n")
        columns.end(1)
    assert column(terminal.lines, 0) == " ".join(map(str, range(40)))
    assert column(terminal.lines, 1) == "short"


@pytest.mark.parametrize("width", [50, 110])
def test_a_terminal_that_is_resized_meanwhile_loses_no_word(width: int) -> None:
    terminal = Emulator(80)
    with GrowingColumns(terminal.console, HEADINGS) as columns:
        for index in range(2):
            for word in WORDS:
                columns.add(0, f"{word} ")
                columns.add(1, f"{word.upper()} ")
            if not index:
                terminal.resize(width)
    text = "".join(terminal.lines).replace(" ", "")  # the terminal broke words that were printed
    for word in WORDS:
        assert text.count(word) == text.count(word.upper()) == 2


def test_control_codes_of_a_model_are_not_obeyed() -> None:
    terminal = Emulator()
    with GrowingColumns(terminal.console, HEADINGS) as columns:
        columns.add(0, "a\x1b[2J\rb")
        columns.add(1, "[red]c[/red]")
    assert terminal.lines[1].startswith("a[2Jb") and "[red]c[/red]" in terminal.lines[1]


def test_a_narrow_console_has_one_text_below_the_other() -> None:
    console = recorded(terminal=False, width=60)
    print_columns(console, HEADINGS, ["left", "right"])
    assert written(console) == "original:\nleft\nedited, trial 7:\nright\n"


@pytest.mark.parametrize("width", [20, 35, 60, 90])
def test_a_frame_leaves_nothing_behind_when_the_terminal_is_narrowed(width: int) -> None:
    terminal = Emulator(80)
    terminal.console.print("before")
    frame = "\n".join(["x" * 79, "y" * 40, "z"])
    live = ResizableLive(terminal.console, lambda: frame, refreshing=False)
    live.start(refresh=True)
    terminal.resize(width)
    frame = "short"
    live.refresh()
    terminal.console.print("between")
    assert terminal.lines == ["before", "between", "short"]
    live.stop()
    assert terminal.lines == ["before", "between"]
