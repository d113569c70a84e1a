"""A server whose model says what a test wants: all but the engine is real.

Templates are rendered, the text is encoded and goes token by token through the detokenizer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from tokenizers import AddedToken

from minisrv.checkpoint.tokenizer import HFTokenizer
from minisrv.detokenizer.worker import DetokenizerWorker
from minisrv.frontend.registry.model_info import ModelInfo
from minisrv.frontend.registry.registry import RequestRegistry
from minisrv.kvcache.manager import KVCacheManager
from minisrv.sampling_params import Grammar
from minisrv.structured_output.checker import find_error
from minisrv.structured_output.vocabulary import Vocabulary, read_vocabulary
from minisrv.tokenizer.chat_template import ChatTemplate
from minisrv.tokenizer.worker import TokenizerWorker
from minisrv.wire.codec import decode, encode
from minisrv.wire.failures import failure_reply
from minisrv.wire.logprobs import TokenLogprobs
from minisrv.wire.messages import (
    DETOKENIZER_INBOX,
    FRONTEND_INBOX,
    SCHEDULER_INBOX,
    TOKENIZER_INBOX,
    AbortMsg,
    AnswerMsg,
    DetokenizeMsg,
    Failure,
    Finish,
    GenerateMsg,
    Query,
    ShowTreeMsg,
    Start,
    TokenizeMsg,
    UserReply,
)
from tests.support import own_tokenizers
from tests.support.http_server import MODEL
from tests.support.scripted_backend import show_tree

EOS = 2
CHAT = """{%- if tools %}<|sys|>
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}CALLS{% endif %}
{%- for m in messages %}<|{{ m.role }}|>
{%- if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}
{{- m.content or '' }}
{%- for call in m.tool_calls or [] %}{{ ' CALL ' + call.function.name }} {{ call.function.arguments
| tojson }}{% endfor %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""
THINKING = (
    "{%- if add_generation_prompt %}{% if enable_thinking is defined and not enable_thinking %}"
)
THINKING += (
    "<think>\n\n</think>\n\n{% elif reasoning_effort == 'high' %}<think>\n{% endif %}{% endif %}"
)
# What a template needs to be known by; the calls themselves the played model writes.
TEMPLATES = {
    "hermes": CHAT.replace("CALLS", "<tool_call></tool_call>") + THINKING,
    "llama": CHAT.replace("CALLS", "<|python_tag|>"),
    "mistral": CHAT.replace("CALLS", "[TOOL_CALLS]"),
    "qwen3_coder": CHAT.replace("CALLS", "<tool_call><function=>"),
    "glm": CHAT.replace("CALLS", "<tool_call><arg_key>"),
    "deepseek": CHAT.replace("CALLS", "<｜tool▁calls▁begin｜>"),
    "plain": "{% for m in messages %}{{ m.content }}{% endfor %}",
}
SPECIAL = [
    *["<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "<arg_value>", "</arg_value>"],
    *["<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>"],
    *["<｜tool▁call▁end｜>", "<｜tool▁sep｜>"],
]
ADDED = ["<tool_call>", "</tool_call>", "<think>", "</think>"]


def make_tokenizer(template: str) -> HFTokenizer:
    """Marks are tokens of their own, special ones as in the models that use them."""
    backend = own_tokenizers.byte_level_bpe()
    backend.add_special_tokens(SPECIAL)
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in ADDED])
    return HFTokenizer(backend, dict(own_tokenizers.NAMED), {"default": template})


def played_logprobs(uid: int, token_ids: Sequence[int], num_top: int) -> TokenLogprobs:
    """-1 for every token; in the places the token itself and those before it, each 1 less."""
    top = [[max(0, token_id - i) for i in range(num_top)] for token_id in token_ids]
    values = [[-1.0 - i for i in range(num_top)] for _ in token_ids]
    return TokenLogprobs(
        uid=uid,
        token_ids=np.array(token_ids, np.int32),
        logprobs=np.full(len(token_ids), -1, np.float32),
        top_ids=np.array(top, np.int32).reshape(-1),
        top_logprobs=np.array(values, np.float32).reshape(-1),
    )


class PlayedModel:
    """Says `text` to every request; ends by itself, or as `max_tokens` has it."""

    def __init__(
        self,
        registry: RequestRegistry,
        template: str,
        max_seq_len: int = 1_000_000,
        describes_tools: bool = True,
    ) -> None:
        self.text = ""
        self.prompts: list[str] = []
        self.messages: list[GenerateMsg] = []
        self.grammars: list[Grammar | None] = []
        self.batch = 1
        self.tokenizer = make_tokenizer(template)
        self.vocabulary = Vocabulary(
            read_vocabulary(self.tokenizer, self.tokenizer.vocab_size, [EOS])
        )
        self.cache = KVCacheManager(16, 2, 16, radix_cache=True)
        self._registry = registry
        self._tokenizer_worker = TokenizerWorker(
            self.tokenizer,
            ChatTemplate(
                self.tokenizer.chat_templates,
                self.tokenizer.special_tokens,
                describes_tools=describes_tools,
            ),
            max_seq_len,
            self.tokenizer.vocab_size,
        )
        self.info: ModelInfo = replace(MODEL, chat_format=self._tokenizer_worker.chat_format)
        self._detokenizer = DetokenizerWorker(self.tokenizer)
        self._tasks: set[asyncio.Task[None]] = set()
        registry.connect(self.send)

    def send(self, tokenizer_index: int, message: TokenizeMsg | AbortMsg | Query) -> None:
        if isinstance(message, ShowTreeMsg):
            return show_tree(self._registry, self.cache, message)
        message = decode(encode(message), TOKENIZER_INBOX)  # type: ignore[assignment]
        if isinstance(message, AbortMsg):
            return
        outgoing = self._tokenizer_worker.handle(message)
        if isinstance(outgoing, UserReply):
            self._registry.deliver(outgoing)
        elif isinstance(outgoing, AnswerMsg):
            self._registry.receive(outgoing)
        elif isinstance(outgoing, GenerateMsg):
            self.messages.append(decode(encode(outgoing), SCHEDULER_INBOX))  # type: ignore[arg-type]
            self.prompts.append(self.tokenizer.decode(outgoing.prompt_ids.tolist(), False))
            grammar = outgoing.sampling.grammar
            self.grammars.append(grammar)
            if grammar and (error := find_error(grammar, self.vocabulary)):
                uids = range(outgoing.uid, outgoing.uid + outgoing.sampling.n)
                failures = tuple(Failure.from_error(uid, error) for uid in uids)
                self._registry.deliver(failure_reply(failures))
                return
            for uid in range(outgoing.uid, outgoing.uid + outgoing.sampling.n):
                task = asyncio.create_task(self._generate(uid, outgoing))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    def reply_to(self, message: GenerateMsg) -> str:
        """What is said to a request."""
        return self.text

    def _start(self, uid: int, message: GenerateMsg) -> Start:
        sampling, prompt_logprobs = message.sampling, None
        if sampling.prompt_logprobs is not None:
            following = message.prompt_ids[1:].tolist()
            prompt_logprobs = played_logprobs(uid, following, sampling.prompt_logprobs)
        return Start(
            uid=uid,
            prompt_tokens=len(message.prompt_ids),
            cached_tokens=0,
            min_tokens=0,
            stop=sampling.stop,
            skip_special_tokens=sampling.skip_special_tokens,
            parts=message.parts,
            prompt_ids=message.prompt_ids if sampling.echo else None,
            prompt_logprobs=prompt_logprobs,
            logprobs=sampling.logprobs is not None,
            include_stop=sampling.include_stop_str_in_output,
            shown_prompt=None if uid > message.uid else message.shown_prompt,
        )

    async def _generate(self, uid: int, message: GenerateMsg) -> None:
        text = self.reply_to(message)
        ids = [*self.tokenizer.encode(text, add_special_tokens=False), EOS]
        sampling = message.sampling
        limit = len(ids) if sampling.max_tokens is None else sampling.max_tokens
        start, ids = self._start(uid, message), ids[:limit] or [-1]
        for i, token_id in enumerate(ids):
            finish = Finish.LENGTH if i + 1 == max(1, limit) else Finish.NONE
            finish = Finish.STOP if token_id == EOS else finish
            told = sampling.logprobs is not None and token_id >= 0
            step = DetokenizeMsg(
                uids=np.array([uid], np.int64),
                token_ids=np.array([token_id], np.int32),
                finishes=np.array([finish], np.uint8),
                starts=() if i else (start,),
                logprobs=(played_logprobs(uid, [token_id], sampling.logprobs or 0),)
                if told
                else (),
            )
            reply, abort = self._detokenizer.handle(decode(encode(step), DETOKENIZER_INBOX))  # type: ignore[arg-type]
            if reply is not None:
                self._registry.deliver(decode(encode(reply), FRONTEND_INBOX))  # type: ignore[arg-type]
            if abort is not None:
                return
            if i % self.batch == 0:
                await asyncio.sleep(0)
