"""The engine starts and serves on a fake GPU, without a wait, a mistaken call or a late compile.

See fake_cuda, fake_flashinfer and fake_triton for what makes it fail.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest

from minisrv.engine.forward_batch import LogprobColumns
from minisrv.sampling_params import Grammar
from minisrv.structured_output.vocabulary import Vocabulary, read_vocabulary
from minisrv.wire.messages import Finish
from tests.gpu_dry_run.dry_run import decode_batch, dry_run, step_batch
from tests.gpu_dry_run.models import MODELS
from tests.gpu_dry_run.requests import SMALL, of_every_kind, prompts
from tests.support.builders import DEMO_EOS, demo_tokenizer

VOCAB_SIZE = 151936


# test_launches.py has steps of some of the others.
QUICK = {
    *("Qwen3-0.6B", "Qwen3-30B-A3B", "Qwen3-8B-FP8-blocks"),
    *("Qwen3-0.6B-switches", "Qwen3-0.6B-xqa"),
}


def names() -> list[Any]:
    """The models as parameters of a test."""
    return [
        pytest.param(name, marks=[] if name in QUICK else [pytest.mark.soak]) for name in MODELS
    ]


@dataclass(frozen=True)
class Served:
    """How the requests of a model ended, and the kernels that were missing when they came."""

    num_choices: int
    ends: dict[int, Finish]
    num_replays: int
    num_plans: int
    late: list[str]
    late_for_penalties: list[str]


@cache
def serve(name: str) -> Served:
    """Start a model; serve requests of every kind, then penalties in batches of several sizes."""
    messages = of_every_kind()
    with TemporaryDirectory() as folder, dry_run(MODELS[name], Path(folder), **SMALL) as run:
        ends, found = run.serve(messages), run.machine
        late = found.kernels.late
        for count in (1, 2, 5, 16, 33):
            penalized = prompts([20] * count, frequency_penalty=0.5, repetition_penalty=1.2)
            assert set(run.serve(penalized).values()) == {Finish.LENGTH}
        return Served(
            sum(message.sampling.n for message in messages),
            ends,
            found.gpu.num_replays,
            found.plans.num_planned,
            late,
            found.kernels.late[len(late) :],
        )


@pytest.mark.parametrize("name", names())
def test_it_serves_requests_of_every_kind(name: str) -> None:
    served = serve(name)
    assert len(served.ends) == served.num_choices
    assert set(served.ends.values()) == {Finish.LENGTH}
    assert served.num_replays > 10
    is_planned = MODELS[name].options.get("decode_kernel") != "xqa"
    assert served.num_plans > (served.num_replays // 2 + 20 if is_planned else 5)


@pytest.mark.parametrize("name", names())
def test_no_kernel_is_first_compiled_while_serving(name: str) -> None:
    assert not serve(name).late


@pytest.mark.parametrize("name", names())
def test_no_kernel_is_first_compiled_for_penalties(name: str) -> None:
    assert not serve(name).late_for_penalties


def test_it_preempts(tmp_path: Path) -> None:
    with dry_run(MODELS["Qwen3-0.6B"], tmp_path, num_pages=20, **SMALL) as run:
        ends = run.serve(prompts([100, 100, 100], max_tokens=120))
        assert run.loop.scheduler.num_preemptions
    assert list(ends.values()) == [Finish.LENGTH] * 3


def test_it_serves_grammars_beside_free_texts(tmp_path: Path) -> None:
    model, tokenizer = MODELS["Qwen3-0.6B"], demo_tokenizer()
    vocabulary = Vocabulary(read_vocabulary(tokenizer, VOCAB_SIZE, [DEMO_EOS]))
    (letter,) = tokenizer.encode("a", add_special_tokens=False)
    with dry_run(model, tmp_path, vocabulary=vocabulary, **SMALL) as run:
        run.machine.gpu.next_token = letter
        messages = prompts([10, 40, 7], grammar=Grammar.regex("a{3}"), max_tokens=9)
        messages += prompts([10, 40, 7], 1000)
        ends = run.serve(messages)
    assert [ends[uid] for uid in (0, 100, 200)] == [Finish.COMPLETE] * 3
    assert [ends[uid] for uid in (1000, 1100, 1200)] == [Finish.LENGTH] * 3


@pytest.mark.parametrize("options", [{}, {"cuda_graph_max_tokens": 512}], ids=["eager", "graphs"])
def test_steps_of_the_largest_sizes(options: dict[str, int], tmp_path: Path) -> None:
    """Those of a full server: every row decodes, and a full budget of prompt tokens."""
    with dry_run(MODELS["Qwen3-0.6B"], tmp_path, cuda_graph_max_bs=8, **options) as run:
        for batch in (
            decode_batch(256),
            decode_batch(256, adjusted=True),
            decode_batch(250),
            step_batch(num_decodes=200, chunks=[3000, 77], start=900),
            step_batch(num_decodes=0, chunks=[1], start=4000),
            step_batch(num_decodes=0, chunks=[4096, 4096]),
        ):
            assert run.launches(batch)


STEPS: list[tuple[int, list[int], dict[str, Any], bool]] = [
    (0, [1], {}, True),
    (0, [512], {}, True),
    (0, [64] * 8, {}, True),
    (0, [62] * 8, {}, False),  # the padding is a chunk, too
    (0, [513], {}, False),
    (5, [30, 29], {}, True),
    (40, [300, 7], {}, True),
    (129, [1], {}, True),
    (200, [100, 3, 4], {}, True),
    (248, [264], {}, True),
    (248, [265], {}, False),
    (249, [1], {}, False),
    (4, [60], {"prompt_logprob_tokens": np.arange(4, 64, dtype=np.int32)}, False),
]


@pytest.mark.soak
def test_a_step_with_prompts_is_replayed_where_it_fits_into_a_graph(tmp_path: Path) -> None:
    options = {"cuda_graph_max_tokens": 512}
    with dry_run(MODELS["Qwen3-0.6B"], tmp_path, num_layers=1, **options) as run:
        for num_decodes, chunks, fields, in_graph in STEPS:
            if fields:
                ids = np.zeros(len(fields["prompt_logprob_tokens"]), np.int32)
                samples = np.arange(num_decodes + len(chunks), dtype=np.int32)
                fields = fields | {"logprobs": LogprobColumns(2, samples, ids)}
            before = run.machine.gpu.num_replays
            run.launches(step_batch(num_decodes=num_decodes, chunks=chunks, start=900, **fields))
            replays = run.machine.gpu.num_replays - before
            assert replays == 2 * in_graph, (num_decodes, chunks)
