"""One server for the tests that do not change its state."""

from collections.abc import Iterator

import pytest

from tests.support.http_server import HttpServer, serve


@pytest.fixture(scope="session")
def server() -> Iterator[HttpServer]:
    with serve() as running:
        yield running
