"""Whether the memory of a server's processes grows with the requests that it has served."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import psutil

MIB = 1 << 20
# The tokenizers library keeps the ids of the first 10,000 words that it meets, then no more. The
# crowd's requests bring about one new word each, and some are refused before they are tokenized.
WARM_REQUESTS = 15_000


@dataclass
class MemoryLog:
    """The resident memory of each process, by the number of requests that had ended."""

    processes: dict[str, psutil.Process]
    num_ended: list[int] = field(default_factory=list)
    mib: dict[str, list[float]] = field(default_factory=dict)

    def add(self, num_ended: int) -> None:
        """Read the memory of every process."""
        self.num_ended.append(num_ended)
        for name, process in self.processes.items():
            self.mib.setdefault(name, []).append(process.memory_info().rss / MIB)

    def report(self) -> dict[str, str]:
        """MiB of each process after each quarter of the requests, and its growth."""
        quarters = [
            min(range(len(self.num_ended)), key=lambda i: abs(self.num_ended[i] - share))
            for share in (self.num_ended[-1] * quarter / 4 for quarter in range(5))
        ]
        return {
            name: ", ".join(f"{self.mib[name][i]:.1f}" for i in quarters) + f"; {growth:+.2f}"
            for name, growth in self.growth().items()
        }

    def growth(self) -> dict[str, float]:
        """MiB per 10,000 requests: the slope of a line through the second half of the requests.

        The line begins later if the caches of words (WARM_REQUESTS) are not full by then.
        """
        ended = np.array(self.num_ended, float)
        late = ended >= max(ended[-1] / 2, min(WARM_REQUESTS, ended[-1] * 3 / 4))
        return {
            name: float(np.polyfit(ended[late], np.array(mib)[late], 1)[0]) * 10_000
            for name, mib in self.mib.items()
        }
