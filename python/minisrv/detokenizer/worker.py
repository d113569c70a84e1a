"""What a detokenizer process does with a step: token columns to text columns, without sockets."""

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
    OutputIds,
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
    """started_at: when its first token came, on the scheduler's clock.

    start: kept until it is forwarded. matcher: None without stop strings.
    splitter: None where no reasoning can come, or none any more.
    new_ids: token ids not sent yet; None for a request that does not want ids.
    speller: None for a request that wants no log-probabilities.
    """

    uid: int
    stream: TextStream
    matcher: StopMatcher | None
    splitter: ReasoningSplitter | None
    min_tokens: int
    start: Start | None
    num_tokens: int = 0
    started_at: float = 0.0
    new_ids: list[int] | None = None
    speller: LogprobSpeller | None = None


@dataclass(slots=True)
class _Columns:
    """The reply of one step while it is made."""

    uids: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    output_tokens: list[int] = field(default_factory=list)
    finishes: list[int] = field(default_factory=list)
    stop_reasons: list[str | int | None] = field(default_factory=list)
    starts: list[Start] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    reasoning: list[ReasoningText] = field(default_factory=list)
    aborts: list[int] = field(default_factory=list)
    output_ids: list[OutputIds] = field(default_factory=list)
    echoes: list[PromptEcho] = field(default_factory=list)
    logprobs: list[SpelledLogprobs] = field(default_factory=list)
    progress: tuple[PrefillProgress, ...] = ()
    at: float = 0.0
    ends: list[End] = field(default_factory=list)

    def add_row(
        self, uid: int, text: str, count: int, finish: int, reason: str | int | None
    ) -> None:
        self.uids.append(uid)
        self.texts.append(text)
        self.output_tokens.append(count)
        self.finishes.append(finish)
        self.stop_reasons.append(reason)

    def reply(self) -> UserReply | None:
        if not self.uids and not self.failures and not self.progress:
            return None
        return UserReply(
            uids=np.array(self.uids, np.int64),
            texts=tuple(self.texts),
            output_tokens=np.array(self.output_tokens, np.int32),
            finishes=np.array(self.finishes, np.uint8),
            stop_reasons=tuple(self.stop_reasons),
            output_ids=tuple(self.output_ids),
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

    A request ended here stays in `_ended` until the scheduler's own final for it comes, so that
    the tokens still on their way are dropped and the frontend gets exactly one final.
    """

    def __init__(self, tokenizer: HFTokenizer) -> None:
        """Raises UnsupportedModelError for a tokenizer whose text cannot be streamed."""
        self._decoder = TextDecoder(tokenizer)
        self._format = find_chat_format(tokenizer.chat_templates)
        self._call_ids = _special_ids(tokenizer, self._format.call_markers)
        self._reasoning_ids = _special_ids(tokenizer, self._format.reasoning_markers or ())
        self._requests: dict[int, _Request] = {}
        self._ended: set[int] = set()

    @property
    def num_requests(self) -> int:
        """Requests whose final from the scheduler has not come."""
        return len(self._requests) + len(self._ended)

    def handle(self, message: DetokenizeMsg) -> tuple[UserReply | None, AbortMsg | None]:
        """The reply to the frontend, and the uids that the scheduler need not continue."""
        columns = _Columns(progress=message.progress, at=message.at)
        for start in message.starts:
            try:
                self._requests[start.uid] = self._open(start, columns)
            except Exception:  # its first token finds no request, and fails
                logger.exception("request uid=%d cannot be opened", start.uid)
        for logprobs in message.logprobs:
            request = self._requests.get(logprobs.uid)
            if request is not None and request.speller is not None:
                request.speller.expect(logprobs)
        entries = zip(
            message.uids.tolist(),
            message.token_ids.tolist(),
            message.finishes.tolist(),
            strict=True,
        )
        for uid, token_id, finish in entries:
            try:
                self._push_token(uid, token_id, finish, columns)
            except Exception:
                logger.exception("request uid=%d cannot be detokenized", uid)
                self._fail(uid, finish, columns)
        for failure in message.failures:
            self._pass_on(failure, columns)
        aborts = AbortMsg(uids=tuple(columns.aborts)) if columns.aborts else None
        return columns.reply(), aborts

    def _open(self, start: Start, columns: _Columns) -> _Request:
        parts = Parts(start.parts)
        marks = (
            self._format.reasoning_markers
            if parts & (Parts.REASONING | Parts.OPEN_REASONING)
            else None
        )
        kept_ids = (self._call_ids if parts & Parts.CALLS else frozenset()) | (
            self._reasoning_ids if marks else frozenset()
        )
        stream = self._decoder.stream(start.skip_special_tokens, kept_ids)
        num_chars = 0
        if start.prompt_ids is not None:
            echo = echo_prompt(start, start.prompt_ids, stream, self._decoder)
            columns.echoes.append(echo)
            num_chars = len(echo.text)
        return _Request(
            uid=start.uid,
            stream=stream,
            matcher=StopMatcher(start.stop, start.include_stop) if start.stop else None,
            splitter=ReasoningSplitter(*marks, bool(parts & Parts.OPEN_REASONING))
            if marks
            else None,
            min_tokens=start.min_tokens,
            start=start,
            started_at=start.at,
            new_ids=[] if start.return_token_ids else None,
            speller=LogprobSpeller(self._decoder, num_chars) if start.logprobs else None,
        )

    def _push_token(self, uid: int, token_id: int, finish: int, columns: _Columns) -> None:
        request = self._requests.get(uid)
        if request is None:
            self._skip_token(uid, finish, columns)
            return
        if finish and (finish == Finish.ABORT or token_id < 0):
            # Without output the rest of an echoed prompt may be held back: a part of a character.
            text = "" if finish == Finish.ABORT else request.stream.flush()
            self._close(request, columns, text, finish, None)
            return
        request.num_tokens += 1
        if request.new_ids is not None:
            request.new_ids.append(token_id)
        text, stop, reasoning = _next_text(request, token_id, finish)
        if reasoning is not None:
            columns.reasoning.append(reasoning)
        if stop is not None:
            self._end_at_stop_string(request, finish, columns, text, stop)
        elif finish:
            reason = token_id if finish == Finish.STOP_TOKEN else None
            self._close(request, columns, text, finish, reason)
        elif text or reasoning is not None or request.start is not None:
            self._reply(request, columns, text, finish, None)

    def _reply(
        self,
        request: _Request,
        columns: _Columns,
        text: str,
        finish: int,
        reason: str | int | None,
    ) -> None:
        columns.add_row(request.uid, text, request.num_tokens, finish, reason)
        if request.start is not None:
            columns.starts.append(request.start)
            request.start = None
        if request.new_ids:
            ids = np.array(request.new_ids, np.int32)
            columns.output_ids.append(OutputIds(uid=request.uid, ids=ids))
            request.new_ids = []
        if request.speller is not None:
            columns.logprobs += request.speller.take_spelled()

    def _close(
        self,
        request: _Request,
        columns: _Columns,
        text: str,
        finish: int,
        reason: str | int | None,
    ) -> None:
        self._reply(request, columns, text, finish, reason)
        columns.ends.append(End(uid=request.uid, decode_s=columns.at - request.started_at))
        del self._requests[request.uid]

    def _end_at_stop_string(
        self, request: _Request, finish: int, columns: _Columns, text: str, stop: str
    ) -> None:
        """End a request at its stop string; `finish` is what the scheduler says of it."""
        self._close(request, columns, text, Finish.STOP, stop)
        if not finish:
            self._ended.add(request.uid)
            columns.aborts.append(request.uid)

    def _skip_token(self, uid: int, finish: int, columns: _Columns) -> None:
        if uid in self._ended:
            if finish:
                self._ended.remove(uid)
            return
        # Its Start could not be opened; an abort needs no more than that.
        assert finish == Finish.ABORT, f"uid {uid} has a token and no Start"
        columns.add_row(uid, "", 0, finish, None)

    def _fail(self, uid: int, finish: int, columns: _Columns) -> None:
        self._requests.pop(uid, None)
        error = MinisrvError("the text of this request could not be made")
        columns.failures.append(Failure.from_error(uid, error))
        if not finish:
            self._ended.add(uid)
            columns.aborts.append(uid)

    def _pass_on(self, failure: Failure, columns: _Columns) -> None:
        self._requests.pop(failure.uid, None)
        if failure.uid in self._ended:
            self._ended.remove(failure.uid)
        else:
            columns.failures.append(failure)


def _special_ids(tokenizer: HFTokenizer, texts: Sequence[str]) -> frozenset[int]:
    return frozenset(id for id in tokenizer.special_ids if tokenizer.token(id) in texts)


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
    reasoning = None
    if request.splitter is not None:
        text, reasoning = _split(request, request.splitter, text, finish)
    num_text_tokens = request.num_tokens if is_text else request.num_tokens - 1
    if request.matcher is None or num_text_tokens <= request.min_tokens:
        return text, None, reasoning
    text, stop = request.matcher.push(text)
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
