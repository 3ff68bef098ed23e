"""Pictures of the terminal for the documentation: live view, list, comparison, preview, chat.

    python benchmarks/screenshots.py --model MODEL [--config FILE] [--output docs/figures]

Those in docs/figures: the demo model, `--trials 14 --config benchmarks/screenshots.toml`.
Runs the command in tmux (which has to be installed), presses the keys that a person would press,
and writes what the terminal then shows as SVG. Nothing is kept but the pictures: the study is
thrown away.
"""

import argparse
import re
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.terminal_theme import DEFAULT_TERMINAL_THEME, SVG_EXPORT_THEME, TerminalTheme
from rich.text import Text

QUESTION = "How do I kill a Python process that hangs?"
THEMES = {"dark": SVG_EXPORT_THEME, "light": DEFAULT_TERMINAL_THEME}
SECONDS_TO_WAIT, SECONDS_A_KEY = 1800, 0.4


class Terminal:
    """A command in a terminal that nobody looks at."""

    def __init__(self, command: list[str], folder: Path, width: int, height: int) -> None:
        self._socket = ["tmux", "-S", str(folder / "tmux"), "-f", "/dev/null"]
        size = ["-x", str(width), "-y", str(height)]
        self._width = width
        self._tmux("new-session", "-d", *size, "env", "TERM=tmux-256color", *command)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *error: object) -> None:
        subprocess.run([*self._socket, "kill-server"], check=False, capture_output=True)

    def press(self, *keys: str) -> None:
        """Press keys by their tmux names, or type text."""
        for key in keys:
            self._tmux("send-keys", key)
            time.sleep(SECONDS_A_KEY)

    def wait(self, pattern: str) -> str:
        """Until the screen matches; what it then shows.

        Raises:
            SystemExit: it never does.
        """
        deadline = time.monotonic() + SECONDS_TO_WAIT
        screen = ""
        while time.monotonic() < deadline:
            screen = self._tmux("capture-pane", "-p")
            if re.search(pattern, screen, re.MULTILINE):
                return screen
            time.sleep(0.2)
        sys.exit(f"the terminal never showed {pattern!r}; it shows\n{screen}")

    def take(self, entry: str) -> None:
        """Move the cursor of a menu to an entry, and press Enter."""
        for _ in range(30):
            if re.search(rf"^\s*> .*{entry}", self._tmux("capture-pane", "-p"), re.MULTILINE):
                return self.press("Enter")
            self.press("Down")
        sys.exit(f"no menu entry {entry!r}")

    def picture(self, target: Path, title: str, theme: TerminalTheme) -> None:
        """Write what the terminal shows as SVG."""
        screen = self._tmux("capture-pane", "-e", "-p").rstrip("\n")
        console = Console(record=True, width=self._width, file=StringIO(), force_terminal=True)
        console.print(Text.from_ansi(screen, no_wrap=True))
        svg = console.export_svg(title=title, theme=theme)
        # A picture that loads nothing: whoever shows it has a font.
        svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)
        target.write_text(re.sub(r"[ \t]+$", "", svg, flags=re.MULTILINE), encoding="utf-8")
        print(f"{target}: {target.stat().st_size // 1024} KB")

    def _tmux(self, *words: str) -> str:
        done = subprocess.run([*self._socket, *words], check=True, capture_output=True, text=True)
        return done.stdout


def main() -> None:
    """Run, press, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--config", type=Path, help="settings file of the run")
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--plotted", type=int, help="trials in the picture of the live view")
    parser.add_argument("--output", type=Path, default=Path("docs/figures"))
    parser.add_argument("--width", type=int, default=80)
    parser.add_argument("--height", type=int, default=24)
    args = parser.parse_args()
    with TemporaryDirectory() as name:
        command = [sys.executable, "-m", "heretic_kl", "--model", args.model]
        command += ["--trials", str(args.trials), "--study-dir", f"{name}/studies"]
        command += ["--refinement.trials", "1", "--refinement.steps", "40"]
        command += [] if args.config is None else ["--config", str(args.config)]
        with Terminal(command, Path(name), args.width, args.height) as terminal:
            _tour(terminal, args)


def _tour(terminal: Terminal, args: argparse.Namespace) -> None:
    def picture(name: str, title: str, theme: str = "dark") -> None:
        terminal.picture(args.output / f"terminal-{name}.svg", title, THEMES[theme])

    plotted = args.plotted or args.trials - 2
    terminal.wait(rf"^\s*{plotted}/{args.trials} .*trial(.|\n)*against KL")
    for theme in THEMES:
        picture(f"live-{theme}", "heretic-kl: a search", theme)
    terminal.wait(r"^> Trial\?")
    picture("list", "heretic-kl: the front")
    terminal.press("Enter")
    terminal.take("compare it")
    terminal.wait(r"^> Compare with\?")
    terminal.press("Enter")
    terminal.wait(r"paired by prompt(.|\n)*^> Trial \d+:")
    picture("compare", "heretic-kl: two trials compared")
    terminal.take("preview")
    terminal.wait(r"^> Preview:")
    terminal.press("Enter")
    terminal.wait(r"^original:(.|\n)*^> Trial \d+:")
    picture("preview", "heretic-kl: responses before saving")
    terminal.take("chat")
    terminal.wait(r"^you >")
    terminal.press(QUESTION, "Enter")
    terminal.wait(r"original:.*│ edited.*\n(.*│.*\n){9}")
    picture("chat", "heretic-kl: both responses as they stream")
    terminal.press("C-c", "C-c", "C-c", "C-c", "C-c")


if __name__ == "__main__":
    main()
