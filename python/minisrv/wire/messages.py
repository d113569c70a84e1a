"""Every message between processes, and which of them each inbox accepts.

The tokens of a step travel as packed columns. codec.py turns a message into a frame.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum, IntFlag
from typing import Any, Literal

from minisrv.errors import Lengths, MinisrvError
from minisrv.sampling_params import SamplingParams
from minisrv.wire.arrays import Int32Array, Int64Array, UInt8Array
from minisrv.wire.logprobs import PromptEcho, SpelledLogprobs, TokenLogprobs


class Finish(IntEnum):
    """How a request ended; NONE while it runs.

    STOP_TOKEN: one of its own stop_token_ids. COMPLETE: its grammar allows no further text.
    """

    NONE = 0
    STOP = 1
    LENGTH = 2
    STOP_TOKEN = 3
    ABORT = 4
    COMPLETE = 5

    @property
    def reason(self) -> Literal["stop", "length"]:
        """OpenAI's word for an end that is not an abort."""
        assert self not in (Finish.NONE, Finish.ABORT)
        return "length" if self is Finish.LENGTH else "stop"


class Parts(IntFlag):
    """What a reply may hold besides plain text; the message fields of this name are plain ints.

    CALLS: tool calls, whose markers stay in the text. REASONING: it may begin with reasoning, which
    is sent separately. OPEN_REASONING: it begins inside reasoning that the prompt has opened.
    """

    CALLS = 1
    REASONING = 2
    OPEN_REASONING = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownPrompt:
    """The prompt as the model saw it, if requested: its token ids, its text, or both."""

    ids: Int32Array | None = None
    text: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Produced:
    """A choice of a request that an earlier engine did not finish, and its output so far."""

    uid: int
    token_ids: Int32Array


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizeMsg:
    """Frontend to tokenizer: either a prompt (text or token ids) or messages for the template.

    The `sampling.n` choices have the uids uid, uid + 1, ... Only max_tokens and seed of the
    sampling may be None. caps_output: a max_tokens beyond the context means the rest of it.
    tools: shown to the template, and the reply is searched for calls of them.
    must_call: the reply must call one of these tools, or several with `parallel_calls`.
    split_reasoning: reasoning is separated from the text. continue_final_message: the prompt ends
    where the last message's content ends. chat_template: a source in place of the model's.
    text_arguments: the arguments of earlier calls are JSON text, and the template gets objects.
    show_prompt_ids, show_prompt_text: in the first `Start`. show_progress: by `PrefillProgress`.
    cache_salt: pages are shared only between requests with the same salt. key: the number of the
    API key that sent it, if keys have fair shares.
    sent_at: Unix time; the chat template sees it, so that a resumed request has the same prompt.
    resumed: if not empty, only these choices are generated, each from where it stopped.
    """

    uid: int
    prompt: str | Int32Array | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    sampling: SamplingParams
    caps_output: bool = False
    tools: tuple[dict[str, Any], ...] | None = None
    must_call: tuple[str, ...] = ()
    parallel_calls: bool = True
    split_reasoning: bool = False
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = None
    text_arguments: bool = False
    show_prompt_ids: bool = False
    show_prompt_text: bool = False
    show_progress: bool = False
    cache_salt: str = ""
    key: int = 0
    sent_at: float = 0.0
    resumed: tuple[Produced, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class AbortMsg:
    """Stop these uids. Each is answered with one final, its own, ABORT or a failure.

    Frontend to tokenizer to scheduler, behind the request; frontend to scheduler, past what waits
    at the tokenizer; detokenizer to scheduler. A tokenizer takes the number of a query too. Unknown
    uids are ignored.
    """

    uids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateMsg:
    """Tokenizer to scheduler: a checked prompt of at least one token, all in the vocabulary.

    resumed: if not empty, only these choices are generated, each from where it stopped.
    """

    uid: int
    prompt_ids: Int32Array
    sampling: SamplingParams
    caps_output: bool = False
    parts: int = 0
    shown_prompt: ShownPrompt | None = None
    show_progress: bool = False
    cache_salt: str = ""
    key: int = 0
    resumed: tuple[Produced, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeMsg:
    """Frontend to tokenizer: tokenize this. Answered with the count of tokens.

    Either a prompt or messages for the template. Templates usually write special tokens themselves;
    then `add_special_tokens` is False for messages. show_tokens: also answered with text, ids and
    tokens, each as JSON, since the frontend only passes them on.
    """

    query: int
    prompt: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    tools: tuple[dict[str, Any], ...] | None = None
    add_special_tokens: bool
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = None
    text_arguments: bool = False
    show_tokens: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderMsg:
    """Frontend to tokenizer: what the prompt of a request would be. Its uid does not count.

    Answered with the count of tokens, and their ids as JSON.
    """

    query: int
    request: TokenizeMsg


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeMsg:
    """Frontend to tokenizer: the text of these ids. Answered with the text as JSON.

    lengths: the ids are those of several texts, which are returned one by one.
    """

    query: int
    token_ids: Int32Array
    skip_special_tokens: bool
    lengths: Int32Array | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DescribeMsg:
    """Frontend to tokenizer: describe the tokenizer. Answered with HFTokenizer.describe()."""

    query: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FlushMsg:
    """Frontend to tokenizer to scheduler: empty the prefix cache. Answered with pages or busy."""

    query: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ShowTreeMsg:
    """Frontend to scheduler: describe the cache's radix tree. Answered with `describe_tree`.

    max_nodes: the most used. uids: the nodes of these requests are marked. num_tokens: how many of
    the first token ids of each node to send.
    """

    query: int
    max_nodes: int
    uids: tuple[int, ...] = ()
    num_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """A request at its first token. cached_tokens: the part of the prompt found in the cache.

    queue_s: from its arrival at the scheduler to its first step; prefill_s: from there to the first
    token, which was ready at `at` on the scheduler's clock.
    prompt_ids: of a prompt to echo. prompt_logprobs: of all its tokens except the first.
    logprobs: whether each token has them. produced_ids: of a resumed request, the output that the
    client has already; such a Start is not sent to the frontend, which has the first one.
    """

    uid: int
    prompt_tokens: int
    cached_tokens: int
    min_tokens: int
    stop: tuple[str, ...]
    skip_special_tokens: bool
    parts: int = 0
    queue_s: float = 0.0
    prefill_s: float = 0.0
    at: float = 0.0
    include_stop: bool = False
    prompt_ids: Int32Array | None = None
    prompt_logprobs: TokenLogprobs | None = None
    logprobs: bool = False
    shown_prompt: ShownPrompt | None = None
    produced_ids: Int32Array | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillProgress:
    """A prompt during prefill. `processed` includes `cached`; seconds since its first step."""

    uid: int
    total: int
    cached: int
    processed: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningText:
    """A piece of reasoning. tokens: of the reasoning so far, including its tags."""

    uid: int
    text: str
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """The final of a request that cannot be served: the fields of an OpenAI error."""

    uid: int
    message: str
    status: int
    error_type: str
    code: str | None
    param: str | None
    lengths: Lengths | None = None

    @classmethod
    def from_error(cls, uid: int, error: MinisrvError) -> Failure:
        return cls(
            uid=uid,
            message=error.message,
            status=error.http_status,
            error_type=error.error_type,
            code=error.code,
            param=error.param,
            lengths=error.lengths,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DetokenizeMsg:
    """Scheduler to detokenizer, one per step: columns of equal length, a token (or end) per entry.

    A request's `Start` is in the message of its first entry. The token is -1 in an ABORT entry and
    at the end of a request with max_tokens 0. The token of a STOP or STOP_TOKEN entry counts in the
    usage and is not text. logprobs: one per token of a request that asked for them.
    at: the step's time on the scheduler's clock.
    """

    uids: Int64Array
    token_ids: Int32Array
    finishes: UInt8Array
    starts: tuple[Start, ...] = ()
    failures: tuple[Failure, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    progress: tuple[PrefillProgress, ...] = ()
    at: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """The end of a request, at its last token. at: on the scheduler's clock."""

    uid: int
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class UserReply:
    """Detokenizer (and tokenizer, for failures) to frontend: columns of equal length.

    texts: deltas that join to the full text. output_tokens: the counts so far. stop_reasons: the
    stop string or token id that ended a request, or None. new_ids: the token ids since the uid's
    row before, of all rows in turn; num_new_ids: how many of them belong to each row.
    reasoning: precedes the text of its uid.
    Each uid ends with one finish code other than NONE, or one failure.
    """

    uids: Int64Array
    texts: tuple[str, ...]
    output_tokens: Int32Array
    finishes: UInt8Array
    stop_reasons: tuple[str | int | None, ...]
    new_ids: Int32Array
    num_new_ids: Int32Array
    starts: tuple[Start, ...] = ()
    failures: tuple[Failure, ...] = ()
    reasoning: tuple[ReasoningText, ...] = ()
    echoes: tuple[PromptEcho, ...] = ()
    logprobs: tuple[SpelledLogprobs, ...] = ()
    ends: tuple[End, ...] = ()
    progress: tuple[PrefillProgress, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerMsg:
    """Tokenizer or scheduler to frontend: the answer to a query, plain values or a failure."""

    query: int
    value: dict[str, Any] = field(default_factory=dict)
    failure: Failure | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptsMsg:
    """Tokenizer to frontend: the lengths of the prompts of requests, sent to the scheduler.

    So the frontend knows the length of a prompt that takes long, or is aborted, before its Start.
    """

    uids: tuple[int, ...]
    prompt_tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TakenMsg:
    """Tokenizer to frontend: it has taken frames of `num_bytes` from its inbox since the last."""

    tokenizer: int
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """Counts per bucket, of which the last has no upper bound, and the sum of all values."""

    counts: Int64Array
    total: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StatsMsg:
    """Scheduler to frontend, periodically: its state now, and its counts since the start.

    pages_used: held by running requests, without pages that only the cache holds.
    admitted: requests that got their first step. prompt_tokens and cached_tokens: of requests that
    got a first token. prefilled_tokens: computed in the chunks of all prompts, and again after a
    preemption. queued_tokens: of open prompts, not computed yet, in part cached. prefill_rate,
    decode_rate: tokens per second in recent steps, 0 before the first. Buckets: wire.histogram.
    """

    running: int
    waiting: int
    pages_used: int
    num_pages: int
    page_size: int
    prompt_tokens: int
    cached_tokens: int
    prefilled_tokens: int
    output_tokens: int
    preemptions: int
    steps: int
    admitted: int
    queued_tokens: int
    prefill_rate: float
    decode_rate: float
    inter_token: Histogram
    step_tokens: Histogram


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeChangesMsg:
    """Scheduler to kv_events: changes of the radix tree, in order.

    pages: for each change that stores n pages n, the page above or -1, the pages; for each that
    removes n pages -n, the pages. token_ids: of all that are stored, in turn. salts: for each
    change that stores pages below -1. begins: these are changes of an empty tree.
    """

    pages: Int32Array
    token_ids: Int32Array
    salts: tuple[str, ...]
    begins: bool


TokenizerQuery = EncodeMsg | RenderMsg | DecodeMsg | DescribeMsg
Query = TokenizerQuery | FlushMsg | ShowTreeMsg
Message = (
    TokenizeMsg
    | AbortMsg
    | Query
    | GenerateMsg
    | DetokenizeMsg
    | UserReply
    | AnswerMsg
    | StatsMsg
    | PromptsMsg
    | TakenMsg
    | TreeChangesMsg
)
InboxTypes = tuple[type[Message], ...]

TOKENIZER_INBOX: InboxTypes = (
    *(TokenizeMsg, AbortMsg, FlushMsg),
    *(EncodeMsg, RenderMsg, DecodeMsg, DescribeMsg),
)
SCHEDULER_INBOX: InboxTypes = (GenerateMsg, AbortMsg, FlushMsg, ShowTreeMsg)
DETOKENIZER_INBOX: InboxTypes = (DetokenizeMsg,)
KV_EVENTS_INBOX: InboxTypes = (TreeChangesMsg,)
FRONTEND_INBOX: InboxTypes = (UserReply, AnswerMsg, StatsMsg, PromptsMsg, TakenMsg)
