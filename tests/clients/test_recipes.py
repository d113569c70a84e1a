"""Every program in docs/clients runs, and prints what the page says."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.clients.pages import DEFAULT_URL, Program, programs
from tests.clients.running import Machine

# They need a longer context than the demo model's, or a better model: test_agents.py.
AGENTS = ("codex", "claude-code", "opencode", "qwen-code", "aider")
# Its first program is a server: test_open_webui.py.
OTHERS = (*AGENTS, "open-webui")


def cases() -> list[object]:
    marked = []
    for program in programs():
        if program.page in OTHERS:
            continue
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
