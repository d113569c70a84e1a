"""Device work that is recorded once and then launched as a whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from minisrv.errors import EngineDeadError

Replay = Callable[[], None]


class Recorder(Protocol):
    """Records work of fixed shape on fixed tensors."""

    def record(self, work: Callable[[], object]) -> Replay:
        """Do the work; returns a function that repeats it with the tensors' current contents."""


class CudaGraphRecorder:
    """Records CUDA graphs. They share one memory pool, because they never run at the same time.

    Other threads may use CUDA meanwhile, as the one with which torch watches NCCL's operations.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def record(self, work: Callable[[], object]) -> Replay:
        """Runs the work once before recording it, so that lazy compilation and setup are not part
        of the graph. Raises EngineDeadError if the work cannot be recorded.
        """
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            work()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(
                graph,
                pool=self._pool,
                stream=self._stream,
                capture_error_mode="thread_local",
            ):
                work()
        except RuntimeError as error:
            raise EngineDeadError(
                f"cannot record a decode step as a CUDA graph: {error}; "
                "use --cuda-graph-max-bs 0 to run without graphs"
            ) from error
        return graph.replay
