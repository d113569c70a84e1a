"""The tokenizer in the metadata of a GGUF file, built with the `tokenizers` library.

Two kinds: `gpt2` is byte-level BPE, whose way to split a text has a name (pre_tokenizers.py);
`llama` is sentencepiece's BPE, where a token's score is the order of its merge. `t5` is
sentencepiece's unigram model. The ids equal those of the tokenizer that was converted, as far as
the file describes it: whether spaces beside an added token belong to it is not in the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from minisrv.checkpoint.gguf.pre_tokenizers import find_pre_tokenizer
from minisrv.checkpoint.gguf.reading import GgufCheckpoint, open_gguf
from minisrv.checkpoint.gguf.vocabulary import (
    CONTROL,
    USER_DEFINED,
    Vocabulary,
    read_vocabulary,
    token_id,
)
from minisrv.checkpoint.tokenizer import HFTokenizer
from minisrv.errors import ConfigError, MinisrvError, UnsupportedModelError

_SPACE = "\u2581"  # a space in the tokens of sentencepiece
# Names in tokenizer_config.json and in the metadata.
_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def load_gguf_tokenizer(path: Path, chat_template: str | None = None) -> HFTokenizer:
    """The tokenizer in GGUF files. `chat_template` replaces those in the file.

    Raises ConfigError if there is none or it contradicts itself, UnsupportedModelError for a kind
    that minisrv does not implement.
    """
    checkpoint = open_gguf(path)
    templates = _templates(checkpoint) if chat_template is None else {"default": chat_template}
    try:
        return _build(checkpoint, templates)
    except MinisrvError:
        raise
    except Exception as error:  # the library raises plain Exception
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"the tokenizer in {checkpoint.name} cannot be built: {reason}"
        ) from error


def _build(checkpoint: GgufCheckpoint, templates: dict[str, str]) -> HFTokenizer:
    vocabulary = read_vocabulary(checkpoint)
    ids = {token: id for id, token in enumerate(vocabulary.tokens)}
    if len(ids) < len(vocabulary.tokens):
        repeated = next(t for id, t in enumerate(vocabulary.tokens) if ids[t] != id)
        raise ConfigError(f"{checkpoint.name} has the token {repeated!a} twice")
    kind = checkpoint.get("tokenizer.ggml.model", str)
    adds_bos, adds_eos = False, False
    match kind:
        case "gpt2":
            backend, adds_bos = _byte_level(checkpoint, ids)
        case "llama":
            backend, adds_bos = _sentencepiece(checkpoint, vocabulary, ids), True
        case "t5":
            backend, adds_eos = _unigram(checkpoint, vocabulary), True
        case _:
            raise UnsupportedModelError(
                f"{checkpoint.name} has a tokenizer of kind {kind!r}; minisrv supports gpt2 (BPE), "
                "llama (sentencepiece) and t5 (unigram)"
            )
    for control in (True, False):
        found = vocabulary.of_type(CONTROL if control else USER_DEFINED)
        added = [AddedToken(token, normalized=False, special=control) for token in found]
        (backend.add_special_tokens if control else backend.add_tokens)(added)
    config = {
        role: vocabulary.tokens[id]
        for role, name in _ROLES.items()
        if (id := _checked_id(checkpoint, vocabulary, name)) is not None
    }
    adds_bos = _flag(checkpoint, "add_bos_token", adds_bos) and "bos_token" in config
    adds_eos = _flag(checkpoint, "add_eos_token", adds_eos) and "eos_token" in config
    if adds_bos or adds_eos:
        bos, eos = config.get("bos_token"), config.get("eos_token")
        template = [bos if adds_bos else None, "$A", eos if adds_eos else None]
        used = {token: ids[token] for token in (bos, eos) if token is not None}
        backend.post_processor = processors.TemplateProcessing(
            single=[item for item in template if item], special_tokens=list(used.items())
        )
    return HFTokenizer(backend, config, templates)


def _byte_level(checkpoint: GgufCheckpoint, ids: dict[str, int]) -> tuple[Tokenizer, bool]:
    """The tokenizer, and whether BOS is added unless the file says otherwise."""
    listed = checkpoint.get("tokenizer.ggml.merges", list)
    if listed is None:
        raise ConfigError(f"{checkpoint.name} has a BPE tokenizer, but no tokenizer.ggml.merges")
    pre_tokenizer = find_pre_tokenizer(checkpoint)
    # As in llama.cpp, a merge whose result is not a token has no effect.
    merges = [
        (first, second)
        for first, _, second in (merge.partition(" ") for merge in listed)
        if first in ids and second in ids and first + second in ids
    ]
    backend = Tokenizer(models.BPE(ids, merges, ignore_merges=pre_tokenizer.whole_words))
    if pre_tokenizer.composes:
        backend.normalizer = normalizers.NFC()
    steps = [pre_tokenizers.Split(Regex(one), "isolated") for one in pre_tokenizer.splits]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend, pre_tokenizer.adds_bos


def _sentencepiece(
    checkpoint: GgufCheckpoint, vocabulary: Vocabulary, ids: dict[str, int]
) -> Tokenizer:
    if not vocabulary.scores:
        raise ConfigError(f"{checkpoint.name} has no tokenizer.ggml.scores")
    unknown = _checked_id(checkpoint, vocabulary, "unknown")
    backend = Tokenizer(
        models.BPE(
            ids,
            _merges(vocabulary, ids),
            unk_token=None if unknown is None else vocabulary.tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefixed = _flag(checkpoint, "add_space_prefix", True)
    prefix = [normalizers.Prepend(_SPACE)] if prefixed else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _SPACE)])
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    strip = [decoders.Strip(" ", 1, 0)] if prefixed else []
    backend.decoder = decoders.Sequence([*steps, *strip])
    return backend


def _merges(vocabulary: Vocabulary, ids: dict[str, int]) -> list[tuple[str, str]]:
    """Each way to make a token of two others, those with the highest scores first."""
    found: list[tuple[float, int, int, str]] = []
    for token, score in zip(vocabulary.tokens, vocabulary.scores, strict=True):
        for i in range(1, len(token)):
            if token[:i] in ids and token[i:] in ids:
                found.append((-score, -i, i - len(token), token))
    found.sort(key=lambda merge: merge[:3])
    return [(token[:-minus_left], token[-minus_left:]) for _, minus_left, _, token in found]


def _unigram(checkpoint: GgufCheckpoint, vocabulary: Vocabulary) -> Tokenizer:
    if not vocabulary.scores:
        raise ConfigError(f"{checkpoint.name} has no tokenizer.ggml.scores")
    unknown = _checked_id(checkpoint, vocabulary, "unknown")
    scored = list(zip(vocabulary.tokens, vocabulary.scores, strict=True))
    backend = Tokenizer(models.Unigram(scored, unk_id=unknown, byte_fallback=False))
    steps: list[normalizers.Normalizer] = []
    if characters := checkpoint.get("tokenizer.ggml.precompiled_charsmap", list):
        steps.append(normalizers.Precompiled(bytes(byte & 255 for byte in characters)))
    if _flag(checkpoint, "remove_extra_whitespaces", False):
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    backend.normalizer = normalizers.Sequence(steps)
    scheme = "always" if _flag(checkpoint, "add_space_prefix", True) else "never"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(_SPACE, prepend_scheme=scheme)
    return backend


def _flag(checkpoint: GgufCheckpoint, name: str, default: bool) -> bool:
    value = checkpoint.get(f"tokenizer.ggml.{name}", bool)
    return default if value is None else value


def _checked_id(checkpoint: GgufCheckpoint, vocabulary: Vocabulary, name: str) -> int | None:
    id = token_id(checkpoint, name)
    if id is not None and not 0 <= id < len(vocabulary.tokens):
        raise ConfigError(
            f"{checkpoint.name} has {name}_token_id {id}, but {len(vocabulary.tokens)} tokens"
        )
    return id


def _templates(checkpoint: GgufCheckpoint) -> dict[str, str]:
    """Chat templates by name."""
    names: Sequence[Any] = checkpoint.get("tokenizer.chat_templates", list) or ()
    keys = {"default": "tokenizer.chat_template"}
    keys |= {str(name): f"tokenizer.chat_template.{name}" for name in names}
    found = {name: checkpoint.get(key, str) for name, key in keys.items()}
    return {name: text for name, text in found.items() if text is not None}
