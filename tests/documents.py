"""What the documents show: their fenced blocks, and the commands in them."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
RESULTS = sorted((ROOT / "docs" / "results").glob("*.md"))
FENCE = re.compile(
    r"^(?:<!-- not run: (?P<why>.*?) -->\n)?(?P<ticks>```+)(?P<info>[^`\n]*)\n(?P<code>.*?)^(?P=ticks)$", re.S | re.M
)
SHELL = ("", "bash", "console", "sh")


class Block(NamedTuple):
    """A fenced block."""

    language: str
    code: str
    line: int
    """Of the first line of code, counted from 1."""
    why_not_run: str
    """What a comment over it says: `<!-- not run: ... -->`; empty where it is run."""


def blocks(page: Path, *languages: str) -> list[Block]:
    """The fenced blocks of a page in these languages, in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start("code")) + 1
        found.append(Block(match["info"].strip(), match["code"], line, match["why"] or ""))
    return [block for block in found if block.language in languages]


def commands(page: Path, program: str) -> list[list[str]]:
    """Command lines of `program` in the shell blocks of a page, as lists of words.

    Lines that end in a backslash go on; several commands may stand on one line, two spaces apart; `[NAME]` is an
    argument that may be left out, and `[NAME ...]` one that may be repeated.
    """
    found = []
    for block in blocks(page, *SHELL):
        for line in re.sub(r"\\\n\s*", " ", block.code).splitlines():
            for part in re.split(rf"\s{{2,}}(?={program} )", line.strip().removeprefix("$ ")):
                if part.startswith(f"{program} "):
                    plain = re.sub(r"\[([^\]]*?)( \.\.\.)?\]", r"\1", part)
                    found.append(shlex.split(plain, comments=True)[1:])
    return found
