import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from minisrv.checkpoint.tokenizer import HFTokenizer
from minisrv.detokenizer.worker import DetokenizerWorker
from minisrv.wire.codec import decode, encode
from minisrv.wire.messages import (
    FRONTEND_INBOX,
    AbortMsg,
    DetokenizeMsg,
    Failure,
    Finish,
    Start,
    UserReply,
)
from tests.support import own_tokenizers

TOKENIZER = HFTokenizer(Tokenizer.from_str(own_tokenizers.byte_level_bpe().to_str()), {}, {})
EOS = 2
Entry = tuple[int, int, Finish]


def start(uid: int, **fields: Any) -> Start:
    defaults = {"prompt_tokens": 3, "cached_tokens": 0, "min_tokens": 0, "stop": ()}
    return Start(uid=uid, skip_special_tokens=True, **{**defaults, **fields})


def step(entries: Sequence[Entry], *starts: Start, failures: Sequence[Failure] = ()) -> Any:
    return DetokenizeMsg(
        uids=np.array([e[0] for e in entries], np.int64),
        token_ids=np.array([e[1] for e in entries], np.int32),
        finishes=np.array([e[2] for e in entries], np.uint8),
        starts=starts,
        failures=tuple(failures),
    )


class Frontend:
    """Gathers what a frontend would, and holds the promises of every reply."""

    def __init__(self) -> None:
        self.worker = DetokenizerWorker(TOKENIZER)
        self.texts: dict[int, str] = defaultdict(str)
        self.counts: dict[int, int] = {}
        self.ends: dict[int, tuple[Finish, str | int | None]] = {}
        self.failures: dict[int, Failure] = {}
        self.started: set[int] = set()
        self.aborted: list[int] = []

    def step(
        self, entries: Sequence[Entry], *starts: Start, failures: Sequence[Failure] = ()
    ) -> UserReply | None:
        reply, abort = self.worker.handle(step(entries, *starts, failures=failures))
        if abort is not None:
            assert isinstance(abort, AbortMsg)
            self.aborted += abort.uids
        if reply is not None:
            self._read(reply)
        return reply

    def _read(self, reply: UserReply) -> None:
        assert isinstance(decode(encode(reply), FRONTEND_INBOX), UserReply)
        for begun in reply.starts:
            assert begun.uid not in self.started
            assert begun.uid in reply.uids
            self.started.add(begun.uid)
        columns = zip(
            reply.uids.tolist(),
            reply.texts,
            reply.output_tokens.tolist(),
            reply.finishes.tolist(),
            reply.stop_reasons,
            strict=True,
        )
        for uid, text, count, finish, reason in columns:
            assert uid not in self.ends
            assert uid not in self.failures
            self.texts[uid] += text
            self.counts[uid] = count
            if finish:
                self.ends[uid] = (Finish(finish), reason)
        for failure in reply.failures:
            assert failure.uid not in self.ends
            assert failure.uid not in self.failures
            self.failures[failure.uid] = failure

    def run(self, uid: int, ids: Sequence[int], last: Finish, **fields: Any) -> None:
        """A request alone, a token a step; tokens go on after an abort as they do on a device."""
        for i, token_id in enumerate(ids):
            finish = last if i == len(ids) - 1 else Finish.NONE
            self.step([(uid, token_id, finish)], *([] if i else [start(uid, **fields)]))


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode(text)


def test_the_length_end_has_its_token_in_the_text() -> None:
    frontend = Frontend()
    ids = ids_of("the quick brown 👍")
    frontend.run(1, ids, Finish.LENGTH)
    assert frontend.texts[1] == "the quick brown 👍"
    assert frontend.counts[1] == len(ids)
    assert frontend.ends[1] == (Finish.LENGTH, None)
    assert frontend.worker.num_requests == 0
    assert not frontend.aborted


@pytest.mark.parametrize(
    ("finish", "token_id", "reason"), [(Finish.STOP, EOS, None), (Finish.STOP_TOKEN, 300, 300)]
)
def test_the_token_of_a_stop_counts_and_is_not_text(
    finish: Finish, token_id: int, reason: int | None
) -> None:
    frontend = Frontend()
    ids = ids_of("over the dog")
    frontend.run(1, [*ids, token_id], finish)
    assert frontend.texts[1] == "over the dog"
    assert frontend.counts[1] == len(ids) + 1
    assert frontend.ends[1] == (finish, reason)


def test_a_character_cut_by_the_end_is_flushed() -> None:
    frontend = Frontend()
    ids = ids_of("👍")
    assert len(ids) == 4
    frontend.run(1, [*ids[:3], EOS], Finish.STOP)
    assert frontend.texts[1] == TOKENIZER.decode(ids[:3]) == "\ufffd"


def test_a_stop_string_cuts_the_text_and_aborts_the_request() -> None:
    frontend = Frontend()
    ids = ids_of("one, two, three and stops.")
    frontend.run(1, ids, Finish.LENGTH, stop=("two, th", "zzz"))
    assert frontend.texts[1] == "one, "
    assert frontend.ends[1] == (Finish.STOP, "two, th")
    assert frontend.counts[1] < len(ids)
    assert frontend.aborted == [1]
    assert frontend.worker.num_requests == 0, "the scheduler's own final ends the tombstone"


PAD = "<pad>"


@pytest.mark.parametrize(
    ("stop", "include", "text"),
    [
        (PAD, False, "over the dog"),
        (PAD, True, "over the dog<pad>"),
        (f"dog{PAD}", False, "over the "),
        (f"dog{PAD}", True, "over the dog<pad>"),
        (f"{PAD} and", False, "over the dog"),
    ],
)
def test_a_special_token_in_a_stop_string_ends_the_text_though_it_is_not_shown(
    stop: str, include: bool, text: str
) -> None:
    frontend = Frontend()
    ids = [TOKENIZER.token_id(PAD), *ids_of("over the dog"), TOKENIZER.token_id(PAD)]
    ids = ids[1:] if stop == PAD else ids
    frontend.run(1, [*ids, *ids_of(" and more")], Finish.LENGTH, stop=(stop,), include_stop=include)
    assert frontend.texts[1] == text
    assert frontend.ends[1] == (Finish.STOP, stop)
    assert frontend.aborted == [1]


def test_a_special_token_that_begins_no_stop_string_is_not_shown() -> None:
    frontend = Frontend()
    pad = TOKENIZER.token_id(PAD)
    ids = [*ids_of("the"), pad, *ids_of(" quick"), pad]
    frontend.run(1, ids, Finish.LENGTH, stop=(f"{PAD} slow", f"quick{PAD}{PAD}"))
    assert frontend.texts[1] == "the quick"
    assert frontend.ends[1] == (Finish.LENGTH, None)


def test_before_min_tokens_a_special_token_neither_ends_the_text_nor_is_shown() -> None:
    frontend = Frontend()
    pad = TOKENIZER.token_id(PAD)
    ids = [pad, *ids_of("the"), pad, *ids_of(" quick")]
    frontend.run(1, ids, Finish.LENGTH, stop=(PAD,), min_tokens=2)
    assert frontend.texts[1] == "the"
    assert frontend.ends[1] == (Finish.STOP, PAD)


def test_nothing_follows_a_stop_string_until_the_final_of_the_scheduler() -> None:
    frontend = Frontend()
    frontend.step([(1, ids_of("x")[0], Finish.NONE)], start(1, stop=("x",)))
    assert frontend.ends[1] == (Finish.STOP, "x")
    assert frontend.step([(1, 300, Finish.NONE)]) is None
    assert frontend.worker.num_requests == 1
    assert frontend.step([(1, -1, Finish.ABORT)]) is None
    assert frontend.worker.num_requests == 0


def test_a_stop_string_in_the_last_token_needs_no_abort() -> None:
    frontend = Frontend()
    frontend.run(1, ids_of("one two"), Finish.LENGTH, stop=("two",))
    assert (frontend.texts[1], frontend.ends[1]) == ("one ", (Finish.STOP, "two"))
    assert not frontend.aborted
    assert frontend.worker.num_requests == 0


def test_the_beginning_of_a_stop_string_is_held_and_given_back() -> None:
    frontend = Frontend()
    ids = ids_of("one tw")
    frontend.run(1, ids, Finish.LENGTH, stop=("two",))
    assert frontend.texts[1] == "one tw"
    assert frontend.ends[1] == (Finish.LENGTH, None)


def test_stop_strings_are_looked_for_beyond_min_tokens() -> None:
    ids = [ids_of("x")[0], ids_of("a")[0]] * 3
    frontend = Frontend()
    frontend.run(1, ids, Finish.LENGTH, stop=("x",), min_tokens=3)
    assert frontend.texts[1] == "xaxa"
    assert frontend.counts[1] == 5


def test_the_first_reply_carries_the_start_even_without_text() -> None:
    frontend = Frontend()
    ids = ids_of("👍")
    reply = frontend.step([(1, ids[0], Finish.NONE)], start(1))
    assert reply is not None
    assert (reply.texts, reply.starts) == (("",), (start(1),))
    assert frontend.step([(1, ids[1], Finish.NONE)]) is None


def test_an_abort_is_passed_on_with_and_without_a_start() -> None:
    frontend = Frontend()
    frontend.step([(1, 300, Finish.NONE)], start(1))
    frontend.step([(1, -1, Finish.ABORT), (2, -1, Finish.ABORT)])
    assert frontend.ends == {1: (Finish.ABORT, None), 2: (Finish.ABORT, None)}
    assert frontend.counts == {1: 1, 2: 0}
    assert frontend.worker.num_requests == 0


def failure(uid: int) -> Failure:
    return Failure(
        uid=uid, message="m", status=503, error_type="server_error", code=None, param=None
    )


def test_failures_are_passed_on_and_end_the_request() -> None:
    frontend = Frontend()
    frontend.step([(1, 300, Finish.NONE)], start(1))
    frontend.step([], failures=[failure(1), failure(9)])
    assert frontend.failures == {1: failure(1), 9: failure(9)}
    assert frontend.worker.num_requests == 0


def test_a_failure_after_a_stop_string_is_not_a_second_final() -> None:
    frontend = Frontend()
    frontend.step([(1, ids_of("x")[0], Finish.NONE)], start(1, stop=("x",)))
    frontend.step([], failures=[failure(1)])
    assert not frontend.failures
    assert frontend.worker.num_requests == 0


@pytest.mark.parametrize("stop", [(), (TOKENIZER.decode([301]),)])
def test_an_end_has_its_time_also_at_a_stop(stop: tuple[str, ...]) -> None:
    worker = DetokenizerWorker(TOKENIZER)
    worker.handle(replace(step([(1, 300, Finish.NONE)], start(1, stop=stop, at=100.0)), at=100.0))
    last = Finish.NONE if stop else Finish.LENGTH
    reply, _ = worker.handle(replace(step([(1, 301, last)]), at=100.25))
    assert reply is not None
    assert [(end.uid, end.at) for end in reply.ends] == [(1, 100.25)]


def test_only_the_broken_request_fails() -> None:
    frontend = Frontend()
    frontend.step([(1, 300, Finish.NONE), (2, 300, Finish.NONE)], start(1), start(2))
    frontend.step([(1, -5, Finish.NONE), (2, 301, Finish.NONE), (3, 300, Finish.NONE)])
    assert {uid: f.status for uid, f in frontend.failures.items()} == {1: 500, 3: 500}
    assert frontend.aborted == [1, 3]
    frontend.step([(1, 300, Finish.NONE), (2, 302, Finish.LENGTH), (3, -1, Finish.ABORT)])
    frontend.step([(1, -1, Finish.ABORT)])
    assert frontend.texts[2] == TOKENIZER.decode([300, 301, 302])
    assert frontend.ends == {2: (Finish.LENGTH, None)}
    assert frontend.worker.num_requests == 0


def expected(ids: Sequence[int], last: Finish, stops: Sequence[str]) -> tuple[str, Any]:
    """The text and its end, from the decoded whole; stop strings here do not overlap."""
    text_ids = ids if last is Finish.LENGTH else ids[:-1]
    text = TOKENIZER.decode(text_ids)
    found = [(text.find(stop), stop) for stop in stops if stop in text]
    if found:
        return text[: min(found)[0]], (Finish.STOP, min(found)[1])
    return text, (last, ids[-1] if last is Finish.STOP_TOKEN else None)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_interleaved_requests_get_their_own_text_and_one_end(data: st.DataObject) -> None:
    token = st.integers(4, TOKENIZER.vocab_size - 1)
    last = st.sampled_from([Finish.LENGTH, Finish.STOP, Finish.STOP_TOKEN])
    stops = st.lists(st.sampled_from(["q", " d", "\n", "世"]), unique=True, max_size=3)
    request = st.tuples(st.lists(token, min_size=1, max_size=12), last, stops)
    requests = dict(enumerate(data.draw(st.lists(request, min_size=1, max_size=5)), 1))
    frontend, position = Frontend(), dict.fromkeys(requests, 0)
    while position:
        chosen = data.draw(st.lists(st.sampled_from(sorted(position)), unique=True, min_size=1))
        entries, starts = [], []
        for uid in chosen:
            ids, end, stop = requests[uid]
            i = position[uid]
            if i == 0:
                starts.append(start(uid, stop=tuple(stop)))
            is_last = i == len(ids) - 1
            entries.append((uid, ids[i], end if is_last else Finish.NONE))
            position[uid] += 1
            if is_last:
                del position[uid]
        frontend.step(entries, *starts)
    for uid, (ids, end, stop) in requests.items():
        assert (frontend.texts[uid], frontend.ends[uid]) == expected(ids, end, stop)
    assert frontend.worker.num_requests == 0
    assert frontend.started == set(requests)


def take_ids(reply: UserReply, sent: dict[int, list[int]]) -> None:
    ids = iter(reply.new_ids.tolist())
    for uid, count in zip(reply.uids.tolist(), reply.num_new_ids.tolist(), strict=True):
        sent[uid] += itertools.islice(ids, count)
    assert next(ids, None) is None


def test_ids_come_with_the_text_that_they_made() -> None:
    frontend = Frontend()
    ids = TOKENIZER.encode("h\u00e9 \U0001f600!")
    sent: dict[int, list[int]] = defaultdict(list)
    rows = [(1, id, Finish.NONE) for id in ids]
    entries = [*rows, (1, EOS, Finish.STOP)]
    beside = (2, ids[0], Finish.NONE)
    starts = [start(1), start(2)]
    for entry in entries:
        reply = frontend.step([beside, entry] if starts else [entry], *starts)
        starts = []
        if reply is not None:
            take_ids(reply, sent)
            assert len(sent[1]) == frontend.counts[1]
    assert sent == {1: [*ids, EOS], 2: ids[:1]}


def test_the_ids_of_a_stop_string_are_sent_and_none_after_it() -> None:
    frontend = Frontend()
    ids = TOKENIZER.encode("abc")
    sent: dict[int, list[int]] = defaultdict(list)
    entries = [(1, id, Finish.NONE) for id in [*ids, *ids]]
    starts = [start(1, stop=("c",))]
    for entry in entries:
        reply = frontend.step([entry], *starts)
        starts = []
        if reply is not None:
            take_ids(reply, sent)
    assert frontend.texts[1] == "ab"
    assert sent[1] == ids
