"""An engine whose cache proves its owner: a slot holds a hash of everything read to compute it.

The slot of position p holds H(all slots before p, read through the page table; token; p), and the
next token is a function of all slots up to p. A page that is aliased, stale, lost or read too early
changes the text; `expected_output` is what the text must be. Log-probabilities are made of the same
hashes: `expected_logprobs`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from minisrv.engine.forward_batch import ForwardBatch, ForwardOutput, Logprobs
from minisrv.wire.arrays import Int32Array

MASK = (1 << 64) - 1
DEADLY_ID, ENDLESS_ID = 1, 2  # see hash_scheduler


def mix(value: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea, Flood, 2014)."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def slot_value(state: int, token: int, position: int) -> int:
    return mix(state ^ mix(token * 0x9E3779B97F4A7C15 + position + 1 & MASK))


def next_token(state: int, vocab_size: int) -> int:
    return mix(state) % vocab_size


def logprob(state: int, token: int) -> float:
    """What the engine tells of `token` after `state`: a number that float32 holds exactly."""
    return -(mix(state ^ (token + 1)) % 4096) / 256


def first_allowed(mask: Int32Array, token: int) -> int:
    """The first token from `token` on, and round from the end, that the mask allows."""
    allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
    return int(allowed[np.searchsorted(allowed, token) % allowed.size])


def expected_output(
    prompt: Sequence[int], count: int, vocab_size: int, stop: Sequence[int] = ()
) -> list[int]:
    """The oracle: `count` tokens after the prompt, fewer when one of `stop` comes."""
    state, output = 0, list[int]()
    for position, token in enumerate(prompt):
        state ^= slot_value(state, token, position)
    while len(output) < count and not (output and output[-1] in stop):
        output.append(next_token(state, vocab_size))
        state ^= slot_value(state, output[-1], len(prompt) + len(output) - 1)
    return output


def expected_logprobs(tokens: Sequence[int]) -> list[float]:
    """The oracle: of all `tokens` but the first, each after those before it."""
    state, logprobs = 0, list[float]()
    for position, (token, following) in enumerate(itertools.pairwise(tokens)):
        state ^= slot_value(state, token, position)
        logprobs.append(logprob(state, following))
    return logprobs


class HashEngine:
    """A ForwardEngine. With `lazy` a step is computed in `wait`, as late as a device may do it.

    The page table is taken at launch; pages mapped for new positions are filled with garbage at
    launch; reads see the cache as it was before the step.
    """

    def __init__(
        self,
        *,
        num_pages: int,
        page_size: int,
        num_rows: int,
        max_seq_len: int,
        vocab_size: int,
        lazy: bool,
    ) -> None:
        self.num_pages, self.page_size, self.max_seq_len = num_pages, page_size, max_seq_len
        self.vocab_size, self.lazy = vocab_size, lazy
        columns = -(-max_seq_len // page_size)
        self.page_table = [[-1] * columns for _ in range(num_rows)]
        self.slots = [0xDEAD] * (num_pages * page_size)
        self.last_token = [0] * num_rows
        self.launched = self.waited = 0
        self._garbage = 1

    def launch(self, batch: ForwardBatch) -> Any:
        assert self.launched - self.waited <= 1
        self.launched += 1
        starts = dict(zip(batch.rows.tolist(), batch.start_positions.tolist(), strict=True))
        writes = zip(
            batch.page_rows.tolist(),
            batch.page_columns.tolist(),
            batch.page_ids.tolist(),
            strict=True,
        )
        for row, column, page in writes:
            self.page_table[row][column] = page
            if row in starts and column * self.page_size >= starts[row]:
                self._scribble(page)
        tables = [self.page_table[row][:] for row in batch.rows]
        # The forward is on its way; a device would compute while the masks are filled.
        masks = self._masks(batch)
        return (batch, tables, masks) if self.lazy else self._compute(batch, tables, masks)

    def wait(self, handle: Any) -> ForwardOutput:
        self.waited += 1
        return self._compute(*handle) if self.lazy else handle

    def _scribble(self, page: int) -> None:
        self._garbage = mix(self._garbage + 1)
        first = page * self.page_size
        self.slots[first : first + self.page_size] = [self._garbage] * self.page_size

    def _masks(self, batch: ForwardBatch) -> dict[int, Int32Array]:
        grammar = batch.sampling.grammar
        if grammar is None:
            return {}
        return dict(zip(grammar.samples.tolist(), grammar.fill(), strict=True))

    def _compute(
        self, batch: ForwardBatch, tables: list[list[int]], masks: dict[int, Int32Array]
    ) -> ForwardOutput:
        before = self.slots[:]
        prompt = iter(batch.prefill_ids.tolist())
        states, token_states = [], []
        for i, (row, length, start) in enumerate(
            zip(
                batch.rows.tolist(),
                batch.query_lens.tolist(),
                batch.start_positions.tolist(),
                strict=True,
            )
        ):
            state = 0
            for position in range(start):
                state ^= before[self._slot(tables[i], position)]
            for position in range(start, start + length):
                token = self.last_token[row] if i < batch.num_decodes else next(prompt)
                value = slot_value(state, token, position)
                self.slots[self._slot(tables[i], position)] = value
                state ^= value
                token_states.append(state)
            states.append(state)
        assert next(prompt, None) is None
        tokens = self._sample(batch, states, masks)
        return ForwardOutput(tokens, self._logprobs(batch, states, token_states, tokens))

    def _logprobs(
        self,
        batch: ForwardBatch,
        states: list[int],
        token_states: list[int],
        tokens: Int32Array,
    ) -> Logprobs | None:
        """Of what was asked for; the likeliest tokens are always 0, 1, 2 and so on."""
        columns = batch.logprobs
        if columns is None:
            assert not batch.prompt_logprob_tokens.size
            return None
        samples = columns.samples.tolist()
        asked = [(states[batch.sample_indices[i]], int(tokens[i])) for i in samples]
        scored = zip(batch.prompt_logprob_tokens.tolist(), columns.prompt_ids.tolist(), strict=True)
        asked += [(token_states[place], following) for place, following in scored]
        num_top = min(columns.num_top, self.vocab_size)
        top = [[logprob(state, id) for id in range(num_top)] for state, _ in asked]
        shape = (len(asked), num_top)
        return Logprobs(
            np.array([logprob(state, token) for state, token in asked], np.float32),
            np.broadcast_to(np.arange(num_top, dtype=np.int32), shape),
            np.array(top, np.float32).reshape(shape),
        )

    def _slot(self, table: list[int], position: int) -> int:
        return table[position // self.page_size] * self.page_size + position % self.page_size

    def _sample(
        self, batch: ForwardBatch, states: list[int], masks: dict[int, Int32Array]
    ) -> Int32Array:
        tokens = [next_token(states[i], self.vocab_size) for i in batch.sample_indices.tolist()]
        for sample, mask in masks.items():
            tokens[sample] = first_allowed(mask, tokens[sample])
        for row, token in zip(batch.rows[batch.sample_indices].tolist(), tokens, strict=True):
            self.last_token[row] = token
        return np.array(tokens, np.int32)
