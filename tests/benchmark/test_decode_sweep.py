"""The sweep over contexts and streams, on a small model."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest


def test_the_sweep_writes_a_table_and_a_picture(
    bench_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import decode_sweep

    page = tmp_path / "page.md"
    arguments = ["--contexts", "100", "200", "--streams", "1", "3", "--steps", "2"]
    arguments += ["--threads", "1", "--results", str(page)]
    monkeypatch.setattr(sys, "argv", ["decode_sweep.py", str(bench_model), *arguments])
    assert decode_sweep.main() == 0
    rows = [line.strip("|").split("|") for line in page.read_text().splitlines() if "| " in line]
    assert [[int(cell) for cell in row[:2]] for row in rows[1:]] == [
        *([1, 100], [1, 200], [3, 100], [3, 200])
    ]
    picture = ElementTree.parse(tmp_path / "page.svg").getroot()
    assert len(picture.findall(".//{http://www.w3.org/2000/svg}circle")) == 4


def test_a_step_reads_the_weights_once_and_the_cache_of_every_stream(bench_model: Path) -> None:
    import decode_sweep
    from gguf_files import make_gguf, measure_file

    sweep = decode_sweep.Sweep(bench_model, 4, 257, 1)
    one, many = (sweep.measure(streams, 256, 1).num_bytes for streams in (1, 4))
    kv_bytes = 256 * 2 * 2 * 2 * 128 * 2  # layers, keys and values, heads, head size, bfloat16
    assert many - one == 3 * kv_bytes
    size = measure_file(make_gguf(bench_model, "BF16"))
    assert one - kv_bytes == 2 * size.num_weights
    assert sweep.num_tokens >= 4 * 256
