"""The work of the detokenizer process, without sockets: a step's token columns to text columns."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from minisrv.checkpoint.chat_format import find_chat_format
from minisrv.checkpoint.tokenizer import HFTokenizer
from minisrv.detokenizer.incremental import TextDecoder, TextStream
from minisrv.detokenizer.logprobs import LogprobSpeller, echo_prompt
from minisrv.detokenizer.reasoning import ReasoningSplitter
from minisrv.detokenizer.stop_strings import StopMatcher
from minisrv.errors import MinisrvError
from minisrv.wire.logprobs import PromptEcho, SpelledLogprobs
from minisrv.wire.messages import (
    AbortMsg,
    DetokenizeMsg,
    End,
    Failure,
    Finish,
    Parts,
    PrefillProgress,
    ReasoningText,
    Start,
    UserReply,
)

logger = logging.getLogger("minisrv.detokenizer")

_WITH_TEXT = (Finish.NONE, Finish.LENGTH, Finish.COMPLETE)  # the entry's token is text


@dataclass(slots=True, eq=False)
class _Request:
    """start: kept until it is forwarded.

    matcher: None without stop strings. splitter: None when no (further) reasoning is possible.
    hidden: by id, special tokens that are not shown but occur in a stop string.
    new_ids: token ids not sent yet. speller: None if log-probabilities are not wanted.
    """

    uid: int
    stream: TextStream
    matcher: StopMatcher | None
    splitter: ReasoningSplitter | None
    min_tokens: int
    start: Start | None
    num_tokens: int = 0
    new_ids: list[int] = field(default_factory=list)
    speller: LogprobSpeller | None = None
    hidden: dict[int, str] = field(default_factory=dict)


_Row = tuple[int, str, int, int, str | int | None, int]  # the columns of UserReply


@dataclass(slots=True)
class _Reply:
    """The reply of one step while it is built. at: the step's time on the scheduler's clock."""

    at: float
    progress: tuple[PrefillProgress, ...]
    rows: list[_Row] = field(default_factory=list)
    starts: list[Start] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    reasoning: list[ReasoningText] = field(default_factory=list)
    aborts: list[int] = field(default_factory=list)
    new_ids: list[int] = field(default_factory=list)
    echoes: list[PromptEcho] = field(default_factory=list)
    logprobs: list[SpelledLogprobs] = field(default_factory=list)
    ends: list[End] = field(default_factory=list)

    def message(self) -> UserReply | None:
        if not self.rows and not self.failures and not self.progress:
            return None
        uids, texts, output_tokens, finishes, stop_reasons, num_new_ids = (
            zip(*self.rows, strict=True) if self.rows else [()] * 6
        )
        return UserReply(
            uids=np.array(uids, np.int64),
            texts=texts,
            output_tokens=np.array(output_tokens, np.int32),
            finishes=np.array(finishes, np.uint8),
            stop_reasons=stop_reasons,
            new_ids=np.array(self.new_ids, np.int32),
            num_new_ids=np.array(num_new_ids, np.int32),
            starts=tuple(self.starts),
            failures=tuple(self.failures),
            reasoning=tuple(self.reasoning),
            echoes=tuple(self.echoes),
            logprobs=tuple(self.logprobs),
            ends=tuple(self.ends),
            progress=self.progress,
        )


class DetokenizerWorker:
    """Turns each step's tokens into text, and ends requests whose text has a stop string.

    A request ended here stays in `_ended` until the scheduler's own final for it arrives: its
    late tokens are dropped, and the frontend gets exactly one final.
    """

    def __init__(self, tokenizer: HFTokenizer) -> None:
        """Raises UnsupportedModelError for a tokenizer whose text cannot be streamed."""
        self._decoder = TextDecoder(tokenizer)
        self._format = find_chat_format(tokenizer.chat_templates)
        self._call_ids = _special_ids(tokenizer, self._format.call_markers)
        self._reasoning_ids = _special_ids(tokenizer, self._format.reasoning_markers or ())
        self._special_names = {
            id: name for id in tokenizer.special_ids if (name := tokenizer.token(id))
        }
        self._requests: dict[int, _Request] = {}
        self._ended: set[int] = set()

    @property
    def num_requests(self) -> int:
        """Requests without a final from the scheduler."""
        return len(self._requests) + len(self._ended)

    def drop_requests(self) -> None:
        """Forget all requests: nobody waits for their text any more."""
        self._requests.clear()
        self._ended.clear()

    def handle(self, message: DetokenizeMsg) -> tuple[UserReply | None, AbortMsg | None]:
        """The reply to the frontend, and the uids that the scheduler need not continue."""
        reply = _Reply(message.at, message.progress)
        for start in message.starts:
            try:
                self._requests[start.uid] = self._open(start, reply)
            except Exception:  # its first token finds no request, and fails
                logger.exception("request uid=%d cannot be opened", start.uid)
        for logprobs in message.logprobs:
            request = self._requests.get(logprobs.uid)
            if request is not None and request.speller is not None:
                request.speller.expect(logprobs)
        columns = (message.uids.tolist(), message.token_ids.tolist(), message.finishes.tolist())
        for uid, token_id, finish in zip(*columns, strict=True):
            try:
                self._push_token(uid, token_id, finish, reply)
            except Exception:
                logger.exception("request uid=%d cannot be detokenized", uid)
                self._requests.pop(uid, None)
                error = MinisrvError("the text of this request could not be made")
                reply.failures.append(Failure.from_error(uid, error))
                if not finish:
                    self._stop(uid, reply)
        for failure in message.failures:
            self._requests.pop(failure.uid, None)
            if failure.uid in self._ended:
                self._ended.remove(failure.uid)
            else:
                reply.failures.append(failure)
        aborts = AbortMsg(uids=tuple(reply.aborts)) if reply.aborts else None
        return reply.message(), aborts

    def _open(self, start: Start, reply: _Reply) -> _Request:
        parts = Parts(start.parts)
        opened, splitter = bool(parts & Parts.OPEN_REASONING), None
        kept_ids = self._call_ids if parts & Parts.CALLS else frozenset()
        if self._format.reasoning_markers and (opened or parts & Parts.REASONING):
            splitter = ReasoningSplitter(*self._format.reasoning_markers, opened)
            kept_ids |= self._reasoning_ids
        stream = self._decoder.stream(start.skip_special_tokens, kept_ids)
        hidden = {}
        if start.skip_special_tokens and start.stop:
            hidden = self._special_tokens_in(start.stop, kept_ids)
        resumed, num_chars = start.produced_ids is not None, 0
        if start.prompt_ids is not None:
            echo = echo_prompt(start, start.prompt_ids, stream, self._decoder)
            num_chars = len(echo.text)
            if not resumed:
                reply.echoes.append(echo)
        request = _Request(
            uid=start.uid,
            stream=stream,
            matcher=StopMatcher(start.stop, start.include_stop) if start.stop else None,
            splitter=splitter,
            min_tokens=start.min_tokens,
            start=None if resumed else start,
            speller=LogprobSpeller(self._decoder, num_chars) if start.logprobs else None,
            hidden=hidden,
        )
        if start.produced_ids is not None:
            for token_id in start.produced_ids.tolist():
                _replay_token(request, token_id)
        return request

    def _special_tokens_in(self, stop: Sequence[str], kept: frozenset[int]) -> dict[int, str]:
        """By id, the special tokens that are a part of a stop string."""
        text = "\0".join(stop)
        return {
            id: name for id, name in self._special_names.items() if name in text and id not in kept
        }

    def _push_token(self, uid: int, token_id: int, finish: int, reply: _Reply) -> None:
        request = self._requests.get(uid)
        if request is None:
            self._skip_token(uid, finish, reply)
            return
        if finish and (finish == Finish.ABORT or token_id < 0):
            # Without output the rest of an echoed prompt may be held back: a part of a character.
            text = "" if finish == Finish.ABORT else request.stream.flush()
            self._add_row(request, reply, text, finish, None)
            return
        request.num_tokens += 1
        request.new_ids.append(token_id)
        text, stop, reasoning = _next_text(request, token_id, finish)
        if reasoning is not None:
            reply.reasoning.append(reasoning)
        if stop is not None:
            self._add_row(request, reply, text, Finish.STOP, stop)
            if not finish:
                self._stop(uid, reply)
        elif finish:
            stop_id = token_id if finish == Finish.STOP_TOKEN else None
            self._add_row(request, reply, text, finish, stop_id)
        elif text or reasoning is not None or request.start is not None:
            self._add_row(request, reply, text, finish, None)

    def _add_row(
        self,
        request: _Request,
        reply: _Reply,
        text: str,
        finish: int,
        stop_reason: str | int | None,
    ) -> None:
        """Add new text and all else that is new of a request; forget it if it has ended."""
        num_tokens, num_new = request.num_tokens, len(request.new_ids)
        reply.rows.append((request.uid, text, num_tokens, finish, stop_reason, num_new))
        reply.new_ids += request.new_ids
        request.new_ids.clear()
        if request.start is not None:
            reply.starts.append(request.start)
            request.start = None
        if request.speller is not None:
            reply.logprobs += request.speller.take_spelled()
        if finish:
            reply.ends.append(End(uid=request.uid, at=reply.at))
            del self._requests[request.uid]

    def _stop(self, uid: int, reply: _Reply) -> None:
        """Have the scheduler end a request that has ended here."""
        self._ended.add(uid)
        reply.aborts.append(uid)

    def _skip_token(self, uid: int, finish: int, reply: _Reply) -> None:
        if uid in self._ended:
            if finish:
                self._ended.remove(uid)
            return
        # Its Start could not be opened; an abort needs no more than that.
        assert finish == Finish.ABORT, f"uid {uid} has a token and no Start"
        reply.rows.append((uid, "", 0, finish, None, 0))


def _special_ids(tokenizer: HFTokenizer, texts: Sequence[str]) -> frozenset[int]:
    return frozenset(id for id in tokenizer.special_ids if tokenizer.token(id) in texts)


def _replay_token(request: _Request, token_id: int) -> None:
    """Take a token whose text the client has already: what is held back stays held back."""
    request.num_tokens += 1
    text = request.stream.push(token_id)
    if request.speller is not None:
        request.speller.skip(text)
    _filter_text(request, token_id, text, Finish.NONE)


def _next_text(
    request: _Request, token_id: int, finish: int
) -> tuple[str, str | None, ReasoningText | None]:
    """What the entry adds to the text, the stop string that ends it there, and the reasoning."""
    is_text = finish in _WITH_TEXT
    text = request.stream.push(token_id) if is_text else request.stream.flush()
    if request.speller is not None:
        request.speller.spell_next(text)
    if finish:
        text += request.stream.flush()
    return _filter_text(request, token_id, text, finish)


def _filter_text(
    request: _Request, token_id: int, text: str, finish: int
) -> tuple[str, str | None, ReasoningText | None]:
    """The decoded text of an entry without reasoning, without what is held back, up to a stop."""
    is_text = finish in _WITH_TEXT
    hidden = request.hidden.get(token_id, "") if is_text else ""
    if hidden and request.splitter is not None and request.splitter.in_reasoning:
        hidden = ""
    if hidden:
        text += request.stream.flush_whole() + hidden
    reasoning = None
    if request.splitter is not None:
        text, reasoning = _split(request, request.splitter, text, finish)
    num_text_tokens = request.num_tokens if is_text else request.num_tokens - 1
    if request.matcher is None or num_text_tokens <= request.min_tokens:
        return text.removesuffix(hidden), None, reasoning
    text, stop = request.matcher.push(text, len(hidden))
    if finish and stop is None:
        text += request.matcher.flush()
    return text, stop, reasoning


def _split(
    request: _Request, splitter: ReasoningSplitter, text: str, finish: int
) -> tuple[str, ReasoningText | None]:
    """Split `text` into content and reasoning; the latter is None unless it has grown."""
    was_closed = splitter.closed
    reasoning, text = splitter.push(text)
    ends = splitter.closed and not was_closed
    if finish:
        ends = ends or splitter.in_reasoning
        rest_of_reasoning, rest = splitter.flush()
        reasoning, text = reasoning + rest_of_reasoning, text + rest
    if splitter.done:
        request.splitter = None
    if reasoning or ends:
        return text, ReasoningText(uid=request.uid, text=reasoning, tokens=request.num_tokens)
    return text, None
