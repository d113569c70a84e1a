"""Options: flags over the environment over the defaults, each checked with a sentence."""

from __future__ import annotations

import argparse
import re
from dataclasses import fields
from types import ModuleType
from typing import Any

import pytest

from minisrv import launch_server
from minisrv.command_line import add_flags, parse_command_line
from minisrv.commands import batch, plan
from minisrv.config import ServerConfig
from minisrv.errors import ConfigError
from minisrv.option_values import flag, parse_size, read_endpoint


def parse(*argv: str) -> ServerConfig:
    config, _ = parse_command_line(argparse.ArgumentParser(prog="test"), argv)
    return config


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.startswith("MINISRV_"):
            monkeypatch.delenv(name)


def test_every_field_has_a_flag_and_a_help() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    text = " ".join(parser.format_help().split())
    for field in fields(ServerConfig):
        assert flag(f"no_{field.name}" if field.default is True else field.name) in text
        assert field.metadata["help"]


@pytest.mark.parametrize("command", [launch_server, batch, plan])
def test_a_negated_flag_says_that_it_switches_off(
    command: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        command.main(["--help"])
    helps = dict(re.findall(r"^ +--no-(\S+) +(\S.*)$", capsys.readouterr().out, re.MULTILINE))
    assert helps.keys() == {
        f.name.replace("_", "-") for f in fields(ServerConfig) if f.default is True
    }
    assert all(help.startswith("do not ") for help in helps.values()), helps


def test_defaults_are_those_of_the_fields() -> None:
    assert parse() == ServerConfig()


@pytest.mark.parametrize(
    ("argv", "field", "value"),
    [
        (("--model", "x"), "model", "x"),
        (("--model-path", "x"), "model", "x"),
        (("x",), "model", "x"),
        (("--max-seq-len", "100"), "max_seq_len", 100),
        (("--tp-size", "1"), "tp", 1),
        (("--no-radix-cache",), "radix_cache", False),
        (("--strict-params",), "strict_params", True),
        (("--memory-fraction", "0.5"), "memory_fraction", 0.5),
        (("--memory-fraction", "1"), "memory_fraction", 1.0),
        (("--num-tokenizer", "2"), "num_tokenizers", 2),
        (("--dtype", "float16"), "dtype", "float16"),
        (("--api-key", "a", "--api-key", "b"), "api_key", ("a", "b")),
        (("--restart-limit", "5/12.5"), "restart_limit", "5/12.5"),
        (("--no-resume",), "resume", False),
        (("--stall-timeout", "0"), "stall_timeout", 0.0),
    ],
)
def test_a_flag_sets_its_field(argv: tuple[str, ...], field: str, value: Any) -> None:
    assert getattr(parse(*argv), field) == value


@pytest.mark.parametrize(
    ("variable", "text", "field", "value"),
    [
        ("MINISRV_MODEL_PATH", "m", "model", "m"),
        ("MINISRV_MODEL", "m", "model", "m"),
        ("MINISRV_MAX_SEQ_LEN", "100", "max_seq_len", 100),
        ("MINISRV_RADIX_CACHE", "0", "radix_cache", False),
        ("MINISRV_RADIX_CACHE", "True", "radix_cache", True),
        ("MINISRV_MEMORY_FRACTION", "0.5", "memory_fraction", 0.5),
        ("MINISRV_KV_MEMORY", "1GiB", "kv_memory", "1GiB"),
        ("MINISRV_DEVICE", "cpu", "device", "cpu"),
        ("MINISRV_API_KEY", "a, b", "api_key", ("a", "b")),
        ("MINISRV_ADMIN_KEY", "a", "admin_key", "a"),
    ],
)
def test_a_variable_sets_its_field_unless_a_flag_does(
    variable: str, text: str, field: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, text)
    assert getattr(parse(), field) == value
    assert getattr(ServerConfig.from_environment(), field) == value
    assert parse("--model", "flag", "--max-seq-len", "7").model == "flag"
    assert parse("--model", "flag", "--max-seq-len", "7").max_seq_len == 7


def test_keys_of_the_environment_hold_beside_those_of_flags(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MINISRV_API_KEY", "a, b")
    assert parse("--api-key", "c", "--api-key", "d").api_key == ("a", "b", "c", "d")
    monkeypatch.delenv("MINISRV_API_KEY")
    assert parse("--api-key", "c").api_key == ("c",)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_pages": 0}, "--num-pages is 0; it must be at least 1"),
        ({"page_size": 12}, "--page-size is 12; it must be a power of two"),
        ({"memory_fraction": 0.0}, "--memory-fraction is 0.0; it must be in (0, 1]"),
        ({"memory_fraction": float("nan")}, "--memory-fraction is nan"),
        ({"port": 65536}, "--port is 65536; it must be from 0 to 65535"),
        ({"overlap_depth": 2}, "--overlap-depth is 2; it must be 0 or 1"),
        ({"tp": 0}, "--tp is 0; it must be at least 1"),
        ({"attention_backend": "fast"}, "--attention-backend is 'fast'; it must be one of auto"),
        ({"dtype": "int8"}, "--dtype is 'int8'; it must be one of auto, bfloat16"),
        ({"kv_memory": "lots"}, "invalid size 'lots'"),
        ({"restart_limit": "often"}, "--restart-limit is 'often'; it must be deaths/seconds"),
        ({"stall_timeout": -1.0}, "--stall-timeout is -1.0; it must be at least 0"),
        ({"stall_timeout": float("nan")}, "--stall-timeout is nan"),
        ({"num_pages": True}, "--num-pages is True; it must be an integer"),
        ({"num_pages": 1.5}, "--num-pages is 1.5; it must be an integer"),
        ({"model": None}, "--model is None; it must be a string"),
        ({"radix_cache": 1}, "--radix-cache is 1; it must be true or false"),
        ({"served_model_name": 5}, "--served-model-name is 5; it must be a list of strings"),
        ({"api_alias": ["/a", 5]}, "--api-alias is ['/a', 5]; it must be a list of strings"),
        ({"chat_template_kwargs": {}}, "--chat-template-kwargs is {}; it must be a string"),
        ({"ssl_keyfile": "k"}, "--ssl-keyfile needs --ssl-certfile"),
    ],
)
def test_a_wrong_value_is_refused_with_its_flag(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ServerConfig(**options)
    assert sentence in caught.value.message


@pytest.mark.parametrize(
    ("variable", "text"),
    [("MINISRV_PORT", "x"), ("MINISRV_STRICT_PARAMS", "maybe"), ("MINISRV_DTYPE", "int8")],
)
def test_a_wrong_variable_is_refused(variable: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        ServerConfig.from_environment({variable: text})


KUBERNETES = {"MINISRV_PORT": "tcp://10.43.12.5:8000"}


def test_a_variable_is_not_read_if_its_flag_is_given() -> None:
    with pytest.raises(ConfigError, match=r"MINISRV_PORT is 'tcp://10.43.12.5:8000'; it must be"):
        ServerConfig.from_environment(KUBERNETES)
    assert ServerConfig.from_environment(KUBERNETES, port=80).port == 80


def test_a_variable_out_of_range_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^MINISRV_PORT is 70000; it must be from 0 to 65535"):
        ServerConfig.from_environment({"MINISRV_PORT": "70000"})
    with pytest.raises(ConfigError, match=r"^--port is 70000"):
        ServerConfig.from_environment({"MINISRV_PORT": "80"}, port=70000)


def test_an_empty_variable_is_as_unset_for_every_option() -> None:
    names = [field.name for field in fields(ServerConfig)]
    empty = {f"MINISRV_{name.upper()}": "" for name in names}
    assert ServerConfig.from_environment(empty | {"MINISRV_MODEL_PATH": ""}) == ServerConfig()
    assert ServerConfig.from_environment({**empty, "MINISRV_MODEL_PATH": "x"}).model == "x"


def test_one_key_may_come_without_a_tuple_around_it() -> None:
    assert ServerConfig(api_key="abc").api_key == ("abc",)  # type: ignore[arg-type]


def test_two_models_that_differ_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse("one", "--model", "one").model == "one"
    with pytest.raises(SystemExit) as ended:
        parse("one", "--model", "two")
    assert ended.value.code == 2
    assert "two models are given: one and two" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1000000", 1000000),
        ("512MiB", 512 * 2**20),
        ("4GB", 4 * 2**30),
        ("1.5g", 3 * 2**29),
        (" 2 KiB ", 2048),
        ("1TiB", 2**40),
    ],
)
def test_a_size_is_read_with_its_unit(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1XB", "1 2", "1e9", "nan", "9" * 400])
def test_an_invalid_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="invalid size"):
        parse_size(text)


def test_a_config_survives_the_way_to_a_child() -> None:
    config = ServerConfig(model="x", num_pages=3, radix_cache=False, kv_memory="1GiB")
    assert ServerConfig(**config.to_dict()) == config


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("5557", "tcp://127.0.0.1:5557"),
        ("tcp://*:5557", "tcp://*:5557"),
        ("tcp://[::1]:5557", "tcp://[::1]:5557"),
        ("ipc:///run/events", "ipc:///run/events"),
    ],
)
def test_a_bare_port_is_one_of_loopback(text: str, endpoint: str) -> None:
    config = ServerConfig(kv_events_endpoint=text, kv_events_replay_endpoint=text)
    assert read_endpoint(config.kv_events_endpoint or "", "kv_events_endpoint") == endpoint


@pytest.mark.parametrize("text", ["0", "65536", "*:5557", "tcp://:1", "http://a:1", "ipc://a", ""])
def test_an_endpoint_in_another_form_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--kv-events-endpoint is '.*it must be a port, tcp://"):
        ServerConfig(kv_events_endpoint=text)


def test_a_replay_without_events_is_refused() -> None:
    with pytest.raises(ConfigError, match="--kv-events-replay-endpoint needs"):
        ServerConfig(kv_events_replay_endpoint="5558")
