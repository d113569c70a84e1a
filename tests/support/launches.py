"""Counts what a GPU would launch, while Triton's kernels run in its interpreter."""

from __future__ import annotations

from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction


class Launches(TorchDispatchMode):
    """Names of torch's operations except views, and of Triton's launches."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.names: list[str] = []
        self._in_kernel = False
        run = InterpretedFunction.run

        def launch(kernel: Any, *args: Any, **kwargs: Any) -> Any:
            self.names.append(kernel.__name__)
            self._in_kernel = True
            try:
                return run(kernel, *args, **kwargs)
            finally:
                self._in_kernel = False

        monkeypatch.setattr(InterpretedFunction, "run", launch)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # A view and an empty tensor take no launch.
        free = func.is_view or func.__name__.startswith(
            ("lift_fresh", "detach", "empty", "new_empty")
        )
        if not self._in_kernel and not free:
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))
