"""JSON that is nested too deeply for Python's reader gets a sentence, like any other wrong JSON."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest

from minisrv.bench.compare import read_result
from minisrv.bench.traces import read_trace
from minisrv.checkpoint.model_config import read_json
from minisrv.checkpoint.own_head import has_own_head
from minisrv.commands import launch
from minisrv.commands.bench_options import read_field
from minisrv.commands.chat_shell import parse_value
from minisrv.errors import ConfigError, MinisrvError
from minisrv.option_values import read_chat_template_kwargs
from minisrv.simulation.linear import Calibration

NESTED = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize("read", [read_json, read_result, read_trace, Calibration.load])
def test_a_file_is_refused_by_its_name(read: Callable[[Path], object], tmp_path: Path) -> None:
    path = tmp_path / "nested.jsonl"
    path.write_text(NESTED)
    with pytest.raises(ConfigError, match=r"nested\.jsonl"):
        read(path)


def test_a_header_of_tensors_is_as_good_as_none(tmp_path: Path) -> None:
    header = NESTED.encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert not has_own_head(tmp_path)


def test_the_answer_of_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "send_request", lambda *_, **__: io.BytesIO(NESTED.encode()))
    with pytest.raises(MinisrvError, match="no minisrv answers at http://x"):
        launch.ask("http://x", launch.NO_KEY)


def test_options_in_json() -> None:
    with pytest.raises(ConfigError, match="--chat-template-kwargs is not valid JSON"):
        read_chat_template_kwargs(NESTED)
    assert read_field(f"x={NESTED}") == ("x", NESTED)
    assert parse_value(NESTED) == NESTED
