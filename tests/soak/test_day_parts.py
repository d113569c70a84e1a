"""What the soak of a day is made of: its trace, and the picture of its samples."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

import plot_day
from tests.soak.trace import (
    BLOCK_TOKENS,
    FIRST_ID,
    LAST_ID,
    MAX_OUTPUT,
    MAX_PROMPT,
    Arrival,
    made,
    read_trace,
)

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def trace(tmp_path: Path) -> str:
    """Three requests: the second repeats two blocks of the first, the third is a very long one."""
    records = [
        {"timestamp": 1000, "input_length": 1536, "output_length": 16, "hash_ids": [7, 8, 9]},
        {"timestamp": 2000, "input_length": 1300, "output_length": 3, "hash_ids": [7, 8, 10]},
        {
            "timestamp": 5000,
            "input_length": 99_000,
            "output_length": 9_000,
            "hash_ids": list(range(194)),
        },
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_a_trace_is_scaled_to_the_time_and_the_model(trace: str) -> None:
    first, second, long = read_trace(trace, 10, 60.0)
    assert [one.at_s for one in (first, second, long)] == [0, 15, 60]
    assert [one.num_tokens for one in (first, second, long)] == [2, 1, MAX_OUTPUT]
    assert len(first.prompt) == 3 * BLOCK_TOKENS
    assert len(second.prompt) == 1300 * BLOCK_TOKENS // 512
    assert MAX_PROMPT - BLOCK_TOKENS < len(long.prompt) <= MAX_PROMPT


def test_prompts_share_the_blocks_that_the_trace_says(trace: str) -> None:
    first, second, _ = read_trace(trace, 10, 60.0)
    shared = 2 * BLOCK_TOKENS
    assert first.prompt[:shared] == second.prompt[:shared]
    assert first.prompt[shared] != second.prompt[shared]


def test_only_as_many_requests_are_read_as_wanted(trace: str) -> None:
    assert len(read_trace(trace, 2, 60.0)) == 2


def test_without_a_file_a_trace_of_the_same_form_is_made() -> None:
    assert all(
        set(record) == {"timestamp", "input_length", "output_length", "hash_ids"}
        and 0 <= 512 * len(record["hash_ids"]) - record["input_length"] < 512
        for record in made(100)
    )
    arrivals = read_trace(None, 100, 40.0)
    assert len(arrivals) == 100
    assert (arrivals[0].at_s, arrivals[-1].at_s) == (0, 40)
    assert all(before.at_s <= after.at_s for before, after in pairwise(arrivals))
    assert all(map(is_served, arrivals))
    assert arrivals == read_trace(None, 100, 40.0)


def is_served(arrival: Arrival) -> bool:
    return (
        0 < len(arrival.prompt) <= MAX_PROMPT
        and FIRST_ID <= min(arrival.prompt) <= max(arrival.prompt) <= LAST_ID
        and 0 < arrival.num_tokens <= MAX_OUTPUT
    )


def test_the_picture_has_a_line_for_each_process_and_each_death() -> None:
    samples = [
        (second, kind, 50.0 + second, 20)
        for second in (0.0, 60.0, 120.0)
        for kind in plot_day.COLORS
    ]
    kills = [(60.0, "scheduler", 1.5), (119.0, "frontend", 0.9)]
    picture = ElementTree.fromstring(plot_day.draw({"samples": samples, "kills": kills}))
    lines = picture.findall(f"{SVG}polyline")
    assert [len(line.attrib["points"].split()) for line in lines] == [3] * 2 * len(plot_day.COLORS)
    dashed = [one for one in picture.findall(f"{SVG}line") if "stroke-dasharray" in one.attrib]
    assert len(dashed) == 2 * len(kills)
    xs = {float(point.split(",")[0]) for line in lines for point in line.attrib["points"].split()}
    ends = {plot_day.LEFT, plot_day.WIDTH - plot_day.RIGHT}
    assert {min(xs), max(xs)} == ends
