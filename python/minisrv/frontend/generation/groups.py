"""Many choices in groups, so that a request of thousands of them does not hold up others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from itertools import islice
from typing import TypeVar

T = TypeVar("T")

CHOICES_AT_ONCE = 16


async def in_groups(items: Iterable[T]) -> AsyncIterator[list[T]]:
    """The items in groups of at most CHOICES_AT_ONCE; other requests run between two groups."""
    rest = iter(items)
    group = list(islice(rest, CHOICES_AT_ONCE))
    while group:
        yield group
        if group := list(islice(rest, CHOICES_AT_ONCE)):
            await asyncio.sleep(0)
