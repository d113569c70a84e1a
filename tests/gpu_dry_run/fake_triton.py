"""Triton's real launcher for a Hopper GPU, without the GPU: kernels are recorded, not compiled.

A variant is what Triton compiles separately: the types of the arguments, which of them are 1 or
multiples of 16, the constants and the options. Those of a run can be compiled afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tests.gpu_dry_run.fake_cuda import FakeGPU, Violation

HOPPER = GPUTarget("cuda", 90, 32)
SHARED_BYTES = 227 * 1024  # at most, of one program
_GRID_LIMITS = 2**31 - 1, 65535, 65535


@dataclass(frozen=True, eq=False)
class Variant:
    """A kernel with all that Triton specialises it on."""

    function: Any
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: Any

    @property
    def name(self) -> str:
        return str(self.function.fn.__name__)

    def describe(self) -> str:
        """Such as "_quantize(x: *bf16 %16, GROUP=128)"."""
        parts = []
        for i, (name, kind) in enumerate(self.signature.items()):
            if kind == "constexpr":
                parts.append(f"{name}={self.constants.get((i,))}")
            else:
                parts.append(f"{name}: {kind}{' %16' * bool(self.attributes.get((i,)))}")
        return f"{self.name}({', '.join(parts)})"

    def compile(self) -> Any:
        """The kernel, compiled for Hopper."""
        source = ASTSource(self.function, self.signature, self.constants, self.attributes)
        return triton.compile(source, target=HOPPER, options=self.options.__dict__)


@dataclass
class Kernels:
    """The variants in the order of their first launch; `late` are those since `start_serving`."""

    variants: list[Variant] = field(default_factory=list)
    num_early: int | None = None

    def start_serving(self) -> None:
        self.num_early = len(self.variants)

    @property
    def late(self) -> list[str]:
        """On a real GPU each of them would hold up a step for a second or more."""
        return [variant.describe() for variant in self.variants[self.num_early :]]


@contextmanager
def fake_triton(gpu: FakeGPU) -> Iterator[Kernels]:
    """Within the context, kernels can be launched on fake tensors; yields what was launched."""
    kernels = Kernels()
    launched: set[Any] = set()
    real_run = JITFunction.run

    def run(function: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        if function not in launched:
            launched.add(function)
            function.device_caches.clear()
        for argument in (*args, *options.values()):
            if isinstance(argument, Tensor):
                gpu.require_on_device(argument, f"an argument of {function.fn.__name__}")
        if any(size > limit for size, limit in zip(grid, _GRID_LIMITS, strict=False)):
            raise Violation(f"the grid of {function.fn.__name__} is too large: {grid}")
        return real_run(function, *args, grid=grid, warmup=warmup, **options)

    def do_compile(
        function: Any,
        key: str,
        signature: Any,
        device: int,
        constants: Any,
        options: Any,
        attributes: Any,
        warmup: bool,
    ) -> Any:
        variant = Variant(function, signature, constants, attributes, options)
        kernels.variants.append(variant)
        loaded = function.device_caches[device][0][key] = _Loaded(gpu, variant.name)
        return loaded

    before = driver._active
    driver.set_active(_Driver(gpu))
    try:
        with (
            mock.patch.object(JITFunction, "run", run),
            mock.patch.object(JITFunction, "_do_compile", do_compile),
        ):
            yield kernels
    finally:
        driver._active = before
        for function in launched:
            function.device_caches.clear()


class _Driver:
    """Of triton.backends.driver.DriverBase, what a launch uses."""

    def __init__(self, gpu: FakeGPU) -> None:
        self._gpu = gpu

    def get_current_target(self) -> GPUTarget:
        return HOPPER

    def get_current_device(self) -> int:
        return self._gpu.device_index

    def get_current_stream(self, device: int) -> int:
        return 0


class _Loaded:
    """A compiled kernel; a launch is recorded under its name."""

    function = packed_metadata = None

    def __init__(self, gpu: FakeGPU, name: str) -> None:
        self._gpu, self._name = gpu, name

    def launch_metadata(self, *args: Any) -> None:
        pass

    def run(self, *args: Any) -> None:
        self._gpu.launch(f"triton::{self._name}")
