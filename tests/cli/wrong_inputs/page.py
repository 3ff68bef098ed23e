"""The page docs/wrong-inputs.md, from the tables: `make wrong-inputs` writes it."""

from wrong_inputs import checks, elsewhere, models, prompts, settings, settings_files, storage
from wrong_inputs.case import Wrong

AREAS = {
    "Settings": settings,
    "Settings in files and variables": settings_files,
    "Settings, with the machine and the scorers": checks,
    "Prompts": prompts,
    "Models, adapters and stored references": models,
    "Studies and storages": storage,
    "Plug-ins, network and terminal": elsewhere,
}
CASES: list[Wrong] = [case for area in AREAS.values() for case in area.CASES]
HEAD = """# Wrong inputs

This page lists {count} wrong inputs and the error message of each. Every one prints a single line on stderr,
`heretic-kl: error: ` and the text below. There is no traceback, nothing is written, and the exit code is above
0 ([list](commands.md#exit-codes)). `[...]` stands for text that depends on a library or on the length of the
input. Each row is a test (`tests/cli/wrong_inputs`), and `make wrong-inputs` writes this page from the tests.
"""


def page() -> str:
    """The whole page, in Markdown."""
    parts = [HEAD.format(count=len(CASES))]
    for title, area in AREAS.items():
        parts.append(f"## {title}\n\n{' '.join((area.__doc__ or '').split())}\n")
        rows = [
            f"| {case.what} | {_code(case.shown)} | {_code(case.line)} | {case.code} |"
            for case in area.CASES
        ]
        parts.append("\n".join(["| wrong | command | answer | code |", "|---|---|---|---|", *rows]))
        parts.append("")
    return "\n".join(parts)


def _code(text: str) -> str:
    """Code in a cell of a table."""
    text = text.replace("|", "\\|").replace("\n", " ")
    return f"`` {text} ``" if "`" in text else f"`{text}`"


if __name__ == "__main__":
    print(page(), end="")
