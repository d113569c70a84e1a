"""What a tokenizer process does with a message: render, encode, check. No sockets here."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from minisrv.chat_format import find_chat_format
from minisrv.errors import InvalidRequestError, MinisrvError
from minisrv.hf_tokenizer import HFTokenizer
from minisrv.messages import (
    AbortMsg,
    Failure,
    GenerateMsg,
    Parts,
    TokenizeMsg,
    UserReply,
    failure_reply,
)
from minisrv.sampling_params import SamplingParams
from minisrv.structured_output.checker import GrammarChecker
from minisrv.tokenizer.chat_template import ChatTemplate

logger = logging.getLogger("minisrv.tokenizer")

Outgoing = GenerateMsg | AbortMsg | UserReply


class TokenizerWorker:
    """Turns requests into checked token ids.

    max_seq_len: most tokens of prompt and output together. vocab_size: ids that the model knows.
    chat_format: how the model writes thoughts and tool calls.
    """

    def __init__(
        self,
        tokenizer: HFTokenizer,
        template: ChatTemplate,
        max_seq_len: int,
        vocab_size: int,
        epoch: int,
        grammar_checker: GrammarChecker,
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self.chat_format = find_chat_format(tokenizer.chat_templates)
        self._max_seq_len = max_seq_len
        self._vocab_size = vocab_size
        self._epoch = epoch
        self._grammar_checker = grammar_checker

    def handle(self, message: TokenizeMsg | AbortMsg) -> list[Outgoing]:
        """What to send on: a UserReply goes to the frontend, all else to the scheduler.

        A request that cannot be served fails alone, under each of its uids.
        """
        if isinstance(message, AbortMsg):
            return [message]
        try:
            prompt_ids, parts = self._prompt(message)
            self._check(prompt_ids, message)
            if message.sampling.grammar is not None:
                self._grammar_checker.check(message.sampling.grammar)
            return [
                GenerateMsg(
                    uid=message.uid,
                    prompt_ids=np.asarray(prompt_ids, np.int32),
                    sampling=message.sampling,
                    parts=parts,
                    epoch=self._epoch,
                )
            ]
        except MinisrvError as error:
            return [self._failure(message, error)]
        except Exception:
            logger.exception("request uid=%d cannot be tokenized", message.uid)
            return [self._failure(message, MinisrvError("the prompt could not be tokenized"))]

    def _prompt(self, message: TokenizeMsg) -> tuple[Sequence[int], Parts]:
        """The ids, and what the reply may hold."""
        if message.messages is None:
            return self._prompt_ids(message), Parts(0)
        text = self._template.render(message.messages, message.template_kwargs, message.tools)
        parts = Parts.CALLS if message.tools else Parts(0)
        if message.split_thought:
            parts |= self._thought_part(text)
        # The template writes the special tokens itself: a second BOS would be wrong.
        return self._tokenizer.encode(text, add_special_tokens=False), parts

    def _thought_part(self, prompt: str) -> Parts:
        """Whether the reply begins in a thought, may begin with one, or has none."""
        if self.chat_format.thought is None:
            return Parts(0)
        begin, end = self.chat_format.thought
        written = prompt.rstrip()
        if written.endswith(begin):
            return Parts.OPEN_THOUGHT
        return Parts(0) if written.endswith(end) else Parts.THOUGHT

    def _prompt_ids(self, message: TokenizeMsg) -> Sequence[int]:
        if isinstance(message.prompt, str):
            ids = self._tokenizer.encode(message.prompt)
            if not ids and self._tokenizer.bos_id is not None:
                return [self._tokenizer.bos_id]
            return ids
        assert message.prompt is not None, "a TokenizeMsg has a prompt or messages"
        return message.prompt

    def _check(self, prompt_ids: Sequence[int], message: TokenizeMsg) -> None:
        param = "prompt" if message.messages is None else "messages"
        if not prompt_ids:
            raise InvalidRequestError(
                f"{param} gives no token; it must give at least one", param=param
            )
        self._check_length(len(prompt_ids), message.sampling.max_tokens, param)
        self._check_named_ids(message.sampling)
        if min(prompt_ids) < 0 or max(prompt_ids) >= self._vocab_size:
            wrong = next(id for id in prompt_ids if not 0 <= id < self._vocab_size)
            raise InvalidRequestError(
                f"{param} holds token id {wrong}; the model's ids go from 0 to "
                f"{self._vocab_size - 1}",
                param=param,
            )

    def _check_named_ids(self, sampling: SamplingParams) -> None:
        biased = tuple(bias.token_id for bias in sampling.logit_bias)
        for name, ids in (("logit_bias", biased), ("stop_token_ids", sampling.stop_token_ids)):
            if ids and max(ids) >= self._vocab_size:
                raise InvalidRequestError(
                    f"{name} holds {max(ids)}; token ids go from 0 to {self._vocab_size - 1}",
                    param=name,
                )

    def _check_length(self, num_prompt: int, max_tokens: int | None, param: str) -> None:
        # The prompt alone must leave room for one token of output.
        num_output = 1 if max_tokens is None else max_tokens
        if num_prompt + num_output <= self._max_seq_len:
            return
        raise InvalidRequestError(
            f"This model's maximum context length is {self._max_seq_len} tokens. However, you "
            f"requested {num_prompt + num_output} tokens ({num_prompt} in the {param}, "
            f"{num_output} in the completion). Please reduce the length of the {param} or "
            "completion.",
            param=param,
            code="context_length_exceeded",
        )

    def _failure(self, message: TokenizeMsg, error: MinisrvError) -> UserReply:
        uids = range(message.uid, message.uid + message.sampling.n)
        return failure_reply([Failure.from_error(uid, error) for uid in uids], self._epoch)
