"""Sends the changes of the radix tree to the process that publishes them as events."""

from __future__ import annotations

import logging
from typing import Protocol

from minisrv.kvcache.radix_tree import RadixTree
from minisrv.kvcache.tree_changes import TreeChanges
from minisrv.wire.messages import TreeChangesMsg

PERIOD_S = 0.1

logger = logging.getLogger("minisrv.scheduler")


class Sender(Protocol):
    """An `Outbox`."""

    def has_room(self) -> bool:
        """Whether `send` would not block."""

    def send(self, message: TreeChangesMsg) -> None:
        """Send a message."""


class TreeFeed:
    """Records what joins and leaves `tree`, from now on, and sends it.

    It never waits: while the receiver has no room, changes are dropped, and afterwards the whole
    tree is sent.
    """

    def __init__(self, tree: RadixTree, sender: Sender) -> None:
        self._tree = tree
        self._sender = sender
        self._begins = True
        self._drops = False
        self._due_at = 0.0
        self._changes = tree.changes = TreeChanges()

    def restart(self) -> None:
        """Send the whole tree next time: the receiver may have lost what it had."""
        self._begins = True

    def send(self, now: float, *, busy: bool) -> None:
        """Send the changes since the last time, if there are any; between steps every PERIOD_S.

        now: in seconds. busy: whether this will be called again soon.
        """
        changes = self._changes
        if not (changes or self._begins) or (busy and now < self._due_at):
            return
        self._due_at = now + PERIOD_S
        if not self._sender.has_room():
            self._drop()
            return
        if self._begins:
            changes.clear()
            self._tree.record_all(changes)
        self._sender.send(changes.message(begins=self._begins))
        changes.clear()
        self._begins = self._drops = False

    def _drop(self) -> None:
        self._changes.clear()
        self._begins = True
        if not self._drops:
            logger.warning("the kv_events process is behind: changes of the cache are dropped")
        self._drops = True
