import time
from functools import cache

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers

from minisrv.checkpoint.tokenizer import HFTokenizer
from minisrv.detokenizer.incremental import TextDecoder
from minisrv.errors import UnsupportedModelError
from tests.support import own_tokenizers

TOKENIZERS = {
    name: HFTokenizer(Tokenizer.from_str(maker().to_str()), {}, {})
    for name, maker in own_tokenizers.MAKERS.items()
}
DECODERS = {name: TextDecoder(tokenizer) for name, tokenizer in TOKENIZERS.items()}
WITH_BYTES = ["byte_level_bpe", "llama_like", "gemma_like", "metaspace_bytes"]
HARD_TEXTS = [
    "👩‍👩‍👧‍👦 family, 👍🏽 thumb, 🇩🇪 flag",
    "e\u0301 a\u0308\u0323 combining",
    "漢字かな交じり文 한국어 ไทย",
    "\U0010ffff\x00\ufffd\u2581",
    "  two  spaces\n\n",
]


def pieces(name: str, ids: list[int], skip: bool) -> list[str]:
    stream = DECODERS[name].stream(skip)
    return [*(stream.push(token_id) for token_id in ids), stream.flush()]


def check(name: str, ids: list[int]) -> None:
    for skip in (True, False):
        assert "".join(pieces(name, ids, skip)) == TOKENIZERS[name].decode(ids, skip)


@pytest.mark.parametrize("name", own_tokenizers.MAKERS)
def test_pieces_of_any_ids_join_to_the_decoded_whole(name: str) -> None:
    vocab_size = TOKENIZERS[name].vocab_size

    @settings(max_examples=120, deadline=None)
    @given(st.lists(st.integers(0, vocab_size + 3), max_size=40))
    @example([])
    @example([vocab_size + 1])
    @example([0, 1, 2])
    def joined(ids: list[int]) -> None:
        check(name, ids)

    joined()


def byte_spellings() -> dict[int, str]:
    """How the library spells bytes; those that no text has (such as 0xFF) stand for themselves."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
    texts = [chr(code) for code in range(0x800)] + [
        chr(code) for code in range(0x1000, 0x10FFFF, 0xFFF)
    ]
    spelled = {byte: chr(byte) for byte in range(256)}
    for text in texts:
        if not "\ud800" <= text <= "\udfff":
            spelled |= zip(text.encode(), split(text)[0][0], strict=True)
    return spelled


@cache
def byte_ids(name: str) -> list[int]:
    """The token ids of the 256 bytes."""
    if name != "byte_level_bpe":
        return [len(own_tokenizers.SPECIALS) + byte for byte in range(256)]
    vocab = own_tokenizers.MAKERS[name]().get_vocab()
    return [vocab[char] for _, char in sorted(byte_spellings().items())]


@pytest.mark.parametrize("name", WITH_BYTES)
@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_pieces_of_any_bytes_join_to_the_decoded_whole(name: str, data: st.DataObject) -> None:
    of_byte = byte_ids(name)
    hard = st.sampled_from(HARD_TEXTS).map(str.encode)
    cut = st.tuples(hard, st.integers(0, 60), st.integers(0, 60)).map(lambda c: c[0][c[1] : c[2]])
    lead = st.binary(max_size=6) | cut | st.sampled_from([b"\xf0\x9f", b"\xed\xa0\x80", b"\xc0"])
    others = st.lists(st.integers(256, TOKENIZERS[name].vocab_size - 1), max_size=3)
    runs = data.draw(st.lists(st.tuples(lead, others), max_size=6))
    ids = [id for run, rest in runs for id in [*(of_byte[byte] for byte in run), *rest]]
    check(name, ids)


@pytest.mark.parametrize("name", WITH_BYTES)
@pytest.mark.parametrize("text", HARD_TEXTS)
def test_a_text_cut_at_every_byte_comes_whole_and_in_whole_characters(name: str, text: str) -> None:
    ids = [byte_ids(name)[byte] for byte in text.encode()]
    stream = DECODERS[name].stream(True)
    shown = ""
    for token_id in ids:
        shown += stream.push(token_id)
        assert text.startswith(shown)
    shown += stream.flush()
    assert shown == TOKENIZERS[name].decode(ids)
    assert shown == text or name not in ("byte_level_bpe", "gemma_like")


def test_byte_level_text_is_shown_with_its_last_byte() -> None:
    of_byte = byte_ids("byte_level_bpe")
    stream = DECODERS["byte_level_bpe"].stream(True)
    shown = [stream.push(of_byte[byte]) for byte in "aé漢👍".encode()]
    assert shown == ["a", "", "é", "", "", "漢", "", "", "", "👍"]


@pytest.mark.parametrize("name", own_tokenizers.MAKERS)
@pytest.mark.parametrize("text", own_tokenizers.SENTENCES)
def test_encoded_text_comes_back(name: str, text: str) -> None:
    ids = TOKENIZERS[name].encode(text)
    check(name, ids)
    if name in ("byte_level_bpe", "llama_like", "gemma_like"):
        assert "".join(pieces(name, ids, True)) == text


@pytest.mark.parametrize("name", own_tokenizers.MAKERS)
def test_a_stream_costs_the_same_for_its_last_token_as_for_its_first(name: str) -> None:
    vocab_size = TOKENIZERS[name].vocab_size
    runs = {
        "mixed": [i * 7 % vocab_size for i in range(20_000)],
        "one": [min(300, vocab_size - 1)] * 20_000,
        "bytes": [10] * 20_000,
        "spaces": [TOKENIZERS[name]._backend.token_to_id("\u2581") or 5] * 20_000,
    }
    for kind, ids in runs.items():
        stream = DECODERS[name].stream(True)
        started = time.process_time()
        for token_id in ids:
            stream.push(token_id)
        stream.flush()
        assert time.process_time() - started < 2.0, kind


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.CTC(),
        decoders.Strip(" ", 0, 1),
        decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")]),
        decoders.Sequence([decoders.ByteLevel(), decoders.Replace("a", "b")]),
    ],
)
def test_a_decoder_that_rewrites_earlier_text_is_refused(decoder: decoders.Decoder) -> None:
    backend = Tokenizer.from_str(own_tokenizers.word_level().to_str())
    backend.decoder = decoder
    with pytest.raises(UnsupportedModelError, match="cannot be streamed"):
        TextDecoder(HFTokenizer(backend, {}, {}))
