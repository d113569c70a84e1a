"""Before a benchmark: find out how prompts of a given length are made for the server."""

from __future__ import annotations

import asyncio

from minisrv.bench.client import INTERRUPTED, BenchError, Client
from minisrv.bench.prompts import WORDS, ChatPrompts, IdPrompts, Prompts, Segment, TextPrompts
from minisrv.checkpoint.hub import resolve_model
from minisrv.checkpoint.tokenizer import HFTokenizer, load_tokenizer
from minisrv.errors import ConfigError, MinisrvError
from minisrv.start_progress import no_progress

PROMPT_FORMS = ("auto", "ids", "text")
_TOKENIZER_FILES = ("*.json", "*.jinja", "*.model", "*.tiktoken")
_PROBES = (32, 288)  # words


def read_tokenizer(name: str) -> HFTokenizer:
    """Of a model as `minisrv serve` finds it. Raises ConfigError."""
    try:
        path = resolve_model(name, no_progress, _TOKENIZER_FILES)
        return load_tokenizer(path)
    except ConfigError as error:
        raise ConfigError(error.message.replace("--model", "--tokenizer")) from None


async def choose_prompts(
    client: Client, form: str, tokenizer: HFTokenizer | None
) -> tuple[Prompts, str]:
    """The writer of prompts, and a line that describes them.

    form: of PROMPT_FORMS; auto takes ids if the endpoint has them and the size of the vocabulary is
    known. Sends one or two requests, so that a server that cannot be measured is found out here.
    Raises BenchError, ConfigError.
    """
    vocabulary = None
    if form != "text" and client.endpoint == "completions":
        vocabulary = tokenizer.vocab_size if tokenizer else await _vocabulary_of(client)
    if vocabulary is not None:
        # The beginning and the end of a vocabulary are where the special tokens are.
        low, high = vocabulary // 10, max(vocabulary // 10 + 1, vocabulary * 9 // 10)
        prompts = IdPrompts(low, high)
        await _probe(client, prompts, _PROBES[0])
        return prompts, f"token ids from {low} to {high - 1}"
    if form == "ids":
        raise ConfigError(
            "token ids need --endpoint completions, and the size of the vocabulary: from the "
            "server's /tokenizer_info or from --tokenizer"
        )
    return await _text_prompts(client, tokenizer)


async def _text_prompts(client: Client, tokenizer: HFTokenizer | None) -> tuple[Prompts, str]:
    make = ChatPrompts if client.endpoint == "chat" else TextPrompts
    words = WORDS if tokenizer is None else _single_tokens(tokenizer)
    short, long = [await _probe(client, make(words), count) for count in _PROBES]
    if short is None or long is None:
        begin = 0 if tokenizer is None else len(tokenizer.encode(""))
        return make(words, overhead=begin), "words, counted as one token each"
    per_word = (long - short) / (_PROBES[1] - _PROBES[0])
    if not per_word > 0:
        raise BenchError(
            f"the server counts {short} and {long} prompt tokens for {_PROBES[0]} and {_PROBES[1]} "
            "words, so prompts of a given length cannot be made"
        )
    overhead = short - per_word * _PROBES[0]
    described = f"words of {per_word:.2f} tokens by the server's count, and {overhead:.0f} around"
    return make(words, per_word, overhead), described


async def _vocabulary_of(client: Client) -> int | None:
    try:
        size = (await client.get("/tokenizer_info"))["vocab_size"]
    except (MinisrvError, LookupError, TypeError):
        return None
    return size if isinstance(size, int) else None


async def _probe(client: Client, prompts: Prompts, num_tokens: int) -> int | None:
    """The server's count of a prompt's tokens, None if it sends none. Raises BenchError."""
    part = prompts.part([Segment((num_tokens,), num_tokens)], first=True)
    outcome, _ = await client.generate(prompts.prompt([part]), 1)
    if outcome.failure is INTERRUPTED:
        raise asyncio.CancelledError
    if (failure := outcome.failure) is not None:
        said = f": {failure.message}" if failure.message else ""
        raise BenchError(f"a first request to {client.url} failed: {failure.kind}{said}")
    return outcome.prompt_tokens


def _single_tokens(tokenizer: HFTokenizer) -> list[str]:
    found = [
        word for word in WORDS if len(tokenizer.encode(f" {word}", add_special_tokens=False)) == 1
    ]
    return found or list(WORDS)
