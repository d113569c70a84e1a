"""The vocabulary in the metadata of a GGUF file."""

from __future__ import annotations

from dataclasses import dataclass

from minisrv.checkpoint.gguf.reading import GgufCheckpoint
from minisrv.errors import ConfigError

# Types of tokens.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
# llama.cpp's ids where the file names none.
_SPM_IDS = {"bos": 1, "eos": 2, "unknown": 0}
# Control tokens that end a turn or a text in every model that has them. Files often name only one.
_END_TOKENS = frozenset(
    {
        "<|im_end|>",
        "<|endoftext|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end_of_text|>",
        "<|end|>",
        "<|EOT|>",
        "<end_of_turn>",
    }
)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Tokens by id, their types and, if the file has them, their scores."""

    tokens: list[str]
    types: list[int]
    scores: list[float]

    def of_type(self, kind: int) -> list[str]:
        """The tokens of a type, in the order of their ids."""
        return [token for token, one in zip(self.tokens, self.types, strict=True) if one == kind]


def read_vocabulary(checkpoint: GgufCheckpoint) -> Vocabulary:
    """Raises ConfigError if there is none, or its arrays have different lengths."""
    _check_lengths(checkpoint)
    tokens = checkpoint.get("tokenizer.ggml.tokens", list) or []
    if not isinstance(tokens[0], str):
        raise ConfigError(f"{checkpoint.name} has no texts in tokenizer.ggml.tokens")
    tokens = [token or f"[EMPTY_{id}]" for id, token in enumerate(tokens)]
    types = checkpoint.get("tokenizer.ggml.token_type", list) or [NORMAL] * len(tokens)
    scores = checkpoint.get("tokenizer.ggml.scores", list) or []
    return Vocabulary(tokens, types, scores)


def _check_lengths(checkpoint: GgufCheckpoint) -> None:
    tokens, types, scores = (
        checkpoint.count(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type", "scores")
    )
    if not tokens:
        raise ConfigError(f"{checkpoint.name} has no tokenizer: no tokenizer.ggml.tokens")
    if types not in (0, tokens) or scores not in (0, tokens):
        raise ConfigError(
            f"{checkpoint.name} has {tokens} tokens, but {types} types and {scores} scores of "
            "tokens"
        )


def token_id(checkpoint: GgufCheckpoint, name: str) -> int | None:
    """The id of the token that has a role: bos, eos, eot, eom, unknown, padding or seperator."""
    id = checkpoint.get(f"tokenizer.ggml.{name}_token_id", int)
    if id is None and checkpoint.get("tokenizer.ggml.model", str) == "llama":
        return _SPM_IDS.get(name)
    return id


def end_ids(checkpoint: GgufCheckpoint) -> list[int]:
    """The tokens that end a text: those that the file names, and control tokens known by name.

    Raises ConfigError if there is no vocabulary, or its arrays have different lengths.
    """
    _check_lengths(checkpoint)
    stated = [token_id(checkpoint, role) for role in ("eos", "eot", "eom")]
    types = checkpoint.get("tokenizer.ggml.token_type", list) or []
    control = [id for id, kind in enumerate(types) if kind == CONTROL]
    tokens = checkpoint.some_texts("tokenizer.ggml.tokens", control)
    known = [id for id, token in sorted(tokens.items()) if token in _END_TOKENS]
    return list(dict.fromkeys(id for id in (*stated, *known) if id is not None))
