"""The only types between scheduler and engine: what one step computes, and what came of it.

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
    """Which samples a grammar constrains, and how to get the tokens it allows them.

    The masks come late, for they depend on the tokens of the step before: an engine calls `fill`
    once, when the forward is on its way. Bit i of word w of a row allows token 32 * w + i.
    """

    samples: Int32Array  # [G] ascending indices into S
    fill: Callable[[], Int32Array]  # -> [G, W]


@dataclass(frozen=True, slots=True)
class SamplingColumns:
    """Sampling parameters of the S sequences that sample, one column a parameter.

    A draw depends on (seeds, choices, position of the new token) alone, so that neighbours in the
    batch change nothing. `suppress_samples[i]` (an index into S) may not draw `suppress_ids[i]`.
    """

    temperature: Float32Array  # [S] 0 is greedy
    top_p: Float32Array  # [S] 1 is off
    top_k: Int32Array  # [S] 0 is off
    min_p: Float32Array  # [S] 0 is off
    seeds: Int64Array  # [S]
    choices: Int32Array  # [S]
    suppress_samples: Int32Array  # [any]
    suppress_ids: Int32Array  # [any]
    grammar: GrammarMasks | None = None  # None when no sample is constrained; stays on rank 0


@dataclass(frozen=True, slots=True)
class Penalties:
    """Penalties and biases of the samples that ask for them; rank 0 alone uses these.

    Columns of the samples with penalties first. A request brings its tokens (prompt, then output)
    in the step of its row's first sample: `begin_ids` are those of all `begin_rows` in turn.
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
    """Whose log-probabilities are wanted; rank 0 alone uses these.

    Those of the tokens that `samples` get, and of prompt tokens: `prompt_ids` are the tokens that
    follow the batch's `scored_tokens`.
    """

    num_top: int  # K, the likeliest tokens to tell for each
    samples: Int32Array  # [L] ascending indices into S
    prompt_ids: Int32Array  # [Q]


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log-probabilities of the L samples that asked, then of the Q prompt tokens.

    K is `num_top`, or the whole vocabulary where that is less.
    """

    logprobs: Float32Array  # [L + Q]
    top_ids: Int32Array  # [L + Q, K] best first
    top_logprobs: Float32Array  # [L + Q, K]


def _no_tokens() -> Int32Array:
    return np.empty(0, np.int32)


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """One step: `num_decodes` sequences of one token first, then the prefill chunks.

    A decode's input token is the one that the engine sampled last for its row (it may still be on
    the device); the ids of prefill chunks are given. Before the forward the engine writes
    `page_table[page_rows, page_columns] = page_ids`; column c of a row holds the page of the
    positions from c * page_size on. A row keeps its pages between steps.
    """

    step_id: int
    num_decodes: int
    rows: Int32Array  # [R] the fixed row of each sequence
    query_lens: Int32Array  # [R] tokens computed in this step
    start_positions: Int32Array  # [R] position of the first of them = tokens already in the cache
    prefill_ids: Int32Array  # [T - num_decodes]
    page_rows: Int32Array  # [P]
    page_columns: Int32Array  # [P]
    page_ids: Int32Array  # [P]
    sample_indices: Int32Array  # [S] ascending indices into R; the last token's logits are used
    sampling: SamplingColumns
    penalties: Penalties | None = None  # None in nearly all steps
    scored_tokens: Int32Array = field(default_factory=_no_tokens)  # [Q] indices into T
    logprobs: LogprobColumns | None = None  # None in nearly all steps


@dataclass(frozen=True, slots=True)
class ForwardOutput:
    """What a step gave."""

    token_ids: Int32Array  # [S] in the order of `sample_indices`
    logprobs: Logprobs | None = None  # where the batch asked for them


class ForwardEngine(Protocol):
    """What the scheduler's loop needs of an engine.

    Steps run in the order of `launch`; a page written by one step may be read by the next.
    """

    def launch(self, batch: ForwardBatch) -> Any:
        """Start a step and return a handle; at most two steps are in flight."""

    def wait(self, handle: Any) -> ForwardOutput:
        """Block until the step is done; called once a handle, in launch order."""
