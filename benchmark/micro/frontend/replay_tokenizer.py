"""Stands in for everything behind the frontend: answers each request with one token per period.

Runs under the supervisor in place of the tokenizer. The period is the request's `seed` in
microseconds. All requests of a step go into one UserReply, as from the detokenizer.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

from minisrv.checkpoint.chat_format import ChatFormat
from minisrv.supervision.child_main import Child, run_child
from minisrv.supervision.records import ChildReady
from minisrv.wire.messages import TOKENIZER_INBOX, Finish, Start, TokenizeMsg, UserReply
from minisrv.wire.sockets import Epoch, Inbox, Outbox

TEXT = " word"


def _serve(child: Child) -> None:
    boot, run_dir, epoch = child.boot, Path(child.boot.run_dir), Epoch(child.boot.epoch)
    inbox = Inbox(run_dir, f"tokenizer-{boot.index}", TOKENIZER_INBOX, epoch)
    frontend = Outbox(run_dir, "frontend", epoch)
    child.report(ChildReady({"chat_format": asdict(ChatFormat())}))
    left: dict[int, int] = {}
    counts: dict[int, int] = {}
    period_s, due = 0.0, 0.0
    while inbox.wait(0 if left else None) or left:
        starts = []
        for message in inbox.drain():
            if isinstance(message, TokenizeMsg):
                assert message.sampling.max_tokens
                assert message.sampling.seed
                left[message.uid] = counts[message.uid] = message.sampling.max_tokens
                period_s = message.sampling.seed * 1e-6
                starts.append(_start(message.uid))
        time.sleep(max(0.0, due - time.perf_counter()))
        due = max(due + period_s, time.perf_counter())
        frontend.send(_next_step(left, counts, tuple(starts)))


def _start(uid: int) -> Start:
    return Start(
        uid=uid,
        prompt_tokens=1,
        cached_tokens=0,
        min_tokens=0,
        stop=(),
        skip_special_tokens=True,
    )


def _next_step(
    left: dict[int, int], counts: dict[int, int], starts: tuple[Start, ...]
) -> UserReply:
    uids = list(left)
    for uid in uids:
        left[uid] -= 1
    finishes = [Finish.NONE if left[uid] else Finish.LENGTH for uid in uids]
    reply = UserReply(
        uids=np.array(uids, np.int64),
        texts=(TEXT,) * len(uids),
        output_tokens=np.array([counts[uid] - left[uid] for uid in uids], np.int32),
        finishes=np.array(finishes, np.uint8),
        stop_reasons=(None,) * len(uids),
        new_ids=np.full(len(uids), 7, np.int32),
        num_new_ids=np.ones(len(uids), np.int32),
        starts=starts,
    )
    for uid in uids:
        if not left[uid]:
            del left[uid], counts[uid]
    return reply


if __name__ == "__main__":
    run_child("tokenizer", _serve)
