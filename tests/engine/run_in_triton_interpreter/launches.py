"""Launches per step with the real sampling kernels, in Triton's interpreter.

Run by test_triton_kernels.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flashinfer")
from minisrv.engine import rank_engine
from minisrv.engine.device_runner import DeviceKernels, DeviceRunner
from minisrv.engine.forward_batch import ForwardBatch
from minisrv.engine.kernels.triton_expand import expand
from minisrv.engine.kernels.triton_mask import mask_logits
from minisrv.engine.kernels.triton_sample import sample_on_device
from minisrv.engine.sampling import adjust
from minisrv.llm import LLM
from minisrv.sampling_params import SamplingParams, TokenBias
from tests.support.checkpoints import make_checkpoint
from tests.support.device_parts import use_device_runner
from tests.support.launches import Launches

# The weight of the least float32 is zero, by way of an infinity.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")

PLAIN = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
EVERYTHING = SamplingParams(
    temperature=0.6,
    top_k=20,
    top_p=0.95,
    min_p=0.01,
    presence_penalty=0.5,
    frequency_penalty=0.5,
    repetition_penalty=1.1,
    max_tokens=3,
    ignore_eos=True,
    seed=1,
)
SAMPLER = ["_penalize", "_add_biases", "_score_blocks", "list_parts", "_pick_best"]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[ForwardBatch, list[str]]]:
    """The steps of all models built in a test, each with its launches."""
    use_device_runner(monkeypatch)
    kernels = DeviceKernels(expand, sample_on_device, mask_logits)
    monkeypatch.setattr(rank_engine, "device_kernels", lambda: kernels)
    launches, found = Launches(monkeypatch), []
    compute, upload = DeviceRunner.compute, adjust.upload

    def counted(runner: DeviceRunner, batch: ForwardBatch) -> Any:
        launches.names.clear()
        with launches:
            handle = compute(runner, batch)
        found.append((batch, launches.names.copy()))
        return handle

    def counted_upload(*args: Any) -> Any:
        launches.names.append("upload")
        return upload(*args)

    monkeypatch.setattr(DeviceRunner, "compute", counted)
    monkeypatch.setattr(adjust, "upload", counted_upload)
    return found


@pytest.fixture
def llm(tmp_path: Path, steps: list[tuple[ForwardBatch, list[str]]]) -> Iterator[LLM]:
    directory = make_checkpoint(tmp_path, "llama", num_hidden_layers=1)
    options: dict[str, Any] = {"dtype": "float32", "device": "cpu", "num_threads": 1}
    with LLM(directory, cuda_graph_max_bs=4, max_running_requests=8, **options) as made:
        yield made


def run(llm: LLM, params: SamplingParams, batch: int) -> list[list[int]]:
    prompts = [[5, 6, 7, 8 + i] for i in range(batch)]
    outputs = llm.generate_outputs(prompts, params, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.soak
def test_penalties_and_filters_add_at_most_six_launches_to_any_step(
    llm: LLM, steps: list[tuple[ForwardBatch, list[str]]]
) -> None:
    """The attention that stands in for FlashInfer's has operations for each sequence."""
    in_decode: dict[tuple[SamplingParams, int], set[int]] = {}
    at_start: dict[tuple[SamplingParams, int], set[int]] = {}
    tails = []
    for params in (PLAIN, EVERYTHING):
        for batch in (1, 4):
            steps.clear()
            llm._loop.scheduler.cache.evict(10**6)  # a step for the whole prompt each time
            run(llm, params, batch)
            decodes = [names for step, names in steps if step.num_decodes == batch]
            assert len(decodes) >= 2
            tails += [names[names.index("_penalize") :] for names in decodes]
            in_decode[params, batch] = {len(names) for names in decodes}
            starts = [n for step, n in steps if not step.num_decodes and step.rows.size == batch]
            at_start[params, batch] = {len(names) for names in starts}
    assert all(tail == tails[0] for tail in tails)
    assert tails[0][: len(SAMPLER)] == SAMPLER
    for batch in (1, 4):
        assert in_decode[EVERYTHING, batch] == in_decode[PLAIN, batch]
        assert max(at_start[EVERYTHING, batch]) <= min(at_start[PLAIN, batch]) + 6


def test_more_biases_than_fit_leave_the_graph_and_still_apply(
    llm: LLM, steps: list[tuple[ForwardBatch, list[str]]]
) -> None:
    """Each request forbids all tokens but one, after the penalties."""
    steps.clear()
    bias = tuple(TokenBias(token, -100.0) for token in range(60) if token != 33)
    params = SamplingParams(
        temperature=0, presence_penalty=2.0, logit_bias=(*bias, TokenBias(33, 100.0)), max_tokens=3
    )
    assert run(llm, params, 2) == [[33, 33, 33]] * 2
    assert all([name for name in names if name in SAMPLER] == SAMPLER for _, names in steps)
