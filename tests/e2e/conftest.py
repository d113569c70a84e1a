"""One real server with the demo model for all tests here, and clients whose traffic is checked."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.support.network_guard import no_network
from tests.support.recording import Recorder
from tests.support.server_process import ServerProcess, running
from tests.support.wire import check_exchange

# float32, so that the text of a request does not depend on the rest of its batch.
MODEL = ("--model", "demo", "--dtype", "float32", "--num-threads", "1")
ARGUMENTS = (*MODEL, "--kv-memory", "64MiB", "--max-open-requests", "64")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    tmp_dir = tmp_path_factory.mktemp("s") / "t"
    with running(*ARGUMENTS, tmp_dir=tmp_dir, hash_engine=False) as server:
        yield server
        server.popen.terminate()
        assert server.wait() == 0
        server.assert_nothing_is_left()


@pytest.fixture(autouse=True)
def refused() -> Iterator[list[str]]:
    """Addresses outside this machine that the test tried to reach; there must be none."""
    with no_network() as refused:
        yield refused
    assert not refused


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    """Records replies; each is validated against the client packages' own types after the test."""
    recorder = Recorder()
    yield recorder
    for exchange in recorder.exchanges:
        check_exchange(exchange)


@pytest.fixture
def base_url(server: ServerProcess) -> str:
    return f"{server.url}/v1"


@pytest.fixture
def client(base_url: str, recorder: Recorder) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=base_url, api_key="none", max_retries=0, http_client=recorder.client()
    ) as client:
        yield client


@pytest.fixture
def async_client(base_url: str, recorder: Recorder) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url=base_url, api_key="none", max_retries=0, http_client=recorder.async_client()
    )
