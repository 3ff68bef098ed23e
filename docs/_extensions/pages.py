"""What the site makes of the Markdown pages: a sidebar from lists of links, and files included.

- The links of `index.md` below each heading become a part of the sidebar; so do those of
  `api/index.md`. `decisions/index.md` takes every page of its folder.
- A page that stands for a file of the repository's root (`INCLUDED`) shows that file.
"""

import re
from pathlib import Path

from sphinx.application import Sphinx

INCLUDED = {
    "changelog": "CHANGELOG.md",
    "contributing": "CONTRIBUTING.md",
    "security": "SECURITY.md",
}
LINK = re.compile(r"(?<=\]\()([^)\s#:]+)")
ENTRY = re.compile(r"^- \[([^]]+)\]\(([^)#:\s]+)\.md\)", re.MULTILINE)


def read_page(app: Sphinx, page: str, source: list[str]) -> None:
    """Replace a page's text by what the site shows."""
    root = Path(app.srcdir).parent
    text = source[0]
    if page in INCLUDED:
        text = (root / INCLUDED[page]).read_text(encoding="utf-8")
        text = LINK.sub(lambda link: from_docs(link[0]), text)
    elif page == "decisions/index":
        text += toctree("", ["*"], "glob", "maxdepth: 1")
    elif page.endswith("index"):
        for part in re.split(r"^(?=## )", text, flags=re.MULTILINE):
            heading = part.partition("\n")[0]
            caption = heading.removeprefix("## ") if heading.startswith("## ") else ""
            if entries := ENTRY.findall(part):
                links = [f"{title} <{target}>" for title, target in entries]
                text += toctree(caption, links, "hidden")
    for target, file in INCLUDED.items():
        text = re.sub(rf"\]\((?:\.\./)+{file}", f"](/{target}.md", text)
    source[0] = text


def from_docs(link: str) -> str:
    """A link of a file in the repository's root, as a page of docs/ writes it."""
    return link.removeprefix("docs/") if link.startswith("docs/") else f"../{link}"


def toctree(caption: str, entries: list[str], *options: str) -> str:
    """A part of the sidebar; the page itself shows it too, unless it is hidden."""
    lines = [f":{option}" if " " in option else f":{option}:" for option in options]
    if caption:
        lines.append(f":caption: {caption}")
    return "\n\n" + "\n".join(["```{toctree}", *lines, "", *entries, "```"]) + "\n"


def setup(app: Sphinx) -> dict[str, bool]:
    """Have every page read by `read_page`."""
    app.connect("source-read", read_page)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
