"""Grammars compiled on threads: shared, kept within bytes, and each ticket answered once."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from minisrv.errors import InvalidRequestError, OverloadedError
from minisrv.sampling_params import Grammar
from minisrv.structured_output.compiler import REFUSAL_SECONDS, GrammarCompiler, Outcome
from minisrv.structured_output.matcher import Matcher
from minisrv.structured_output.vocabulary import Vocabulary, VocabularySource
from tests.support.builders import demo_vocabulary


@pytest.fixture
def compiler() -> Iterator[GrammarCompiler]:
    made = GrammarCompiler(demo_vocabulary(), max_cache_bytes=3 * 2**18 + 1000)
    yield made
    made.close()


def outcomes(compiler: GrammarCompiler, count: int) -> dict[int, Outcome]:
    done: dict[int, Outcome] = {}
    while len(done) < count:
        compiler.wait(5)
        for ticket, outcome in compiler.take_done():
            assert ticket not in done
            done[ticket] = outcome
    assert compiler.take_done() == []
    return done


def test_those_who_wait_for_one_grammar_get_a_state_each_and_later_ones_at_once(
    compiler: GrammarCompiler,
) -> None:
    for ticket in range(3):
        assert compiler.request(Grammar.regex("a+"), ticket) is None
    done = outcomes(compiler, 3)
    assert len({id(matcher) for matcher in done.values()}) == 3
    assert isinstance(compiler.request(Grammar.regex("a+", "other"), 9), Matcher)


def test_the_least_recently_used_goes_when_the_bytes_are_over(compiler: GrammarCompiler) -> None:
    patterns = ["a", "b", "c"]
    for ticket, pattern in enumerate(patterns):
        compiler.request(Grammar.regex(pattern), ticket)
        outcomes_of = outcomes(compiler, 1)
        assert isinstance(outcomes_of[ticket], Matcher)
    assert compiler.request(Grammar.regex("a"), 7) is not None  # used again
    compiler.request(Grammar.regex("d"), 8)
    outcomes(compiler, 1)
    assert compiler.cache_bytes <= 3 * 2**18 + 1000
    assert compiler.request(Grammar.regex("b"), 9) is None
    assert compiler.request(Grammar.regex("a"), 10) is not None


def test_a_tokenizer_that_llguidance_cannot_use_fails_each_grammar_and_is_read_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vocabulary = Vocabulary(VocabularySource("{}", 512, [0]))
    compiler = GrammarCompiler(vocabulary)
    for ticket in range(2):
        assert compiler.request(Grammar.regex("a"), ticket) is None
        failure = outcomes(compiler, 1)[ticket]
        assert "llguidance cannot use the tokenizer" in str(failure)
        monkeypatch.delattr(Vocabulary, "_read", raising=False)
    compiler.close()


def test_a_grammar_that_cannot_be_compiled_fails_all_who_wait(compiler: GrammarCompiler) -> None:
    for ticket in range(2):
        compiler.request(Grammar.json_schema({"type": "foo"}, "response_format"), ticket)
    for outcome in outcomes(compiler, 2).values():
        assert isinstance(outcome, InvalidRequestError)
        assert outcome.param == "response_format"


def test_grammars_that_running_requests_hold_are_bounded() -> None:
    compiler = GrammarCompiler(demo_vocabulary(), max_cache_bytes=0, max_held_bytes=2 * 2**18)
    running = []
    for ticket, pattern in enumerate(["a", "b"]):
        compiler.request(Grammar.regex(pattern), ticket)
        running.append(outcomes(compiler, 1)[ticket])
    assert compiler.cache_bytes == 0
    with pytest.raises(OverloadedError, match="0 MiB"):
        compiler.request(Grammar.regex("c"), 2)
    copies = [matcher.copy() for matcher in running if isinstance(matcher, Matcher)]
    running.clear()  # the copies still hold the grammars
    with pytest.raises(OverloadedError):
        compiler.request(Grammar.regex("c"), 2)
    del copies[0]
    assert compiler.request(Grammar.regex("c"), 2) is None  # not remembered as refused
    assert isinstance(outcomes(compiler, 1)[2], Matcher)
    compiler.close()


def test_a_refusal_is_remembered_for_a_while(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = Grammar.regex("a(b")
    compiler.request(wrong, 0)
    outcomes(compiler, 1)
    with pytest.raises(InvalidRequestError, match="unclosed group"):
        compiler.request(wrong, 1)
    later = time.monotonic() + REFUSAL_SECONDS + 1
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert compiler.request(wrong, 2) is None
    assert isinstance(outcomes(compiler, 1)[2], InvalidRequestError)
