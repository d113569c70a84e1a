"""The program that measures starts: its page, and a run of it."""

from __future__ import annotations

import pytest

MIB = 2**20


def test_the_page_has_medians_and_what_is_not_weights_or_cache() -> None:
    import start

    memory = start.Memory(400 * MIB, at_work=1100 * MIB, resident=1000 * MIB, private=900 * MIB)
    text = start.page({"/models/one.gguf": [3.0, 9.0, 4.0]}, {"/models/one.gguf": memory}, "256MiB")
    row = next(line for line in text.splitlines() if line.startswith("| one.gguf"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:] == ["4.0 (3.0-9.0)", "400 MiB", "1000 MiB", "900 MiB", "344 MiB", "444 MiB"]


@pytest.mark.soak
def test_a_server_is_started_filled_and_measured() -> None:
    import start

    assert 1 < start.measure_start("demo", "1MiB") < 60
    memory = start.measure_memory("demo", "1MiB")
    assert 3 * MIB < memory.weights < 4 * MIB
    assert memory.weights < memory.private < memory.resident < 1000 * MIB
