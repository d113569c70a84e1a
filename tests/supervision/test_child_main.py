"""What a child process does once it has started."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Blocks of the C heap, of which the last one stays: only `malloc_trim` gives those before it back.
FREED = """
import gc
import psutil
from minisrv.supervision.child_main import end_start
blocks = [bytearray(2000) for _ in range(50_000)]
kept = bytearray(2000)
blocks.clear()
gc.disable()
before = psutil.Process().memory_info().rss
end_start()
assert gc.isenabled()
print(before - psutil.Process().memory_info().rss)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="malloc_trim is glibc's")
def test_memory_that_only_the_start_needed_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 80_000_000
