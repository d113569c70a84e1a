"""--restart-limit: what it may say, and when it ends a server."""

from __future__ import annotations

import pytest

from minisrv.config import ServerConfig
from minisrv.errors import ConfigError
from minisrv.restart_limit import RestartLimit


@pytest.mark.parametrize(
    ("text", "limit"),
    [("3/60", (3, 60.0)), ("10/0.5", (10, 0.5)), ("0", (0, 0.0)), ("0/60", (0, 60.0))],
)
def test_a_limit_is_read(text: str, limit: tuple[int, float]) -> None:
    assert RestartLimit.parse(text) == RestartLimit(*limit)


@pytest.mark.parametrize(
    "text",
    ["", "3", "3/", "/60", "3/0", "3/-1", "-1/60", "3 / 60", "3/60s", "3/inf", "1.5/60", "٣/٦٠"],
)
def test_any_other_text_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--restart-limit is .*3/60"):
        RestartLimit.parse(text)
    with pytest.raises(ConfigError):
        ServerConfig(restart_limit=text)


def test_a_variable_that_is_not_a_limit_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^MINISRV_RESTART_LIMIT is 'often'; it must be"):
        ServerConfig.from_environment({"MINISRV_RESTART_LIMIT": "often"})


@pytest.mark.parametrize(
    ("text", "deaths", "goes_on"),
    [
        ("0", [5.0], False),
        ("0/60", [5.0], False),
        ("1/60", [5.0], False),
        ("3/60", [5.0], True),
        ("3/60", [5.0, 6.0], True),
        ("3/60", [5.0, 6.0, 64.9], False),
        ("3/60", [5.0, 6.0, 65.0], True),  # the first is 60 seconds ago
        ("3/60", [0.0, 1.0, 100.0, 101.0], True),
    ],
)
def test_the_end_comes_with_too_many_deaths_in_the_time(
    text: str, deaths: list[float], goes_on: bool
) -> None:
    assert RestartLimit.parse(text).allows_restart(deaths) is goes_on
