"""Tokenizers from GGUF metadata: the ids of llama.cpp, of sentencepiece and of the originals.

MINISRV_LLAMA_CPP_MODELS: the folder `models` of llama.cpp's source, whose vocabulary files are
compared; without it that test is skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from minisrv.checkpoint.gguf.tokenizer import load_gguf_tokenizer
from minisrv.checkpoint.tokenizer import HFTokenizer, load_tokenizer, needs_conversion
from minisrv.detokenizer.incremental import TextDecoder
from minisrv.errors import ConfigError, UnsupportedModelError
from tests.support import own_tokenizers

MODELS = os.environ.get("MINISRV_LLAMA_CPP_MODELS")
VOCABULARIES = [
    "command-r",
    "deepseek-coder",
    "deepseek-llm",
    "falcon",
    "gpt-2",
    "llama-bpe",
    "llama-spm",
    "mpt",
    "phi-3",
    "qwen2",
    "refact",
    "starcoder",
]
TEXTS = [
    *own_tokenizers.SENTENCES,
    "",
    " ",
    "  leading and trailing  ",
    "emoji 👩‍👩‍👧 and e\u0301 and \x00 and \U0010ffff",
    "It's 12345 o'clock, SHE'S\r\n\r\n here...!\t\t(x)",
]
SPM_TEXTS = [text for text in TEXTS if "\x00" not in text]
KIND = {name: int(value) for name, value in gguf.TokenType.__members__.items()}


def write_vocabulary(
    path: Path, kind: str, tokens: Sequence[str], types: Sequence[int], **entries: Any
) -> Path:
    """A file without weights. entries: below `tokenizer.ggml`."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for key, value in entries.items():
        full = key.replace("__", ".") if "__" in key else f"tokenizer.ggml.{key}"
        if isinstance(value, dict):
            writer.add_key_value(full, value["value"], value["type"], value.get("sub_type"))
        else:
            writer.add_key_value(full, value, gguf.GGUFValueType.get_type(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_byte_level(path: Path, **entries: Any) -> Path:
    """`byte_level_bpe` of own_tokenizers."""
    original = json.loads(own_tokenizers.byte_level_bpe().to_str())
    ids = dict(original["model"]["vocab"])
    added = {one["content"]: one for one in original["added_tokens"]}
    ids |= {content: one["id"] for content, one in added.items()}
    tokens = sorted(ids, key=lambda token: ids[token])
    types = [
        KIND["NORMAL"]
        if token not in added
        else KIND["CONTROL" if added[token]["special"] else "USER_DEFINED"]
        for token in tokens
    ]
    merges = [" ".join(pair) for pair in original["model"]["merges"]]
    entries = {"pre": "gpt-2", "merges": merges, "bos_token_id": 1, "eos_token_id": 2, **entries}
    return write_vocabulary(path, "gpt2", tokens, types, **entries)


def train(folder: Path, kind: str, **options: Any) -> sentencepiece.SentencePieceProcessor:
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(own_tokenizers.SENTENCES * 5))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "tokenizer"),
        model_type=kind,
        character_coverage=0.99,
        hard_vocab_limit=False,
        user_defined_symbols=["<tool>"],
        control_symbols=["<turn>"],
        minloglevel=2,
        **options,
    )
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def write_sentencepiece(
    folder: Path, kind: str, original: sentencepiece.SentencePieceProcessor, **entries: Any
) -> Path:
    ids = range(original.get_piece_size())
    types = [
        KIND["BYTE"]
        if original.is_byte(id)
        else KIND["UNKNOWN"]
        if original.is_unknown(id)
        else KIND["CONTROL"]
        if original.is_control(id)
        else KIND["USER_DEFINED"]
        if original.id_to_piece(id) == "<tool>"
        else KIND["NORMAL"]
        for id in ids
    ]
    return write_vocabulary(
        folder / "model.gguf",
        kind,
        [original.id_to_piece(id) for id in ids],
        types,
        scores=[original.get_score(id) for id in ids],
        bos_token_id=original.bos_id(),
        eos_token_id=original.eos_id(),
        unknown_token_id=original.unk_id(),
        **entries,
    )


@pytest.mark.skipif(MODELS is None, reason="MINISRV_LLAMA_CPP_MODELS is not set")
@pytest.mark.parametrize("name", VOCABULARIES)
def test_ids_equal_those_of_llama_cpp(name: str) -> None:
    path = Path(MODELS or "") / f"ggml-vocab-{name}.gguf"
    tokenizer = load_tokenizer(path)
    texts = path.with_name(path.name + ".inp").read_bytes().decode()
    ids = path.with_name(path.name + ".out").read_text()
    pairs = list(zip(texts.split("\n__ggml_vocab_test__\n"), ids.split("\n"), strict=True))
    assert len(pairs) > 40
    for text, expected in pairs:
        ours = tokenizer.encode(text, add_special_tokens=False)
        assert ours == [int(id) for id in expected.split()], text
    check_streaming(tokenizer, [text for text, _ in pairs])


def check_streaming(tokenizer: HFTokenizer, texts: Sequence[str]) -> None:
    """The detokenizer can use it: the pieces of a text are the text."""
    decoder = TextDecoder(tokenizer)
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        stream = decoder.stream(skip_special_tokens=True)
        pieces = [stream.push(id) for id in ids]
        assert "".join([*pieces, stream.flush()]) == tokenizer.decode(ids)


@pytest.mark.parametrize("adds", [{}, {"add_bos_token": True}, {"add_eos_token": True}])
def test_a_byte_level_tokenizer_equals_the_original(adds: dict[str, bool], tmp_path: Path) -> None:
    ours = load_tokenizer(write_byte_level(tmp_path / "model.gguf", **adds))
    theirs = own_tokenizers.byte_level_bpe()
    for text in [*TEXTS, "<s>special</s> <tool> é→ <tool"]:
        ids = theirs.encode(text).ids
        assert ours.encode(text, add_special_tokens=False) == ids
        expected = [1] * ("add_bos_token" in adds) + ids + [2] * ("add_eos_token" in adds)
        assert ours.encode(text) == expected
        assert ours.decode(ids) == theirs.decode(ids)
    assert (ours.bos_token, ours.eos_token, ours.bos_id, ours.eos_id) == ("<s>", "</s>", 1, 2)
    assert {ours.token(id) for id in ours.special_ids} == set(own_tokenizers.SPECIALS)
    check_streaming(ours, TEXTS)


def test_sentencepiece_equals_the_library(tmp_path: Path) -> None:
    theirs = train(
        tmp_path,
        "bpe",
        vocab_size=420,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
    )
    ours = load_tokenizer(write_sentencepiece(tmp_path, "llama", theirs))
    for text in SPM_TEXTS:
        ids = theirs.encode(text)
        assert ours.encode(text, add_special_tokens=False) == ids, text
        assert ours.encode(text) == [theirs.bos_id(), *ids]
        assert ours.decode(ids) == theirs.decode(ids)
    for token in ("<turn>", "<tool>"):
        id = theirs.piece_to_id(token)
        assert ours.encode(f"{token}x", add_special_tokens=False)[0] == id
        assert (id in ours.special_ids) == (token == "<turn>")
    check_streaming(ours, SPM_TEXTS)


def test_sentencepiece_without_a_space_prefix(tmp_path: Path) -> None:
    theirs = train(
        tmp_path,
        "bpe",
        vocab_size=420,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
    )
    path = write_sentencepiece(tmp_path, "llama", theirs, add_space_prefix=False)
    ours = load_tokenizer(path)
    for text in SPM_TEXTS:
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text), text
        assert ours.decode(theirs.encode(text)) == theirs.decode(theirs.encode(text))


def test_unigram_equals_sentencepiece(tmp_path: Path) -> None:
    theirs = train(tmp_path, "unigram", vocab_size=200)
    proto = sentencepiece_model_pb2.ModelProto.FromString(theirs.serialized_model_proto())
    characters = {
        "value": list(proto.normalizer_spec.precompiled_charsmap),
        "type": gguf.GGUFValueType.ARRAY,
        "sub_type": gguf.GGUFValueType.UINT8,
    }
    path = write_sentencepiece(
        tmp_path, "t5", theirs, precompiled_charsmap=characters, remove_extra_whitespaces=True
    )
    ours = load_tokenizer(path)
    for text in ["ﬁne ①", *SPM_TEXTS]:
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text), text
    assert ours.encode("a b") == [*theirs.encode("a b"), theirs.eos_id()]


def test_templates_are_found_by_name_and_replaced_by_a_file(tmp_path: Path) -> None:
    path = write_byte_level(
        tmp_path / "model.gguf",
        tokenizer__chat_template="plain",
        tokenizer__chat_templates=["tool_use"],
        tokenizer__chat_template__tool_use="with tools",
    )
    assert load_tokenizer(path).chat_templates == {"default": "plain", "tool_use": "with tools"}
    other = tmp_path / "other.jinja"
    other.write_text("mine")
    assert load_tokenizer(path, str(other)).chat_templates == {"default": "mine"}
    assert not needs_conversion(path)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"pre": "new-kind"}, "the pre-tokenizer 'new-kind'; minisrv supports llama3, "),
        ({"model": "rwkv"}, "a tokenizer of kind 'rwkv'; minisrv supports gpt2"),
    ],
)
def test_an_unknown_kind_is_refused_by_name(
    entries: dict[str, Any], message: str, tmp_path: Path
) -> None:
    kind = entries.pop("model", "gpt2")
    entries["merges"] = ["a b"]
    path = write_vocabulary(tmp_path / "model.gguf", kind, ["a", "b", "ab"], [1] * 3, **entries)
    with pytest.raises(UnsupportedModelError, match=message):
        load_gguf_tokenizer(path)


@pytest.mark.parametrize(
    ("tokens", "entries", "message"),
    [
        (["a", "b", "a"], {}, "has the token 'a' twice"),
        (["a", "b", "ab"], {"merges": None}, r"no tokenizer.ggml.merges"),
        (["a", "b", "ab"], {"eos_token_id": 9}, "eos_token_id 9, but 3 tokens"),
        (["a", "b", "ab"], {"scores": [0.5]}, "3 tokens, but 3 types and 1 scores"),
    ],
)
def test_a_vocabulary_that_contradicts_itself_is_refused(
    tokens: list[str], entries: dict[str, Any], message: str, tmp_path: Path
) -> None:
    entries = {"pre": "gpt-2", "merges": ["a b"], **entries}
    entries = {key: value for key, value in entries.items() if value is not None}
    path = write_vocabulary(tmp_path / "model.gguf", "gpt2", tokens, [1] * 3, **entries)
    with pytest.raises(ConfigError, match=message):
        load_gguf_tokenizer(path)


def test_merges_into_what_is_not_a_token_have_no_effect(tmp_path: Path) -> None:
    entries = {"pre": "gpt-2", "merges": ["a b", "b c", "ab c", "x y"]}
    path = write_vocabulary(
        tmp_path / "model.gguf", "gpt2", ["a", "b", "c", "ab"], [1] * 4, **entries
    )
    assert load_tokenizer(path).encode("bcabc") == [1, 2, 3, 2]


def test_neither_torch_nor_transformers_is_loaded(tmp_path: Path) -> None:
    path = write_byte_level(tmp_path / "model.gguf")
    code = (
        "import sys; from pathlib import Path; from minisrv.checkpoint.tokenizer import *; "
        f"load_tokenizer(Path({str(path)!r})); "
        "sys.exit(','.join({'torch', 'transformers'} & sys.modules.keys()) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
