"""The load of each point of a benchmark: what is sent, and when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from minisrv.bench.replay import Replay
from minisrv.bench.workloads import Conversation, Shape, make_conversations, with_arrivals
from minisrv.errors import ConfigError

ARRIVALS = ("poisson", "constant")
_MIN_REQUESTS, _REQUESTS_EACH, _REQUESTS_AT_A_RATE = 32, 8, 100


@dataclass(frozen=True, slots=True)
class Load:
    """Either `concurrency` conversations at once, or `rate` new ones per second.

    Neither: they arrive as a trace has recorded them.
    """

    concurrency: int | None = None
    rate: float | None = None
    arrivals: str = "poisson"

    def to_json(self) -> dict[str, object]:
        """As in the JSON of a benchmark."""
        found = asdict(self)
        return {**found, "arrivals": None if self.rate is None else self.arrivals}

    @property
    def default_requests(self) -> int:
        """The number of synthetic requests where the user gives none."""
        if self.concurrency is None:
            return _REQUESTS_AT_A_RATE
        return max(_MIN_REQUESTS, _REQUESTS_EACH * self.concurrency)


def parse_loads(
    concurrency: str | None, rate: str | None, arrivals: str, has_trace: bool = False
) -> list[Load]:
    """The points of "1,4,16". Raises ConfigError."""
    if rate is not None:
        if concurrency is not None:
            raise ConfigError("give either --concurrency or --rate")
        return [Load(rate=value, arrivals=arrivals) for value in _numbers(rate, "--rate", float)]
    if concurrency is None and has_trace:
        return [Load()]
    numbers = _numbers(concurrency or "8", "--concurrency", int)
    return [Load(concurrency=int(value)) for value in numbers]


def make_load(
    load: Load, source: Shape | Replay, num_requests: int | None, seed: Sequence[int]
) -> list[Conversation]:
    """The conversations of one point."""
    if isinstance(source, Replay):
        conversations = source.conversations(seed)
    else:
        conversations = make_conversations(source, num_requests or load.default_requests, seed)
    if load.rate is None:
        return conversations
    return with_arrivals(conversations, load.rate, load.arrivals == "poisson", seed)


def _numbers(text: str, option: str, kind: type[int] | type[float]) -> list[float]:
    try:
        values = [kind(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(0 < value < float("inf") for value in values):
        raise ConfigError(f"{option} {text} is not a list of numbers above 0, such as 1,4,16")
    return list(values)
