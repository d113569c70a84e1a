"""`minisrv plan`: what a model takes on a GPU, from its config.json alone, before anything loads.

Weights and pages are exact. Workspace and CUDA graphs are estimates by the formulas printed beside
them; at its start the engine measures them. Of several ranks, the fullest is planned.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from minisrv.checkpoint.hub import CONFIG_FILES, resolve_model
from minisrv.checkpoint.model_config import ModelConfig, load_model_config
from minisrv.commands.gpus import GPU, find_card
from minisrv.config import MAX_PREFILL_TOKENS, ServerConfig, flag, parse_command_line, parse_size
from minisrv.engine.memory import MemoryPlan, format_size, useful_pages
from minisrv.engine.model_size import (
    ATTENTION_WORKSPACE_BYTES,
    GRAPH_NODE_BYTES,
    GRAPH_NODES,
    Parameters,
    count_parameters,
    graph_bytes,
    graph_sizes,
    graph_width,
    kv_bytes_per_token,
    widest_layer,
)
from minisrv.engine.parallel.shard import Sharding, check_divisible
from minisrv.errors import ConfigError, MinisrvError

CONTEXT_BYTES = 512 * 2**20  # the driver's own, and the kernels of the libraries
_ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}
_MOST_RANKS, _LEAST_PREFILL, _LEAST_REQUESTS, _LEAST_CONTEXT = 8, 256, 8, 512
_HIGHEST_FRACTION = 0.95


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be planned: a model with the options of a server, on memory of so many bytes."""

    model: ModelConfig
    config: ServerConfig
    memory: int

    @property
    def dtype(self) -> str:
        """The type of weights and cache."""
        given = self.config.dtype
        return (self.model.dtype or "bfloat16") if given == "auto" else given

    @property
    def partition(self) -> Sharding:
        """The last rank, whose share of the vocabulary is the largest."""
        return Sharding(self.config.tp - 1, self.config.tp)

    @property
    def parameters(self) -> Parameters:
        """Those of the fullest rank."""
        return count_parameters(self.model, self.partition)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan; the exit status: 0 it fits, 2 it does not or an option is wrong."""
    parser = argparse.ArgumentParser(
        prog="minisrv plan",
        description="What a model takes on a GPU, from config.json alone. Nothing is loaded.",
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--card", metavar="NAME", help="a GPU, such as H100 or 'RTX 4090'")
    where.add_argument("--card-memory", metavar="SIZE", help="memory of a GPU, such as 24GiB")
    config = parse_command_line(parser, argv)
    options = parser.parse_args(argv)
    try:
        card = find_card(options.card) if options.card else None
        memory = int(card.usable_gib * 2**30) if card else parse_size(options.card_memory)
        directory = resolve_model(config.model, lambda phase, fraction: None, CONFIG_FILES)
        model = load_model_config(directory, config.max_seq_len)
        check_divisible(model, config.tp)
    except MinisrvError as error:
        print(f"minisrv: {error.message}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    request = Request(model, config, memory)
    print(describe(request, card))
    if fits(request):
        return 0
    print("\n" + advise(request), file=sys.stderr)
    return 2


def describe(request: Request, card: GPU | None) -> str:
    """The table, under a line that names model and card and above one with the limit of speed."""
    config, size = request.config, format_size(request.memory)
    where = f"{card.name} of {size}" if card else f"a card of {size}"
    ranks = "" if config.tp == 1 else f", each of {config.tp} ranks"
    lines = [
        f"{config.model}: {request.model.architecture} in {request.dtype} on {where}{ranks}, "
        f"--memory-fraction {config.memory_fraction:g}",
        make_plan(request).describe(),
    ]
    if card is not None:
        read = request.parameters.read_for_a_token * _ITEMSIZE[request.dtype]
        lines.append(
            f"{'decode alone':<25}at most {card.bandwidth / read:,.0f} tokens/s: "
            f"{format_size(int(read))} of weights a token at {card.bandwidth / 1e12:g} TB/s"
        )
    return "\n".join(lines)


def make_plan(request: Request) -> MemoryPlan:
    """The plan; its cache may be empty."""
    model, config, itemsize = request.model, request.config, _ITEMSIZE[request.dtype]
    weights = request.parameters.total * itemsize
    workspace, workspace_note = _workspace(request)
    graphs, graphs_note = _graphs(request)
    cache_itemsize = 1 if config.kv_cache_dtype == "fp8" else itemsize
    page_bytes = config.page_size * kv_bytes_per_token(model, cache_itemsize, request.partition)
    free = int(request.memory * config.memory_fraction)
    free -= CONTEXT_BYTES + weights + workspace + graphs
    num_pages = max(0, min(free // page_bytes, useful_pages(config, model.max_seq_len)))
    return MemoryPlan(
        weights=weights,
        workspace=workspace,
        graphs=graphs,
        context=CONTEXT_BYTES,
        num_pages=num_pages if config.num_pages is None else min(config.num_pages, num_pages),
        page_bytes=page_bytes,
        page_size=config.page_size,
        max_seq_len=model.max_seq_len,
        notes={
            "weights": _weights_note(request),
            "workspace": workspace_note,
            "CUDA graphs": graphs_note,
            "CUDA context": "estimate",
        },
    )


def fits(request: Request) -> bool:
    """Whether the cache holds a request of the full context, and all pages that are asked for."""
    plan, wanted = make_plan(request), request.config.num_pages
    return plan.num_tokens >= plan.max_seq_len and wanted in (None, plan.num_pages)


def advise(request: Request) -> str:
    """The options that would make it fit, each with its value and each enough alone."""
    found = [remedy for remedy in _remedies(request) if remedy is not None]
    if not found:
        return "minisrv: it does not fit, and no single option makes it fit: take a larger card"
    plan = make_plan(request)
    held = f"the cache holds {plan.num_tokens} of the {plan.max_seq_len} tokens of one full context"
    return f"minisrv: it does not fit: {held}; run with {' or '.join(found)}"


def _remedies(request: Request) -> Iterator[str | None]:
    if request.config.num_pages is not None:
        lowered = replace(request, config=replace(request.config, num_pages=None))
        if fits(lowered):
            yield f"{flag('num_pages')} {make_plan(lowered).num_pages}"
            return
    yield _first_that_fits(request, "tp", range(request.config.tp + 1, _MOST_RANKS + 1))
    yield _shorter_context(request)
    budget = _prefill_tokens(request.config)
    yield _first_that_fits(request, "max_prefill_tokens", _halves(budget, _LEAST_PREFILL))
    running = request.config.max_running_requests
    yield _first_that_fits(request, "max_running_requests", _halves(running, _LEAST_REQUESTS))
    if request.config.memory_fraction < _HIGHEST_FRACTION:
        yield _first_that_fits(request, "memory_fraction", [_HIGHEST_FRACTION])
    if request.dtype == "float32":
        yield _first_that_fits(request, "dtype", ["bfloat16"])


def _first_that_fits(request: Request, name: str, values: Sequence[Any]) -> str | None:
    for value in values:
        changed = replace(request, config=replace(request.config, **{name: value}))
        try:
            check_divisible(changed.model, changed.config.tp)
        except ConfigError:
            continue
        if fits(changed):
            return f"{flag(name)} {value}"
    return None


def _shorter_context(request: Request) -> str | None:
    tokens = make_plan(request).num_tokens
    if tokens < _LEAST_CONTEXT:
        return None
    changed = replace(request, model=replace(request.model, max_seq_len=tokens))
    return f"{flag('max_seq_len')} {tokens}" if fits(changed) else None


def _halves(value: int, least: int) -> list[int]:
    values = []
    while value // 2 >= least:
        value //= 2
        values.append(value)
    return values


def _prefill_tokens(config: ServerConfig) -> int:
    return config.max_prefill_tokens or MAX_PREFILL_TOKENS["cuda"]


def _weights_note(request: Request) -> str:
    note = f"{request.parameters.total:,} parameters"
    if request.model.tie_word_embeddings:
        note += ", head tied"
    if request.model.fp8 is not None:
        # A GPU with FP8 keeps those matrices as they are; which they are, config.json does not say.
        note += f", FP8 in the checkpoint, counted as {request.dtype}: a GPU with FP8 takes less"
    return note


def _workspace(request: Request) -> tuple[int, str]:
    """Bytes that the largest step takes, and how they are made up."""
    model, config, itemsize = request.model, request.config, _ITEMSIZE[request.dtype]
    samples = config.max_running_requests
    tokens = _prefill_tokens(config) + samples
    width = widest_layer(model, config.tp)
    rotary = 2 * model.max_seq_len * model.head_dim * itemsize
    sampling = samples * model.vocab_size * itemsize
    total = ATTENTION_WORKSPACE_BYTES + rotary + tokens * width * itemsize + sampling
    return total, (
        f"estimate: attention {format_size(ATTENTION_WORKSPACE_BYTES)}, "
        f"rotary table {format_size(rotary)}, {tokens} tokens x {width} x {itemsize} B, "
        f"{samples} samples x {model.vocab_size} x {itemsize} B"
    )


def _graphs(request: Request) -> tuple[int, str]:
    """Bytes of the CUDA graphs of decode steps, and how they are made up."""
    model, config, itemsize = request.model, request.config, _ITEMSIZE[request.dtype]
    largest = min(config.cuda_graph_max_bs, config.max_running_requests)
    sizes = graph_sizes(largest) if config.tp == 1 else []
    if not sizes:
        return 0, "none"
    layer_bytes = GRAPH_NODES * GRAPH_NODE_BYTES
    return graph_bytes(model, sizes, itemsize), (
        f"estimate: {len(sizes)} sizes x {model.num_layers} layers x {format_size(layer_bytes)}, "
        f"{largest} tokens x {graph_width(model)} x {itemsize} B"
    )
