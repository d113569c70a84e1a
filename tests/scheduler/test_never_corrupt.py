"""Any order of requests, steps, aborts, evictions and preemptions gives the text of the oracle,
with its log-probabilities, where a request asks for them; and no request finds in the cache what
none of its salt has put there."""

import os
from collections import defaultdict
from itertools import takewhile
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from minisrv.wire.messages import AbortMsg, DetokenizeMsg, Finish, Start
from tests.support.builders import generate_msg, hash_loop
from tests.support.hash_engine import expected_logprobs, expected_output

VOCAB = 30
EOS = 7
DISTURBANCES = ["abort", "disconnect", "preempt", "preempt", "evict"]


class CacheMachine(RuleBasedStateMachine):
    """Drives the real loop on the hash engine, one operation a rule."""

    @initialize(
        num_pages=st.integers(8, 28),
        page_size=st.sampled_from([1, 2, 4, 8]),
        num_rows=st.integers(1, 6),
        budget=st.sampled_from([2, 4, 5, 6, 7, 8, 16]),
        depth=st.integers(0, 1),
        radix_cache=st.sampled_from([True, True, True, False]),
        fair_keys=st.booleans(),
    )
    def start(self, **options: Any) -> None:
        self.loop = hash_loop(vocab_size=VOCAB, eos_ids=[EOS], **options)
        self.scheduler, self.cache = self.loop.scheduler, self.loop.scheduler.cache
        self.prompts: dict[int, list[int]] = {}
        self.limits: dict[int, int] = {}
        self.outputs: dict[int, list[int]] = defaultdict(list)
        self.ends: dict[int, Finish] = {}
        self.salts: dict[int, str] = {}
        self.aborted: set[int] = set()
        self.scored: dict[int, str] = {}
        self.prompt_logprobs: dict[int, list[float]] = {}
        self.logprobs: dict[int, list[float]] = defaultdict(list)
        self.next_uid = 0

    @precondition(lambda self: len(self.open_uids()) < 8)
    @rule(
        stem=st.sampled_from([(), (1,) * 5, (1,) * 9, (1, 1) + (2,) * 15]),
        tails=st.lists(st.lists(st.integers(0, 2), max_size=5), min_size=1, max_size=4),
        max_tokens=st.integers(2, 12),
        choices=st.sampled_from([1, 1, 1, 2]),
        scored=st.sampled_from(["", "", "output", "prompt", "both", "prompt alone"]),
        salt=st.sampled_from(["", "", "a", "b"]),
        key=st.integers(0, 3),
    )
    def add(
        self,
        stem: tuple[int, ...],
        tails: list[list[int]],
        max_tokens: int,
        choices: int,
        scored: str,
        salt: str,
        key: int,
    ) -> None:
        for tail in tails:
            self.add_one([*stem, *tail], max_tokens, choices, scored, salt, key)

    @rule(turns=st.integers(1, 5))
    def step(self, turns: int) -> None:
        for _ in range(turns):
            self.turn()
            self.scheduler.check()

    @precondition(lambda self: self.open_uids())
    @rule(data=st.data(), what=st.sampled_from(DISTURBANCES))
    def disturb(self, data: Any, what: str) -> None:
        if what == "evict":
            self.cache.evict(data.draw(st.integers(1, 6)))
        elif what != "preempt":
            uids = self.open_uids()
            self.abort(uids if what == "disconnect" else [data.draw(st.sampled_from(uids))])
        elif self.scheduler.running:
            self.scheduler._preempt(data.draw(st.sampled_from(self.scheduler.running)), now=0.0)

    def abort(self, uids: list[int]) -> None:
        self.aborted.update(uids)
        self.loop.channel.inbox.append(AbortMsg(uids=(*uids, 10**6)))

    def add_one(
        self, prompt: list[int], max_tokens: int, choices: int, scored: str, salt: str, key: int
    ) -> None:
        max_tokens = 0 if scored == "prompt alone" else max_tokens
        fits = prompt and len(prompt) + max_tokens <= self.scheduler.max_seq_len
        wanted = {"logprobs": 1 if scored in ("output", "both") else None}
        wanted["prompt_logprobs"] = 2 if scored in ("prompt", "both", "prompt alone") else None
        message = generate_msg(
            self.next_uid, prompt, salt, key=key, max_tokens=max_tokens, n=choices, **wanted
        )
        self.loop.channel.inbox.append(message)
        for _ in range(choices):
            if fits:
                self.prompts[self.next_uid] = prompt
                self.limits[self.next_uid] = max_tokens
                self.scored[self.next_uid] = scored
                self.salts[self.next_uid] = salt
            self.next_uid += 1

    @invariant()
    def every_page_has_one_owner(self) -> None:
        if hasattr(self, "loop"):
            self.scheduler.check()

    def open_uids(self) -> list[int]:
        return [uid for uid in self.prompts if uid not in self.ends]

    def turn(self) -> None:
        self.loop.turn()
        outbox = self.loop.channel.outbox
        while outbox:
            message = outbox.popleft()
            self.take_logprobs(message)
            for start in message.starts:
                self.check_hit(start)
            for uid, token, finish in zip(
                message.uids.tolist(), message.token_ids.tolist(), message.finishes, strict=True
            ):
                assert uid not in self.ends, "a token after the end"
                if finish == Finish.ABORT:
                    assert uid in self.aborted
                elif token >= 0:
                    self.outputs[uid].append(token)
                if finish:
                    self.ends[uid] = Finish(finish)
                self.compare(uid)

    def take_logprobs(self, message: DetokenizeMsg) -> None:
        for start in message.starts:
            if start.prompt_logprobs is not None:
                self.prompt_logprobs[start.uid] = start.prompt_logprobs.logprobs.tolist()
                expected = expected_logprobs(self.prompts[start.uid])
                assert self.prompt_logprobs[start.uid] == expected
                assert len(start.prompt_logprobs.top_ids) == 2 * (start.prompt_tokens - 1)
        for told in message.logprobs:
            self.logprobs[told.uid] += told.logprobs.tolist()

    def check_hit(self, start: Start) -> None:
        uid, longest = start.uid, 0
        for other, prompt in self.prompts.items():
            if other != uid and self.salts[other] == self.salts[uid]:
                text = [*prompt, *expected_output(prompt, self.limits[other], VOCAB, [EOS])]
                pairs = zip(self.prompts[uid], text, strict=False)
                longest = max(longest, sum(1 for _ in takewhile(lambda p: p[0] == p[1], pairs)))
        assert start.cached_tokens <= longest, f"request {uid} has read another salt's pages"

    def compare(self, uid: int) -> None:
        expected = expected_output(self.prompts[uid], self.limits[uid], VOCAB, [EOS])
        output = self.outputs[uid]
        assert output == expected[: len(output)], f"request {uid} has a wrong text"
        if self.ends.get(uid) in (Finish.STOP, Finish.LENGTH):
            assert output == expected
            assert (self.ends[uid] is Finish.STOP) == (output[-1:] == [EOS])
        if self.ends.get(uid) != Finish.ABORT:
            self.compare_logprobs(uid)

    def compare_logprobs(self, uid: int) -> None:
        scored, prompt = self.scored[uid], self.prompts[uid]
        expected = expected_logprobs(prompt + self.outputs[uid])
        before, after = expected[: len(prompt) - 1], expected[len(prompt) - 1 :]
        assert self.prompt_logprobs.get(uid, []) == (
            before if "prompt" in scored or scored == "both" else []
        )
        assert self.logprobs[uid] == (after if scored in ("output", "both") else [])

    def teardown(self) -> None:
        if not hasattr(self, "loop"):
            return
        for _ in range(3000):
            if not self.loop.busy and not self.loop.channel.inbox:
                break
            self.turn()
            self.scheduler.check()
        assert not self.open_uids(), "requests without an end"
        self.cache.evict(10**6)
        assert self.cache.pages.num_free == self.cache.pages.size
        assert self.cache.rows.num_free == self.cache.rows.size


def settings_of(max_examples: int) -> settings:
    return settings(
        max_examples=max_examples,
        stateful_step_count=100,
        deadline=None,
        phases=[p for p in Phase if p is not Phase.shrink or "NO_SHRINK" not in os.environ],
        suppress_health_check=list(HealthCheck),
    )


TestNeverCorrupt = CacheMachine.TestCase
TestNeverCorrupt.settings = settings_of(int(os.environ.get("NEVER_CORRUPT_EXAMPLES", "100")))


@pytest.mark.soak
def test_never_corrupt_at_length() -> None:
    run_state_machine_as_test(CacheMachine, settings=settings_of(5000))
