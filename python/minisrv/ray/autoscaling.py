"""How many replicas there should be."""

from __future__ import annotations

from typing import Any

QUEUED_TOKENS = "queued_tokens"  # in the metrics of a replica


class QueuedTokensPolicy:
    """As many replicas as queued prompt tokens and open requests need, whichever needs more.

    target_queued_tokens: of each replica, on the average of Ray's look_back_period_s. The open
    requests of each have Ray's target_ongoing_requests.
    """

    def __init__(self, target_queued_tokens: float) -> None:
        self._target = target_queued_tokens

    def __call__(self, context: Any) -> tuple[float, dict[str, Any]]:
        """The wanted number, and no state. context: an AutoscalingContext.

        Ray keeps it between the least and the most, and waits before it changes the number.
        """
        tokens = sum((context.aggregated_metrics or {}).get(QUEUED_TOKENS, {}).values())
        by_requests = context.total_num_requests / context.config.target_ongoing_requests
        return max(tokens / self._target, by_requests), {}
