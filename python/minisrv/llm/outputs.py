"""Results of offline requests, gathered from the messages of scheduler and detokenizer."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from minisrv.errors import InvalidRequestError, MinisrvError
from minisrv.wire.events import Event, gather_reply
from minisrv.wire.logprobs import TokenLogprob
from minisrv.wire.messages import DetokenizeMsg, Failure, GenerateMsg, Produced, UserReply


@dataclass(slots=True, kw_only=True)
class CompletionOutput:
    """One choice. finish_reason: stop or length. stop_reason: the stop string or token id.

    reasoning: its reasoning text, for a request with `split_reasoning`. logprobs: of `token_ids`,
    for a request that asks for them. event: the same as the server's frontend has it.
    The end-of-text token and stop tokens count in `token_ids` and are not in `text`.
    """

    index: int
    text: str = ""
    reasoning: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    event: Event = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCounts:
    """Token counts of a request; cached_tokens is the part of the prompt found in the cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(slots=True, kw_only=True)
class RequestOutput:
    """The results for prompt number `index`. prompt: None for messages and token ids.

    prompt_logprobs: those of all tokens of the prompt except the first, which has none.
    error: why the prompt failed, if it did; its outputs are then incomplete.
    """

    index: int
    prompt: str | None = None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    error: MinisrvError | None = None

    @property
    def usage(self) -> TokenCounts:
        return TokenCounts(
            prompt_tokens=len(self.prompt_token_ids),
            completion_tokens=sum(len(output.token_ids) for output in self.outputs),
            cached_tokens=self.cached_tokens,
        )


class PromptsFailedError(MinisrvError):
    """Some of several prompts failed; has the fields of the first failure.

    outputs: those of all prompts; each that failed has an `error`.
    """

    def __init__(self, outputs: list[RequestOutput]) -> None:
        failed = [output for output in outputs if output.error is not None]
        first = failed[0].error
        assert first is not None
        super().__init__(
            f"{len(failed)} of {len(outputs)} prompts failed; "
            f"prompt {failed[0].index}: {first.message}",
            param=first.param,
            code=first.code,
            status=first.http_status,
            error_type=first.error_type,
        )
        self.outputs = outputs


def raise_failures(outputs: list[RequestOutput]) -> None:
    """Raise the error of a single prompt, or PromptsFailedError if some of several failed."""
    failed = [output for output in outputs if output.error is not None]
    if failed and len(outputs) > 1:
        raise PromptsFailedError(outputs)
    for output in failed:
        assert output.error is not None
        raise output.error


class Run:
    """The requests of one call. choices: those that have not ended, by uid."""

    def __init__(self, messages: Sequence[GenerateMsg]) -> None:
        self.choices: dict[int, tuple[RequestOutput, CompletionOutput]] = {}
        self._messages = messages
        self._missing: dict[int, int] = {}
        for index, message in enumerate(messages):
            self._missing[index] = message.sampling.n
            choices = [
                CompletionOutput(index=i, event=Event(message.uid + i, i))
                for i in range(message.sampling.n)
            ]
            prompt_ids = message.prompt_ids.tolist()
            output = RequestOutput(index=index, prompt_token_ids=prompt_ids, outputs=choices)
            self.choices |= {choice.event.uid: (output, choice) for choice in choices}

    def add_tokens(self, message: DetokenizeMsg) -> None:
        """Add the tokens of a step, from the scheduler."""
        for start in message.starts:
            if start.uid in self.choices and start.produced_ids is None:
                output, choice = self.choices[start.uid]
                if choice.index == 0:
                    output.cached_tokens = start.cached_tokens
                    if start.prompt_logprobs is not None:
                        output.prompt_logprobs += start.prompt_logprobs
        for logprobs in message.logprobs:
            if logprobs.uid in self.choices:
                self.choices[logprobs.uid][1].logprobs += logprobs
        for uid, token_id in zip(message.uids.tolist(), message.token_ids.tolist(), strict=True):
            if token_id >= 0 and uid in self.choices:
                self.choices[uid][1].token_ids.append(token_id)

    def add_texts(self, reply: UserReply) -> Iterator[RequestOutput]:
        """Add a reply of the detokenizer; yields the requests that have ended or failed."""
        for event in gather_reply(reply, self._event_of, time.monotonic()):
            output, choice = self.choices.pop(event.uid)
            if event.failure is not None:
                output.error = output.error or error_of(event.failure)
            choice.text, choice.reasoning = event.text, event.reasoning_text
            del choice.token_ids[event.output_tokens :]
            del choice.logprobs[event.output_tokens :]
            if event.failure is None:
                choice.finish_reason, choice.stop_reason = event.finish.reason, event.stop_reason
            self._missing[output.index] -= 1
            if not self._missing[output.index]:
                yield output

    def resume_open(self) -> list[GenerateMsg]:
        """What another engine needs to continue the open choices where their events end."""
        left = []
        for message in self._messages:
            produced = []
            for uid in range(message.uid, message.uid + message.sampling.n):
                if uid in self.choices:
                    choice = self.choices[uid][1]
                    ids = choice.event.token_ids
                    del choice.token_ids[len(ids) :]
                    del choice.logprobs[len(ids) :]
                    produced.append(Produced(uid=uid, token_ids=np.array(ids, np.int32)))
            if produced:
                left.append(replace(message, resumed=tuple(produced)))
        return left

    def fail_open(self, why: str) -> list[RequestOutput]:
        """End the open choices with an error; returns their requests."""
        outputs = {output.index: output for output, _ in self.choices.values()}
        self.choices.clear()
        for output in outputs.values():
            sentence = f"{why}; open requests end, because --no-resume is set"
            error = MinisrvError(sentence, code="engine_restarted", status=503)
            output.error = output.error or error
        return list(outputs.values())

    def _event_of(self, uid: int) -> Event | None:
        return self.choices[uid][1].event if uid in self.choices else None


def error_of(failure: Failure) -> MinisrvError:
    """The exception for a failure."""
    kind = InvalidRequestError if failure.status < 500 else MinisrvError
    return kind(failure.message, param=failure.param, code=failure.code)
