"""The programs of docs/clients."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

PAGES = Path(__file__).parent.parent.parent / "docs" / "clients"
DEFAULT_URL = "http://127.0.0.1:8000"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Program:
    """A block of a page, and the output that the page shows after it, if any."""

    page: str
    language: str
    source: str
    output: str | None


def programs() -> list[Program]:
    """All that can be run, in the order of the pages."""
    found = []
    for path in sorted(PAGES.glob("*.md")):
        blocks = FENCE.findall(path.read_text())
        followers = [*blocks, ("", "")][1:]
        found += [
            Program(path.stem, language, source, following[1] if following[0] == "text" else None)
            for (language, source), following in zip(blocks, followers, strict=False)
            if language in ("python", "js", "sh")
        ]
    return found
