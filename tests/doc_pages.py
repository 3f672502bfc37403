"""The code blocks of the pages, block by block and command by command."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = (
    "accelerate",
    "bash",
    "for",
    "foreseer",
    "make",
    "npm",
    "pip",
    "pytest",
    "python",
    "sbatch",
    "srun",
    "torchrun",
)
"""What a line of a block of commands begins with."""


@dataclass(frozen=True)
class Block:
    """A fenced or indented block of code; `kind` is `commands`, `python` or `text`."""

    page: str
    line: int
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}, line {self.line}"

    def commands(self) -> list[str]:
        """Its commands, one line each, without comments and with single spaces."""
        joined = re.sub(r"\\\n\s*", " ", self.text)
        lines = [shlex.join(shlex.split(line, comments=True)) for line in joined.splitlines()]
        return [line for line in lines if line]


def pages() -> list[str]:
    """Every page of the documentation and of the repository's root, but the log of the past."""
    found = [*ROOT.glob("docs/**/*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    return sorted(path.relative_to(ROOT).as_posix() for path in found if path.exists())


def blocks_of(page: str, text: str) -> list[Block]:
    """The blocks of a page.

    Raises:
        ValueError: a fence names no kind, or an unknown one; or commands stand beside other text.
    """
    found = []
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type in ("fence", "code_block"):
            assert token.map is not None
            line = token.map[0] + 1
            kind = kind_of(token.info.strip(), token.content, f"{page}, line {line}")
            found.append(Block(page, line, kind, token.content))
    return found


def kind_of(language: str, text: str, where: str) -> str:
    """What a block is; an indented one has no language and is known by how its lines begin."""
    kinds = {"bash": "commands", "python": "python", "text": "text"}
    if language and language not in kinds:
        raise ValueError(f"{where}: a block of {language!r}; expected {', '.join(kinds)}.")
    begins = re.sub(r"\\\n", " ", text).splitlines()
    lines = [re.sub(r'^(\w+=("[^"]*"|\S*) )*', "", line) for line in begins]  # variables first
    commands = [line.startswith(PROGRAMS) for line in lines if line and line[0] not in "# "]
    if kinds.get(language) == "commands" or (not language and any(commands)):
        if not all(commands):
            raise ValueError(
                f"{where}: some lines begin with no known program ({', '.join(PROGRAMS)}); put "
                "what is no command into a block of `text`."
            )
        return "commands"
    return kinds.get(language, "text")


def all_blocks() -> list[Block]:
    """The blocks of all pages."""
    return [block for page in pages() for block in blocks_of(page, (ROOT / page).read_text())]


def inline_commands() -> list[tuple[str, str]]:
    """Commands in running text and tables: the page and the words between backticks."""
    found = []
    for page in pages():
        for token in MarkdownIt("commonmark").enable("table").parse((ROOT / page).read_text()):
            for child in token.children or []:
                if child.type == "code_inline" and child.content.startswith(
                    ("foreseer ", "python ", "make ")
                ):
                    found.append((page, child.content.replace("\n", " ")))
    return found
