"""The program that measures starts: its page, and a run of it."""

from __future__ import annotations

import pytest

MIB = 2**20


def test_the_page_has_medians_and_what_is_not_weights_or_cache() -> None:
    import start

    starts = [
        start.Start(seconds, weights=400 * MIB, resident=1000 * MIB, private=900 * MIB)
        for seconds in (3.0, 9.0, 4.0)
    ]
    text = start.page({"/models/one.gguf": starts}, "256MiB")
    row = next(line for line in text.splitlines() if line.startswith("| one.gguf"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:] == ["4.0 (3.0-9.0)", "400 MiB", "1000 MiB", "900 MiB", "344 MiB"]


@pytest.mark.soak
def test_a_server_is_started_filled_and_measured() -> None:
    import start

    measured = start.measure_start("demo", "1MiB")
    assert 1 < measured.seconds < 60
    assert 3 * MIB < measured.weights < 4 * MIB
    assert measured.weights < measured.private < measured.resident < 1000 * MIB
