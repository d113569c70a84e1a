"""`minisrv batch`: answer the prompts in a file, one line each, and continue after a stop.

Input: a text file with a prompt per line, or JSONL with {"prompt" or "messages", "id", fields of
the API}, or OpenAI's batch lines {"custom_id", "method", "url", "body"}. Every input line gets
exactly one output line, in the order in which they finish; `index` (or `custom_id`) says whose it
is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from minisrv import log
from minisrv.checkpoint.gguf.files import find_gguf
from minisrv.checkpoint.hub import find_local_model
from minisrv.command_line import parse_command_line
from minisrv.commands.batch_output import Key, Output
from minisrv.config import ServerConfig
from minisrv.errors import ConfigError, InvalidRequestError, MinisrvError
from minisrv.frontend.apis.openai.chat import ChatRenderer, read_chat
from minisrv.frontend.apis.openai.completions import CompletionRenderer, read_completion
from minisrv.frontend.apis.openai.fields import COMPLETION_FIELDS, chat_fields, field_names
from minisrv.frontend.apis.openai.render import OpenAIRenderer
from minisrv.frontend.fields.names import NEUTRAL_NAMES, FieldNames
from minisrv.frontend.fields.schema import describe
from minisrv.frontend.fields.table import read_fields
from minisrv.frontend.generation.fingerprint import fingerprint
from minisrv.frontend.generation.renderer import whole_reply
from minisrv.frontend.generation.request import GenerationRequest
from minisrv.frontend.http.body import parse_json
from minisrv.frontend.http.error_format import error_body
from minisrv.frontend.registry.model_info import ModelInfo

if TYPE_CHECKING:
    from minisrv.llm import LLM
    from minisrv.llm.outputs import RequestOutput
    from minisrv.wire.messages import GenerateMsg

logger = logging.getLogger("minisrv.batch")

Fields = dict[str, Any]

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
# Options that do not change what a batch answers: how much memory and how many processes it takes,
# who may call a server, what is logged. All others are part of the settings of a batch.
HARMLESS_OPTIONS = (
    *("host", "port", "num_threads", "num_pages", "kv_memory", "memory_fraction"),
    *("radix_cache", "max_running_requests", "max_prefill_tokens", "overlap_depth"),
    *("cuda_graph_max_bs", "cuda_graph_max_tokens", "cuda_graph_ranks"),
    *("max_open_requests", "num_tokenizers"),
    *(
        "api_key",
        "api_key_file",
        "admin_key",
        "allowed_host",
        "public_metrics",
        "api_alias",
        "root_path",
        "ssl_certfile",
        "ssl_keyfile",
    ),
    *(
        "strict_params",
        "cors_origins",
        "max_body_bytes",
        "response_store_bytes",
        "start_timeout_s",
        "drain_timeout",
    ),
    *("restart_limit", "resume", "stall_timeout", "log_level", "log_format"),
    "metrics_vllm_names",
)
# Larger files of a model are recognized by their size, beginning and end.
_WHOLE_FILE_BYTES = 2**24
_EDGE_BYTES = 2**20

# A batch's answers have no place for these.
_ONLINE_FIELDS = ("stream", "timings")
_CHAT_URL, _COMPLETION_URL = "/v1/chat/completions", "/v1/completions"


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the input. `key` is unique; `openai` lines are answered in OpenAI's form.

    value: of a JSON line. fault: what is wrong with the line as a whole.
    """

    key: Key
    index: int
    text: str
    openai: bool = False
    value: Any = None
    fault: str | None = None

    @property
    def request_id(self) -> str:
        """The same whenever the file is answered."""
        return hashlib.sha256(f"{self.index} {self.text}".encode()).hexdigest()[:24]

    def answer(self, body: Fields, status: int = 200) -> Fields:
        """The line of the output that holds `body`."""
        if self.openai:
            response = {"status_code": status, "request_id": self.request_id, "body": body}
            id = f"batch_req_{self.request_id}"
            return {"id": id, "custom_id": self.key, "response": response, "error": None}
        given = None if self.value is None else self.value.get("id")
        return {"index": self.index, **({} if given is None else {"id": given}), **body}


Answer = tuple[Line, Fields]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status: 0 done, 1 failed, 2 wrong option, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="minisrv batch",
        description="Answer the prompts in a file. Run again after a stop, it continues.",
    )
    parser.add_argument("--input", type=Path, required=True, help="prompts: text or .jsonl")
    parser.add_argument("--output", type=Path, required=True, help="answers, one JSON line each")
    for name, kind in SAMPLING_FLAGS.items():
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=kind, metavar="X", help=f"{name} for lines without one")
    config, options = parse_command_line(parser, argv)
    log.setup("batch", config.log_level, config.log_format)
    given = {name: getattr(options, name) for name in SAMPLING_FLAGS}
    defaults = {name: value for name, value in given.items() if value is not None}
    try:
        answer_file(config, options.input, options.output, defaults)
    except KeyboardInterrupt:
        print("minisrv: stopped; run the same command to continue", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"minisrv: {error}", file=sys.stderr)
        return 1
    except MinisrvError as error:
        print(f"minisrv: {error.message}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


def answer_file(config: ServerConfig, source: Path, target: Path, defaults: Fields) -> None:
    """Answer every line of `source` that `target` does not answer yet.

    `defaults` are request fields for lines that do not have them. Raises ConfigError.
    """
    lines = read_lines(source)
    purpose = {
        "input": hashlib.sha256(source.read_bytes()).hexdigest(),
        "settings": settings_digest(config, defaults),
    }
    output = Output(target, purpose)
    try:
        left = [line for line in lines if line.key not in output.done]
        with tqdm(total=len(lines), initial=len(lines) - len(left), unit="line") as bar:
            if left:
                for line, answer in _answers(config, left, defaults):
                    output.write(line.key, answer)
                    bar.update()
    finally:
        output.close()


def settings_digest(config: ServerConfig, defaults: Fields) -> str:
    """A digest of everything that changes answers: options, the model's files, the template."""
    options = {k: v for k, v in config.to_dict().items() if k not in HARMLESS_OPTIONS}
    digest = hashlib.sha256(json.dumps([options, defaults], sort_keys=True).encode())
    if config.chat_template is not None and Path(config.chat_template).is_file():
        digest.update(Path(config.chat_template).read_bytes())
    model_path = find_local_model(config.model)
    # A hub name is the identity of its model; with @revision, exactly so.
    files: Iterable[Path] = ()
    if model_path is not None:
        files = find_gguf(model_path) or sorted(model_path.iterdir())
    for path in files:
        if path.is_file():
            digest.update(f"\n{path.name!a} {path.stat().st_size} ".encode())
            digest.update(_content(path))
    return digest.hexdigest()


def _content(path: Path) -> bytes:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size <= _WHOLE_FILE_BYTES:
            return file.read()
        begin = file.read(_EDGE_BYTES)
        file.seek(size - _EDGE_BYTES)
        return begin + file.read()


def read_lines(source: Path) -> list[Line]:
    """The lines of the input that are not empty.

    Raises ConfigError for a repeated custom_id and for a file that is not UTF-8.
    """
    jsonl = source.suffix in (".jsonl", ".json")
    try:
        texts = source.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source} is not UTF-8: {error}") from None
    full = [(i, text.rstrip("\r")) for i, text in enumerate(texts) if text.strip()]
    lines = [_read_json_line(i, text) if jsonl else Line(i, i, text) for i, text in full]
    keys: set[Key] = set()
    for line in lines:
        if line.key in keys:
            raise ConfigError(f"line {line.index + 1}: the custom_id {line.key!r} is a repetition")
        keys.add(line.key)
    return lines


def _read_json_line(index: int, text: str) -> Line:
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


def _answers(config: ServerConfig, lines: list[Line], defaults: Fields) -> Iterator[Answer]:
    """The answers as they come, AT_ONCE lines at a time; refused lines first."""
    from minisrv.llm import LLM  # torch, which --help does not need

    options = config.to_dict()
    with LLM(options.pop("model"), **options) as llm:
        model = ModelInfo.from_facts(config, llm.facts)
        for start in range(0, len(lines), AT_ONCE):
            yield from _answer_part(llm, model, lines[start : start + AT_ONCE], defaults)


def _answer_part(
    llm: LLM, model: ModelInfo, lines: list[Line], defaults: Fields
) -> Iterator[Answer]:
    messages: list[GenerateMsg] = []
    jobs: list[_Job] = []  # of each message
    for line in lines:
        try:
            job = _Job(line, *_read_line(line, model, defaults, llm.config))
            prepared = [
                llm.prepare(replace(message, split_reasoning=line.openai))
                for message in job.request.tokenize_messages(0)
            ]
        except Exception as error:
            yield line, _failure(line, error)
            continue
        messages += prepared
        jobs += [job] * len(prepared)
    for output in llm.stream_outputs(messages):
        job = jobs[output.index]
        job.outputs.append(output)
        if len(job.outputs) == job.request.num_prompts:
            try:
                answer = job.answer()
            except Exception as error:
                answer = _failure(job.line, error)
            yield job.line, answer


def _failure(line: Line, error: Exception) -> Fields:
    """The answer to a line that cannot be answered; a bug is logged, and the batch goes on."""
    if not isinstance(error, MinisrvError):
        logger.exception("line %d failed", line.index + 1)
        error = MinisrvError(f"internal error; see the log under line {line.index + 1}")
    return line.answer(error_body(error), error.http_status)


@dataclass(frozen=True, slots=True)
class _Job:
    """A line that is being answered. outputs: of those of its prompts that are done."""

    line: Line
    request: GenerationRequest
    renderer: OpenAIRenderer
    names: FieldNames = NEUTRAL_NAMES
    outputs: list[RequestOutput] = field(default_factory=list)

    def answer(self) -> Fields:
        """An OpenAI line gets the server's reply, any other line its texts.

        Raises the first failure, which names its prompt if there are several.
        """
        outputs = sorted(self.outputs, key=lambda output: output.index)
        for number, output in enumerate(outputs):
            if output.error is not None:
                if self.request.num_prompts > 1 and output.error.param == "prompt":
                    output.error.rename_field(f"prompt.{number}")
                self.names.name_field_of(output.error)
                raise output.error
        choices = [choice for output in outputs for choice in output.outputs]
        events = [
            replace(choice.event, index=index, token_ids=choice.token_ids)
            for index, choice in enumerate(choices)
        ]
        body = whole_reply(self.request, self.renderer, events)
        if self.line.openai:
            return self.line.answer(body)
        answers: dict[str, list[Any]] = {
            "text" if len(choices) == 1 else "texts": [choice.text for choice in choices],
            "finish_reason": [choice.finish_reason for choice in choices],
            "logprobs": [choice["logprobs"] for choice in body["choices"]],
            "token_ids": [choice.get("token_ids") for choice in body["choices"]],
        }
        shown = {
            name: values[0] if len(values) == 1 else values
            for name, values in answers.items()
            if any(value is not None for value in values)
        }
        shown |= {name: body[name] for name in ("prompt_token_ids", "prompt") if name in body}
        return self.line.answer({**shown, "usage": body["usage"]})


def _read_line(
    line: Line, model: ModelInfo, defaults: Fields, config: ServerConfig
) -> tuple[GenerationRequest, OpenAIRenderer, FieldNames]:
    """The request of a line, checked as over HTTP, except that unknown fields are refused."""
    chat, body = _body(line)
    table = COMPLETION_FIELDS
    if chat:
        table = chat_fields(trust_template=config.trust_request_chat_template)
    fields, unknown = read_fields({**defaults, **body}, table)
    if unknown:
        raise InvalidRequestError(f"{unknown[0]} is an unknown field", param=unknown[0])
    for name in _ONLINE_FIELDS:
        if fields.get(name):
            raise InvalidRequestError(f"{name} is not supported in a batch", param=name)
    about = line.request_id, fingerprint(config)
    names = field_names(fields)
    try:
        if chat:
            request = read_chat(fields, model)
            return request, ChatRenderer(*about, request, config.reasoning_fields), names
        completion = read_completion(fields, model)
        return completion, CompletionRenderer(*about, completion), names
    except MinisrvError as error:
        names.name_field_of(error)
        raise


def _body(line: Line) -> tuple[bool, Fields]:
    """Whether the line is a chat completion, and its body. Raises InvalidRequestError."""
    if line.fault is not None:
        raise InvalidRequestError(line.fault)
    if not line.openai:
        body = {"prompt": line.text} if line.value is None else dict(line.value)
        body.pop("id", None)
        return True, body
    url, body = line.value.get("url"), line.value.get("body")
    if url not in (_CHAT_URL, _COMPLETION_URL):
        raise InvalidRequestError(
            f"url is {describe(url)}; it must be {_CHAT_URL} or {_COMPLETION_URL}", param="url"
        )
    if not isinstance(body, dict):
        raise InvalidRequestError("body must be an object", param="body")
    return url == _CHAT_URL, body


if __name__ == "__main__":
    sys.exit(main())
