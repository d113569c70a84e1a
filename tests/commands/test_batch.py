"""minisrv batch: every line once, whatever happens in between."""

import io
import json
import logging
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion

from minisrv.commands import batch
from minisrv.config import ServerConfig
from tests.support.failing_choices import fail_choices

FLAGS = ["--temperature", "0", "--max-tokens", "6", "--kv-memory", "64MiB", "--num-threads", "1"]


def command(model_dir: Path, source: Path, target: Path) -> list[str]:
    paths = ["--input", str(source), "--output", str(target)]
    return ["--model", str(model_dir), *paths, *FLAGS]


def read(target: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in target.read_text().splitlines()]


def write_lines(path: Path, values: list[object]) -> Path:
    path.write_text("".join(f"{json.dumps(value)}\n" for value in values))
    return path


def test_every_line_is_answered_or_has_its_fault_reported(model_dir: Path, tmp_path: Path) -> None:
    source = write_lines(
        tmp_path / "in.jsonl",
        [
            {"prompt": "one", "id": "first"},
            {"messages": [{"role": "user", "content": "two"}]},
            {"prompt": "three", "max_tokens": -1},
            {"prompt": "four", "surprise": 1},
            {"prompt": "five", "n": 2},
            17,
        ],
    )
    with source.open("a") as file:
        file.write("{broken\n")
    target = tmp_path / "out.jsonl"
    assert batch.main(command(model_dir, source, target)) == 0
    answers = {answer["index"]: answer for answer in read(target)}
    assert sorted(answers) == list(range(7))
    assert answers[0]["id"] == "first"
    assert answers[0]["usage"]["completion_tokens"] <= 6
    assert "text" in answers[1]
    assert answers[2]["error"]["param"] == "max_tokens"
    assert answers[3]["error"]["param"] == "surprise"
    assert len(answers[4]["texts"]) == 2
    assert "object" in answers[5]["error"]["message"]
    assert "JSON" in answers[6]["error"]["message"]


def test_only_openai_lines_have_thoughts_apart(model_dir: Path, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0].content }}<think>{# </think> #}")
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": chat}
    source = write_lines(tmp_path / "in.jsonl", [line, chat])
    target = tmp_path / "out.jsonl"
    options = ["--chat-template", str(template), "--reasoning-field", "reasoning"]
    assert batch.main([*command(model_dir, source, target), *options]) == 0
    openai_answer, plain = sorted(read(target), key=lambda answer: "text" in answer)
    completion = ChatCompletion.model_validate(openai_answer["response"]["body"], strict=True)
    message = completion.choices[0].message
    assert message.content is None
    assert message.model_extra == {"reasoning": plain["text"].strip("\n")}


def test_openai_lines_get_openai_answers(model_dir: Path, tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    lines = [
        ("a", "/v1/chat/completions", chat),
        ("b", "/v1/completions", {"prompt": ["x", "y"], "max_tokens": 3}),
        ("c", "/v1/embeddings", {"input": "x"}),
        ("d", "/v1/chat/completions", {**chat, "model": "unknown"}),
    ]
    source = write_lines(
        tmp_path / "in.jsonl",
        [{"custom_id": i, "method": "POST", "url": u, "body": b} for i, u, b in lines],
    )
    target = tmp_path / "out.jsonl"
    assert batch.main(command(model_dir, source, target)) == 0
    answers = {answer["custom_id"]: answer["response"] for answer in read(target)}
    ChatCompletion.model_validate(answers["a"]["body"], strict=True)
    assert len(Completion.model_validate(answers["b"]["body"], strict=True).choices) == 2
    assert [answers[i]["status_code"] for i in "abcd"] == [200, 200, 400, 404]


def test_log_probabilities_and_echoes_are_answered(model_dir: Path, tmp_path: Path) -> None:
    scored = {"prompt": ["one", "two"], "max_tokens": 2, "echo": True, "logprobs": 1, "n": 2}
    lines = [
        {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": scored},
        {"prompt": "three", "max_tokens": 3, "logprobs": True, "top_logprobs": 2},
    ]
    target = tmp_path / "out.jsonl"
    assert batch.main(command(model_dir, write_lines(tmp_path / "in.jsonl", lines), target)) == 0
    openai_answer, plain = sorted(read(target), key=lambda answer: "text" in answer)
    body = openai_answer["response"]["body"]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    for choice in body["choices"]:
        assert choice["text"].startswith("one" if choice["index"] < 2 else "two")
        assert choice["logprobs"]["token_logprobs"][0] is None
        assert all(value <= 0 for value in choice["logprobs"]["token_logprobs"][1:])
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    assert len(plain["logprobs"]["content"]) == plain["usage"]["completion_tokens"]
    assert all(len(token["top_logprobs"]) == 2 for token in plain["logprobs"]["content"])


def test_token_ids_and_prompts_are_answered(model_dir: Path, tmp_path: Path) -> None:
    shown = {"max_tokens": 3, "return_token_ids": True, "return_prompt": True}
    chat = {"messages": [{"role": "user", "content": "hi"}], **shown}
    lines = [
        {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": chat},
        {"prompt": "three", **shown},
    ]
    target = tmp_path / "out.jsonl"
    assert batch.main(command(model_dir, write_lines(tmp_path / "in.jsonl", lines), target)) == 0
    openai_answer, plain = sorted(read(target), key=lambda answer: "text" in answer)
    body = openai_answer["response"]["body"]
    assert "hi" in body["prompt"]
    assert len(body["prompt_token_ids"]) == body["usage"]["prompt_tokens"]
    assert len(body["choices"][0]["token_ids"]) == body["usage"]["completion_tokens"]
    assert plain["prompt"] == "three"
    assert len(plain["prompt_token_ids"]) == plain["usage"]["prompt_tokens"]
    assert len(plain["token_ids"]) == plain["usage"]["completion_tokens"]


def test_text_lines_are_prompts(model_dir: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.txt"
    source.write_text("alpha\n\nbeta \u4f60\n")
    target = tmp_path / "out.jsonl"
    assert batch.main(command(model_dir, source, target)) == 0
    assert {answer["index"] for answer in read(target)} == {0, 2}


def test_a_line_that_fails_while_it_runs_gets_its_error_and_the_others_go_on(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_choices(monkeypatch, {1, 4})
    completion = {"prompt": ["p", "q"], "max_tokens": 3}
    source = write_lines(
        tmp_path / "in.jsonl",
        [
            {"prompt": "one"},
            {"prompt": "two"},
            {"prompt": "three"},
            {"custom_id": "c", "method": "POST", "url": "/v1/completions", "body": completion},
            {"prompt": "five"},
        ],
    )
    target = tmp_path / "out.jsonl"
    assert batch.main(command(model_dir, source, target)) == 0
    answers = {answer.get("index", answer.get("custom_id")): answer for answer in read(target)}
    assert set(answers) == {0, 1, 2, 4, "c"}
    assert answers[1]["error"]["code"] == "grammar_too_complex"
    assert "text" not in answers[1]
    assert all("text" in answers[index] for index in (0, 2, 4))
    response = answers["c"]["response"]
    assert response["status_code"] == 400
    assert response["body"]["error"]["param"] == "prompt.1"


def test_every_option_that_is_not_harmless_is_a_setting(model_dir: Path, tmp_path: Path) -> None:
    other: dict[str, Any] = {"dtype": "float16", "max_seq_len": 99, "tp": 2}
    other |= {"chat_template_kwargs": '{"a": 1}', "sampling_defaults": "openai"}
    other |= {"kv_cache_dtype": "fp8", "grammar_cpu_s": 3.0}
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages }}")
    other["chat_template"] = str(template)
    digests = {batch.settings_digest(ServerConfig(model=str(model_dir)), {})}
    for name, value in other.items():
        config = ServerConfig(model=str(model_dir), **{name: value})
        digests.add(batch.settings_digest(config, {}))
    template.write_text("{{ messages }}!")
    digests.add(batch.settings_digest(config, {}))
    digests.add(batch.settings_digest(config, {"seed": 1}))
    assert len(digests) == len(other) + 3
    assert set(batch.HARMLESS_OPTIONS) <= {field.name for field in fields(ServerConfig)}
    quiet = ServerConfig(
        model=str(model_dir),
        chat_template=str(template),
        log_level="error",
        restart_limit="0",
        resume=False,
        stall_timeout=0.0,
    )
    assert batch.settings_digest(quiet, {}) == batch.settings_digest(config, {})


def test_a_byte_order_mark_is_not_part_of_the_first_line(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'\xef\xbb\xbf{"prompt": "x"}\r\n')
    (line,) = batch.read_lines(source)
    assert (line.fault, line.value) == (None, {"prompt": "x"})


def test_an_input_that_is_not_utf_8_is_refused(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "in.txt", tmp_path / "out.jsonl"
    source.write_bytes(b"caf\xe9\n")
    assert batch.main(command(model_dir, source, target)) == 2
    assert f"{source} is not UTF-8" in capsys.readouterr().err
    assert not target.exists()


def test_other_input_or_settings_are_refused(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": "x"}])
    target = tmp_path / "out.jsonl"
    assert batch.main(command(model_dir, source, target)) == 0
    done = target.read_bytes()
    write_lines(source, [{"prompt": "y"}])
    assert batch.main(command(model_dir, source, target)) == 2
    assert "another input" in capsys.readouterr().err
    other = tmp_path / "notes.txt"
    other.write_text("mine")
    assert batch.main(command(model_dir, source, other)) == 2
    assert (target.read_bytes(), other.read_text()) == (done, "mine")


def test_the_log_of_a_command_goes_to_what_is_stderr_at_the_time(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger("minisrv")
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    first, second = io.StringIO(), io.StringIO()
    try:
        monkeypatch.setattr(sys, "stderr", first)
        source = write_lines(tmp_path / "in.jsonl", [{"prompt": "x", "max_tokens": 1}])
        assert batch.main(command(model_dir, source, tmp_path / "out.jsonl")) == 0
        monkeypatch.setattr(sys, "stderr", second)
        first.close()
        logger.warning("later")
    finally:
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)
    assert "later" in second.getvalue()
    assert "Logging error" not in second.getvalue()
