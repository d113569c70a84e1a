"""`minisrv ray` without Ray: what it says. With Ray: tests/ray."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from minisrv.errors import ConfigError
from tests.support.server_process import environment

# As if the extra were not installed, also where it is.
WITHOUT_RAY = (
    "import sys; sys.modules['ray'] = None; from minisrv.commands import cli;"
    "sys.exit(cli.main(sys.argv[1:]))"
)


def test_without_the_extra_it_says_what_to_install(tmp_path: Path) -> None:
    config = tmp_path / "fleet.yaml"
    config.write_text("model: demo\n")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_RAY, "ray", str(config)],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("minisrv: ")
    assert "pip install 'minisrv[ray]'" in line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("a: [", "cannot be read"),
        ("[1]", "must be a mapping"),
        ("model: demo\nreplicas: 2", "no option is called replicas"),
        ("model: demo\nnum_replicas: two", "num_replicas is 'two'"),
        ("model: demo\nnum_replicas: 3\nmax_replicas: 2", "less than num_replicas"),
        ("model: demo\nrouter: random", "router is 'random'"),
        ('{"model": "demo", "port": "high"}', "port is 'high'; it must be an integer"),
        ("model: demo\nport: 1.5", "port is 1.5; it must be an integer"),
        ("model: demo\napi_key: 5", "api_key is 5; it must be a list of strings"),
        ("model: demo\napi_key: [5]", "api_key is (5,); it must be a list of strings"),
        ("model: demo\nkv_memory: 2026-13-01", "cannot be read"),
        ("model: demo\nssl_certfile: a.pem", "ssl_certfile has no effect with Ray"),
        (
            "model: demo\nmax_replicas: 2\nkv_events_endpoint: '5557'",
            "kv_events_endpoint is an address that only one server can have",
        ),
    ],
)
def test_a_file_that_is_wrong_is_refused_with_the_reason(
    tmp_path: Path, text: str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ray.serve")
    from minisrv.commands import cli

    config = tmp_path / "fleet.yaml"
    if text is not None:
        config.write_text(text)
    assert cli.main(["ray", str(config)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["host", "port"])
def test_an_application_for_serve_run_has_no_address(name: str) -> None:
    pytest.importorskip("ray.serve")
    from minisrv.ray import build

    with pytest.raises(ConfigError, match=f"--http-{name}"):
        build({"model": "demo", name: "1"})


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[str]:
    pytest.importorskip("ray.serve")
    config = tmp_path / "fleet.yaml"
    config.write_text("model: demo\n")
    handler = signal.getsignal(signal.SIGTERM)
    yield str(config)
    signal.signal(signal.SIGTERM, handler)


def test_an_address_in_no_form_of_ray_is_reported(
    demo: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from minisrv.commands import cli

    assert cli.main(["ray", demo, "--address", "nowhere"]) == 1
    assert "no Ray cluster answers at nowhere: " in capsys.readouterr().err


def test_ctrl_c_while_ray_starts_ends_the_command(
    demo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from minisrv.commands import cli
    from minisrv.ray import deploy

    def interrupt(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(deploy.ray, "init", interrupt)
    assert cli.main(["ray", demo]) == 0
