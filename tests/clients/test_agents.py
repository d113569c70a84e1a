"""Coding agents as `minisrv launch` starts them, with a model that follows a script."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from tests.clients.pages import DEFAULT_URL, programs
from tests.clients.recorder import Recording
from tests.clients.running import Done, Machine
from tests.clients.scripted_model import Conversation, Cut, Script, call

Play = Callable[..., Recording]
MakeMachine = Callable[[str], Machine]
LIMIT_S = 120
FINAL = "Fertig \N{PARTY POPPER}: "


@dataclass(frozen=True)
class Agent:
    """client: for `minisrv launch`. arguments: one question, no confirmations. tool: its shell.

    prompt_tokens: about how many the scripted model's tokenizer makes of its first prompt.
    """

    client: str
    page: str
    arguments: tuple[str, ...]
    tool: str
    prompt_tokens: int
    command: str = "command"
    more: tuple[tuple[str, object], ...] = ()

    def shell(self, command: str) -> str:
        """A call of its shell."""
        return call(self.tool, **{self.command: command}, **dict(self.more))

    def run(self, machine: Machine, recording: Recording) -> Done:
        # As `minisrv launch` finds a server on another port; root has to say that it is a sandbox.
        port = recording.url.rpartition(":")[2]
        command = ["minisrv", "launch", self.client, "--run", "--", *self.arguments, "Begin."]
        path = machine.variables["PATH"].partition(os.pathsep)[0]
        return machine.run(
            [f"{path}/{command[0]}", *command[1:]], LIMIT_S, MINISRV_PORT=port, IS_SANDBOX="1"
        )


DESCRIBED, WAITED_FOR = ("description", "x"), ("is_background", False)
AGENTS = [
    Agent(
        "codex",
        "codex",
        ("exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox"),
        "exec_command",
        33_000,
        "cmd",
    ),
    Agent("opencode", "opencode", ("run", "--auto"), "bash", 26_000, more=(DESCRIBED,)),
    Agent("qwen-code", "qwen-code", ("--yolo",), "run_shell_command", 63_000, more=(WAITED_FOR,)),
    Agent("claude", "claude-code", ("-p", "--allowedTools", "Bash", "--"), "Bash", 65_000),
]


def each(tried: str) -> pytest.MarkDecorator:
    cases = [
        pytest.param(agent, marks=pytest.mark.client(agent.client, tried), id=agent.client)
        for agent in AGENTS
    ]
    return pytest.mark.parametrize("agent", cases)


def loop(agent: Agent) -> Script:
    """Two calls at once, then one, then a text; requests without tools want a title."""

    def script(conversation: Conversation) -> str:
        if agent.tool not in conversation.tool_names:
            return "A title"
        match len(conversation.results):
            case 0:
                return "I look.\n" + agent.shell("touch first") + agent.shell("touch second")
            case 2:
                return agent.shell("touch third")
            case count:
                return f"{FINAL}{count} results."

    return script


@each("loops of three turns with parallel calls")
def test_an_agent_loops_over_parallel_calls(agent: Agent, machine: MakeMachine, play: Play) -> None:
    recording, computer = play(loop(agent)), machine(agent.client)
    done = agent.run(computer, recording)
    assert done.status == 0, str(done)
    assert f"{FINAL}3 results." in done.stdout, str(done)
    made = {path.name for path in computer.work.iterdir()}
    assert made >= {"first", "second", "third"}, str(done)
    assert {exchange.status for exchange in recording.generations()} == {200}
    assert all(exchange.json["stream"] for exchange in recording.generations())
    largest = max(exchange.json.get("max_tokens", 0) for exchange in recording.generations())
    assert largest == (0 if agent.client == "codex" else 32_000)


@each("the recipe")
def test_the_recipe_of_an_agent_runs(agent: Agent, machine: MakeMachine, play: Play) -> None:
    """Prints the reply, to the letter."""
    reply = 'It says "hello" \N{EARTH GLOBE EUROPE-AFRICA} to all.'
    recording = play(lambda conversation: reply)
    (source,) = [program.source for program in programs() if program.page == agent.page]
    port = recording.url.rpartition(":")[2]
    done = machine(agent.client).program(source, "sh", MINISRV_PORT=port)
    assert done.status == 0, str(done)
    assert reply in done.stdout, str(done)


@pytest.mark.client("aider", "[recipe](aider.md), with a model that follows a script")
def test_aider_writes_the_file_of_the_reply(machine: MakeMachine, play: Play) -> None:
    recording = play(lambda conversation: 'So:\n\nhello.py\n```python\nprint("hello")\n```\n')
    (recipe,) = [program for program in programs() if program.page == "aider"]
    computer = machine("aider")
    source = recipe.source.replace(DEFAULT_URL, recording.url)
    done = computer.program(source, "sh")
    assert done.status == 0, str(done)
    assert (computer.work / "hello.py").read_text() == 'print("hello")\n', str(done)


@each("a call that is cut off")
def test_a_call_that_is_cut_off_is_not_carried_out(
    agent: Agent, machine: MakeMachine, play: Play
) -> None:
    computer = machine(agent.client)

    def script(conversation: Conversation) -> str:
        if conversation.num_replies or agent.tool not in conversation.tool_names:
            return "I stop."
        return Cut(agent.shell("touch first-second").partition("-second")[0])

    recording = play(script)
    agent.run(computer, recording)
    # qwen-code completes the JSON and runs it, whatever the reply said of its end.
    assert (computer.work / "first").exists() == (agent.client == "qwen-code")
    assert {exchange.status for exchange in recording.generations()} == {200}


@each("a conversation that outgrows the context")
def test_a_conversation_that_outgrows_the_context_is_compacted_or_reported(
    agent: Agent, machine: MakeMachine, play: Play
) -> None:
    calls = 0

    def script(conversation: Conversation) -> str:
        nonlocal calls
        asked = str(conversation.messages[-1]["content"]).lower()
        if agent.tool not in conversation.tool_names or "summar" in asked:
            return FINAL
        calls += 1
        return agent.shell(f"seq {calls} 3000") if calls < 8 else FINAL

    recording = play(script, context=agent.prompt_tokens * 3 // 2)
    done = agent.run(machine(agent.client), recording)
    shown = (done.stdout + done.stderr).lower()
    reported = "context window" in shown or "context length" in shown or "too long" in shown
    assert FINAL in done.stdout or reported, str(done)
