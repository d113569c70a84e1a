"""Errors told in the names that the client used."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from minisrv.errors import MinisrvError

Names = Sequence[tuple[re.Pattern[str], str]]


def rename_fields(error: MinisrvError, names: Names) -> None:
    """Put other names into the sentence and the `param` of an error."""
    error.message = rename_text(error.message, names)
    error.param = error.param and rename_text(error.param, names)
    error.args = (error.message,)


def rename_text(text: str, names: Names) -> str:
    """The text with the other names."""
    for pattern, name in names:
        text = pattern.sub(name, text)
    return text


@contextmanager
def renamed(names: Names) -> Iterator[None]:
    """Let errors tell other names."""
    try:
        yield
    except MinisrvError as error:
        rename_fields(error, names)
        raise
