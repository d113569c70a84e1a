"""Tokens are spelled in bytes, and begin in the text where their offset says."""

from dataclasses import replace

import numpy as np
import pytest

from minisrv.checkpoint.tokenizer import HFTokenizer
from minisrv.detokenizer.incremental import TextDecoder
from minisrv.detokenizer.logprobs import LogprobSpeller
from minisrv.detokenizer.worker import DetokenizerWorker
from minisrv.wire.logprobs import TokenLogprobs
from minisrv.wire.messages import DetokenizeMsg, Finish, Start
from tests.support import own_tokenizers

TEXTS = [*own_tokenizers.SENTENCES, "\U0001f600 smile \U0001f469\u200d\U0001f52c", "cafe\u0301"]
KINDS = ["byte_level_bpe", "llama_like", "gemma_like", "metaspace_bytes"]


def make(kind: str) -> HFTokenizer:
    return HFTokenizer(getattr(own_tokenizers, kind)(), dict(own_tokenizers.NAMED), {})


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_spellings_of_a_text_join_to_its_bytes(kind: str, text: str) -> None:
    tokenizer = make(kind)
    decoder = TextDecoder(tokenizer)
    ids = tokenizer.encode(text, add_special_tokens=False)
    spelled = b"".join(map(decoder.spell, ids))
    assert spelled.decode().removeprefix(" ") == tokenizer.decode(ids).removeprefix(" ")


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_has_a_spelling_that_is_stable(kind: str) -> None:
    tokenizer = make(kind)
    decoder = TextDecoder(tokenizer)
    for token_id in range(tokenizer.vocab_size):
        assert decoder.spell(token_id) == decoder.spell(token_id)
        assert isinstance(decoder.spell(token_id), bytes)
    assert decoder.spell(10**6) == b""


def test_special_tokens_are_spelled_as_they_are_written() -> None:
    for kind in KINDS:
        tokenizer = make(kind)
        assert tokenizer.token_id("</s>") is not None
        assert TextDecoder(tokenizer).spell(tokenizer.token_id("</s>") or 0) == b"</s>"


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_token_begins_where_its_offset_says(kind: str, text: str) -> None:
    tokenizer = make(kind)
    decoder = TextDecoder(tokenizer)
    speller, stream, shown = LogprobSpeller(decoder, 0), decoder.stream(True), ""
    ids = tokenizer.encode(text, add_special_tokens=False)
    for token_id in ids:
        speller.expect(
            replace(
                told(token_id),
                top_ids=np.array([token_id, 0], np.int32),
                top_logprobs=np.array([-1, -2], np.float32),
            )
        )
        delta = stream.push(token_id)
        speller.spell_next(delta)
        shown += delta
    spelled_logprobs = speller.take_spelled()
    assert speller.take_spelled() == []
    assert len(spelled_logprobs) == len(ids)
    for (token,) in spelled_logprobs:
        spelled = token.spelling.decode(errors="ignore").lstrip(" ")
        whole = spelled.encode() == token.spelling.lstrip(b" ")
        assert not whole or shown[token.offset :].lstrip(" ").startswith(spelled)
        assert token.top == ((token.spelling, -1), (decoder.spell(0), -2))


def told(token_id: int) -> TokenLogprobs:
    return TokenLogprobs(
        uid=1,
        token_ids=np.array([token_id], np.int32),
        logprobs=np.array([-1], np.float32),
        top_ids=np.empty(0, np.int32),
        top_logprobs=np.empty(0, np.float32),
    )


def test_each_broken_character_begins_where_it_is_shown() -> None:
    tokenizer = make("byte_level_bpe")
    decoder = TextDecoder(tokenizer)
    first_byte = next(i for i in range(tokenizer.vocab_size) if decoder.spell(i) == b"\xe4")
    speller, stream = LogprobSpeller(decoder, 0), decoder.stream(True)
    for _ in range(3):
        speller.expect(told(first_byte))
        speller.spell_next(stream.push(first_byte))
    assert [token.offset for (token,) in speller.take_spelled()] == [0, 1, 2]


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("cut", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_an_echo_is_the_whole_prompt_and_the_output_goes_on_behind_it(
    kind: str, cut: int, max_tokens: int
) -> None:
    tokenizer = make(kind)
    ids = tokenizer.encode("a smile \U0001f600", add_special_tokens=False)
    ids = ids[: len(ids) - cut]
    output = [tokenizer.encode("the", add_special_tokens=False)[-1]][:max_tokens]
    start = Start(
        uid=1,
        prompt_tokens=len(ids),
        cached_tokens=0,
        min_tokens=0,
        stop=(),
        skip_special_tokens=True,
        prompt_ids=np.array(ids, np.int32),
    )
    message = DetokenizeMsg(
        uids=np.array([1]),
        token_ids=np.array(output or [-1], np.int32),
        finishes=np.array([Finish.LENGTH], np.uint8),
        starts=(start,),
    )
    reply, _ = DetokenizerWorker(tokenizer).handle(message)
    assert reply is not None
    echo, text = reply.echoes[0].text, reply.texts[0]
    assert echo + text == tokenizer.decode([*ids, *output])
    if not cut:
        assert echo == tokenizer.decode(ids)
