"""Traces are read in three forms; a fault is reported with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from minisrv.bench.traces import TraceRequest, read_trace
from minisrv.errors import ConfigError

AZURE = """\
TIMESTAMP,ContextTokens,GeneratedTokens\r
2023-11-16 18:17:03.9799600,4808,10\r
2023-11-16 18:17:04.0319600,3180,8\r
2023-11-16 18:18:03.9799600,110,27"""
MOONCAKE = """\
{"timestamp": 3000, "input_length": 513, "output_length": 500, "hash_ids": [0, 7]}
{"timestamp": 5500, "input_length": 1024, "output_length": 1, "hash_ids": [0, 8]}
"""
OWN = """\
arrival_s,input_tokens,output_tokens,session
2.5,20,3,a
1,10,2,a
4,5,1,
"""


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_bytes(text.encode())
    return path


def test_azures_form(tmp_path: Path) -> None:
    requests = read_trace(written(tmp_path, "code.csv", AZURE))
    assert [(r.input_tokens, r.output_tokens) for r in requests] == [
        (4808, 10),
        (3180, 8),
        (110, 27),
    ]
    assert [r.arrival_s for r in requests] == pytest.approx([0, 0.052, 60])
    assert {(r.block_ids, r.session) for r in requests} == {((), None)}


def test_mooncakes_form(tmp_path: Path) -> None:
    path = written(tmp_path, "conversation.jsonl", MOONCAKE)
    first, second = read_trace(path)
    assert first == TraceRequest(0.0, 513, 500, (0, 7))
    assert second == TraceRequest(2.5, 1024, 1, (0, 8))
    assert read_trace(path, limit=1) == [first]


def test_our_own_form_is_sorted_by_arrival(tmp_path: Path) -> None:
    requests = read_trace(written(tmp_path, "own.csv", OWN))
    assert requests == [
        TraceRequest(0.0, 10, 2, session="a"),
        TraceRequest(1.5, 20, 3, session="a"),
        TraceRequest(3.0, 5, 1),
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "", "has no requests"),
        ("t.csv", "a,b\n1,2\n", r"line 2 .* none of the columns TIMESTAMP, timestamp, arrival_s"),
        ("t.csv", AZURE.replace(",8", ",eight"), "line 3 .* is wrong"),
        ("t.csv", AZURE.replace(",ContextTokens", ""), "line 2 .* 'ContextTokens'"),
        ("t.csv", OWN.replace("1,10,2", "1,10"), "line 3 .* is wrong"),
        ("t.csv", OWN.replace("2.5", "inf"), "line 2 .* time of arrival is inf"),
        ("t.jsonl", MOONCAKE.replace("513", "512"), "line 1 .* 512 tokens are not 2 blocks"),
        ("t.jsonl", MOONCAKE.replace("1024", "0"), "line 2 .* at least one token"),
        ("t.csv", OWN.replace("1,10,2", "1,1000000000,2"), "line 3 .* at most 16777216 tokens"),
        ("t.jsonl", MOONCAKE + "{", "line 3 .* is not JSON"),
        ("t.jsonl", "[]", "line 1 .* is not a JSON object"),
        ("t.csv", "\udcff", "is not UTF-8"),
        ("t.csv", OWN + "x" * 200_000, "line . of .* is not CSV: field larger"),
        ("t.jsonl", "[" * 100_000, "line 1 .* is not JSON"),
        ("t.jsonl", MOONCAKE.replace("[0, 7]", "[0, -7]"), "line 1 .* an id of a block is neg"),
    ],
)
def test_a_fault_is_reported_with_its_line(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=message):
        read_trace(path)


def test_a_missing_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_trace(tmp_path / "none.csv")
