"""Every option, once: flag, environment variable, default, help and check come from its field."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from minisrv.errors import ConfigError

ENV_PREFIX = "MINISRV_"
MODEL_ENV = "MINISRV_MODEL_PATH"
MAX_PREFILL_TOKENS = {"cpu": 512, "cuda": 8192}  # where --max-prefill-tokens is not given
# What the server gives a chat template itself.
RESERVED_VARIABLES = (
    *("messages", "tools", "documents", "chat_template", "add_generation_prompt"),
    *("continue_final_message", "tokenize"),
)
_SIZE_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def option(default: Any, help: str, *aliases: str, secret: bool = False) -> Any:
    """A field with the help of its flag. `aliases` are further names of the flag.

    A field that is True by default gets the flag `--no-<name>`; its help says what that one does.
    secret: kept out of the repr and of `to_public_dict`.
    """
    metadata = {"help": help, "aliases": aliases, "secret": secret}
    return field(default=default, repr=not secret, metadata=metadata)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """What the user asked for. Values left at None are resolved by their owner at start."""

    model: str = option(
        "demo",
        "a directory with a Hugging Face checkpoint, a hub name such as Qwen/Qwen3-0.6B, or demo",
        "--model-path",
    )
    served_model_name: tuple[str, ...] = option(
        (),
        "the name that clients use; may be given several times, the first is that of replies to "
        "requests without one (default: as given in --model; in the environment: separated by "
        "commas)",
    )
    host: str = option("127.0.0.1", "address that HTTP listens on")
    port: int = option(8000, "port that HTTP listens on; 0 takes a free one")

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = option(
        "auto", "type to compute in; auto is the checkpoint's"
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where the model runs")
    attention_backend: Literal["auto", "torch_native", "flashinfer"] = option(
        "auto", "attention implementation"
    )
    kernels: Literal["auto", "torch"] = option(
        "auto",
        "small operators: auto compiles them at the first start on a CPU, torch uses torch's",
    )
    tp: int = option(1, "tensor-parallel ranks", "--tp-size", "--tensor-parallel-size")
    load_format: Literal["auto", "dummy"] = option(
        "auto", "dummy takes random weights: for benchmarks, needs config.json alone"
    )
    num_threads: int | None = option(None, "CPU threads of the engine (default: all cores)")
    max_seq_len: int | None = option(None, "longest prompt plus output (default: the model's)")
    chat_template: str | None = option(None, "a Jinja file to use instead of the model's template")

    chat_template_kwargs: str = option(
        "{}",
        "variables for the chat template of every request, as JSON such as "
        """'{"enable_thinking": false}'; those of a request go before them""",
    )

    sampling_defaults: Literal["model", "openai"] = option(
        "model",
        "sampling of requests that leave it open: by the model's generation_config.json, or as "
        "OpenAI has it",
    )
    trust_request_chat_template: bool = option(
        False, "let requests bring a chat template; its text can keep a tokenizer process busy"
    )

    reasoning_field: Literal["reasoning_content", "reasoning", "both"] = option(
        "reasoning_content", "where replies have a model's reasoning"
    )

    page_size: int = option(16, "tokens in a cache page")
    kv_cache_dtype: Literal["auto", "fp8"] = option(
        "auto", "type of the KV cache: the model's, or fp8 (e4m3), which halves that of bfloat16"
    )
    num_pages: int | None = option(None, "pages in the KV cache (default: as many as fit)")
    kv_memory: str | None = option(
        None,
        "bytes for the KV cache on CPU, such as 2GiB (default: 25%% of free memory, at most 4GiB)",
    )
    memory_fraction: float = option(0.9, "share of the GPU's memory to use")
    radix_cache: bool = option(True, "do not keep or share cached prefixes between requests")

    max_running_requests: int = option(256, "requests that may decode together")
    max_prefill_tokens: int | None = option(
        None, "prompt tokens that one step may compute (default: 512 on CPU, 8192 on CUDA)"
    )
    overlap_depth: int | None = option(
        None, "steps launched before the last is settled, 0 or 1 (default: 0 on CPU, 1 on CUDA)"
    )
    cuda_graph_max_bs: int = option(
        256, "largest batch whose decode step is recorded as a CUDA graph; 0 records none"
    )
    max_open_requests: int = option(
        4096, "requests accepted and not yet finished; more are refused with 503"
    )
    num_tokenizers: int = option(1, "tokenizer processes", "--num-tokenizer")

    api_key: tuple[str, ...] = option(
        (),
        "a key that clients send as 'Authorization: Bearer KEY'; may be given several times "
        "(those of the environment, separated by commas, hold too)",
        secret=True,
    )
    api_key_file: str | None = option(None, "a file with a key on each line, beside --api-key")
    admin_key: str | None = option(
        None,
        "the key for the admin routes; it opens all others too. Without any key the admin routes "
        "answer on a loopback --host alone",
        secret=True,
    )
    public_metrics: bool = option(False, "answer /metrics without a key")
    ssl_certfile: str | None = option(None, "a PEM file with the certificate chain: serve HTTPS")
    ssl_keyfile: str | None = option(
        None, "a PEM file with the key of the certificate, if it is not in --ssl-certfile"
    )

    strict_params: bool = option(False, "refuse request fields that no table of the API names")
    cors_origins: str | None = option(
        None, "origins that browsers may call from, separated by commas; * is any"
    )
    max_body_bytes: int = option(8 * 2**20, "largest request body")
    start_timeout_s: float = option(1800.0, "seconds that the start may take, downloads aside")
    log_level: Literal["debug", "info", "warning", "error"] = option("info", "least level logged")
    log_format: Literal["text", "json"] = option("text", "json logs an object a line")
    metrics_vllm_names: bool = option(
        False, "show each metric that vLLM has under its vllm: name too"
    )

    def __post_init__(self) -> None:
        keys = (self.api_key,) if isinstance(self.api_key, str) else tuple(self.api_key)
        object.__setattr__(self, "api_key", keys)
        names = self.served_model_name
        names = (names,) if isinstance(names, str) else tuple(dict.fromkeys(names))
        object.__setattr__(self, "served_model_name", names)
        if not all(names):
            raise ConfigError("--served-model-name is empty")
        read_chat_template_kwargs(self.chat_template_kwargs)
        for f in fields(self):
            _check_choice(f.name, getattr(self, f.name))
        for name, low in _AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(f"{flag(name)} is {value}; it must be at least {low}")
        if self.page_size & (self.page_size - 1):
            raise ConfigError(f"--page-size is {self.page_size}; it must be a power of two")
        if not 0 < self.memory_fraction <= 1:
            raise ConfigError(f"--memory-fraction is {self.memory_fraction}; it must be in (0, 1]")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port is {self.port}; it must be from 0 to 65535")
        if self.overlap_depth not in (None, 0, 1):
            raise ConfigError(f"--overlap-depth is {self.overlap_depth}; it must be 0 or 1")
        if self.kv_memory is not None:
            parse_size(self.kv_memory)
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise ConfigError("--ssl-keyfile needs --ssl-certfile")

    @property
    def served_names(self) -> tuple[str, ...]:
        """The model's names in requests; the first is its own."""
        return self.served_model_name or (self.model,)

    @property
    def served_name(self) -> str:
        """The name of a model whose request has none."""
        return self.served_names[0]

    @property
    def reasoning_fields(self) -> tuple[str, ...]:
        """The fields of a message that hold the reasoning."""
        both = ("reasoning_content", "reasoning")
        return both if self.reasoning_field == "both" else (self.reasoning_field,)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a child's boot message."""
        return asdict(self)

    def to_public_dict(self) -> dict[str, Any]:
        """Plain values without the secrets, for those who may look at the server."""
        return {f.name: getattr(self, f.name) for f in fields(self) if not f.metadata["secret"]}

    @classmethod
    def from_environment(
        cls, environ: Mapping[str, str] | None = None, **overrides: Any
    ) -> ServerConfig:
        """Defaults, MINISRV_* variables, then `overrides`; keys of both. Raises ConfigError."""
        environ = os.environ if environ is None else environ
        values = _environment_values(environ)
        if "api_key" in overrides:
            overrides["api_key"] = (*values.get("api_key", ()), *overrides["api_key"])
        return cls(**{**values, **overrides})


_AT_LEAST = {
    "tp": 1,
    "num_threads": 1,
    "max_seq_len": 2,
    "page_size": 1,
    "num_pages": 1,
    "max_running_requests": 1,
    "max_prefill_tokens": 1,
    "cuda_graph_max_bs": 0,
    "max_open_requests": 1,
    "num_tokenizers": 1,
    "max_body_bytes": 1024,
    "start_timeout_s": 1,
}
_TYPES = get_type_hints(ServerConfig)


def flag(name: str) -> str:
    """The command-line flag of a field."""
    return "--" + name.replace("_", "-")


def parse_size(text: str) -> int:
    """Bytes of a size such as 512MiB, 4GB or 1000000; all units are powers of 1024."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?\s*", text.lower())
    if match is None:
        raise ConfigError(f"{text!r} is no size; write it as 512MiB or 4GiB")
    return int(float(match[1]) * _SIZE_UNITS[match[2]])


def read_chat_template_kwargs(text: str) -> dict[str, Any]:
    """The variables of --chat-template-kwargs. Raises ConfigError."""
    name = flag("chat_template_kwargs")
    try:
        variables = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{name} is no JSON: {error}") from None
    if not isinstance(variables, dict):
        raise ConfigError(f"{name} is {text[:60]!r}; it must be a JSON object")
    for reserved in RESERVED_VARIABLES:
        if reserved in variables:
            raise ConfigError(f"{name} may not set {reserved}")
    return variables


def add_flags(parser: argparse.ArgumentParser) -> None:
    """One flag a field, with the environment's or the field's default."""
    for f in fields(ServerConfig):
        literal = _choices(f.name)
        plain = f.default is None or isinstance(f.default, bool | tuple)
        default = "" if plain else f"(default: {f.default})"
        text = f"{f.metadata['help']} {default}".strip()
        names = [flag(f.name), *f.metadata["aliases"]]
        common: dict[str, Any] = {"dest": f.name, "default": argparse.SUPPRESS, "help": text}
        if _plain_type(f.name) is bool:
            if f.default is True:
                parser.add_argument(flag(f"no_{f.name}"), action="store_false", **common)
            else:
                parser.add_argument(*names, action="store_true", **common)
        elif literal:
            parser.add_argument(*names, choices=literal, **common)
        elif _plain_type(f.name) is tuple:
            parser.add_argument(*names, action="append", metavar="X", **common)
        else:
            parser.add_argument(*names, type=_plain_type(f.name), metavar="X", **common)


def parse_command_line(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> ServerConfig:
    """Flags over the environment over the defaults; ends the process with status 2 on an error."""
    add_flags(parser)
    parser.add_argument("positional_model", nargs="?", metavar="MODEL", help=argparse.SUPPRESS)
    given = vars(parser.parse_args(argv))
    positional = given.pop("positional_model")
    if positional is not None and given.setdefault("model", positional) != positional:
        parser.error(f"two models given: {positional} and {given['model']}")
    known = {f.name for f in fields(ServerConfig)}
    try:
        return ServerConfig.from_environment(**{k: v for k, v in given.items() if k in known})
    except ConfigError as error:
        parser.error(error.message)


def _environment_values(environ: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if MODEL_ENV in environ:
        values["model"] = environ[MODEL_ENV]
    for f in fields(ServerConfig):
        variable = ENV_PREFIX + f.name.upper()
        if variable in environ:
            values[f.name] = _parse_variable(f.name, variable, environ[variable])
    return values


def _parse_variable(name: str, variable: str, text: str) -> Any:
    kind = _plain_type(name)
    try:
        if kind is bool:
            return {"1": True, "true": True, "0": False, "false": False}[text.lower()]
        if kind is tuple:
            return tuple(part.strip() for part in text.split(","))
        return kind(text)
    except (KeyError, ValueError):
        raise ConfigError(f"{variable} is {text!r}; it must be a {kind.__name__}") from None


def _plain_type(name: str) -> type[Any]:
    """The type of a field without None; str for a Literal, tuple for several strings."""
    kind = _TYPES[name]
    if get_origin(kind) in (Union, UnionType):
        kind = next(part for part in get_args(kind) if part is not type(None))
    if get_origin(kind) is tuple:
        return tuple
    return str if get_origin(kind) is Literal else kind


def _choices(name: str) -> tuple[str, ...]:
    return get_args(_TYPES[name]) if get_origin(_TYPES[name]) is Literal else ()


def _check_choice(name: str, value: Any) -> None:
    choices = _choices(name)
    if choices and value not in choices:
        raise ConfigError(f"{flag(name)} is {value!r}; it must be one of {', '.join(choices)}")
    kind = _plain_type(name)
    number_ok = kind is float and isinstance(value, int) and not isinstance(value, bool)
    if value is None:
        if type(None) in get_args(_TYPES[name]):
            return
    elif number_ok or (isinstance(value, kind) and (kind is bool or not isinstance(value, bool))):
        return
    raise ConfigError(f"{flag(name)} is {value!r}; it must be a {kind.__name__}")
