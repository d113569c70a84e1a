"""A GPU without contents: its tensors have a device, dtype, shape and stride, but no numbers.

Tensors that are made on `cuda` are torch's FakeTensors; those in host memory stay real. Work on the
GPU is only recorded: launches, copies, and what a CUDA graph contains. What would be wrong, slow or
impossible on a real GPU raises a Violation where it is called:

* tensors of different devices in one operation,
* a wait of the host for the device in the middle of a step (`.item()`, `.cpu()`, a copy into or out
  of memory that is not pinned), and any copy or wait while a graph is being recorded,
* a pinned buffer that is overwritten before the copy out of it is known to have finished.

Copies take effect as late as they may: when the host waits for an event behind them.
"""

from __future__ import annotations

import ctypes
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.gpu_dry_run.compiled import load_compiled

aten = torch.ops.aten
NUM_SMS = 132
MEMORY = 140 * 2**30
# Pageable memory up to this size is copied into the command itself, without a wait.
INLINE_BYTES = 64 * 2**10
_POISON = 0x81  # in host memory that a copy from the device has not reached yet
_BASE_ADDRESS = 2**40
# One for the whole process: FlashInfer caches tensors, and modes must not be mixed.
FAKE_MODE = FakeTensorMode()
_NO_KERNEL = {
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten._unsafe_view.default,
    aten.lift_fresh.default,
}


class Violation(AssertionError):
    """Something that a GPU would not do, or not without a wait."""


@dataclass(frozen=True)
class Copy:
    """A copy between host and device that may not have happened yet."""

    position: int
    host: Tensor
    content: bytes | None  # of the host memory when the copy was queued; None if it is the target


@dataclass(eq=False)
class Graph:
    """A CUDA graph: the launches in it, and checks to be made at each replay."""

    launches: list[str] = field(default_factory=list)
    checks: list[Callable[[], None]] = field(default_factory=list)
    gpu: FakeGPU | None = None

    def replay(self) -> None:
        assert self.gpu is not None
        self.gpu.replay(self)


class FakeGPU:
    """What was launched and copied, and the rules for it.

    launches: names in the order of the stream. copies: how many there were of each kind.
    num_torch_calls: operations that torch was asked for, views and host memory included.
    num_host_launches: as `launches`, but a CUDA graph is one.
    next_token: what samplers "draw", the content of int32 vectors that come from the device.
    """

    def __init__(self, num_devices: int = 1) -> None:
        self.num_devices = num_devices
        self.device_index = 0
        self.launches: list[str] = []
        self.copies: Counter[str] = Counter()
        self.num_replays = self.num_torch_calls = self.num_host_launches = 0
        self.next_token = 0
        self.serving = False  # before that, a wait does no harm
        self.graphs = weakref.WeakSet[Graph]()  # those that exist
        self._recording: Graph | None = None
        self._position = 0
        self._pending: list[Copy] = []
        self._pinned: dict[int, Tensor] = {}
        self._contents: dict[int, tuple[Any, bytearray]] = {}

    @property
    def recording(self) -> Graph | None:
        """The graph that is being recorded."""
        return self._recording

    def launch(self, name: str) -> None:
        if self._recording is None:
            self.launches.append(name)
            self.num_host_launches += 1
        else:
            self._recording.launches.append(name)

    def replay(self, graph: Graph) -> None:
        if self._recording is not None:
            raise Violation("a graph is replayed while another is being recorded")
        with self.uncounted():
            for check in graph.checks:
                check()
        self.num_replays += 1
        self.num_host_launches += 1
        self.launches += graph.launches

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Within the context, calls of torch are those of a check and not of the engine."""
        before = self.num_torch_calls
        yield
        self.num_torch_calls = before

    @contextmanager
    def record(self, graph: Graph) -> Iterator[None]:
        graph.gpu = self
        self.graphs.add(graph)
        self._recording = graph
        try:
            yield
        finally:
            self._recording = None

    def require_on_device(self, tensor: Any, name: str) -> None:
        """Raise a Violation unless `tensor` is on the current device."""
        device = torch.device("cuda", self.device_index)
        if not isinstance(tensor, FakeTensor) or tensor.device != device:
            found = tensor.device if isinstance(tensor, Tensor) else type(tensor).__name__
            raise Violation(f"{name} is on {found}, not on {device}")

    def pin(self, tensor: Tensor) -> Tensor:
        """Mark real host memory as pinned. It is kept, so that no other memory has its address."""
        if self._recording is not None:
            raise Violation("memory is pinned while a graph is being recorded")
        self._pinned[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._pinned

    def upload(self, source: Tensor, target: Tensor | None, non_blocking: bool) -> None:
        """Queue a copy of host memory to the device; `target` is None if nobody reads it here."""
        self._queue("host to device", source, non_blocking, source.nbytes > INLINE_BYTES)
        content = _bytes_of(source)
        self._pending.append(Copy(self._position, source, content))
        if target is not None and target.dtype == source.dtype and target.is_contiguous():
            self._contents_of(target)[_offset(target) : _offset(target) + len(content)] = content

    def download(self, target: Tensor, non_blocking: bool) -> None:
        """Queue a copy of device memory to the host."""
        self._queue("device to host", target, non_blocking, True)
        ctypes.memset(target.data_ptr(), _POISON, target.nbytes)
        self._pending.append(Copy(self._position, target, None))

    def content(self, tensor: Tensor) -> Tensor | None:
        """What the host last copied into a device tensor; None if it never did."""
        found = self._contents.get(tensor.untyped_storage()._cdata)
        if found is None:
            return None
        data = bytes(found[1][_offset(tensor) : _offset(tensor) + tensor.nbytes])
        return torch.frombuffer(bytearray(data), dtype=tensor.dtype).view(tensor.shape)

    def wait(self, position: int | None = None) -> None:
        """The host knows that everything up to `position` in the stream has been done."""
        if self._recording is not None:
            raise Violation("the host waits while a graph is being recorded")
        done = self._position if position is None else position
        finished = [copy for copy in self._pending if copy.position <= done]
        self._pending = [copy for copy in self._pending if copy.position > done]
        for copy in finished:
            if copy.content is None:
                self._fill(copy.host)
            elif _bytes_of(copy.host) != copy.content:
                raise Violation("host memory was overwritten before its copy had finished")

    @property
    def position(self) -> int:
        """How much has been queued."""
        return self._position

    def _queue(self, kind: str, host: Tensor, non_blocking: bool, needs_pinned: bool) -> None:
        if self._recording is not None:
            raise Violation(f"a copy from {kind} while a graph is being recorded")
        waits = not non_blocking or (needs_pinned and not self.is_pinned(host))
        if waits and self.serving:
            why = "of memory that is not pinned" if non_blocking else "without non_blocking"
            raise Violation(f"the host waits: a copy from {kind} {why}, {tuple(host.shape)}")
        self._position += 1
        self.copies[kind] += 1

    def _fill(self, host: Tensor) -> None:
        ctypes.memset(host.data_ptr(), 0, host.nbytes)
        if host.dtype is torch.int32 and host.dim() == 1:
            host.numpy()[:] = self.next_token

    def _contents_of(self, tensor: Tensor) -> bytearray:
        storage = tensor.untyped_storage()
        return self._contents.setdefault(storage._cdata, (storage, bytearray(storage.nbytes())))[1]


class _Dispatch(TorchDispatchMode):
    """Sends each operation to the host or to the fake device."""

    def __init__(self, gpu: FakeGPU) -> None:
        super().__init__()
        self._gpu = gpu

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # there is nothing to skip, and asking takes longer than most operations

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        self._gpu.num_torch_calls += 1
        if kwargs.pop("pin_memory", None):
            return self._gpu.pin(func(*args, **kwargs))
        if func in (aten.pin_memory.default, aten._pin_memory.default):
            return self._gpu.pin(args[0].clone())
        if func is aten.is_pinned.default:
            return self._gpu.is_pinned(args[0])
        tensors = list(_tensors_in((args, kwargs)))
        fakes = [tensor for tensor in tensors if isinstance(tensor, FakeTensor)]
        if not fakes and not any(map(_is_cuda, [kwargs.get("device"), *args])):
            return func(*args, **kwargs)
        if _is_composite(func):
            num_calls = self._gpu.num_torch_calls
            with self:
                result = func.decompose(*args, **kwargs)
            self._gpu.num_torch_calls = num_calls  # its parts are not asked for by the engine
            return result
        if func is aten.copy_.default and len(fakes) < 2:
            return self._copy(args[0], args[1], bool(_argument(args, kwargs, 2, "non_blocking")))
        if func is aten._to_copy.default:
            moved = self._move(args[0], kwargs)
            if moved is not None:
                return moved
        return self._compute(func, tensors, args, kwargs)

    def _copy(self, target: Tensor, source: Tensor, non_blocking: bool) -> Tensor:
        if target.shape != source.shape:
            raise Violation(f"a copy of shape {source.shape} into {target.shape}")
        if isinstance(source, FakeTensor):
            self._gpu.download(target, non_blocking)
        else:
            self._gpu.upload(source, target, non_blocking)
        return target

    def _move(self, source: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        """The result of a copy to another device, or None if `source` stays where it is."""
        device = kwargs.get("device")
        if isinstance(source, FakeTensor):
            if device is None or torch.device(device) == source.device:
                return None
            raise Violation(f"the host waits: a tensor goes from {source.device} to {device}")
        if not _is_cuda(device):
            return None
        dtype = kwargs.get("dtype") or source.dtype
        with FAKE_MODE:
            target = torch.empty_strided(source.shape, source.stride(), dtype=dtype, device=device)
        self._gpu.upload(source, target, bool(kwargs.get("non_blocking")))
        return target

    def _compute(
        self, func: Any, tensors: list[Tensor], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Any:
        for tensor in tensors:
            if not _is_host_number(tensor):
                self._gpu.require_on_device(tensor, f"an operand of {func}")
        try:
            with FAKE_MODE:
                result = func(*_all_fake(args), **kwargs)
        except (
            torch._subclasses.fake_tensor.DataDependentOutputException,
            torch._subclasses.fake_tensor.DynamicOutputShapeException,
        ) as error:
            raise Violation(f"the host waits for the result of {func}") from error
        if not func.is_view and func not in _NO_KERNEL:
            self._gpu.launch(func._schema.name)
        return result


class _Event:
    """torch.cuda.Event."""

    def __init__(self, gpu: FakeGPU) -> None:
        self._gpu, self._position = gpu, 0

    def record(self, stream: Any = None) -> None:
        self._position = self._gpu.position

    def synchronize(self) -> None:
        self._gpu.wait(self._position)

    def query(self) -> bool:
        self._gpu.wait(self._position)
        return True


class _Stream:
    """torch.cuda.Stream: there is only one order of work here."""

    cuda_stream = 0

    def wait_stream(self, other: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass


@contextmanager
def _use_stream(stream: Any) -> Iterator[None]:
    yield


@contextmanager
def fake_cuda(gpu: FakeGPU) -> Iterator[FakeGPU]:
    """Within the context, torch finds the GPUs of `gpu` and nothing else of CUDA."""
    _register_device_guard()
    lifted = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with ExitStack() as patches:
            for name, value in _replacements(gpu).items():
                patches.enter_context(mock.patch.object(torch.cuda, name, value))
            patches.enter_context(mock.patch.object(torch, "Generator", _generator))
            patches.enter_context(mock.patch.object(FakeTensor, "data_ptr", _address, create=True))
            patches.enter_context(_Dispatch(gpu))
            yield gpu
    finally:
        torch._C._set_only_lift_cpu_tensors(lifted)


@cache
def _register_device_guard() -> None:
    """Indexing needs one; it does nothing and stays for the rest of the process."""
    if torch.backends.cuda.is_built():
        torch._C._ensureCUDADeviceGuardSet()
        return
    folder = Path(torch.__file__).parent
    command = ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{folder / 'include'}"]
    command += [
        f"-L{folder / 'lib'}",
        f"-Wl,-rpath,{folder / 'lib'}",
        "-Wl,--no-as-needed",
        "-lc10",
    ]
    load_compiled(command, [Path(__file__).with_name("cuda_guard.cpp")], torch.__version__)


def _replacements(gpu: FakeGPU) -> dict[str, Any]:
    properties = SimpleNamespace(
        name="NVIDIA H200", major=9, minor=0, multi_processor_count=NUM_SMS, total_memory=MEMORY
    )

    def set_device(device: Any) -> None:
        gpu.device_index = device if isinstance(device, int) else torch.device(device).index

    def no_op(*args: Any, **options: Any) -> None:
        pass

    return {
        "_lazy_init": no_op,
        "is_available": lambda: True,
        "device_count": lambda: gpu.num_devices,
        "current_device": lambda: gpu.device_index,
        "set_device": set_device,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: properties,
        "can_device_access_peer": lambda device, peer: device != peer,
        "get_device_name": lambda device=None: properties.name,
        "mem_get_info": lambda device=None: (MEMORY - 2**30, MEMORY),
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 2**30,
        "reset_peak_memory_stats": no_op,
        "empty_cache": no_op,
        "synchronize": lambda device=None: gpu.wait(),
        "Event": lambda *args, **options: _Event(gpu),
        "Stream": lambda *args, **options: _Stream(),
        "stream": _use_stream,
        "current_stream": lambda device=None: _Stream(),
        "graph_pool_handle": lambda: (0, 0),
        "CUDAGraph": Graph,
        "graph": lambda graph, **options: gpu.record(graph),
    }


_real_generator = torch.Generator


def _generator(device: Any = "cpu") -> torch.Generator:
    """Numbers are drawn nowhere, so the host's generator will do."""
    return _real_generator("cpu")


def _address(tensor: Tensor) -> int:
    """Allocations are aligned to 512 bytes or more, so the offset decides about alignment."""
    return _BASE_ADDRESS + _offset(tensor)


def _offset(tensor: Tensor) -> int:
    return int(tensor.storage_offset()) * tensor.element_size()


def _bytes_of(tensor: Tensor) -> bytes:
    dense = tensor.contiguous()
    return ctypes.string_at(dense.data_ptr(), dense.nbytes)


def _is_cuda(device: Any) -> bool:
    return isinstance(device, torch.device) and device.type == "cuda"


def _is_composite(func: Any) -> bool:
    """Whether torch splits it into other operations; in inference mode it has not done so yet."""
    return bool(
        torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    )


def _is_host_number(tensor: Tensor) -> bool:
    """A launch takes it as an argument."""
    return not isinstance(tensor, FakeTensor) and tensor.dim() == 0


def _all_fake(args: Sequence[Any]) -> list[Any]:
    """The arguments, with fake tensors for numbers in host memory."""
    return [
        FAKE_MODE.from_tensor(value)
        if isinstance(value, Tensor) and _is_host_number(value)
        else value
        for value in args
    ]


def _argument(args: Sequence[Any], kwargs: dict[str, Any], index: int, name: str) -> Any:
    return args[index] if len(args) > index else kwargs.get(name)


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors_in(part)
    elif isinstance(value, dict):
        yield from _tensors_in(list(value.values()))
