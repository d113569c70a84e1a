"""The work of a tokenizer process, without sockets: render, encode and check each message."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from minisrv.checkpoint.chat_format import find_chat_format
from minisrv.checkpoint.tokenizer import HFTokenizer
from minisrv.errors import ContextLengthError, InvalidRequestError, Lengths, MinisrvError
from minisrv.sampling_params import SamplingParams
from minisrv.tokenizer.chat_template import ChatTemplate, Messages
from minisrv.tokenizer.reply_grammar import ReplyGrammars
from minisrv.tokenizer.tool_arguments import with_read_arguments
from minisrv.wire.arrays import Int32Array
from minisrv.wire.failures import failure_reply
from minisrv.wire.messages import (
    AbortMsg,
    AnswerMsg,
    DecodeMsg,
    EncodeMsg,
    Failure,
    FlushMsg,
    GenerateMsg,
    Parts,
    RenderMsg,
    ShownPrompt,
    TokenizeMsg,
    TokenizerQuery,
    UserReply,
)

logger = logging.getLogger("minisrv.tokenizer")

MAX_PROMPT_LOGPROBS = 2**19

Outgoing = GenerateMsg | AbortMsg | FlushMsg | UserReply | AnswerMsg


class TokenizerWorker:
    """max_seq_len: most tokens of prompt and output together. vocab_size: the model's token ids.

    chat_format: how the model writes reasoning and tool calls.
    """

    def __init__(
        self,
        tokenizer: HFTokenizer,
        template: ChatTemplate,
        max_seq_len: int,
        vocab_size: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self.chat_format = find_chat_format(
            tokenizer.chat_templates, describes_tools=template.describes_tools
        )
        self._max_seq_len = max_seq_len
        self._vocab_size = vocab_size
        self._grammars = ReplyGrammars(tokenizer, self.chat_format)

    def handle(self, message: TokenizeMsg | AbortMsg | FlushMsg | TokenizerQuery) -> Outgoing:
        """The message to send: a UserReply or AnswerMsg to the frontend, others to the scheduler.

        A request that cannot be served fails under each of its uids; others are not affected.
        """
        if isinstance(message, AbortMsg | FlushMsg):
            return message
        try:
            if isinstance(message, TokenizeMsg):
                return self._generate(message)
            return AnswerMsg(query=message.query, value=self._answer(message))
        except MinisrvError as refusal:
            error = refusal
        except Exception:
            logger.exception("the tokenizer failed on a %s", type(message).__name__)
            error = MinisrvError("the tokenizer failed on this request")
        if not isinstance(message, TokenizeMsg):
            return AnswerMsg(query=message.query, failure=Failure.from_error(0, error))
        uids = range(message.uid, message.uid + message.sampling.n)
        unfinished = [produced.uid for produced in message.resumed] or uids
        return failure_reply([Failure.from_error(uid, error) for uid in unfinished])

    def _generate(self, message: TokenizeMsg) -> GenerateMsg:
        prompt_ids, text, parts = self._prompt(message)
        self._check(prompt_ids, message)
        return GenerateMsg(
            uid=message.uid,
            prompt_ids=prompt_ids,
            sampling=self._sampling(message, parts),
            caps_output=message.caps_output,
            parts=parts,
            shown_prompt=self._shown(message, prompt_ids, text),
            show_progress=message.show_progress,
            cache_salt=message.cache_salt,
            key=message.key,
            resumed=message.resumed,
        )

    def _prompt(self, message: TokenizeMsg) -> tuple[Int32Array, str | None, Parts]:
        """The token ids, the text if there was one, and what the reply may hold."""
        if message.messages is None:
            assert message.prompt is not None, "a TokenizeMsg has a prompt or messages"
            if not isinstance(message.prompt, str):
                return message.prompt, None, Parts(0)
            ids = self._encode(message.prompt, True, "prompt")
            if not ids and self._tokenizer.bos_id is not None:
                ids = [self._tokenizer.bos_id]
            return np.array(ids, np.int32), message.prompt, Parts(0)
        text = self._render(message, message.messages)
        parts = Parts.CALLS if message.tools else Parts(0)
        if message.split_reasoning:
            continued = message.messages[-1]["content"] if message.continue_final_message else ""
            parts |= self._reasoning_part(text, continued)
        # The template writes the special tokens itself: a second BOS would be wrong.
        return np.array(self._encode(text, False, "messages"), np.int32), text, parts

    def _render(self, message: TokenizeMsg | EncodeMsg, messages: Messages) -> str:
        if message.text_arguments:
            messages = [with_read_arguments(one) for one in messages]
        return self._template.render(
            messages,
            message.template_kwargs,
            message.tools,
            add_generation_prompt=message.add_generation_prompt,
            continue_final_message=message.continue_final_message,
            chat_template=message.chat_template,
            at=message.sent_at if isinstance(message, TokenizeMsg) and message.sent_at else None,
        )

    def _shown(self, message: TokenizeMsg, ids: Int32Array, text: str | None) -> ShownPrompt | None:
        if not message.show_prompt_ids and not message.show_prompt_text:
            return None
        if text is None and message.show_prompt_text:
            text = self._tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        return ShownPrompt(
            ids=ids if message.show_prompt_ids else None,
            text=text if message.show_prompt_text else None,
        )

    def _sampling(self, message: TokenizeMsg, parts: Parts) -> SamplingParams:
        """The sampling with the grammar of the whole reply, which the scheduler checks."""
        grammar = message.sampling.grammar
        if message.must_call:
            assert message.tools is not None
            grammar = replace(
                self._grammars.calls(message.tools, message.must_call, message.parallel_calls),
                parts=tuple(self._grammars.parameters(message.tools, message.must_call)),
            )
        if grammar is None:
            return message.sampling
        if message.tools and not message.must_call:
            grammar = self._grammars.or_calls(grammar, message.tools, message.parallel_calls)
        grammar = self._grammars.behind_reasoning(grammar, parts)
        return replace(message.sampling, grammar=grammar)

    def _reasoning_part(self, prompt: str, continued: str) -> Parts:
        """Whether the reply begins inside reasoning, may begin with it, or has none.

        continued: the text that the reply continues, or "".
        """
        if self.chat_format.reasoning_markers is None:
            return Parts(0)
        begin, end = self.chat_format.reasoning_markers
        if continued.strip():
            is_open = continued.rfind(begin) > continued.rfind(end)
            return Parts.OPEN_REASONING if is_open else Parts(0)
        written = prompt.rstrip()
        if written.endswith(begin):
            return Parts.OPEN_REASONING
        return Parts(0) if written.endswith(end) else Parts.REASONING

    def _answer(self, query: TokenizerQuery) -> dict[str, Any]:
        if isinstance(query, EncodeMsg):
            text, param = query.prompt or "", "prompt"
            if query.messages is not None:
                text, param = self._render(query, query.messages), "messages"
            ids = self._encode(text, query.add_special_tokens, param)
            if not query.show_tokens:
                return {"count": len(ids)}
            tokens = [self._tokenizer.token(id) for id in ids]
            shown = {"text": text, "ids": ids, "tokens": tokens}
            return {"count": len(ids), **{name: _json(value) for name, value in shown.items()}}
        if isinstance(query, RenderMsg):
            prompt_ids, _, _ = self._prompt(query.request)
            self._check(prompt_ids, query.request)
            return {"count": len(prompt_ids), "ids": _json(prompt_ids.tolist())}
        if isinstance(query, DecodeMsg):
            return self._decode(query)
        return self._tokenizer.describe()

    def _decode(self, query: DecodeMsg) -> dict[str, Any]:
        ids, skip = query.token_ids.tolist(), query.skip_special_tokens
        if query.lengths is None:
            return {"text": _json(self._tokenizer.decode(ids, skip))}
        ends = np.cumsum(query.lengths).tolist()
        parts = (ids[start:end] for start, end in pairwise([0, *ends]))
        return {"texts": [_json(self._tokenizer.decode(part, skip)).decode() for part in parts]}

    def _encode(self, text: str, add_special_tokens: bool, param: str) -> list[int]:
        """Token ids of a text; one that cannot fit is refused unread, since it may take seconds."""
        limit = self._max_seq_len * self._tokenizer.longest_token
        if len(text) > limit:
            have = "messages have" if param == "messages" else f"{param} has"
            raise InvalidRequestError(
                f"This model's maximum context length is {self._max_seq_len} tokens. However, the "
                f"{have} {len(text)} characters, and no more than {limit} can fit. Please "
                f"reduce the length of the {param} (context_length_exceeded).",
                param=param,
                code="context_length_exceeded",
            )
        return self._tokenizer.encode(text, add_special_tokens)

    def _check(self, prompt_ids: Int32Array, message: TokenizeMsg) -> None:
        sampling, num_prompt = message.sampling, len(prompt_ids)
        param = "prompt" if message.messages is None else "messages"
        if not num_prompt:
            raise InvalidRequestError(
                f"{param} gives no token; it must give at least one", param=param
            )
        num_output = sampling.least_output(capped=message.caps_output)
        if num_prompt + num_output > self._max_seq_len:
            lengths = Lengths(num_prompt, num_output, self._max_seq_len)
            raise ContextLengthError(lengths, param, param=param)
        biased = [bias.token_id for bias in sampling.logit_bias]
        self._check_ids(biased, "logit_bias")
        self._check_ids(sampling.stop_token_ids, "stop_token_ids")
        _check_prompt_logprobs(num_prompt, sampling)
        self._check_ids(prompt_ids, param)

    def _check_ids(self, ids: Sequence[int] | Int32Array, param: str) -> None:
        array = np.asarray(ids, np.int64)
        word = "token id " if param in ("prompt", "messages") else ""
        wrong = array[(array < 0) | (array >= self._vocab_size)]
        if wrong.size:
            raise InvalidRequestError(
                f"{param} holds {word}{wrong[0]}; token ids go from 0 to {self._vocab_size - 1}",
                param=param,
            )


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _check_prompt_logprobs(num_prompt: int, sampling: SamplingParams) -> None:
    """Bound the time for which the log-probabilities, written all at once, delay other requests."""
    if sampling.prompt_logprobs is None:
        return
    num_logprobs = num_prompt * (1 + sampling.prompt_logprobs) * sampling.n
    if num_logprobs > MAX_PROMPT_LOGPROBS:
        raise InvalidRequestError(
            f"the log-probabilities of the prompt would be {num_logprobs} ({num_prompt} tokens, "
            f"{sampling.prompt_logprobs} alternatives each, {sampling.n} choices); the limit is "
            f"{MAX_PROMPT_LOGPROBS}",
            param="logprobs",
        )
