"""Choices that fail where they would end."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from minisrv.detokenizer.worker import DetokenizerWorker
from minisrv.errors import InvalidRequestError
from minisrv.wire.messages import Failure


def fail_choices(monkeypatch: pytest.MonkeyPatch, failing: set[int]) -> None:
    """Have the detokenizer report a failure in place of the end of these uids."""
    handle = DetokenizerWorker.handle

    def fail(self: DetokenizerWorker, message: Any) -> Any:
        reply, aborts = handle(self, message)
        if reply is None:
            return reply, aborts
        fails = np.isin(reply.uids, list(failing)) & (reply.finishes > 0)
        error = InvalidRequestError("no", param="prompt", code="grammar_too_complex")
        changes: dict[str, Any] = {
            name: getattr(reply, name)[~fails] for name in ("uids", "output_tokens", "finishes")
        }
        for name in ("texts", "stop_reasons"):
            column = zip(getattr(reply, name), fails, strict=True)
            changes[name] = tuple(value for value, failed in column if not failed)
        changes["num_new_ids"] = reply.num_new_ids[~fails]
        changes["new_ids"] = reply.new_ids[~np.repeat(fails, reply.num_new_ids)]
        changes["ends"] = tuple(end for end in reply.ends if end.uid in changes["uids"])
        failures = [Failure.from_error(int(uid), error) for uid in reply.uids[fails]]
        return replace(reply, **changes, failures=(*reply.failures, *failures)), aborts

    monkeypatch.setattr(DetokenizerWorker, "handle", fail)
