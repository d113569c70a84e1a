"""Real clients and the servers that they talk to; what was tried becomes a table."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.clients.environments import ENVIRONMENTS
from tests.clients.recorder import Recording, recording
from tests.clients.results import Result, table
from tests.clients.running import Machine
from tests.clients.scripted_model import CONTEXT, Script, ScriptedModel
from tests.support.http_server import serve
from tests.support.server_process import running

RESULTS = os.environ.get("MINISRV_CLIENT_RESULTS")
# float32, so that the text of a request does not depend on the rest of its batch.
ARGUMENTS = ("--model", "demo", "--dtype", "float32", "--num-threads", "1", "--kv-memory", "64MiB")
_results: list[Result] = []


@pytest.fixture(scope="session")
def demo_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The whole server with the demo model."""
    tmp_dir = tmp_path_factory.mktemp("s") / "t"
    with running(*ARGUMENTS, tmp_dir=tmp_dir, hash_engine=False) as server:
        yield server.url


@pytest.fixture
def play() -> Iterator[Callable[..., Recording]]:
    """Starts servers whose model follows a script, with a recorder before each."""
    with ExitStack() as stack:

        def start(script: Script, context: int = CONTEXT) -> Recording:
            model = lambda registry: ScriptedModel(registry, script, context)  # noqa: E731
            server = stack.enter_context(serve(make_backend=model))
            return stack.enter_context(recording(server.url))

        yield start


@pytest.fixture
def machine(tmp_path: Path) -> Callable[[str], Machine]:
    """A machine with a client, by the name of its environment; skips where it is not installed."""

    def make(name: str) -> Machine:
        environment = ENVIRONMENTS[name]
        if not environment.is_installed:
            pytest.skip(f"{name}: {environment.problem}")
        return Machine(environment, tmp_path / name)

    return make


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report: pytest.TestReport = yield  # type: ignore[assignment]
    marker = item.get_closest_marker("client")
    if marker is not None and (report.when == "call" or report.outcome != "passed"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
        name, tried = marker.args
        _results.append(Result(name, tried, report.outcome, reason.removeprefix("Skipped: ")))
    return report  # type: ignore[return-value]


def pytest_sessionfinish() -> None:
    if RESULTS and _results:
        Path(RESULTS).write_text(table(_results))
