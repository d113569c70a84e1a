"""Work on the device recorded once and launched again as a whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from minisrv.errors import EngineDeadError

Replay = Callable[[], None]


class Recorder(Protocol):
    """Turns work of fixed shape on fixed tensors into something that does it again."""

    def record(self, work: Callable[[], object]) -> Replay:
        """Do the work, and return what repeats it on whatever its tensors hold then."""


class CudaGraphRecorder:
    """Records CUDA graphs. They share one memory pool, since they never run at the same time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def record(self, work: Callable[[], object]) -> Replay:
        """See Recorder. The work is done once outside of the graph, for what it compiles or sets
        up then. Raises EngineDeadError where it cannot be recorded.
        """
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            work()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                work()
        except RuntimeError as error:
            raise EngineDeadError(
                f"a decode step cannot be recorded as a CUDA graph: {error}; "
                "--cuda-graph-max-bs 0 runs without graphs"
            ) from error
        return graph.replay
