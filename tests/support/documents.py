"""The pages people read, and the blocks of code in them.

A block in `sh`, `python`, `yaml` or `json` is run by a test; one in `console` or `text` is shown
only. One that begins with `# NAME.yaml` or `# NAME.py` is that file for what comes behind it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
OWN = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "cluster/README.md")
EXAMPLES = (
    "examples/spoken_digits/README.md",
    "examples/most/README.md",
    "examples/drama/README.md",
)
_BLOCK = re.compile(r"^```(\S*)\n(.*?)^```$", re.M | re.S)


class Block(NamedTuple):
    """A block of a page; `line` of the page is its first."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[str]:
    """All of them, from the repository's root."""
    docs = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
    return [page for page in (*OWN, *EXAMPLES, *docs) if (ROOT / page).exists()]


def text_of(page: str) -> str:
    """A page as it is written."""
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, *languages: str) -> list[Block]:
    """The blocks of a page in these languages (none given: in any), in their order."""
    text = text_of(page)
    found = [
        Block(page, text.count("\n", 0, match.start()) + 2, *match.groups())
        for match in _BLOCK.finditer(text)
    ]
    return [block for block in found if not languages or block.language in languages]


def file_of(block: Block) -> str | None:
    """The name of the file that a block is; None: it is none."""
    found = re.match(r"# (\w+\.(?:py|yaml))\n", block.text)
    return found[1] if found else None
