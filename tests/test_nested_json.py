"""JSON that is nested too deeply for Python's reader gets a sentence, like any other wrong JSON."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from minisrv.bench.compare import read_result
from minisrv.bench.traces import read_trace
from minisrv.checkpoint.model_config import read_json
from minisrv.commands.bench_options import read_field
from minisrv.commands.chat_shell import parse_value
from minisrv.errors import ConfigError
from minisrv.option_values import read_chat_template_kwargs
from minisrv.simulation.linear import Calibration

NESTED = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize("read", [read_json, read_result, read_trace, Calibration.load])
def test_a_file_is_refused_by_its_name(read: Callable[[Path], object], tmp_path: Path) -> None:
    path = tmp_path / "nested.jsonl"
    path.write_text(NESTED)
    with pytest.raises(ConfigError, match=r"nested\.jsonl"):
        read(path)


def test_options_in_json() -> None:
    with pytest.raises(ConfigError, match="--chat-template-kwargs is not valid JSON"):
        read_chat_template_kwargs(NESTED)
    assert read_field(f"x={NESTED}") == ("x", NESTED)
    assert parse_value(NESTED) == NESTED
