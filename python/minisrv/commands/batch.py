"""`minisrv batch`: answer the prompts of a file, one line each, and go on after a stop.

Input: a text file with a prompt a line, or JSONL with {"prompt" or "messages", "id", fields of the
API}, or OpenAI's batch lines {"custom_id", "method", "url", "body"}. Every input line gives exactly
one output line, in the order in which the answers come; `index` (or `custom_id`) says whose it is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from minisrv import log
from minisrv.config import ServerConfig, parse_command_line
from minisrv.errors import ConfigError, InvalidRequestError, MinisrvError

if TYPE_CHECKING:
    from minisrv.frontend.generation.renderer import Renderer
    from minisrv.frontend.generation.request import GenerationRequest
    from minisrv.frontend.registry.model_info import ModelInfo
    from minisrv.llm import LLM
    from minisrv.llm.outputs import RequestOutput
    from minisrv.wire.messages import GenerateMsg

AT_ONCE = 1024
SAMPLING_FLAGS = {
    "max_tokens": int,
    "min_tokens": int,
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "seed": int,
    "n": int,
}
# What a batch's answers have no place for.
_ONLINE_FIELDS = ("stream", "timings")
_CHAT_URL, _COMPLETION_URL = "/v1/chat/completions", "/v1/completions"


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the input. `key` is unique; `openai` lines are answered in OpenAI's form."""

    key: str | int
    index: int
    text: str
    openai: bool = False
    value: Any = None
    fault: str | None = None


class Output:
    """The answers file. A line is written whole or, after a crash, cut off at the next start.

    A file beside it, with `.batch` added to its name, says what input and settings it is for.
    """

    def __init__(self, path: Path, purpose: dict[str, str]) -> None:
        """Raises ConfigError if the file holds something else."""
        self.done: set[str | int] = set()
        note = path.with_name(path.name + ".batch")
        if note.exists():
            if json.loads(note.read_text()) != purpose:
                raise ConfigError(
                    f"{path} was begun with another input or other settings; "
                    "choose another --output, or remove it and the .batch file beside it"
                )
        elif path.exists() and path.stat().st_size:
            raise ConfigError(f"{path} exists and is no unfinished batch; choose another --output")
        else:
            partial = note.with_name(note.name + ".partial")
            partial.write_text(json.dumps(purpose) + "\n")
            os.replace(partial, note)
        path.touch()
        self._file: IO[bytes] = path.open("r+b")
        self._take_up()

    def _take_up(self) -> None:
        end = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            end += len(line)
            answer = json.loads(line)
            self.done.add(answer["custom_id"] if "custom_id" in answer else answer["index"])
        self._file.truncate(end)
        self._file.seek(end)

    def write(self, key: str | int, answer: dict[str, Any]) -> None:
        """Append the answer to one line of the input."""
        self._file.write(json.dumps(answer, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        self.done.add(key)

    def close(self) -> None:
        """Put what was written on the disk."""
        os.fsync(self._file.fileno())
        self._file.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status: 0 done, 1 failed, 2 wrong option, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="minisrv batch",
        description="Answer the prompts of a file. Started again, it goes on where it stopped.",
    )
    parser.add_argument("--input", type=Path, required=True, help="prompts: text or .jsonl")
    parser.add_argument("--output", type=Path, required=True, help="answers, a JSON line each")
    for name, kind in SAMPLING_FLAGS.items():
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=kind, metavar="X", help=f"{name} where a line has none")
    config = parse_command_line(parser, argv)
    options = parser.parse_args(argv)
    log.setup("batch", config.log_level)
    given = {name: getattr(options, name) for name in SAMPLING_FLAGS}
    defaults = {name: value for name, value in given.items() if value is not None}
    try:
        answer_file(config, options.input, options.output, defaults)
    except KeyboardInterrupt:
        print("minisrv: stopped; the same command goes on", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"minisrv: {error}", file=sys.stderr)
        return 1
    except MinisrvError as error:
        print(f"minisrv: {error.message}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


def answer_file(config: ServerConfig, source: Path, target: Path, defaults: dict[str, Any]) -> None:
    """Answer every line of `source` that `target` does not answer yet.

    `defaults` are request fields for lines that do not have them. Raises ConfigError.
    """
    from tqdm import tqdm

    lines = read_lines(source)
    settings = json.dumps([config.model, config.dtype, config.max_seq_len, defaults])
    purpose = {
        "input": hashlib.sha256(source.read_bytes()).hexdigest(),
        "settings": hashlib.sha256(settings.encode()).hexdigest(),
    }
    output = Output(target, purpose)
    try:
        left = [line for line in lines if line.key not in output.done]
        with tqdm(total=len(lines), initial=len(lines) - len(left), unit="line") as bar:
            if left:
                for key, answer in _answers(config, left, defaults):
                    output.write(key, answer)
                    bar.update()
    finally:
        output.close()


def read_lines(source: Path) -> list[Line]:
    """The lines of the input that are not empty. Raises ConfigError for a double custom_id."""
    jsonl = source.suffix in (".jsonl", ".json")
    texts = source.read_text(encoding="utf-8").split("\n")
    full = [(i, text.rstrip("\r")) for i, text in enumerate(texts) if text.strip()]
    lines = [_read_json_line(i, text) if jsonl else Line(i, i, text) for i, text in full]
    keys: set[str | int] = set()
    for line in lines:
        if line.key in keys:
            raise ConfigError(f"line {line.index + 1}: the custom_id {line.key!r} came before")
        keys.add(line.key)
    return lines


def _read_json_line(index: int, text: str) -> Line:
    from minisrv.frontend.http.body import parse_json

    try:
        value = parse_json(text.encode())
    except InvalidRequestError as error:
        return Line(index, index, text, fault=error.message)
    if not isinstance(value, dict):
        return Line(index, index, text, fault="the line is not a JSON object")
    if "custom_id" not in value:
        return Line(index, index, text, value=value)
    key = value["custom_id"]
    if not isinstance(key, str):
        return Line(index, index, text, fault="custom_id must be a string")
    return Line(key, index, text, openai=True, value=value)


def _answers(
    config: ServerConfig, lines: list[Line], defaults: dict[str, Any]
) -> Iterator[tuple[str | int, dict[str, Any]]]:
    """(key, answer) of each line, as they come; refused lines first."""
    from minisrv.frontend.registry.model_info import ModelInfo
    from minisrv.llm import LLM

    options = config.to_dict()
    with LLM(options.pop("model"), **options) as llm:
        model = ModelInfo.from_facts(config, llm.facts)
        rest = iter(lines)
        while part := list(islice(rest, AT_ONCE)):
            yield from _answer_part(llm, model, part, defaults)


def _answer_part(
    llm: LLM, model: ModelInfo, lines: list[Line], defaults: dict[str, Any]
) -> Iterator[tuple[str | int, dict[str, Any]]]:
    messages: list[GenerateMsg] = []
    owners: list[Line] = []
    missing: dict[int, int] = {}
    outputs: dict[int, list[RequestOutput]] = {}
    renderers: dict[int, tuple[GenerationRequest, Renderer]] = {}
    for line in lines:
        try:
            request, renderer = _read_line(line, model, defaults, llm.config)
            prepared = [
                llm.prepare(replace(message, split_reasoning=line.openai))
                for message in request.tokenize_messages(0)
            ]
        except MinisrvError as error:
            yield line.key, _failure(line, error)
            continue
        messages += prepared
        owners += [line] * len(prepared)
        missing[line.index], outputs[line.index] = len(prepared), []
        renderers[line.index] = request, renderer
    for output in llm.stream_outputs(messages):
        line = owners[output.index]
        outputs[line.index].append(output)
        missing[line.index] -= 1
        if not missing[line.index]:
            ready = sorted(outputs.pop(line.index), key=lambda o: o.index)
            yield line.key, _success(line, *renderers.pop(line.index), ready)


def _read_line(
    line: Line, model: ModelInfo, defaults: dict[str, Any], config: ServerConfig
) -> tuple[GenerationRequest, Renderer]:
    """The request of a line, checked as over HTTP but with unknown fields refused."""
    from minisrv.frontend.apis.openai.chat import ChatRenderer, chat_names, read_chat
    from minisrv.frontend.apis.openai.completions import CompletionRenderer, read_completion
    from minisrv.frontend.apis.openai.fields import COMPLETION_FIELDS, chat_fields
    from minisrv.frontend.apis.openai.render import ReplyHead, StreamOptions
    from minisrv.frontend.apis.openai.route import CHAT_PREFIX, COMPLETION_PREFIX
    from minisrv.frontend.fields.table import read_fields
    from minisrv.frontend.generation.fingerprint import fingerprint

    url, body = _body(line)
    chat = url == _CHAT_URL
    table = COMPLETION_FIELDS
    if chat:
        table = chat_fields(trust_template=config.trust_request_chat_template)
    fields, unknown = read_fields({**defaults, **body}, table)
    if unknown:
        raise InvalidRequestError(f"unknown field {unknown[0]}", param=unknown[0])
    for name in _ONLINE_FIELDS:
        if fields.get(name):
            raise InvalidRequestError(f"{name} is not supported in a batch", param=name)

    def head(request: GenerationRequest) -> ReplyHead:
        return ReplyHead(
            id=(CHAT_PREFIX if chat else COMPLETION_PREFIX) + _request_id(line),
            model=request.model,
            system_fingerprint=fingerprint(config),
            created=model.created,
        )

    try:
        if chat:
            request = read_chat(fields, model)
            renderer = ChatRenderer(
                head(request), request, StreamOptions(), config.reasoning_fields
            )
            return request, renderer
        completion = read_completion(fields, model)
        return completion, CompletionRenderer(head(completion), completion, StreamOptions())
    except MinisrvError as error:
        chat_names(fields).name_field_of(error)
        raise


def _body(line: Line) -> tuple[str, dict[str, Any]]:
    """The route that the line is for, and the body. Raises InvalidRequestError."""
    if line.fault is not None:
        raise InvalidRequestError(line.fault)
    if not line.openai:
        body = {"prompt": line.text} if line.value is None else dict(line.value)
        body.pop("id", None)
        return _CHAT_URL, body
    url, body = line.value.get("url"), line.value.get("body")
    if url not in (_CHAT_URL, _COMPLETION_URL):
        raise InvalidRequestError(
            f"url is {url!r}; it must be {_CHAT_URL} or {_COMPLETION_URL}", param="url"
        )
    if not isinstance(body, dict):
        raise InvalidRequestError("body must be an object", param="body")
    return url, body


def _success(
    line: Line,
    request: GenerationRequest,
    renderer: Renderer,
    outputs: list[RequestOutput],
) -> dict[str, Any]:
    """An OpenAI line gets the server's reply, any other line its texts."""
    from minisrv.frontend.generation.renderer import whole_reply

    choices = [choice for output in outputs for choice in output.outputs]
    for index, choice in enumerate(choices):
        choice.event.index, choice.event.token_ids = index, choice.token_ids
    body = whole_reply(request, renderer, [choice.event for choice in choices])
    if line.openai:
        return _openai_answer(line, 200, body)
    answers: dict[str, list[Any]] = {
        "text": [choice.text for choice in choices],
        "finish_reason": [choice.finish_reason for choice in choices],
        "logprobs": [choice["logprobs"] for choice in body["choices"]],
        "token_ids": [choice.get("token_ids") for choice in body["choices"]],
    }
    if len(choices) > 1:
        answers["texts"] = answers.pop("text")
    shown = {
        name: values[0] if len(values) == 1 else values
        for name, values in answers.items()
        if any(value is not None for value in values)
    }
    shown |= {name: body[name] for name in ("prompt_token_ids", "prompt") if name in body}
    return {**_name(line), **shown, "usage": body["usage"]}


def _failure(line: Line, error: MinisrvError) -> dict[str, Any]:
    from minisrv.frontend.http.error_format import error_body

    if line.openai:
        return _openai_answer(line, error.http_status, error_body(error))
    return {**_name(line), **error_body(error)}


def _openai_answer(line: Line, status: int, body: dict[str, Any]) -> dict[str, Any]:
    request_id = _request_id(line)
    response = {"status_code": status, "request_id": request_id, "body": body}
    return {
        "id": f"batch_req_{request_id}",
        "custom_id": line.key,
        "response": response,
        "error": None,
    }


def _name(line: Line) -> dict[str, Any]:
    given = line.value.get("id") if line.value is not None else None
    return {"index": line.index, **({} if given is None else {"id": given})}


def _request_id(line: Line) -> str:
    return hashlib.sha256(f"{line.index} {line.text}".encode()).hexdigest()[:24]


if __name__ == "__main__":
    sys.exit(main())
