"""The memory that the system reports as available."""

from pathlib import Path

from minisrv.engine.memory import available_memory


def test_available_memory_is_the_kernels_estimate(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       16384 kB\nMemFree: 64 kB\nMemAvailable:    1024 kB\n")
    assert available_memory(meminfo) == 1024 * 1024


def test_without_an_estimate_half_of_the_physical_memory_counts(tmp_path: Path) -> None:
    without = tmp_path / "meminfo"
    without.write_text("MemTotal:       16384 kB\n")
    assert available_memory(without) == available_memory(tmp_path / "missing") > 2**20
    assert available_memory() < 2 * available_memory(without)
