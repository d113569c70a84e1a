"""`scripts/check_sizes.py`: what it refuses, and that an exception must be needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "check_sizes.py"
MODULE = "python/minisrv/room/module.py"


def check(root: Path, source: str, exceptions: str = "") -> tuple[int, str, str]:
    """Exit status, report and faults of a package of one module."""
    path = root / MODULE
    path.parent.mkdir(parents=True)
    path.write_text(source)
    (root / "pyproject.toml").write_text(f"[tool.check-sizes.exceptions]\n{exceptions}")
    done = subprocess.run([sys.executable, SCRIPT, root], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def function(num_lines: int, indent: str = "") -> str:
    body = f"{indent}    pass\n" * (num_lines - 1)
    return f"{indent}def long() -> None:\n{body}"


def test_sizes_at_the_limit_pass_and_are_reported(tmp_path: Path) -> None:
    status, report, faults = check(tmp_path, function(60) + "x = 1\n" * 390)
    assert (status, faults) == (0, "")
    assert f"max 450 ({MODULE})" in report
    assert f"max 60 ({MODULE}:long)" in report
    assert "room " in report


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        (function(61), f"{MODULE}:long has 61 lines; the limit is 60\n"),
        ("class A:\n" + function(61, "    "), f"{MODULE}:A.long has 61 lines; the limit is 60\n"),
        ("async " + function(61), f"{MODULE}:long has 61 lines; the limit is 60\n"),
        (
            "def outer() -> None:\n" + function(61, "    "),
            f"{MODULE}:outer has 62 lines; the limit is 60\n"
            f"{MODULE}:outer.long has 61 lines; the limit is 60\n",
        ),
        ("x = 1\n" * 451, f"{MODULE} has 451 lines; the limit is 450\n"),
    ],
)
def test_what_is_too_long_fails_by_name(tmp_path: Path, source: str, fault: str) -> None:
    status, _, faults = check(tmp_path, source)
    assert (status, faults) == (1, fault)


def test_an_exception_lets_one_name_pass_as_long_as_it_is_needed(tmp_path: Path) -> None:
    exception = f'"{MODULE}:long" = "reason"\n'
    assert check(tmp_path / "needed", function(61), exception)[0] == 0
    status, _, faults = check(tmp_path / "unneeded", function(60), exception)
    assert (status, faults) == (1, f"{MODULE}:long needs no exception\n")
