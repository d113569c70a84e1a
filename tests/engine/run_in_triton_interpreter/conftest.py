"""For tests in Triton's interpreter, which is slow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction

from minisrv.engine.kernels import triton_sample


@pytest.fixture(autouse=True, scope="session")
def _prepare_a_module_once_per_launch() -> Iterator[None]:
    with prepared_once():
        yield


@contextmanager
def prepared_once() -> Iterator[None]:
    """Before a kernel or a function runs, Triton puts the interpreter's operations into its own
    `triton.language`. Doing that at each call of a function takes a third of the time.
    """
    prepared: set[int] = set()
    run = InterpretedFunction.run

    def launch(kernel: Any, *args: Any, **options: Any) -> Any:
        prepared.clear()
        return run(kernel, *args, **options)

    def call(function: Any, *args: Any, **options: Any) -> Any:
        module = id(function.fn.__globals__)
        if module not in prepared:
            prepared.add(module)
            interpreter._patch_lang(function.fn)
        return function.rewrite()(*args, **options)

    with (
        mock.patch.object(InterpretedFunction, "run", launch),
        mock.patch.object(InterpretedFunction, "__call__", call),
    ):
        yield


@pytest.fixture(autouse=True, scope="session")
def _let_loaded_numbers_be_bounds_of_loops() -> Iterator[None]:
    """They are arrays of one element, which numpy no longer takes for numbers."""
    patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda number: number.handle.data.item())

    with mock.patch.object(interpreter, "_patch_lang_tensor", patch_tensor):
        yield


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three blocks per row of tests/support/gumbel.py, the last not full; room for an eighth of
    its parts.
    """
    monkeypatch.setattr(triton_sample, "_BLOCK", 128)
    monkeypatch.setattr(triton_sample, "_PART", 4)
    monkeypatch.setattr(triton_sample, "_MOST_PARTS", 16)
