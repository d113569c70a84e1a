"""Turns a step's plan into the flat arrays that the engine takes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from minisrv.engine.forward_batch import ForwardBatch, GrammarMasks, SamplingColumns
from minisrv.scheduler.logprobs import build_logprobs
from minisrv.scheduler.penalties import build_penalties
from minisrv.scheduler.request import Request
from minisrv.scheduler.step_plan import StepPlan
from minisrv.wire.arrays import Int32Array, Int64Array

FillMasks = Callable[[list[Request]], Int32Array]

_NO_TOKENS = np.empty(0, np.int32)


class BatchBuilder:
    """Keeps what is known of each row in columns, from which a step gathers its own."""

    def __init__(self, num_rows: int) -> None:
        self.uids = np.zeros(num_rows, np.int64)
        self._temperature = np.zeros(num_rows, np.float32)
        self._top_p = np.ones(num_rows, np.float32)
        self._top_k = np.zeros(num_rows, np.int32)
        self._min_p = np.zeros(num_rows, np.float32)
        self._seeds = np.zeros(num_rows, np.int64)
        self._choices = np.zeros(num_rows, np.int32)
        self._min_tokens = np.zeros(num_rows, np.int32)
        self._constrained = np.zeros(num_rows, np.bool_)
        self._has_penalties = np.zeros(num_rows, np.bool_)
        self._has_logprobs = np.zeros(num_rows, np.bool_)

    def find_rows(self, plan: StepPlan) -> Int64Array:
        """The rows of a plan, decodes first [R]; their columns are set. Call once for each plan.

        As int64, with which numpy indexes several times faster than with int32.
        """
        requests = plan.decodes + [chunk.request for chunk in plan.prefills]
        rows = np.array([r.lease.row for r in requests if r.lease], np.int64)
        for chunk, row in zip(plan.prefills, rows[len(plan.decodes) :], strict=True):
            self._set_row(int(row), chunk.request)
        return rows

    def build_batch(self, plan: StepPlan, rows: Int64Array, fill_masks: FillMasks) -> ForwardBatch:
        """The batch of a plan with its rows. Call once for each plan, in order.

        fill_masks: called back when the engine needs the grammar masks of these requests.
        """
        decodes, prefills = plan.decodes, plan.prefills
        prompts = [c.request.prefill_ids[c.start : c.start + c.length] for c in prefills]
        starts = [r.num_computed - 1 for r in decodes] + [chunk.start for chunk in prefills]
        query_lens = np.ones(len(rows), np.int32)
        query_lens[len(decodes) :] = [chunk.length for chunk in prefills]
        sample_indices = np.arange(len(decodes) + len(plan.sampling_prefills))
        sample_indices[len(decodes) :] = [len(decodes) + i for i in plan.sampling_prefills]
        sample_rows = rows[sample_indices]
        has_penalties = self._has_penalties[sample_rows].any()
        has_logprobs = plan.scored or self._has_logprobs[sample_rows].any()
        scored, logprobs = build_logprobs(plan) if has_logprobs else (_NO_TOKENS, None)
        places = np.array(list(plan.page_writes), np.int32).reshape(-1, 2)
        return ForwardBatch(
            step_id=plan.step_id,
            num_decodes=len(decodes),
            rows=rows.astype(np.int32),
            query_lens=query_lens,
            start_positions=np.array(starts, np.int32),
            prefill_ids=np.concatenate(prompts) if prompts else np.empty(0, np.int32),
            page_rows=np.ascontiguousarray(places[:, 0]),
            page_columns=np.ascontiguousarray(places[:, 1]),
            page_ids=np.array(list(plan.page_writes.values()), np.int32),
            sample_indices=sample_indices.astype(np.int32),
            sampling=self._columns(plan, sample_rows, fill_masks),
            penalties=build_penalties(plan, sample_rows) if has_penalties else None,
            prompt_logprob_tokens=scored,
            logprobs=logprobs,
        )

    def _set_row(self, row: int, request: Request) -> None:
        sampling = request.sampling
        assert sampling.top_k is not None, "the defaults are not filled in"
        self.uids[row] = request.uid
        self._temperature[row] = sampling.temperature
        self._top_p[row] = sampling.top_p
        self._top_k[row] = sampling.top_k
        self._min_p[row] = sampling.min_p
        self._seeds[row] = request.seed
        self._choices[row] = request.choice
        self._min_tokens[row] = sampling.min_tokens
        self._constrained[row] = request.matcher is not None
        self._has_penalties[row] = sampling.adjusts_logits
        self._has_logprobs[row] = sampling.logprobs is not None

    def _columns(self, plan: StepPlan, rows: Int64Array, fill_masks: FillMasks) -> SamplingColumns:
        suppressed = []
        if self._min_tokens[rows].any():
            suppressed = [
                (sample, token_id)
                for sample, request in enumerate(plan.samples)
                if request.matcher is None  # its mask leaves them out
                for token_id in request.suppressed_ids
            ]
        pairs = np.array(suppressed, np.int32).reshape(-1, 2)
        return SamplingColumns(
            temperature=self._temperature[rows],
            top_p=self._top_p[rows],
            top_k=self._top_k[rows],
            min_p=self._min_p[rows],
            seeds=self._seeds[rows],
            choices=self._choices[rows],
            suppress_samples=np.ascontiguousarray(pairs[:, 0]),
            suppress_ids=np.ascontiguousarray(pairs[:, 1]),
            grammar=self._grammar_masks(plan, rows, fill_masks),
        )

    def _grammar_masks(
        self, plan: StepPlan, rows: Int64Array, fill_masks: FillMasks
    ) -> GrammarMasks | None:
        constrained = np.flatnonzero(self._constrained[rows])
        if not constrained.size:
            return None
        requests = plan.samples
        fill = partial(fill_masks, [requests[sample] for sample in constrained])
        return GrammarMasks(constrained.astype(np.int32), fill)
