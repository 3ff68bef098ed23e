"""Pictures in the card of a saved model, put there afterwards. Draws nothing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from heretic_kl.errors import ExportError
from heretic_kl.export.folder import write_text
from heretic_kl.export.portable import markdown_text
from heretic_kl.files import new_file

CARD = "README.md"
FOLDER = "figures"
HEADING = "## Figures"
NEXT = "## Limits of the measurement"
"""Section of the card before which the pictures stand."""


@dataclass(frozen=True)
class CardPicture:
    """A picture, and the words that stand for it (`alternative`) and below it."""

    name: str
    png: bytes
    alternative: str
    caption: str


def add_figures(folder: Path, pictures: Sequence[CardPicture]) -> list[Path]:
    """Write pictures into a saved model's folder and show them in its card.

    What an earlier call put into the card is replaced.

    Returns:
        The files that were written, the card first.

    Raises:
        ExportError: the folder holds no card of a saved model, or cannot be written.
    """
    card = folder / CARD
    try:
        text = card.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        text = ""
    if NEXT not in text:
        raise ExportError(f"{str(folder)!r} holds no card of a model that heretic-kl saved")
    files = [folder / FOLDER / f"{picture.name}.png" for picture in pictures]
    for path, picture in zip(files, pictures, strict=True):
        try:
            with new_file(path) as partial:
                partial.write_bytes(picture.png)
        except OSError as error:
            raise ExportError(f"cannot write {str(path)!r}: {error.strerror}") from error
    text = re.sub(rf"^{HEADING}\n.*?(?=^## )", "", text, flags=re.DOTALL | re.MULTILINE)
    shown = "\n\n".join(map(_shown, pictures))
    before, after = text.split(f"\n{NEXT}\n", 1)
    write_text(card, f"{before}\n{HEADING}\n\n{shown}\n\n{NEXT}\n{after}")
    return [card, *files]


def _shown(picture: CardPicture) -> str:
    alternative = markdown_text(re.sub(r"[\[\]]+", " ", picture.alternative))
    return f"![{alternative}]({FOLDER}/{picture.name}.png)\n\n*{markdown_text(picture.caption)}*"
