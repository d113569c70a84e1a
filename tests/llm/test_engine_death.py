"""A rank of the engine is killed while an `LLM` runs: the answers are those of an uncut run."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from minisrv import LLM, SamplingParams
from minisrv.engine import memory
from minisrv.errors import EngineDeadError, MinisrvError
from minisrv.llm.outputs import RequestOutput, Run
from minisrv.sampling_params import Grammar
from minisrv.wire.messages import GenerateMsg, TokenizeMsg
from tests.support.checkpoints import make_checkpoint

OPTIONS: dict[str, Any] = {"dtype": "float32", "num_threads": 1, "tp": 2, "page_size": 4}
LONG: dict[str, Any] = {"max_tokens": 24, "ignore_eos": True}
SCHEMA = '{"type":"object","properties":{"n":{"type":"string","minLength":30}},"required":["n"]}'
REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0, **LONG},
    "seeded": {"temperature": 2.0, "seed": 5, **LONG},
    "choices without a seed": {"temperature": 2.0, "n": 3, **LONG},
    "penalties": {"temperature": 0.0, "repetition_penalty": 1.3, "presence_penalty": 0.7, **LONG},
    "logprobs": {"temperature": 2.0, "seed": 9, "logprobs": 2, "prompt_logprobs": 1, **LONG},
    "stop string": {
        "temperature": 0.0,
        "max_tokens": 40,
        "stop": ("4 5 5", "10 11"),
        "logprobs": 2,
    },
    "grammar": {
        "temperature": 1.2,
        "seed": 3,
        "grammar": Grammar(kind="json_schema", text=SCHEMA),
        "max_tokens": 60,
    },
    "short": {"temperature": 0.0, "max_tokens": 3, "ignore_eos": True},
    "waits": {"temperature": 0.0, **LONG},
}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    # So few rows that some requests have not started when the engine dies.
    with LLM(
        "demo", **OPTIONS, kv_memory="64MiB", max_running_requests=8, restart_limit="100/60"
    ) as made:
        yield made


def prepare(llm: LLM) -> list[GenerateMsg]:
    """Greedy requests continue a chat; sampled ones a text after which the model is unsure."""
    chat: dict[str, Any] = {"messages": ({"role": "user", "content": "Count from 1 to 12."},)}
    prompts = [{"prompt": "Once"} if f["temperature"] else chat for f in REQUESTS.values()]
    return [
        llm.prepare(TokenizeMsg(uid=0, sampling=SamplingParams(**fields), **prompt))
        for fields, prompt in zip(REQUESTS.values(), prompts, strict=True)
    ]


def ranks() -> list[psutil.Process]:
    """The processes of ranks of all models of this process, oldest first."""
    children = psutil.Process().children()
    alive = [child for child in children if "minisrv.engine.parallel" in child.cmdline()]
    return sorted(alive, key=lambda child: (child.create_time(), child.pid))


def kill_rank() -> None:
    """Kill the rank of the model that started last."""
    ranks()[-1].kill()


def kill_once(llm: LLM, monkeypatch: pytest.MonkeyPatch, when: Callable[[Run], bool]) -> None:
    """Kill a rank as soon as `when` holds between two steps; the next one then dies."""
    turn, killed = llm._turn, False

    def turn_and_kill(run: Run) -> list[RequestOutput]:
        nonlocal killed
        ended = turn(run)
        if not killed and when(run):
            killed = True
            kill_rank()
        return ended

    monkeypatch.setattr(llm, "_turn", turn_and_kill)


def kill_during_a_step(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kill a rank from another thread once there are tokens, while the steps go on."""
    turn, num_turns = llm._turn, 0
    killer = threading.Thread(target=kill_rank, daemon=True)

    def turn_while_another_kills(run: Run) -> list[RequestOutput]:
        nonlocal num_turns
        if not num_turns and has_tokens(run):
            killer.start()
        num_turns += killer.ident is not None
        if num_turns == 4:  # it has to wait for a processor
            killer.join()
        return turn(run)

    monkeypatch.setattr(llm, "_turn", turn_while_another_kills)


def has_tokens(run: Run) -> bool:
    return any(choice.token_ids for _, choice in run.choices.values())


def holds_tokens_back(run: Run) -> bool:
    """Whether a choice with logprobs has tokens whose text may be a part of a stop string."""
    return any(len(c.logprobs) > len(c.event.token_ids) for _, c in run.choices.values())


def by_name(outputs: Iterator[RequestOutput]) -> dict[str, RequestOutput]:
    names = list(REQUESTS)
    return {names[output.index]: output for output in outputs}


def shown(output: RequestOutput) -> list[tuple[Any, ...]]:
    """All that may not differ at all."""
    assert output.error is None, output.error
    return [
        (c.text, c.token_ids, c.event.text, c.event.token_ids, c.finish_reason, c.stop_reason)
        for c in output.outputs
    ]


def logprobs_of(output: RequestOutput) -> tuple[list[int], list[bytes], list[float]]:
    """Of prompt and output, with those of the likeliest tokens: the ids, spellings and values."""
    (choice,) = output.outputs
    parts = [*output.prompt_logprobs, *choice.logprobs]
    ids = [id for part in parts for id in (part.token_id, *(id for id, _ in part.top))]
    values = [value for part in parts for value in (part.logprob, *(v for _, v in part.top))]
    return ids, [s for part in choice.event.logprobs for s in part.spellings], values


def test_requests_go_on_where_they_are_on_another_engine_and_on_a_third(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = prepare(llm)
    uncut = by_name(llm.stream_outputs(messages))
    assert len({choice.text for choice in uncut["choices without a seed"].outputs}) == 3
    messages = [
        replace(again, sampling=replace(again.sampling, seed=first.sampling.seed))
        for again, first in zip(prepare(llm), messages, strict=True)
    ]
    engine = weakref.ref(llm._loop.engine)
    kill_during_a_step(llm, monkeypatch)
    kill_once(llm, monkeypatch, lambda run: len(llm._deaths) == 1 and holds_tokens_back(run))
    cut = by_name(llm.stream_outputs(messages))
    assert len(llm._deaths) == 2
    gc.collect()
    assert engine() is None, "the old engine keeps its memory"
    for name in REQUESTS:
        assert shown(cut[name]) == shown(uncut[name]), name
    for name in ("logprobs", "stop string"):
        *same, values = logprobs_of(cut[name])
        *expected, expected_values = logprobs_of(uncut[name])
        assert same == expected
        assert values == pytest.approx(expected_values, abs=1e-4)
    assert cut["greedy"].cached_tokens > 0, "what the first engine found is forgotten"
    assert not llm._loop.busy
    assert llm._detokenizer.num_requests == 0
    llm._loop.scheduler.check()


def test_without_resume_open_requests_fail_and_the_next_ones_are_served(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    uncut = llm.generate(["a", "b"], params)
    monkeypatch.setattr(llm, "config", replace(llm.config, resume=False))
    kill_once(llm, monkeypatch, has_tokens)
    for output in llm.generate_outputs(["a", "b"], params):
        assert isinstance(output.error, MinisrvError)
        assert (output.error.code, output.error.http_status) == ("engine_restarted", 503)
        assert "rank 1 process has died" in output.error.message
    assert not llm._loop.busy
    assert llm._detokenizer.num_requests == 0
    assert llm.generate(["a", "b"], params) == uncut


def test_a_rank_that_dies_between_calls_or_while_they_are_dropped_is_replaced(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)
    request = TokenizeMsg(uid=0, prompt="a", sampling=params)
    short = TokenizeMsg(uid=0, prompt="a", sampling=replace(params, max_tokens=2))
    outputs = llm.stream_outputs([llm.prepare(request), llm.prepare(short)])
    (ended,) = next(outputs).outputs
    kill_rank()
    outputs.close()
    assert not llm._loop.busy
    assert llm.generate("a", params, max_tokens=2) == [ended.text]


def test_at_the_restart_limit_every_call_raises_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    others, num_fds = ranks(), psutil.Process().num_fds()
    monkeypatch.setattr(memory, "_CPU_LIMIT", 2**26)
    with LLM("demo", **OPTIONS, restart_limit="2/60") as llm:
        num_pages = llm._loop.scheduler.cache.pages.size
        monkeypatch.setattr(memory, "available_memory", lambda: 2**24)
        kill_rank()
        assert llm.generate("a", max_tokens=2)
        assert llm._loop.scheduler.cache.pages.size == num_pages
        kill_rank()
        for _ in range(2):
            with pytest.raises(EngineDeadError, match=r"rank 1 process has died.*SIGKILL"):
                llm.generate("a", max_tokens=2)
        assert len(llm._deaths) == 2
        assert ranks() == others
    gc.collect()
    assert psutil.Process().num_fds() == num_fds


def test_an_engine_that_cannot_start_again_ends_the_llm(tmp_path: Path) -> None:
    model_dir = make_checkpoint(tmp_path, "llama")
    with LLM(model_dir, **OPTIONS, kv_memory="64MiB") as llm:
        (model_dir / "model.safetensors").write_bytes(b"nothing of use")
        kill_rank()
        for _ in range(2):
            with pytest.raises(EngineDeadError, match=r"rank 1 .*cannot be started again: .*safet"):
                llm.generate([[1, 2]], max_tokens=2)
