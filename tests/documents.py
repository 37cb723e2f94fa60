"""README, CONTRIBUTING and `docs/`: their pages, blocks of code and headings."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from conftest import ROOT

PAGES = [
    str(path.relative_to(ROOT))
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
]
COMMAND = re.compile(r"(?:^|\| )(?:\w+=\S+ )*(?:offline-kd|(?:python|torchrun .*) -m offline_kd) (.+)")


@dataclass(frozen=True)
class Block:
    """What stands between two fences."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    def with_text(self, text: str) -> "Block":
        return replace(self, text=text)

    def commands(self) -> list[str]:
        """The lines of a shell, without comments and prompts, continued lines joined."""
        joined = re.sub(r" *\\\n *", " ", self.text)
        bare = (re.sub(r"(^|\s)#.*$", "", line).strip() for line in joined.splitlines())
        return [line for line in bare if line]

    def words_after_our_name(self) -> list[str]:
        """What the commands of this package are given, a text for each."""
        return [found[1].partition(" > ")[0] for line in self.commands() if (found := COMMAND.search(line))]


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    text = text_of(page)
    found = re.finditer(r"^```(\S*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(page, text.count("\n", 0, one.start()) + 1, one[1], one[2]) for one in found]


def prose(page: str) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)


def inline(page: str) -> list[str]:
    """What stands between single backticks."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(page))]


def anchors(page: str) -> set[str]:
    """What `#...` may name in a page: its headings, as GitHub makes anchors of them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        name = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        found.add(next(one for one in (name, *(f"{name}-{n}" for n in range(1, 99))) if one not in found))
    return found


def links(page: str) -> list[tuple[Path, str]]:
    """The files and anchors that a page leads to inside the project."""
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose(page))):
        if not re.match("[a-z]+:", target):
            file, _, anchor = target.partition("#")
            found.append(((ROOT / page).parent / file if file else ROOT / page, anchor))
    return found
