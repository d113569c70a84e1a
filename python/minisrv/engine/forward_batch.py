"""The interface between scheduler and engine: what one step computes, and what it returns.

Sizes: R sequences in the step, T tokens, S sequences that sample, P page-table writes.
Plain numpy, so that the scheduler and a fake engine need no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from minisrv.wire.arrays import Float32Array, Int32Array, Int64Array


@dataclass(frozen=True, slots=True)
class GrammarMasks:
    """Which samples a grammar constrains, and how to get the tokens that it allows.

    The masks depend on the tokens of the previous step, so an engine calls `fill` late: once per
    step, after launching the forward. Bit i of word w of a row allows token 32 * w + i.
    """

    samples: Int32Array  # [G] ascending indices into S
    fill: Callable[[], Int32Array]  # -> [G, W]


@dataclass(frozen=True, slots=True)
class SamplingColumns:
    """Sampling parameters of the S sequences that sample, one column per parameter.

    Randomness depends only on (seeds, choices, position of the new token), not on other requests in
    the batch. Sample `suppress_samples[i]` (an index into S) may not get token `suppress_ids[i]`.
    """

    temperature: Float32Array  # [S] 0 is greedy
    top_p: Float32Array  # [S] 1 is off
    top_k: Int32Array  # [S] 0 is off
    min_p: Float32Array  # [S] 0 is off
    seeds: Int64Array  # [S]
    choices: Int32Array  # [S]
    suppress_samples: Int32Array  # [any]
    suppress_ids: Int32Array  # [any]
    grammar: GrammarMasks | None = None  # None if no sample is constrained; only on rank 0


@dataclass(frozen=True, slots=True)
class Penalties:
    """Penalties and logit biases of the samples that have any; used only on rank 0.

    The engine counts the tokens of each row. `begin_rows` sample for the first time in this step,
    so their tokens so far (prompt, then output) are given: `begin_ids`, one row after the other.
    """

    samples: Int32Array  # [E] indices into S
    rows: Int32Array  # [E] their rows
    presence: Float32Array  # [E]
    frequency: Float32Array  # [E]
    repetition: Float32Array  # [E] 1 is off
    begin_rows: Int32Array  # [B]
    begin_lens: Int32Array  # [B]
    begin_prompt_lens: Int32Array  # [B] how many of them are the prompt
    begin_ids: Int32Array  # [sum of begin_lens]
    bias_samples: Int32Array  # [any] indices into S
    bias_ids: Int32Array  # [any]
    bias_values: Float32Array  # [any]


@dataclass(frozen=True, slots=True)
class LogprobColumns:
    """Which logprobs to compute; used only on rank 0.

    Those of the tokens sampled by `samples`, and of prompt tokens: `prompt_ids` are the tokens that
    follow the batch's `prompt_logprob_tokens`.
    """

    num_top: int  # K, most likely alternatives per token
    samples: Int32Array  # [L] ascending indices into S
    prompt_ids: Int32Array  # [Q]


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Logprobs of the L samples, then of the Q prompt tokens.

    K is `num_top`, or the size of the vocabulary if that is smaller.
    """

    logprobs: Float32Array  # [L + Q]
    top_ids: Int32Array  # [L + Q, K] best first
    top_logprobs: Float32Array  # [L + Q, K]


def _no_tokens() -> Int32Array:
    return np.empty(0, np.int32)


@dataclass(frozen=True, slots=True, repr=False)
class ForwardBatch:
    """One step: first `num_decodes` sequences of one token each, then the prefill chunks.

    The input of a decode is the token that the engine sampled last for its row, which may still be
    on the device; the ids of prefill chunks are given. Before the forward the engine sets
    `page_table[page_rows, page_columns] = page_ids`; column c of a row is the page that holds
    positions c * page_size and up. A row keeps its pages between steps.
    """

    step_id: int
    num_decodes: int
    rows: Int32Array  # [R] the fixed row of each sequence
    query_lens: Int32Array  # [R] tokens computed in this step
    start_positions: Int32Array  # [R] position of the first one = tokens already in the cache
    prefill_ids: Int32Array  # [T - num_decodes]
    page_rows: Int32Array  # [P]
    page_columns: Int32Array  # [P]
    page_ids: Int32Array  # [P]
    sample_indices: Int32Array  # [S] ascending indices into R; each samples after its last token
    sampling: SamplingColumns
    penalties: Penalties | None = None  # None in nearly all steps
    prompt_logprob_tokens: Int32Array = field(default_factory=_no_tokens)  # [Q] indices into T
    logprobs: LogprobColumns | None = None  # None in nearly all steps

    def __repr__(self) -> str:
        return (
            f"ForwardBatch(step {self.step_id}: {self.num_decodes} decodes, "
            f"{self.rows.size - self.num_decodes} chunks with {self.prefill_ids.size} tokens, "
            f"{self.sample_indices.size} samples)"
        )


@dataclass(frozen=True, slots=True)
class ForwardOutput:
    token_ids: Int32Array  # [S] in the order of `sample_indices`
    logprobs: Logprobs | None = None  # if the batch requested any


class ForwardEngine(Protocol):
    """What the scheduler's loop requires of an engine.

    Steps run in launch order; a page that one step writes may be read by the next.
    """

    def launch(self, batch: ForwardBatch) -> Any:
        """Start a step and return a handle; at most two steps are in flight."""

    def wait(self, handle: Any) -> ForwardOutput:
        """Block until the step is done; called once per handle, in launch order."""
