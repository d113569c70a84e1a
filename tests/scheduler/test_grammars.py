"""Requests with a grammar in the loop: every token obeys it, whatever happens to the others."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from llguidance import LLParserLimits

from minisrv.sampling_params import Grammar
from minisrv.scheduler.loop import SchedulerLoop
from minisrv.structured_output.compiler import GrammarCompiler
from minisrv.structured_output.vocabulary import Vocabulary
from minisrv.wire.messages import AbortMsg, Finish
from tests.scheduler.test_loop import Result, collect, drain
from tests.support.builders import (
    DEMO_EOS,
    demo_sandbox,
    demo_tokenizer,
    demo_vocabulary,
    generate_msg,
    hash_loop,
)
from tests.support.hash_engine import expected_output

VOCAB = 512
PERSON = Grammar.json_schema(
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 6},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    }
)


@cache
def vocabulary() -> Vocabulary:
    return demo_vocabulary()


def grammar_loop(**options: Any) -> SchedulerLoop:
    settings = {"num_pages": 400, "page_size": 4, "budget": 64, "num_rows": 16, **options}
    compiler = GrammarCompiler(vocabulary(), demo_sandbox())
    return hash_loop(vocab_size=VOCAB, eos_ids=[DEMO_EOS], compiler=compiler, **settings)


def text_of(tokens: list[int]) -> str:
    return demo_tokenizer().decode(tokens)


def check_person(tokens: list[int]) -> None:
    person = json.loads(text_of(tokens))
    assert list(person) == ["name", "age"]
    assert len(person["name"]) <= 6
    assert 0 <= person["age"] <= 150


@pytest.mark.parametrize("depth", [0, 1])
def test_texts_obey_their_grammar_and_free_ones_beside_them_are_untouched(depth: int) -> None:
    loop = grammar_loop(depth=depth)
    for uid in range(8):
        grammar = PERSON if uid % 2 else None
        message = generate_msg(uid, [uid, 1, 2], max_tokens=300, ignore_eos=True, grammar=grammar)
        loop.channel.inbox.append(message)
    result = drain(loop)
    for uid in range(8):
        if uid % 2:
            check_person(result.tokens[uid])
            assert result.ends[uid] is Finish.COMPLETE
        else:
            assert result.tokens[uid] == expected_output([uid, 1, 2], 300, VOCAB)


def test_with_overlap_a_constrained_request_gets_a_token_every_step() -> None:
    loop = grammar_loop(depth=1)
    loop.channel.inbox.append(generate_msg(0, [1, 2], max_tokens=40))
    grammar = Grammar.regex("[a-z]{40}")
    loop.channel.inbox.append(generate_msg(1, [3, 4], max_tokens=200, grammar=grammar))
    result = Result()
    while not result.tokens[1]:  # compiled, and its prompt computed
        loop.turn()
        collect(loop, result)
    for _ in range(10):
        before = len(result.tokens[1])
        loop.turn()
        collect(loop, result)
        assert len(result.tokens[1]) == before + 1


@pytest.mark.parametrize("depth", [0, 1])
def test_the_same_text_after_retractions(depth: int) -> None:
    texts = []
    for num_pages in (400, 40):
        loop = grammar_loop(num_pages=num_pages, page_size=2, depth=depth)
        for uid in range(6):
            loop.channel.inbox.append(
                generate_msg(uid, [uid, 1, 2, 3], max_tokens=60, grammar=PERSON)
            )
        texts.append(drain(loop).tokens)
    assert loop.scheduler.num_preemptions > 0
    assert texts[0] == texts[1]


def test_each_of_n_choices_has_a_state_of_its_own() -> None:
    loop = grammar_loop()
    loop.channel.inbox.append(generate_msg(0, [1, 2, 3], max_tokens=200, n=5, grammar=PERSON))
    result = drain(loop)
    for uid in range(5):
        check_person(result.tokens[uid])


@pytest.mark.parametrize("depth", [0, 1])
def test_max_tokens_gives_length_unless_the_text_is_whole(depth: int) -> None:
    loop = grammar_loop(depth=depth)
    grammar = Grammar.json_schema({"const": "0123456789"})
    for uid, max_tokens in enumerate([5, 100]):
        loop.channel.inbox.append(generate_msg(uid, [1, 2], max_tokens=max_tokens, grammar=grammar))
    result = drain(loop)
    assert result.ends == {0: Finish.LENGTH, 1: Finish.COMPLETE}
    assert text_of(result.tokens[1]) == '"0123456789"'
    assert text_of(result.tokens[1]).startswith(text_of(result.tokens[0]))
    exact = len(result.tokens[1])
    loop.channel.inbox.append(generate_msg(2, [1, 2], max_tokens=exact, grammar=grammar))
    assert drain(loop).ends == {2: Finish.COMPLETE}


@pytest.mark.parametrize("depth", [0, 1])
def test_end_of_text_comes_only_where_the_grammar_may_end_and_ends_the_request(depth: int) -> None:
    loop = grammar_loop(depth=depth)
    for uid in range(30):
        loop.channel.inbox.append(
            generate_msg(
                uid, [uid, 7], max_tokens=200, ignore_eos=True, grammar=Grammar.regex("(ab)+")
            )
        )
    result = drain(loop)
    ended = [uid for uid, end in result.ends.items() if end is Finish.STOP]
    assert ended
    for uid in ended:
        assert result.tokens[uid][-1] == DEMO_EOS
        assert set(text_of(result.tokens[uid]).split("ab")) == {""}


@pytest.mark.parametrize("depth", [0, 1])
def test_min_tokens_keeps_the_end_away_unless_nothing_else_is_left(depth: int) -> None:
    loop = grammar_loop(depth=depth)
    options = {"max_tokens": 200, "min_tokens": 9}
    for uid in range(20):
        loop.channel.inbox.append(
            generate_msg(uid, [uid, 7], grammar=Grammar.regex("a+"), **options)
        )
    loop.channel.inbox.append(generate_msg(20, [7], grammar=Grammar.regex("b{3}"), **options))
    result = drain(loop)
    assert all(len(result.tokens[uid]) > 9 for uid in range(20))
    assert text_of(result.tokens[20]) == "bbb"
    assert result.ends[20] in (Finish.STOP, Finish.COMPLETE)


@pytest.mark.parametrize("depth", [0, 1])
def test_min_tokens_one_keeps_end_of_text_from_being_the_first_token(depth: int) -> None:
    prompt = [4, 5, 6]
    eos = expected_output(prompt, 1, 50)[0]
    loop = hash_loop(eos_ids=[eos], depth=depth)
    loop.channel.inbox.append(generate_msg(0, prompt, max_tokens=3, min_tokens=1))
    batches = []
    launch = loop.engine.launch

    def watch(batch: Any) -> Any:
        batches.append(batch.sampling.suppress_ids.tolist())
        return launch(batch)

    loop.engine.launch = watch  # type: ignore[method-assign]
    drain(loop)
    assert batches == [[eos], [], []]


@pytest.mark.parametrize("turns", range(6))
@pytest.mark.parametrize("depth", [0, 1])
def test_an_abort_at_any_time_gives_one_end_and_all_pages_back(turns: int, depth: int) -> None:
    loop = grammar_loop(num_pages=30, page_size=2, budget=3, depth=depth)
    loop.channel.inbox.append(generate_msg(0, list(range(9)), max_tokens=40, grammar=PERSON))
    result = Result()
    for _ in range(turns):
        loop.turn()
        collect(loop, result)
    loop.channel.inbox.append(AbortMsg(uids=(0,)))
    end = drain(loop)
    assert [*result.ends.values(), *end.ends.values()] == [Finish.ABORT]
    loop.scheduler.cache.evict(1000)
    assert loop.scheduler.cache.pages.num_free == 30


@pytest.mark.parametrize("grammar", [PERSON, Grammar.regex("(")])
def test_a_grammar_of_an_earlier_epoch_does_not_reach_a_request_with_the_same_uid(
    grammar: Grammar, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A frontend that is started again counts its uids from 1."""
    loop = grammar_loop()
    loop.channel.inbox.append(generate_msg(1, [1, 2], max_tokens=300, grammar=grammar))
    loop.turn()
    assert loop.scheduler.num_compiling == 1
    epochs = iter([True])
    monkeypatch.setattr(loop.channel, "begins_epoch", lambda: next(epochs, False))
    loop.channel.inbox.append(generate_msg(1, [3, 4], max_tokens=20, ignore_eos=True))
    assert loop._grammars is not None
    loop._grammars.wait(30)
    result = drain(loop)
    assert not result.failures
    assert result.tokens == {1: expected_output([3, 4], 20, VOCAB)}


def test_a_grammar_that_fails_on_the_way_fails_only_its_request() -> None:
    limits = LLParserLimits(step_max_items=50, verbose_errors=False)
    compiler = GrammarCompiler(demo_vocabulary(limits), demo_sandbox())
    loop = hash_loop(
        num_pages=400, page_size=4, vocab_size=VOCAB, eos_ids=[DEMO_EOS], compiler=compiler
    )
    ambiguous = Grammar.lark('start: /[a-z]{3}/ s\ns: s s | s s s | "a" | "b" | ')
    loop.channel.inbox.append(generate_msg(0, [1, 2], max_tokens=400, grammar=ambiguous))
    loop.channel.inbox.append(generate_msg(1, [1, 2], max_tokens=20, ignore_eos=True))
    result = drain(loop)
    assert set(result.failures) == {0}
    assert result.fields[0] == ("grammar_too_complex", "grammar")
    assert result.tokens[1] == expected_output([1, 2], 20, VOCAB)


def test_a_sampled_token_outside_the_grammar_is_not_blamed_on_it() -> None:
    loop = grammar_loop()
    grammar = Grammar.regex("[a-z]{40}", "guided_regex")
    loop.channel.inbox.append(generate_msg(0, [1, 2], max_tokens=200, grammar=grammar))
    result = Result()
    while not result.tokens[0]:
        loop.turn()
        collect(loop, result)
    matcher = loop.scheduler._requests[0].matcher
    assert matcher is not None
    matcher.advance(7)  # a token that does not fit
    while not result.failures:
        loop.turn()
        collect(loop, result)
    assert result.fields[0] == ("internal_error", None)
    assert "the grammar does not allow" in result.failures[0]


def test_without_a_vocabulary_a_grammar_is_refused() -> None:
    loop = hash_loop()
    loop.channel.inbox.append(generate_msg(0, [1, 2], max_tokens=4, n=2, grammar=PERSON))
    assert set(drain(loop).failures) == {0, 1}


@pytest.mark.timed
def test_a_compile_of_seconds_leaves_the_others_their_pace() -> None:
    loop = grammar_loop()
    # A state for each remainder of the product.
    slow = Grammar.json_schema(
        {"type": "integer", "allOf": [{"multipleOf": 331}, {"multipleOf": 337}]}
    )
    result = Result()
    quiet = turn_times(loop, result, lambda: result.ends.keys() >= set(range(10)))
    loop.channel.inbox.append(generate_msg(-1, [3, 4], max_tokens=40, grammar=slow))
    start = time.perf_counter()
    busy = turn_times(loop, result, lambda: -1 in result.ends)
    assert time.perf_counter() - start > 1, "the compile is too fast to show anything"
    assert not result.failures
    assert int(text_of(result.tokens[-1])) % (331 * 337) == 0
    added = statistics.median(busy) - statistics.median(quiet)
    assert added < 0.005, f"{added * 1e3:.1f} ms more between two tokens"
    # Not the 99th percentile: on two cores a few turns wait for a core.
    assert statistics.quantiles(busy, n=10)[8] - statistics.median(quiet) < 0.03


def turn_times(loop: SchedulerLoop, result: Result, done: Callable[[], bool]) -> list[float]:
    """Seconds of each turn with a token for somebody: one free request after the other."""
    times, uid = [], 100 if result.ends else 0
    while not done():
        if uid == 0 or uid - 1 in result.ends or uid == 100:
            message = generate_msg(uid, [uid, 2], max_tokens=60, ignore_eos=True)
            loop.channel.inbox.append(message)
            uid += 1
        start = time.perf_counter()
        loop.turn()
        times.append(time.perf_counter() - start)
        collect(loop, result)
        time.sleep(0.002)  # the device computes
    loop.channel.inbox.append(AbortMsg(uids=(uid - 1,)))
    while loop.busy or loop.channel.inbox:
        loop.turn()
        collect(loop, result)
    return times
