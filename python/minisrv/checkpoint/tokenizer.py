"""A Hugging Face tokenizer from tokenizer.json and tokenizer_config.json, without transformers.

The ids equal those of transformers' fast tokenizer for the same files. Compared with loading only
tokenizer.json, tokens that only the configuration or added_tokens.json names are added, and stored
truncation and padding are turned off. As in transformers 5, only the post-processor in
tokenizer.json decides whether BOS and EOS are added; `add_bos_token` is ignored.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from minisrv.checkpoint.gguf.files import find_gguf
from minisrv.checkpoint.model_config import read_json
from minisrv.errors import ConfigError, InvalidRequestError

# They come first in `special_tokens`.
_NAMED_TOKENS = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
_ADDED_TOKEN_FIELDS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


class HFTokenizer:
    """Encodes and decodes text. Immutable after loading, so threads may share it.

    special_tokens: the named ones, such as {"eos_token": "</s>"}, as chat templates see them.
    special_ids: ids that decoding skips on request.
    chat_templates: template sources by name; the usual one is called "default". May be empty.
    vocab_size: number of tokens, added ones included; the model may have fewer or more rows.
    """

    def __init__(
        self, backend: Tokenizer, config: dict[str, Any], chat_templates: dict[str, str]
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        _add_tokens(backend, config)
        self._backend = backend
        self.chat_templates = chat_templates
        self.special_tokens = {
            name: _content(value) for name, value in _named_tokens(config).items()
        }
        self.special_ids = frozenset(
            id for id, token in backend.get_added_tokens_decoder().items() if token.special
        )
        self.bos_token = self.special_tokens.get("bos_token")
        self.eos_token = self.special_tokens.get("eos_token")
        self.bos_id = None if self.bos_token is None else self.token_id(self.bos_token)
        self.eos_id = None if self.eos_token is None else self.token_id(self.eos_token)
        self.vocab_size = backend.get_vocab_size()

    @property
    def decoder_state(self) -> dict[str, Any] | None:
        """The `decoder` entry of tokenizer.json."""
        decoder = self._backend.decoder
        return None if decoder is None else json.loads(decoder.__getstate__())

    def to_json(self) -> str:
        """The tokenizer in the format of tokenizer.json."""
        return self._backend.to_str()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Raises InvalidRequestError for lone surrogates."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequestError(
                f"the text has a lone surrogate (U+{ord(text[error.start]):04X}) at character "
                f"{error.start}, which UTF-8 cannot encode; send complete characters"
            ) from None
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; unknown ids are skipped, invalid UTF-8 becomes U+FFFD."""
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def token(self, token_id: int) -> str | None:
        """The token of an id as the vocabulary spells it; None for an unknown id."""
        return self._backend.id_to_token(token_id)

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token in the vocabulary's spelling; none decodes to more."""
        return max(map(len, self._backend.get_vocab()), default=1)

    def describe(self) -> dict[str, Any]:
        """The properties a client needs that does not have the tokenizer's files."""
        return {
            **self.special_tokens,
            "bos_token_id": self.bos_id,
            "eos_token_id": self.eos_id,
            "vocab_size": self.vocab_size,
            "chat_template": self.chat_templates.get("default"),
            "chat_templates": dict(self.chat_templates),
        }

    def token_id(self, text: str) -> int | None:
        """The id of the token spelled `text`; None if there is none."""
        return self._backend.token_to_id(text)


def load_tokenizer(model_dir: Path, chat_template_file: str | None = None) -> HFTokenizer:
    """The tokenizer in `model_dir`, with the chat template in `chat_template_file` if given.

    model_dir: a directory, or GGUF files as `find_gguf` finds them. Raises ConfigError if a file is
    missing or cannot be read.
    """
    if find_gguf(model_dir):
        # Imports the package `gguf`, which takes a while.
        from minisrv.checkpoint.gguf.tokenizer import load_gguf_tokenizer

        given = None if chat_template_file is None else _read_text(Path(chat_template_file))
        return load_gguf_tokenizer(model_dir, given)
    path = model_dir / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(f"{model_dir} has no tokenizer.json")
    config = read_json(model_dir / "tokenizer_config.json")
    if "additional_special_tokens" in config and not config.get("extra_special_tokens"):
        config["extra_special_tokens"] = config.pop("additional_special_tokens")
    old = "added_tokens_decoder" not in config
    if old:
        config |= read_json(model_dir / "special_tokens_map.json")
    templates = _read_templates(model_dir, config, chat_template_file)
    try:
        backend = Tokenizer.from_file(str(path))
        if old:
            added = read_json(model_dir / "added_tokens.json")
            config["added_tokens_decoder"] = _decoder_of_old_form(backend, config, added)
        return HFTokenizer(backend, config, templates)
    except Exception as error:  # the library raises plain Exception
        raise ConfigError(f"the tokenizer in {model_dir} cannot be loaded: {error}") from error


def needs_conversion(model_dir: Path) -> bool:
    """Whether `minisrv.checkpoint.convert_tokenizer` must first write a tokenizer.json."""
    return not find_gguf(model_dir) and not (model_dir / "tokenizer.json").is_file()


def _read_templates(
    model_dir: Path, config: dict[str, Any], chat_template_file: str | None
) -> dict[str, str]:
    if chat_template_file is not None:
        return {"default": _read_text(Path(chat_template_file))}
    files = {path.stem: path for path in (model_dir / "additional_chat_templates").glob("*.jinja")}
    if (model_dir / "chat_template.jinja").is_file():
        files["default"] = model_dir / "chat_template.jinja"
    if files:
        return {name: _read_text(path) for name, path in files.items()}
    value = config.get("chat_template")
    if value is None:
        value = read_json(model_dir / "chat_template.json").get("chat_template")
    return _templates_by_name(value)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"the chat template {path} cannot be read: {error}") from error


def _templates_by_name(value: Any) -> dict[str, str]:
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    try:
        named = value if isinstance(value, dict) else {t["name"]: t["template"] for t in value}
    except (TypeError, KeyError):
        named = {}
    if not named or not all(isinstance(text, str) for pair in named.items() for text in pair):
        raise ConfigError("chat_template must be a string or a list of named templates")
    return named


def _content(value: Any) -> str:
    return value if isinstance(value, str) else str(value["content"])


def _is_token(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and "content" in value)


def _named_tokens(config: dict[str, Any]) -> dict[str, Any]:
    named = {name: config[name] for name in _NAMED_TOKENS if _is_token(config.get(name))}
    for name, value in config.items():
        if name.endswith("_token") and _is_token(value):
            named.setdefault(name, value)
    extra = config.get("extra_special_tokens")
    return named | extra if isinstance(extra, dict) else named


def _added_token(value: Any, **flags: bool) -> AddedToken:
    if isinstance(value, str):
        return AddedToken(value, **flags)
    fields = {name: value[name] for name in _ADDED_TOKEN_FIELDS if name in value}
    return AddedToken(**fields | flags)


def _decoder_of_old_form(
    backend: Tokenizer, config: dict[str, Any], added: dict[str, Any]
) -> dict[int, dict[str, Any]]:
    """`added_tokens_decoder` from added_tokens.json, {token: id}; tokenizer.json comes first."""
    extra = config.get("extra_special_tokens")
    values = [*map(config.get, _NAMED_TOKENS), *(extra if isinstance(extra, list) else [])]
    special = {_content(value) for value in values if _is_token(value)}
    present = backend.get_added_tokens_decoder()
    return {
        id: {"content": text, "special": text in special, "normalized": text not in special}
        for text, id in added.items()
        if id not in present
    }


def _add_tokens(backend: Tokenizer, config: dict[str, Any]) -> None:
    """Add the tokens that the configuration has and tokenizer.json lacks, lowest id first.

    An added token that the configuration names, such as `eos_token`, becomes special.
    """
    present = list(backend.get_added_tokens_decoder().values())
    spelled = {repr(token) for token in present}
    by_id = sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0]))
    missing = [t for t in (_added_token(value) for _, value in by_id) if repr(t) not in spelled]
    known = {token.content: token for token in [*present, *missing]}
    tokens = list(_named_tokens(config).values())
    named = {_content(value) for value in tokens}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens")
    for value in [*tokens, *(extra if isinstance(extra, list) else [])]:
        content = _content(value)
        if content not in known:
            known[content] = _added_token(value, special=True)
            missing.append(known[content])
        elif content in named and not known[content].special:
            known[content].special = True
            missing.append(known[content])
    if missing:
        backend.add_tokens(missing)
