"""What stands behind the frontend, played: it answers messages by the words of their prompt."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np

from minisrv.errors import InvalidRequestError
from minisrv.frontend.registry.registry import RequestRegistry
from minisrv.kvcache.manager import KVCacheManager
from minisrv.scheduler.tree_description import describe_tree
from minisrv.wire.codec import decode, encode
from minisrv.wire.failures import failure_reply
from minisrv.wire.histogram import SECONDS, TOKENS, HistogramCounter
from minisrv.wire.messages import (
    FRONTEND_INBOX,
    TOKENIZER_INBOX,
    AbortMsg,
    AnswerMsg,
    End,
    Failure,
    Finish,
    Histogram,
    ShowTreeMsg,
    Start,
    StatsMsg,
    TokenizeMsg,
    UserReply,
)

WORDS = ("Hello", " from", " the", " \u4f60\u597d", " \U0001f600", " server")
TEXT = "".join(WORDS)
DECODE_S = 0.05


def reply(
    uid: int,
    text: str = "",
    output_tokens: int = 1,
    finish: Finish = Finish.NONE,
    stop_reason: str | int | None = None,
    start: Start | None = None,
) -> UserReply:
    return UserReply(
        uids=np.array([uid], np.int64),
        texts=(text,),
        output_tokens=np.array([output_tokens], np.int32),
        finishes=np.array([finish], np.uint8),
        stop_reasons=(stop_reason,),
        new_ids=np.empty(0, np.int32),
        num_new_ids=np.zeros(1, np.int32),
        starts=() if start is None else (start,),
        ends=(End(uid=uid, at=DECODE_S),) if finish else (),
    )


def start_of(uid: int, prompt_tokens: int = 7, cached_tokens: int = 3) -> Start:
    return Start(
        uid=uid,
        prompt_tokens=prompt_tokens,
        cached_tokens=cached_tokens,
        min_tokens=0,
        stop=(),
        skip_special_tokens=True,
        queue_s=0.002,
        prefill_s=0.03,
    )


def stats(**fields: Any) -> StatsMsg:
    counts = {"running": 3, "waiting": 2, "pages_used": 5, "num_pages": 20, "page_size": 16}
    counts |= {
        "prompt_tokens": 100,
        "cached_tokens": 40,
        "prefilled_tokens": 60,
        "output_tokens": 70,
    }
    counts |= {"preemptions": 1, "steps": 9, "admitted": 6, "queued_tokens": 900}
    counts |= {"prefill_rate": 1500.0, "decode_rate": 80.0, **fields}
    inter_token = HistogramCounter(SECONDS)
    inter_token.count_value(0.004, 50)
    return StatsMsg(
        **counts,
        inter_token=inter_token.message(),
        step_tokens=Histogram(counts=np.zeros(len(TOKENS) + 1, np.int64), total=0.0),
    )


def show_tree(registry: RequestRegistry, cache: KVCacheManager, message: ShowTreeMsg) -> None:
    """What the scheduler does with a query for the tree, 100 s after its start."""
    answer = AnswerMsg(query=message.query, value=describe_tree(cache, message, now=100.0))
    registry.receive(decode(encode(answer), FRONTEND_INBOX))


class ScriptedBackend:
    """Answers each choice with WORDS, one a step; the prompt may say otherwise:

    "refuse": a failure 400. "silent": nothing until the abort. "stall": one word, then nothing.
    "break": one word, then a failure 500. "bug": text that no reply can hold.
    cache: what /v1/cache/tree shows.
    """

    def __init__(self, registry: RequestRegistry, step_s: float = 0.0) -> None:
        self.sent: list[tuple[int, TokenizeMsg | AbortMsg]] = []
        self.started: list[int] = []
        self.cache = KVCacheManager(100, 8, 4, radix_cache=True)
        self._registry = registry
        self._step_s = step_s
        self._running: dict[int, asyncio.Task[None]] = {}
        registry.connect(self.send)

    @property
    def requests(self) -> list[TokenizeMsg]:
        return [message for _, message in self.sent if isinstance(message, TokenizeMsg)]

    @property
    def aborted(self) -> list[int]:
        return [uid for _, m in self.sent if isinstance(m, AbortMsg) for uid in m.uids]

    def send(self, tokenizer_index: int, message: TokenizeMsg | AbortMsg | ShowTreeMsg) -> None:
        if isinstance(message, ShowTreeMsg):
            return show_tree(self._registry, self.cache, message)
        self.take(tokenizer_index, decode(encode(message), TOKENIZER_INBOX))

    def take(self, tokenizer_index: int, message: TokenizeMsg | AbortMsg) -> None:
        """Answer a message that has arrived."""
        self.sent.append((tokenizer_index, message))
        if isinstance(message, AbortMsg):
            for uid in message.uids:
                self._abort(uid)
            return
        for uid in range(message.uid, message.uid + message.sampling.n):
            self._running[uid] = asyncio.create_task(self._answer(uid, message))

    def deliver(self, message: UserReply) -> None:
        self._registry.deliver(decode(encode(message), FRONTEND_INBOX))

    def _abort(self, uid: int) -> None:
        task = self._running.pop(uid, None)
        if task is not None and not task.done():
            task.cancel()
            self.deliver(reply(uid, finish=Finish.ABORT))

    async def _answer(self, uid: int, message: TokenizeMsg) -> None:
        await asyncio.sleep(self._step_s)
        prompt = _last_text(message)
        if prompt == "silent":
            await asyncio.Event().wait()
        if prompt == "refuse":
            error = InvalidRequestError(
                "This model's maximum context length is 8 tokens.",
                param="messages",
                code="context_length_exceeded",
            )
            self.deliver(failure_reply([Failure.from_error(uid, error)]))
            return
        limit = min(len(WORDS), message.sampling.max_tokens or len(WORDS))
        for i, word in enumerate(WORDS[:limit]):
            if i == 1 and prompt == "stall":
                await asyncio.Event().wait()
            if i == 1 and prompt == "break":
                error = RuntimeError("broken")
                failure = Failure(
                    uid=uid,
                    message="broken",
                    status=500,
                    error_type="server_error",
                    code="internal_error",
                    param=None,
                )
                self.deliver(failure_reply([failure]))
                return
            start = start_of(uid) if i == 0 else None
            self.deliver(reply(uid, word, i + 1, start=start))
            self.started += [uid] if i == 0 else []
            await asyncio.sleep(self._step_s)
        finish = Finish.STOP if limit == len(WORDS) else Finish.LENGTH
        reason = message.sampling.stop[0] if message.sampling.stop else None
        count = limit + (finish is Finish.STOP)
        self.deliver(reply(uid, "", count, finish, reason))


def _last_text(message: TokenizeMsg) -> Any:
    if message.messages:
        return message.messages[-1]["content"]
    return message.prompt if isinstance(message.prompt, str) else None
