"""Log-probabilities in OpenAI's two shapes: of a chat completion, and of a completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from minisrv.errors import InvalidRequestError
from minisrv.messages import ScoredToken, TokenScore
from minisrv.sampling_params import MAX_LOGPROBS


def chat_logprobs(scores: Sequence[TokenScore]) -> dict[str, Any]:
    """`logprobs` of a chat choice, whole or of one chunk."""
    content = []
    for score in scores:
        assert score.logprob is not None, "only the first token of a prompt has none"
        chosen = ScoredToken(token=score.token, logprob=score.logprob)
        content.append(_entry(chosen) | {"top_logprobs": [_entry(token) for token in score.top]})
    return {"content": content, "refusal": None}


def text_logprobs(scores: Sequence[TokenScore]) -> dict[str, Any]:
    """`logprobs` of a completion's choice: four lists with an entry a token.

    The likeliest tokens have the token that came among them. Of two tokens of the same spelling the
    likelier one is told.
    """
    return {
        "tokens": [_spelling(score.token) for score in scores],
        "token_logprobs": [score.logprob for score in scores],
        "top_logprobs": [_top(score) for score in scores],
        "text_offset": [score.offset for score in scores],
    }


def read_chat_logprobs(fields: dict[str, Any]) -> int | None:
    """How many of the likeliest tokens a chat request wants. Raises InvalidRequestError."""
    if fields.get("logprobs", False):
        return _checked(fields.get("top_logprobs", 0), "top_logprobs")
    if fields.get("top_logprobs", 0):
        raise InvalidRequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
    return None


def read_text_logprobs(fields: dict[str, Any]) -> int | None:
    """The same of a completion. Raises InvalidRequestError."""
    return _checked(fields["logprobs"], "logprobs") if "logprobs" in fields else None


def _checked(count: int, param: str) -> int:
    if not 0 <= count <= MAX_LOGPROBS:
        raise InvalidRequestError(
            f"{param} is {count}; it must be from 0 to {MAX_LOGPROBS}", param=param
        )
    return count


def _entry(token: ScoredToken) -> dict[str, Any]:
    return {
        "token": _spelling(token.token),
        "logprob": token.logprob,
        "bytes": list(token.token),
    }


def _top(score: TokenScore) -> dict[str, float] | None:
    if score.logprob is None:
        return None
    top = {_spelling(score.token): score.logprob}
    for token in score.top:
        spelling = _spelling(token.token)
        top[spelling] = max(token.logprob, top.get(spelling, token.logprob))
    return top


def _spelling(token: bytes) -> str:
    r"""The token as text; bytes that are no whole character are written as \xe2."""
    return token.decode(errors="backslashreplace")
