"""Keys that drive the picker's menus, and a function that sends them."""

from collections.abc import Callable
from pathlib import Path

from prompt_toolkit.input import PipeInput
from ui_samples import FakeSession, recorded, written

from heretic_kl.ui.picker import Picker

DOWN, UP, LEFT, ENTER, CTRL_C, CTRL_D, CTRL_U = (
    "\x1b[B",
    "\x1b[A",
    "\x1b[D",
    "\r",
    "\x03",
    "\x04",
    "\x15",
)
LORA, PREVIEW, TALK, DETAILS, COMPARE, MEASURE = (DOWN * n + ENTER for n in range(1, 7))
BACK = UP + ENTER
"""From the first entry of a menu."""


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
