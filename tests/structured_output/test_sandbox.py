"""Hostile grammars end in the sandbox, and honest ones do not wait for them."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from minisrv.errors import InvalidRequestError, MinisrvError
from minisrv.sampling_params import Grammar
from minisrv.structured_output.compiler import GrammarCompiler, Outcome
from minisrv.structured_output.matcher import Matcher
from minisrv.structured_output.sandbox import Sandbox
from tests.support.builders import demo_vocabulary

LCM = '{"type":"integer","allOf":[{"multipleOf":9973},{"multipleOf":9967}]}'
HOSTILE = [
    Grammar.json_schema(LCM, "response_format"),
    Grammar.json_schema(
        {"$defs": {"a": {"multipleOf": 9973}}, "$ref": "#/$defs/a", "multipleOf": 7919}
    ),
    Grammar.json_schema({"allOf": [{"pattern": f"a.*b{{{i}}}.*c"} for i in range(2, 40)]}),
    Grammar.lark(f'start: "x" %json {LCM}'),
]


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    made = Sandbox(demo_vocabulary().source, cpu_seconds=1, memory_mib=256)
    yield made
    made.close()


def test_an_honest_grammar_passes_and_a_wrong_one_is_refused(sandbox: Sandbox) -> None:
    sandbox.try_out(Grammar.regex("a+"))
    with pytest.raises(InvalidRequestError, match="unclosed group") as caught:
        sandbox.try_out(Grammar.regex("a(b", "guided_regex"))
    assert caught.value.param == "guided_regex"


@pytest.mark.parametrize("grammar", HOSTILE, ids=["lcm", "ref", "patterns", "lark"])
def test_a_hostile_grammar_is_refused_within_its_time(sandbox: Sandbox, grammar: Grammar) -> None:
    sandbox.try_out(Grammar.regex("a"))  # the helper has started
    began = time.monotonic()
    with pytest.raises(InvalidRequestError, match="more than 1 s or 256 MiB") as caught:
        sandbox.try_out(grammar)
    assert time.monotonic() - began < 10
    assert caught.value.param == grammar.param


def test_a_fault_in_the_trial_is_not_blamed_on_the_grammar(sandbox: Sandbox) -> None:
    grammar = Grammar.regex("a")
    object.__setattr__(grammar, "text", "\ud800")  # llguidance raises UnicodeEncodeError
    with pytest.raises(MinisrvError, match="could not be compiled") as caught:
        sandbox.try_out(grammar)
    assert not isinstance(caught.value, InvalidRequestError)


def test_memory_is_limited_before_time() -> None:
    sandbox = Sandbox(demo_vocabulary().source, cpu_seconds=60, memory_mib=64)
    sandbox.try_out(Grammar.regex("a"))
    began = time.monotonic()
    with pytest.raises(InvalidRequestError, match="64 MiB"):
        sandbox.try_out(HOSTILE[0])
    assert time.monotonic() - began < 60
    sandbox.close()


def test_a_child_that_gets_no_processor_ends_after_twice_its_time(sandbox: Sandbox) -> None:
    sandbox.try_out(Grammar.regex("a"))
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            sandbox._send(theirs)
        ours.settimeout(60)
        began = time.monotonic()
        assert ours.recv(1) == b"."  # it has started, and waits for its grammar
        assert ours.recv(1) == b""
        assert 1.5 < time.monotonic() - began < 20


def test_hostile_grammars_leave_no_process_and_no_memory(sandbox: Sandbox) -> None:
    sandbox.try_out(Grammar.regex("a"))
    assert sandbox._helper is not None
    before = _resident_mib(sandbox._helper.pid)
    for _ in range(3):
        with pytest.raises(InvalidRequestError):
            sandbox.try_out(HOSTILE[0])
    children = Path(f"/proc/{sandbox._helper.pid}/task/{sandbox._helper.pid}/children")
    deadline = time.monotonic() + 60
    while children.read_text() and time.monotonic() < deadline:  # freeing memory takes a moment
        time.sleep(0.05)
    assert children.read_text() == ""
    assert _resident_mib(sandbox._helper.pid) < before + 10


def test_the_memory_of_a_large_grammar_is_reported(sandbox: Sandbox) -> None:
    assert sandbox.try_out(Grammar.regex("a")) < 2**24
    schema = {"type": "integer", "allOf": [{"multipleOf": 223}, {"multipleOf": 227}]}
    assert sandbox.try_out(Grammar.json_schema(schema)) > 2**24


def test_a_helper_that_was_killed_is_replaced(sandbox: Sandbox) -> None:
    sandbox.try_out(Grammar.regex("a"))
    assert sandbox._helper is not None
    sandbox._helper.kill()
    sandbox.try_out(Grammar.regex("b"))


def test_a_grammar_is_not_blamed_for_a_helper_that_was_killed_during_its_trial(
    sandbox: Sandbox,
) -> None:
    sandbox.try_out(Grammar.regex("a"))
    outcomes: list[BaseException] = []

    def try_out() -> None:
        try:
            sandbox.try_out(HOSTILE[0])
        except MinisrvError as error:
            outcomes.append(error)

    thread = threading.Thread(target=try_out)
    thread.start()
    for _ in range(2):  # the grammar is tried twice
        first = sandbox._helper
        assert first is not None
        _wait_for_child(first.pid)
        first.kill()
        while thread.is_alive() and sandbox._helper is first:
            time.sleep(0.01)
    thread.join(30)
    (outcome,) = outcomes
    assert not isinstance(outcome, InvalidRequestError)
    assert outcome.code == "grammar_not_compiled"


def test_a_closed_sandbox_has_no_process(sandbox: Sandbox) -> None:
    sandbox.try_out(Grammar.regex("a"))
    assert sandbox._helper is not None
    pid = sandbox._helper.pid
    sandbox.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(MinisrvError, match="closing"):
        sandbox.try_out(Grammar.regex("b"))


@pytest.mark.timed
def test_an_honest_new_grammar_costs_at_most_50_ms(sandbox: Sandbox) -> None:
    times = []
    for i in range(15):
        began = time.monotonic()
        sandbox.try_out(Grammar.json_schema({"type": "integer", "minimum": i}))
        times.append(time.monotonic() - began)
    assert min(times) < 0.05  # pauses of the machine only add to a run


def test_honest_grammars_wait_for_two_hostile_ones_and_then_pass(sandbox: Sandbox) -> None:
    compiler = GrammarCompiler(demo_vocabulary(), sandbox)
    for ticket, grammar in enumerate(HOSTILE[:2]):
        compiler.request(grammar, ticket)
    honest = Grammar.regex("a+")
    compiler.request(honest, 7)
    done = {}
    began = time.monotonic()
    while len(done) < 3:
        compiler.wait(1)
        done.update(compiler.take_done())
    assert time.monotonic() - began < 60
    assert isinstance(done[7], Matcher)
    assert isinstance(done[0], InvalidRequestError)
    with pytest.raises(InvalidRequestError, match="more than"):  # remembered: refused at once
        compiler.request(HOSTILE[0], 9)
    compiler.close()


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_200_hostile_grammars_leave_no_memory_behind() -> None:
    sandbox = Sandbox(demo_vocabulary().source, cpu_seconds=1, memory_mib=128)
    compiler = GrammarCompiler(demo_vocabulary(), sandbox)
    compiler.compile(Grammar.regex("a"))
    before = _tree_mib()
    done: dict[int, Outcome] = {}
    for i in range(200):
        factors = [{"multipleOf": 9973}, {"multipleOf": 9967}, {"minimum": i}]
        compiler.request(Grammar.json_schema({"type": "integer", "allOf": factors}), i)
    while len(done) < 200:
        compiler.wait(5)
        done.update(compiler.take_done())
    assert all(isinstance(outcome, InvalidRequestError) for outcome in done.values())
    assert _tree_mib() < before + 50
    compiler.close()


def _children(pid: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _wait_for_child(pid: int) -> None:
    deadline = time.monotonic() + 60
    while not _children(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _tree_mib() -> float:
    """The memory of this process and of all processes that it has started."""
    pids = [os.getpid()]
    for pid in pids:
        pids += _children(pid)
    return sum(_resident_mib(pid) for pid in pids)


def _resident_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
