"""The sampling parameters that few requests set: penalties and logit biases."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from minisrv.engine.forward_batch import Penalties
from minisrv.scheduler.request import Request
from minisrv.scheduler.step_plan import StepPlan
from minisrv.wire.arrays import Int32Array, Int64Array


def build_penalties(plan: StepPlan, rows: Int64Array) -> Penalties:
    """The penalties of a step; `rows` are the page table rows of its samples.

    The engine counts a request's tokens by row. They are sent with the chunk that ends its prompt,
    the first step that samples; after a preemption that includes the output, all of it settled.
    """
    samples = plan.samples
    penalized = [
        (i, request) for i, request in enumerate(samples) if request.sampling.penalizes_tokens
    ]
    begun = [(i, request) for i, request in penalized if i >= len(plan.decodes)]
    biased = [
        (i, bias) for i, request in enumerate(samples) for bias in request.sampling.logit_bias
    ]
    chosen = [i for i, _ in penalized]
    params = [request.sampling for _, request in penalized]
    return Penalties(
        samples=_ints(chosen),
        rows=rows[chosen].astype(np.int32),
        presence=np.array([p.presence_penalty for p in params], np.float32),
        frequency=np.array([p.frequency_penalty for p in params], np.float32),
        repetition=np.array([p.repetition_penalty for p in params], np.float32),
        begin_rows=rows[[i for i, _ in begun]].astype(np.int32),
        begin_lens=_ints([len(request.prefill_ids) for _, request in begun]),
        begin_prompt_lens=_ints([len(request.prompt_ids) for _, request in begun]),
        begin_ids=_joined([request for _, request in begun]),
        bias_samples=_ints([i for i, _ in biased]),
        bias_ids=_ints([bias.token_id for _, bias in biased]),
        bias_values=np.array([bias.value for _, bias in biased], np.float32),
    )


def _joined(requests: Sequence[Request]) -> Int32Array:
    return np.concatenate([np.empty(0, np.int32), *(r.prefill_ids for r in requests)])


def _ints(values: Sequence[int]) -> Int32Array:
    return np.array(values, np.int32)
