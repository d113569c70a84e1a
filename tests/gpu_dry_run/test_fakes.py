"""The fake GPU refuses what it is there to refuse, and leaves the process as it found it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from minisrv.engine.kernels.torch_native import TorchKernels
from minisrv.engine.transfer import download, upload
from tests.gpu_dry_run.dry_run import Machine, machine
from tests.gpu_dry_run.fake_cuda import INLINE_BYTES, FakeGPU, Graph, Violation, fake_cuda

CUDA = torch.device("cuda", 0)


@pytest.fixture
def gpu() -> Iterator[FakeGPU]:
    with fake_cuda(FakeGPU(num_devices=2)) as found, torch.inference_mode():
        found.serving = True
        yield found


def zeros(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(shape, **{"device": CUDA, **options})


WAITS: dict[str, Callable[[], Any]] = {
    "item": lambda: zeros(1).item(),
    "bool": lambda: bool(zeros(1)),
    "tolist": lambda: zeros(3).tolist(),
    "cpu": lambda: zeros(3).cpu(),
    "to": lambda: zeros(3).to("cpu", non_blocking=True),
    "nonzero": lambda: zeros(3).nonzero(),
    "mask": lambda: zeros(3)[zeros(3) > 0],
    "a copy to memory that is not pinned": lambda: torch.empty(3).copy_(zeros(3), True),
    "a copy to pinned memory": lambda: torch.empty(3, pin_memory=True).copy_(zeros(3)),
    "a copy from pinned memory": lambda: torch.zeros(3).pin_memory().to(CUDA),
    "a large copy": lambda: torch.zeros(INLINE_BYTES).to(CUDA, non_blocking=True),
    "a new tensor": lambda: torch.tensor([1, 2], device=CUDA),
}
MIXES: dict[str, Callable[[], Any]] = {
    "sum": lambda: zeros(3) + torch.zeros(3),
    "index": lambda: zeros(3)[torch.zeros(2, dtype=torch.int64)],
    "product": lambda: zeros(3, 3) @ torch.zeros(3, 3),
    "another GPU": lambda: zeros(3) + zeros(3, device=torch.device("cuda", 1)),
}


@pytest.mark.parametrize("name", WAITS)
def test_the_host_may_not_wait(gpu: FakeGPU, name: str) -> None:
    with pytest.raises(Violation, match="waits"):
        WAITS[name]()


@pytest.mark.parametrize("name", MIXES)
def test_devices_may_not_be_mixed(gpu: FakeGPU, name: str) -> None:
    with pytest.raises(Violation, match="is on"):
        MIXES[name]()


def test_reference_penalties_wait_and_copies_of_ours_do_not(gpu: FakeGPU) -> None:
    ids = upload(np.arange(4), CUDA)
    host = download(zeros(3, 4).index_select(0, ids[:2]))
    gpu.wait()
    assert host.tolist() == [[0.0] * 4] * 2
    factors: Any = type("Columns", (), {"rows_E": ids})
    with pytest.raises(Violation, match=r"waits for the result of aten\.nonzero"):
        TorchKernels().penalize_(zeros(4, 8), zeros(4, 8), factors)


def test_launches_are_counted_and_views_are_not(gpu: FakeGPU) -> None:
    x = zeros(4, 6)
    (x.view(2, 12)[:, 3:].t() * 2).add_(1)
    x[1:3] = 5.0
    x[0] = x[1]
    expected = ["aten::zeros", "aten::mul", "aten::add_", "aten::fill_", "aten::copy_"]
    assert gpu.launches == expected
    assert not gpu.copies


def test_a_graph_repeats_its_launches_and_holds_no_copies(gpu: FakeGPU) -> None:
    x, graph = zeros(4), Graph()
    with torch.cuda.graph(graph):
        x.add_(1)
        with pytest.raises(Violation, match="while a graph is being recorded"):
            upload(np.arange(3), CUDA)
        with pytest.raises(Violation, match="while a graph is being recorded"):
            torch.cuda.synchronize()
    gpu.launches.clear()
    graph.replay()
    graph.replay()
    assert gpu.launches == ["aten::add_"] * 2


def test_pinned_memory_may_be_used_again_only_behind_an_event(gpu: FakeGPU) -> None:
    pinned, target = torch.zeros(8, dtype=torch.int32).pin_memory(), zeros(8, dtype=torch.int32)
    for overwritten_early in (False, True):
        target.copy_(pinned, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        if not overwritten_early:
            event.synchronize()
            pinned += 1
            continue
        pinned += 1
        with pytest.raises(Violation, match="overwritten"):
            event.synchronize()


def test_results_are_there_only_behind_an_event(gpu: FakeGPU) -> None:
    gpu.next_token = 7
    tokens = zeros(3, dtype=torch.int32)
    host = torch.zeros(3, dtype=torch.int32, pin_memory=True)
    host.copy_(tokens, non_blocking=True)
    assert (host < 0).all()
    torch.cuda.synchronize()
    assert host.tolist() == [7, 7, 7]


@pytest.fixture
def found() -> Iterator[Machine]:
    with machine() as found, torch.inference_mode():
        yield found


def test_flashinfer_refuses_wrong_operands(found: Machine) -> None:
    import flashinfer

    x, weight = zeros(4, 64, dtype=torch.bfloat16), zeros(64, dtype=torch.bfloat16)
    assert flashinfer.rmsnorm(x, weight, 1e-6).shape == x.shape
    assert found.gpu.launches[-1] == "flashinfer::rmsnorm"
    wrong = {
        "another size": (x, weight[:32]),
        "another dtype": (x, weight.half()),
        "of torch.float32": (x.float(), weight.float()),
        "is on cpu": (x, torch.zeros(64, dtype=torch.bfloat16)),
        "not aligned": (zeros(4, 68, dtype=torch.bfloat16)[:, 2:66], weight),
    }
    for reason, operands in wrong.items():
        with pytest.raises(Violation, match=reason):
            flashinfer.rmsnorm(*operands, 1e-6)


def test_nothing_is_left_behind() -> None:
    from triton.runtime.jit import JITFunction

    before = torch.cuda.is_available, torch.Generator, JITFunction.run
    with machine():
        assert torch.cuda.is_available()
    assert (torch.cuda.is_available, torch.Generator, JITFunction.run) == before
    assert not torch.cuda.is_available()
    assert torch.empty(2).device.type == "cpu"
