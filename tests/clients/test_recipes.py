"""Every program in docs/clients runs, and prints what the page says."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.clients.running import Machine

PAGES = Path(__file__).parent.parent.parent / "docs" / "clients"
DEFAULT_URL = "http://127.0.0.1:8000"
# Their first prompts are too long for the demo model: test_agents.py.
AGENTS = ("codex", "claude-code", "opencode", "qwen-code")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Program:
    """A block of a page, and the output that the page shows after it, if any."""

    page: str
    language: str
    source: str
    output: str | None


def programs() -> list[Program]:
    found = []
    for path in sorted(PAGES.glob("*.md")):
        blocks = FENCE.findall(path.read_text())
        followers = [*blocks[1:], ("", "")]
        found += [
            Program(path.stem, language, source, following[1] if following[0] == "text" else None)
            for (language, source), following in zip(blocks, followers, strict=True)
            if language in ("python", "js", "sh")
        ]
    return [program for program in found if program.page not in AGENTS]


def cases() -> list[object]:
    marked = []
    for program in programs():
        in_node = (program.page, program.language) == ("openai", "js")
        client = "openai-node" if in_node else program.page
        mark = pytest.mark.client(client, f"[recipe]({program.page}.md)")
        marked.append(pytest.param(client, program, marks=mark, id=client))
    return marked


@pytest.mark.parametrize(("client", "program"), cases())
def test_a_recipe_prints_what_its_page_says(
    machine: Callable[[str], Machine], demo_url: str, client: str, program: Program
) -> None:
    source = program.source.replace(DEFAULT_URL, demo_url)
    done = machine(client).program(source, program.language)
    assert done.status == 0, str(done)
    assert program.output is None or done.stdout.strip() == program.output.strip(), str(done)
