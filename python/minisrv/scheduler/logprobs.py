"""Log-probabilities of a step: what the engine must compute, and which request each is for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from minisrv.engine.forward_batch import LogprobColumns, Logprobs
from minisrv.scheduler.request import Request, Status
from minisrv.scheduler.step_plan import Chunk, StepPlan
from minisrv.wire.arrays import Int32Array
from minisrv.wire.logprobs import TokenLogprobs


def build_logprobs(step: StepPlan) -> tuple[Int32Array, LogprobColumns | None]:
    """The batch's `prompt_logprob_tokens` and `logprobs`: empty and None if no request asks."""
    samples = _asking(step)
    chunks = step.scored
    asking = [request for _, request in samples] + [chunk.request for chunk in chunks]
    if not asking:
        return np.empty(0, np.int32), None
    ids = [chunk.request.prompt_ids[chunk.start + 1 : _end(chunk) + 1] for chunk in chunks]
    columns = LogprobColumns(
        num_top=max(request.sampling.num_top_logprobs for request in asking),
        samples=np.array([sample for sample, _ in samples], np.int32),
        prompt_ids=np.concatenate([np.empty(0, np.int32), *ids]),
    )
    return _scored_tokens(step), columns


def take_logprobs(
    step: StepPlan, token_ids: Sequence[int], logprobs: Logprobs
) -> Iterator[TokenLogprobs]:
    """The log-probabilities of the step's tokens; those of prompts are kept until the first token.

    Must be called before the step is settled.
    """
    samples = _asking(step)
    for row, (sample, request) in enumerate(samples):
        if request.status is not Status.FINISHED and request.max_tokens:
            assert request.sampling.logprobs is not None
            num_top = request.sampling.logprobs
            yield TokenLogprobs(
                uid=request.uid,
                token_ids=np.array([token_ids[sample]], np.int32),
                logprobs=logprobs.logprobs[row : row + 1],
                top_ids=logprobs.top_ids[row, :num_top],
                top_logprobs=logprobs.top_logprobs[row, :num_top],
            )
    first = len(samples)
    for chunk in step.scored:
        end = first + _end(chunk) - chunk.start
        _keep(chunk, logprobs, first, end)
        first = end


def _asking(step: StepPlan) -> list[tuple[int, Request]]:
    return [(i, r) for i, r in enumerate(step.samples) if r.sampling.logprobs is not None]


def _end(chunk: Chunk) -> int:
    """The end of the chunk's positions that are followed by a prompt token."""
    return min(chunk.start + chunk.length, len(chunk.request.prompt_ids) - 1)


def _scored_tokens(step: StepPlan) -> Int32Array:
    places = [np.empty(0, np.int32)]
    first = len(step.decodes)
    scored = {id(chunk) for chunk in step.scored}
    for chunk in step.prefills:
        if id(chunk) in scored:
            places.append(np.arange(first, first + _end(chunk) - chunk.start, dtype=np.int32))
        first += chunk.length
    return np.concatenate(places)


def _keep(chunk: Chunk, logprobs: Logprobs, first: int, end: int) -> None:
    """Store a part of a prompt's log-probabilities, over those from before a preemption."""
    request = chunk.request
    assert request.sampling.prompt_logprobs is not None
    num_top = min(request.sampling.prompt_logprobs, logprobs.top_ids.shape[1])
    shape = len(request.prompt_ids) - 1
    if request.prompt_logprobs is None:
        request.prompt_logprobs = Logprobs(
            np.empty(shape, np.float32),
            np.empty((shape, num_top), np.int32),
            np.empty((shape, num_top), np.float32),
        )
    kept, there = request.prompt_logprobs, slice(chunk.start, _end(chunk))
    kept.logprobs[there] = logprobs.logprobs[first:end]
    kept.top_ids[there] = logprobs.top_ids[first:end, :num_top]
    kept.top_logprobs[there] = logprobs.top_logprobs[first:end, :num_top]
