"""Install the clients that are missing and run tests/clients with them, without a network.

Run: python scripts/try_clients.py [pytest arguments]; without arguments all of them, and a table of
the results is written to docs/clients/results.md. The clients are kept in minisrv's cache.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "clients" / "results.md"
IN_A_NAMESPACE = ["unshare", "--map-root-user", "--net"]
WITH_LOOPBACK = ["sh", "-c", 'ip link set lo up && exec "$@"', "sh"]


def isolation() -> list[str]:
    """What gives a command no network except loopback; empty where that is not possible."""
    prefix = [*IN_A_NAMESPACE, *WITH_LOOPBACK]
    try:
        done = subprocess.run([*prefix, "true"], capture_output=True)
    except FileNotFoundError:
        return []
    return prefix if done.returncode == 0 else []


def main(arguments: list[str]) -> int:
    """Run the tests; their exit status."""
    subprocess.run([sys.executable, "-m", "tests.clients.environments"], cwd=ROOT, check=True)
    prefix = isolation()
    if not prefix:
        print("no network namespace can be made here: the clients are tried with a network")
    pytest = [sys.executable, "-m", "pytest", *(arguments or ["tests/clients", "--durations=5"])]
    own = {"OMP_NUM_THREADS": "1"}
    if not arguments:
        own["MINISRV_CLIENT_RESULTS"] = str(RESULTS)
    return subprocess.run([*prefix, *pytest], cwd=ROOT, env={**os.environ, **own}).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
