"""What a process has freed goes back to the operating system when it has no work."""

from __future__ import annotations

import platform
import re
import subprocess
import sys

import pytest

PROGRAM = """\
import ctypes, time
from pathlib import Path
from minisrv.supervision.idle_memory import trim_when_idle

PERIOD_S = 0.2
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p

def resident_mib():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 >> 20

trim_when_idle(PERIOD_S)
time.sleep(3 * PERIOD_S)  # the thread has trimmed once and waits for work
blocks = [libc.malloc(100_000) for _ in range(1000)]  # below the size that is mapped by itself
for block in blocks:
    ctypes.memset(block, 1, 100_000)
for block in blocks[:-1]:  # the last keeps the heap from shrinking
    libc.free(ctypes.c_void_p(block))
end = time.process_time() + PERIOD_S
while time.process_time() < end:
    pass
print(resident_mib())
deadline = time.monotonic() + 20
freed = resident_mib()
while freed == resident_mib() and time.monotonic() < deadline:
    time.sleep(PERIOD_S)
print(resident_mib())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc keeps freed memory")
def test_freed_memory_is_given_back_after_work() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=60
    )
    with_work, without = map(int, re.findall(r"\d+", done.stdout))
    assert without < with_work - 80, done.stdout
