"""`scripts/soak.py`: which part runs which test."""

from __future__ import annotations

from pathlib import Path

import pytest

import soak

TESTS = Path(__file__).parent


def test_every_soak_test_belongs_to_one_part() -> None:
    folders = [folder for part in (soak.SERVER_TESTS | soak.TESTS).values() for folder in part]
    marked = [
        path.relative_to(TESTS.parent)
        for path in TESTS.rglob("test_*.py")
        if "mark.soak" in path.read_text() and path != Path(__file__)
    ]
    parts = {
        str(path): [folder for folder in folders if path.is_relative_to(folder)] for path in marked
    }
    assert {path: found for path, found in parts.items() if len(found) != 1} == {}


def test_a_part_that_is_not_there_is_named_with_those_that_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert soak.main(["crowds"]) == 2
    printed = capsys.readouterr().out
    assert "crowds" in printed
    assert all(part in printed for part in ("crowd", "fuzz", "drain", "seeded_bugs"))
