"""Small tokenizers of every kind that checkpoints come with, made here from a few sentences."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

SENTENCES = [
    "the quick brown fox jumps over the lazy dog, doesn't it?",
    "a server that answers: one, two, three ... and stops.",
    "numbers 0123456789 and (brackets) [too] {x: 1}; 'quoted' words!",
    "der Fluss fließt über das Gerät, naïve café",
    "你好 世界 こんにちは 안녕하세요",
    "no split characters  two spaces   three spaces\nnew line\n\n\ttab",
]
SPECIALS = ["<unk>", "<s>", "</s>", "<pad>"]
NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


def _train(tokenizer: Tokenizer, trainer: Any) -> Tokenizer:
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    return tokenizer


def byte_level_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=380, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    _train(tokenizer, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("é→", special=False)])
    return tokenizer


def _sentencepiece_like_model() -> models.BPE:
    """Merges over characters, with the 256 byte tokens that spell all other characters."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    trainer = trainers.BpeTrainer(vocab_size=200, show_progress=False)
    _train(tokenizer, trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    tokens = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += sorted(trained["vocab"], key=trained["vocab"].get)
    vocab = {token: id for id, token in enumerate(tokens)}
    merges = [tuple(pair) for pair in trained["merges"]]
    return models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)


def llama_like() -> Tokenizer:
    tokenizer = Tokenizer(_sentencepiece_like_model())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def gemma_like() -> Tokenizer:
    tokenizer = Tokenizer(_sentencepiece_like_model())
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(SPECIALS)
    return tokenizer


def metaspace_bytes() -> Tokenizer:
    tokenizer = Tokenizer(_sentencepiece_like_model())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.add_special_tokens(SPECIALS)
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False
    )
    return _train(tokenizer, trainer)


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    trainer = trainers.WordPieceTrainer(
        vocab_size=260, special_tokens=SPECIALS, show_progress=False
    )
    return _train(tokenizer, trainer)


def suffix_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder("</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=260, special_tokens=SPECIALS, end_of_word_suffix="</w>", show_progress=False
    )
    return _train(tokenizer, trainer)


def word_level() -> Tokenizer:
    """No decoder at all: words joined by spaces."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return _train(tokenizer, trainers.WordLevelTrainer(special_tokens=SPECIALS, vocab_size=120))


MAKERS: dict[str, Callable[[], Tokenizer]] = {
    maker.__name__: cache(maker)
    for maker in (
        byte_level_bpe,
        llama_like,
        gemma_like,
        metaspace_bytes,
        unigram,
        word_piece,
        suffix_bpe,
        word_level,
    )
}


def save(path: Path, name: str, **config: Any) -> Path:
    """A model directory with that tokenizer and a tokenizer_config.json."""
    path.mkdir(parents=True, exist_ok=True)
    MAKERS[name]().save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **NAMED, **config}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path
