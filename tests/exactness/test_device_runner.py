"""The step that is made for a GPU gives the tokens of transformers, too, graphs or not."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

pytest.importorskip("flashinfer")
from minisrv.checkpoint.model_config import load_model_config
from minisrv.config import ServerConfig
from minisrv.engine import rank_engine
from minisrv.engine.device_runner import DeviceRunner
from minisrv.engine.engine import Engine
from minisrv.engine.forward_batch import ForwardBatch
from minisrv.engine.graph_shapes import GraphShape
from minisrv.engine.layers.decoder import Decoder
from minisrv.engine.model_size import (
    GRAPH_NODE_BYTES,
    GRAPH_NODES,
    graph_sizes,
    widest_layer,
)
from minisrv.llm import LLM
from minisrv.sampling_params import SamplingParams
from minisrv.scheduler.build import build_loop
from minisrv.scheduler.channel import LocalChannel
from minisrv.scheduler.loop import SchedulerLoop
from minisrv.start_progress import no_progress
from minisrv.wire.messages import AbortMsg, Finish, GenerateMsg
from tests.support.checkpoints import make_checkpoint
from tests.support.device_parts import use_device_runner
from tests.support.oracle import (
    CHECKPOINTS,
    compare,
    load_reference,
    make_prompts,
    reference_tokens,
    run,
)
from tests.support.step_driver import open_engine


def make_loop(model_dir: Path, **options: object) -> SchedulerLoop:
    config = ServerConfig(
        **{  # type: ignore[arg-type]
            "model": str(model_dir),
            "dtype": "float32",
            "device": "cpu",
            "num_pages": 400,
            "max_prefill_tokens": 64,
            "max_running_requests": 20,
            "num_threads": 1,
            **options,
        }
    )
    return build_loop(config, model_dir, LocalChannel(), no_progress)


@pytest.fixture(scope="module", params=[pytest.param("llama", marks=pytest.mark.soak), "qwen3"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    architecture, variant = CHECKPOINTS[request.param]
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), architecture, **variant)


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> tuple[PreTrainedModel, list[list[int]], list[list[int]]]:
    """The model in transformers, prompts, and what it answers to them."""
    model = load_reference(checkpoint)
    prompts = make_prompts(16, model.config.vocab_size, longest=150)
    return model, prompts, reference_tokens(model, prompts)


# Graphs of decodes up to `largest`, and of steps with prompts up to `max_tokens`.
@pytest.mark.parametrize(
    ("overlap_depth", "page_size", "largest", "max_tokens"),
    [
        *((0, 1, 0, 0), (1, 16, 6, 64), (0, 1, 256, 0)),
        *(
            pytest.param(*rest, marks=pytest.mark.soak)
            for rest in [
                *((1, 16, 0, 0), (0, 1, 6, 0), (0, 1, 6, 64)),
                *((1, 16, 256, 0), (1, 16, 256, 100)),
            ]
        ),
    ],
)
def test_tokens_equal_those_of_transformers(
    checkpoint: Path,
    reference: tuple[PreTrainedModel, list[list[int]], list[list[int]]],
    overlap_depth: int,
    page_size: int,
    largest: int,
    max_tokens: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    repeat = use_device_runner(monkeypatch)
    model, prompts, expected = reference
    loop = make_loop(
        checkpoint,
        overlap_depth=overlap_depth,
        page_size=page_size,
        num_pages=6400 // page_size,
        cuda_graph_max_bs=largest,
        cuda_graph_max_tokens=max_tokens,
    )
    assert isinstance(loop.engine, Engine)
    runner = loop.engine._rank_0.runner
    assert isinstance(runner, DeviceRunner)
    mixed: Counter[bool] = Counter()
    find = runner._shape

    def count(batch: ForwardBatch) -> GraphShape | None:
        shape = find(batch)
        if batch.prefill_ids.size:
            mixed[shape is not None] += 1
        return shape

    monkeypatch.setattr(runner, "_shape", count)
    recorded = repeat.replays
    for at_once in (16, 3):
        outputs, _ = run(loop, prompts, at_once)
        assert not compare(model, prompts, expected, outputs)
    assert (repeat.replays > recorded) == bool(largest)
    assert (mixed[True] > 5) == bool(max_tokens)


@pytest.mark.parametrize(("context", "lens"), [(None, [1, 17, 65, 513]), (40, [1, 17, 38])])
def test_prompts_of_the_warm_up_are_computed_whole_one_by_one(
    checkpoint: Path, context: int | None, lens: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_device_runner(monkeypatch)
    monkeypatch.setattr(rank_engine, "_WARM_UP_LENS", {"cpu": (1, 17, 65, 513)})
    chunks = []
    launch = Engine.launch

    def count(engine: Engine, batch: ForwardBatch) -> Any:
        if batch.prefill_ids.size:
            assert batch.rows.size == 1
            chunks.append(batch.prefill_ids.size)
        return launch(engine, batch)

    monkeypatch.setattr(Engine, "launch", count)
    loop = make_loop(checkpoint, max_prefill_tokens=1024, max_seq_len=context)
    assert chunks == lens
    cache = loop.scheduler.cache
    assert cache.num_available == cache.pages.num_free == cache.pages.size
    assert not loop.scheduler.take_replies()


def test_graphs_of_all_sizes_write_their_logits_to_the_tensor_that_the_plan_counts(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_device_runner(monkeypatch)
    places = set()
    logits = Decoder.logits

    def note(model: Decoder, *arguments: Any) -> torch.Tensor:
        result = logits(model, *arguments)
        places.add(result.data_ptr())
        return result

    monkeypatch.setattr(Decoder, "logits", note)
    config = load_model_config(checkpoint)
    engine = open_engine(checkpoint, dtype="float32", max_running_requests=20)
    runner = engine._rank_0.runner
    assert isinstance(runner, DeviceRunner)
    sizes = graph_sizes(20)
    assert set(runner._graphs) == {GraphShape(size) for size in sizes}
    shared = runner._graph_logits_SV
    assert places == {shared.data_ptr()}
    hidden = 20 * widest_layer(config, 1) * 4
    kernels = len(sizes) * config.num_layers * GRAPH_NODES * GRAPH_NODE_BYTES
    assert engine.memory_plan.graphs == kernels + hidden + shared.nbytes


@pytest.mark.parametrize("largest", [0, 256])
def test_penalties_change_the_text_as_they_do_where_the_host_is_in_charge(
    checkpoint: Path, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = make_prompts(8, load_reference(checkpoint).config.vocab_size, longest=100)
    plain = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    penalised = replace(plain, presence_penalty=1.5, repetition_penalty=1.4)
    params = [penalised, plain] * 4
    options: dict[str, Any] = {"dtype": "float32", "device": "cpu", "num_threads": 1}
    options["max_running_requests"] = 12  # the largest graph

    def tokens() -> list[list[int]]:
        with LLM(checkpoint, cuda_graph_max_bs=largest, **options) as llm:
            outputs = llm.generate_outputs(prompts, params, use_tqdm=False)
        return [output.outputs[0].token_ids for output in outputs]

    on_host = tokens()
    repeat = use_device_runner(monkeypatch)
    assert tokens() == on_host
    assert bool(repeat.replays) == bool(largest)


@pytest.mark.parametrize("overlap_depth", [pytest.param(0, marks=pytest.mark.soak), 1])
def test_short_memory_and_aborts_leave_the_text_of_the_others(
    checkpoint: Path, overlap_depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_device_runner(monkeypatch)
    model = load_reference(checkpoint)
    prompts = make_prompts(20, model.config.vocab_size, longest=60)
    expected = reference_tokens(model, prompts)
    loop = make_loop(checkpoint, overlap_depth=overlap_depth, page_size=4, num_pages=120)
    outputs = _run_with_aborts(loop, prompts)
    assert loop.scheduler.num_preemptions
    kept = [i for i, output in enumerate(outputs) if output is not None]
    assert 0 < len(kept) < len(prompts)
    answers = [output for output in outputs if output is not None]
    compare(model, [prompts[i] for i in kept], [expected[i] for i in kept], answers)


def _run_with_aborts(loop: SchedulerLoop, prompts: list[list[int]]) -> list[list[int] | None]:
    """All prompts at once, every fourth of which is aborted at some moment; None for those."""
    import numpy as np

    rng = random.Random(1)
    channel = loop.channel
    assert isinstance(channel, LocalChannel)
    sampling = SamplingParams(
        temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, max_tokens=32, ignore_eos=True
    )
    outputs: list[list[int] | None] = [[] for _ in prompts]
    for uid, prompt in enumerate(prompts):
        ids = np.array(prompt, np.int32)
        channel.inbox.append(GenerateMsg(uid=uid, prompt_ids=ids, sampling=sampling))
    to_abort, num_open = list(range(0, len(prompts), 4)), len(prompts)
    while num_open:
        if to_abort and rng.random() < 0.2:
            channel.inbox.append(AbortMsg(uids=(to_abort.pop(),)))
        loop.turn()
        loop.scheduler.check()
        while channel.outbox:
            message = channel.outbox.popleft()
            columns = zip(message.uids.tolist(), message.token_ids, message.finishes, strict=True)
            for uid, token, finish in columns:
                num_open -= finish != Finish.NONE
                output = outputs[uid]
                if finish == Finish.ABORT:
                    outputs[uid] = None
                elif output is not None:
                    output.append(int(token))
    return outputs
