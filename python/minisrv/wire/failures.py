"""A reply that holds failures only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from minisrv.wire.messages import Failure, UserReply


def failure_reply(failures: Sequence[Failure]) -> UserReply:
    return UserReply(
        uids=np.empty(0, np.int64),
        texts=(),
        output_tokens=np.empty(0, np.int32),
        finishes=np.empty(0, np.uint8),
        stop_reasons=(),
        new_ids=np.empty(0, np.int32),
        num_new_ids=np.empty(0, np.int32),
        failures=tuple(failures),
    )
