"""`minisrv plan`: the memory a model needs on a GPU, from its config.json or its GGUF file.

A head that config.json ties is looked up in the files of a local model. Weights, token counts and
pages are exact. Workspace and CUDA graphs are estimates; the formulas are printed beside them, and
the engine measures both when it starts. With several ranks the plan is for the fullest one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from minisrv.checkpoint.hub import CONFIG_FILES, resolve_model
from minisrv.checkpoint.model_config import ModelConfig, load_model_config
from minisrv.checkpoint.own_head import has_own_head
from minisrv.command_line import parse_command_line
from minisrv.config import MAX_PREFILL_TOKENS, ServerConfig
from minisrv.engine import model_size
from minisrv.engine.gpus import GPU, find_gpu
from minisrv.engine.memory import MemoryPlan, format_size, useful_pages
from minisrv.engine.model_size import Parameters, count_parameters, kv_bytes_per_token
from minisrv.engine.parallel.shard import Sharding, check_divisible
from minisrv.engine.quantization import check_quantization
from minisrv.errors import ConfigError, MinisrvError
from minisrv.option_values import flag, parse_size
from minisrv.start_progress import no_progress

CONTEXT_BYTES = 512 * 2**20  # taken by the driver and the libraries' kernels
_ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}
_MAX_RANKS, _MIN_PREFILL, _MIN_REQUESTS, _MIN_CONTEXT = 8, 256, 8, 512
_MAX_FRACTION = 0.95
_UNKNOWN_NUM_SMS = 132  # as an H100 or H200; other large GPUs have up to 170


@dataclass(frozen=True, slots=True)
class Deployment:
    """What to plan for: a model, the options of its server, and one GPU: bytes, multiprocessors."""

    model: ModelConfig
    config: ServerConfig
    memory: int
    num_sms: int = _UNKNOWN_NUM_SMS

    @property
    def dtype(self) -> str:
        """The type of weights and activations, and of the KV cache unless that is FP8."""
        given = self.config.dtype
        return (self.model.dtype or "bfloat16") if given == "auto" else given

    @property
    def partition(self) -> Sharding:
        """The last rank, whose share of the vocabulary is the largest."""
        return Sharding(self.config.tp - 1, self.config.tp)

    @property
    def parameters(self) -> Parameters:
        """The counts of the fullest rank."""
        return count_parameters(self.model, self.partition)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan; exit status 0: it fits, 2: it does not or an option is wrong, 1: failed."""
    parser = argparse.ArgumentParser(
        prog="minisrv plan",
        description="Compute what memory a model needs on a GPU, from config.json or a GGUF file.",
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--gpu", "--card", metavar="NAME", help="GPU, such as H100 or 'RTX 4090'")
    where.add_argument(
        "--gpu-memory", "--card-memory", metavar="SIZE", help="memory of the GPU, such as 24GiB"
    )
    config, options = parse_command_line(parser, argv)
    try:
        gpu = None if options.gpu is None else find_gpu(options.gpu)
        memory = int(gpu.usable_gib * 2**30) if gpu else parse_size(options.gpu_memory)
        directory = resolve_model(config.model, no_progress, CONFIG_FILES)
        model = load_model(directory, config.max_seq_len)
        check_quantization(config, model, "cuda")
        check_divisible(model, config.tp)
    except MinisrvError as error:
        print(f"minisrv: {error.message}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    deployment = Deployment(model, config, memory, gpu.num_sms if gpu else _UNKNOWN_NUM_SMS)
    print(describe(deployment, gpu))
    if fits(deployment):
        return 0
    print("\n" + advise(deployment), file=sys.stderr)
    return 2


def load_model(directory: Path, max_seq_len: int | None) -> ModelConfig:
    """The config, without a tied head where the files have other values for it."""
    model = load_model_config(directory, max_seq_len)
    if model.tie_word_embeddings and has_own_head(directory):
        return replace(model, tie_word_embeddings=False)
    return model


def describe(deployment: Deployment, gpu: GPU | None) -> str:
    """A line that names model and GPU, the table, and for a known GPU the limit of decode speed."""
    config, size = deployment.config, format_size(deployment.memory)
    where = f"{gpu.name if gpu else 'a GPU'} with {size}"
    ranks = "" if config.tp == 1 else f", one of {config.tp} ranks"
    lines = [
        f"{config.model}: {deployment.model.architecture} in {deployment.dtype} on {where}{ranks}, "
        f"--memory-fraction {config.memory_fraction:g}",
        make_plan(deployment).describe(),
    ]
    if gpu is not None:
        read = deployment.parameters.read_for_a_token * _ITEMSIZE[deployment.dtype]
        lines.append(
            f"{'decode, batch 1':<25}at most {gpu.bandwidth / read:,.0f} tokens/s: "
            f"{format_size(int(read))} of weights per token at {gpu.bandwidth / 1e12:g} TB/s"
        )
    return "\n".join(lines)


def make_plan(deployment: Deployment) -> MemoryPlan:
    """The memory of the fullest rank; there may be no room for a single page."""
    model, config, itemsize = deployment.model, deployment.config, _ITEMSIZE[deployment.dtype]
    weights = deployment.parameters.total * itemsize
    counts = model_size.token_count_bytes(model, config.max_running_requests)
    workspace, workspace_note = _workspace(deployment)
    graphs, graphs_note = _graphs(deployment)
    cache_itemsize = 1 if config.kv_cache_dtype == "fp8" else itemsize
    page_bytes = config.page_size * kv_bytes_per_token(model, cache_itemsize, deployment.partition)
    free = int(deployment.memory * config.memory_fraction)
    free -= CONTEXT_BYTES + weights + counts + workspace + graphs
    num_pages = max(0, min(free // page_bytes, useful_pages(config, model.max_seq_len)))
    return MemoryPlan(
        weights=weights,
        token_counts=counts,
        workspace=workspace,
        graphs=graphs,
        context=CONTEXT_BYTES,
        num_pages=num_pages if config.num_pages is None else min(config.num_pages, num_pages),
        page_bytes=page_bytes,
        page_size=config.page_size,
        max_seq_len=model.max_seq_len,
        notes={
            "weights": _weights_note(deployment),
            "token counts": _token_counts_note(deployment),
            "workspace": workspace_note,
            "CUDA graphs": graphs_note,
            "CUDA context": "estimate",
        },
    )


def fits(deployment: Deployment) -> bool:
    """Whether the cache holds one request of the full context, and every page of --num-pages."""
    plan, wanted = make_plan(deployment), deployment.config.num_pages
    return plan.num_tokens >= plan.max_seq_len and wanted in (None, plan.num_pages)


def advise(deployment: Deployment) -> str:
    """The options that would make it fit, each with a value that suffices by itself."""
    found = list(_remedies(deployment))
    if not found:
        return "minisrv: it does not fit with any single option; use a GPU with more memory"
    plan, wanted = make_plan(deployment), deployment.config.num_pages
    if wanted not in (None, plan.num_pages):
        held = f"the cache has room for {plan.num_pages} of the {wanted} pages of --num-pages"
    else:
        held = f"the cache holds {plan.num_tokens} tokens, one full context is {plan.max_seq_len}"
    return f"minisrv: it does not fit: {held}; run with {' or '.join(found)}"


def _remedies(deployment: Deployment) -> Iterator[str]:
    config, num_tokens = deployment.config, make_plan(deployment).num_tokens
    if config.num_pages is not None:
        lowered = _changed(deployment, "num_pages", None)
        if fits(lowered):
            yield f"{flag('num_pages')} {make_plan(lowered).num_pages}"
            return
    candidates: dict[str, Sequence[Any]] = {
        "tp": range(config.tp + 1, _MAX_RANKS + 1),
        "max_seq_len": [num_tokens] if num_tokens >= _MIN_CONTEXT else [],
        "max_prefill_tokens": _halves(_prefill_tokens(config), _MIN_PREFILL),
        "max_running_requests": _halves(config.max_running_requests, _MIN_REQUESTS),
        "memory_fraction": [_MAX_FRACTION] if config.memory_fraction < _MAX_FRACTION else [],
        "dtype": ["bfloat16"] if deployment.dtype == "float32" else [],
    }
    for name, values in candidates.items():
        fitting = (value for value in values if _is_remedy(deployment, name, value))
        for value in islice(fitting, 1):
            yield f"{flag(name)} {value}"


def _is_remedy(deployment: Deployment, name: str, value: Any) -> bool:
    changed = _changed(deployment, name, value)
    try:
        check_divisible(changed.model, changed.config.tp)
    except ConfigError:
        return False
    return fits(changed)


def _changed(deployment: Deployment, name: str, value: Any) -> Deployment:
    if name == "max_seq_len":
        return replace(deployment, model=replace(deployment.model, max_seq_len=value))
    return replace(deployment, config=replace(deployment.config, **{name: value}))


def _halves(value: int, minimum: int) -> list[int]:
    return [value >> n for n in range(1, value.bit_length()) if value >> n >= minimum]


def _prefill_tokens(config: ServerConfig) -> int:
    return config.max_prefill_tokens or MAX_PREFILL_TOKENS["cuda"]


def _weights_note(deployment: Deployment) -> str:
    note = f"{deployment.parameters.total:,} parameters"
    if deployment.model.tie_word_embeddings:
        note += ", tied LM head"
    if (packed := deployment.model.packed) is not None:
        size = format_size(packed.num_bytes)
        note += f", {size} in the file ({', '.join(packed.kinds)}), dequantized on a GPU"
    if deployment.model.fp8 is not None:
        # A GPU with FP8 keeps such matrices as they are; config.json does not say which they are.
        note += f", FP8 in the checkpoint, counted as {deployment.dtype}: a GPU with FP8 needs less"
    return note


def _token_counts_note(deployment: Deployment) -> str:
    rows, vocab_size = deployment.config.max_running_requests, deployment.model.vocab_size
    return f"for penalties: {rows} rows x {vocab_size} x {model_size.TOKEN_COUNT_BYTES} B"


def _workspace(deployment: Deployment) -> tuple[int, str]:
    """Bytes that the largest step needs, and the formula."""
    model, config, itemsize = deployment.model, deployment.config, _ITEMSIZE[deployment.dtype]
    samples = config.max_running_requests
    tokens = _prefill_tokens(config) + samples
    width = model_size.widest_layer(model, config.tp)
    rotary = 2 * model.max_seq_len * model.head_dim * itemsize
    sampling = samples * model.vocab_size * model_size.LOGIT_BYTES
    attention = model_size.attention_workspace_bytes(
        model,
        deployment.partition,
        deployment.num_sms,
        model_size.largest_graph(config),
        model_size.largest_chunk_graph(config),
    )
    total = attention + rotary + tokens * width * itemsize + sampling
    return total, (
        f"estimate: attention {format_size(attention)}, "
        f"rotary table {format_size(rotary)}, {tokens} tokens x {width} x {itemsize} B, "
        f"{samples} samples x {model.vocab_size} x {model_size.LOGIT_BYTES} B"
    )


def _graphs(deployment: Deployment) -> tuple[int, str]:
    """Bytes of the CUDA graphs, and the formula."""
    model, config, itemsize = deployment.model, deployment.config, _ITEMSIZE[deployment.dtype]
    shapes = model_size.graph_shapes(config, _prefill_tokens(config), model.max_seq_len)
    if not shapes:
        return 0, "none"
    tokens = max(shape.num_tokens for shape in shapes)
    samples = max(shape.num_sequences for shape in shapes)
    layer_bytes = model_size.GRAPH_NODES * model_size.GRAPH_NODE_BYTES
    return model_size.graph_bytes(model, shapes, itemsize), (
        f"estimate: {len(shapes)} shapes x {model.num_layers} layers x {format_size(layer_bytes)}, "
        f"{tokens} tokens x {model_size.widest_layer(model, 1)} x {itemsize} B, "
        f"{samples} samples x {model.vocab_size} x {model_size.LOGIT_BYTES} B"
    )
