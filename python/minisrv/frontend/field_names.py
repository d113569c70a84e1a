"""Errors told in the names that the client used."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from minisrv.errors import MinisrvError

Names = Sequence[tuple[re.Pattern[str], str]]


def rename_fields(error: MinisrvError, names: Names) -> None:
    """Put other names into the sentence and the `param` of an error."""
    for pattern, name in names:
        error.message = pattern.sub(name, error.message)
        error.param = error.param and pattern.sub(name, error.param)
    error.args = (error.message,)


@contextmanager
def renamed(names: Names) -> Iterator[None]:
    """Let errors tell other names."""
    try:
        yield
    except MinisrvError as error:
        rename_fields(error, names)
        raise
