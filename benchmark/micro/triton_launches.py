"""The Triton kernels as they are launched for some models, so that they can be compiled ahead."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton

from minisrv.engine.kernels import (
    triton_candidates,
    triton_expand,
    triton_fp8,
    triton_mask,
    triton_moe,
    triton_norm,
    triton_penalize,
    triton_rotate,
    triton_route,
    triton_sample,
    triton_small_batch,
    triton_small_experts,
)
from minisrv.engine.kernels.triton_normed_products import MOST_TOKENS

DTYPES = {"*bf16": torch.bfloat16, "*fp16": torch.float16, "*fp32": torch.float32}

MEMORY, LATENCY, ARITHMETIC = "memory", "latency", "arithmetic"


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel as it is launched. Pointers are given by type, whole numbers by value."""

    name: str
    kernel: Any
    arguments: dict[str, str | int | float | None]
    constants: dict[str, Any]
    limit: str  # MEMORY, LATENCY or ARITHMETIC
    num_warps: int = 4
    num_stages: int = 3
    bytes_per_stage: int = 0  # loaded ahead, in each stage of a loop


def all_launches() -> Iterator[Launch]:
    """Every kernel, for models in bfloat16, whose logits are float32."""
    yield from step_launches()
    yield from rotate_launches()
    yield from sampling_launches()
    yield from expert_launches()
    yield from fp8_launches()
    yield from small_batch_launches()


def step_launches() -> Iterator[Launch]:
    long = {"last_token", "ids", "positions", "slots"}
    for kernel, constants in (
        (triton_expand._write_pages, {"BLOCK": 256}),
        (triton_expand._expand, {"PAGE_SIZE": 16, "BLOCK": 256}),
    ):
        names = set(kernel.arg_names) - constants.keys() - {"width"}
        arguments: dict[str, Any] = {name: "*i64" if name in long else "*i32" for name in names}
        yield Launch(kernel.__name__, kernel, {**arguments, "width": 2560}, constants, LATENCY)


def rotate_launches(kind: str = "*bf16") -> Iterator[Launch]:
    """Qwen3-0.6B's heads, with a cache of the same dtype and one of FP8."""
    for norm, cache in ((True, kind), (False, kind), (True, "*fp8e4nv")):
        arguments: dict[str, Any] = dict.fromkeys(
            ("qkv", "q_weight", "k_weight", "cos", "sin"), kind
        )
        arguments |= {"slots": "*i64", "keys": cache, "values": cache, "eps": 1e-6}
        constants = {"NUM_HEADS": 16, "NUM_KV_HEADS": 8, "HALF": 64, "BLOCK": 64, "NORM": norm}
        constants |= {"TILE": triton_rotate._TILE, "LIMIT": None if cache == kind else 448.0}
        name = f"norm_rotate_store{'' if norm else ', no norm'}{'' if cache == kind else ', fp8'}"
        kernel = triton_rotate._norm_rotate_store
        yield Launch(name, kernel, arguments, constants, MEMORY, triton_rotate._WARPS)


def sampling_launches(kind: str = "*fp32") -> Iterator[Launch]:
    """With a vocabulary of 151,936; `kind` is the type of the logits."""
    block, part = triton_sample._BLOCK, triton_sample._PART
    blocks = triton.cdiv(151_936, block)
    columns: dict[str, Any] = {
        "temperatures": "*fp32",
        "top_ks": "*i32",
        "top_ps": "*fp32",
        "min_ps": "*fp32",
        "seeds": "*i64",
        "choices": "*i32",
        "positions": "*i32",
    }
    counting = {"counts": "*i16", "rows": "*i32", "factors": "*fp32", "factor_stride": 256}
    sizes = {"vocab_size": 151_936, "row_stride": 151_936}
    logits: dict[str, Any] = {"logits": kind, **sizes}
    tables = {"best": "*i64", "masses": "*fp32", "part_tops": "*i32", "out": "*i32"}
    listed = {"parts": "*i32", "nums_listed": "*i32", "floors": "*i32"}
    most, spare = triton_sample._MOST_PARTS, triton_sample._SPARE_BITS[DTYPES[kind]]
    sizes_of_parts = {"PART": part, "MOST_PARTS": most, "SPARE_BITS": spare}

    def launch(
        kernel: Any, arguments: dict[str, Any], limit: str, warps: int, **constants: Any
    ) -> Launch:
        given = {name: arguments[name] for name in kernel.arg_names if name in arguments}
        return Launch(kernel.__name__.removeprefix("_"), kernel, given, constants, limit, warps)

    everything = {**logits, **columns, **counting, **tables, **listed}
    pairs = {"samples": "*i32", "ids": "*i32", "values": "*fp32", "count": "*i32"}
    yield launch(
        triton_penalize._penalize,
        {**everything, "samples": "*i64"},
        MEMORY,
        triton_penalize._WARPS,
        BLOCK=4096,
    )
    yield launch(triton_sample._add_biases, {**everything, **pairs}, LATENCY, 4, BLOCK=256)
    masks = {"samples": "*i32", "masks": "*i32", "num_words": 151_936 // 32}
    yield launch(triton_mask._mask, {**everything, **masks}, MEMORY, 4, BLOCK=triton_mask._BLOCK)
    yield launch(
        triton_sample._score_blocks,
        everything,
        MEMORY,
        8,
        NUM_BLOCKS=blocks,
        BLOCK=block,
        PART=part,
    )
    num_parts = blocks * (block // part)
    yield launch(
        triton_candidates.list_parts,
        everything,
        LATENCY,
        16,
        NUM_PARTS=num_parts,
        PARTS=triton.next_power_of_2(num_parts),
        MOST_PARTS=most,
        SPARE_BITS=spare,
    )
    yield launch(
        triton_sample._pick_best,
        everything,
        LATENCY,
        16,
        NUM_BLOCKS=blocks,
        BLOCK=block,
        BLOCKS=triton.next_power_of_2(blocks),
        **sizes_of_parts,
    )


def expert_launches(kind: str = "*bf16") -> Iterator[Launch]:
    """Qwen3-30B-A3B's layers, for steps of 1, 512 and 8,192 tokens."""
    experts, hidden, features, per_token = 128, 2048, 768, 8
    router: dict[str, Any] = {"logits": kind, "scores": kind, "experts": "*i64"}
    constants: dict[str, Any] = {"NUM_EXPERTS": experts, "EXPERTS": experts}
    chosen = {"PER_TOKEN": per_token, "CHOSEN": per_token, "NORMALIZE": True}
    yield Launch("route", triton_route._route, router, {**constants, **chosen}, LATENCY, 1)
    norm: dict[str, Any] = {**dict.fromkeys(("x", "parts", "weight", "out"), kind), "eps": 1e-6}
    sizes = {"NUM_PARTS": per_token, "SIZE": hidden, "BLOCK": hidden}
    yield Launch(
        "add_parts_and_norm", triton_norm._add_parts_and_norm, norm, sizes, MEMORY, hidden // 256
    )
    tables: dict[str, Any] = {"slot_pairs": "*i32", "tile_experts": "*i32"}
    itemsize = DTYPES[kind].itemsize
    for num_tokens in (1, 512, 8192):
        first, second = triton_moe.choose_tiles(per_token * num_tokens, experts, itemsize)
        block, warps = triton_moe.placing(first.rows)
        pairs = {"experts": "*i64", "num_pairs": per_token * num_tokens, "num_tiles": 100}
        rows = {"ROWS": first.rows, "BLOCK": block}
        yield Launch(
            f"place, {first.rows} rows",
            triton_moe._place,
            {**tables, **pairs},
            {**constants, **rows},
            LATENCY,
            warps,
        )
        for name, kernel, tile, pointers, shape, matrices in (
            (
                "gate_up",
                triton_moe._gate_up,
                first,
                ("x", "weights", "hidden"),
                {"PER_TOKEN": per_token, "INPUTS": hidden, "FEATURES": features},
                2,
            ),
            (
                "down",
                triton_moe._down,
                second,
                ("hidden", "weights", "scores", "out"),
                {"FEATURES": features, "OUTPUTS": hidden},
                1,
            ),
        ):
            of_tile = {"ROWS": tile.rows, "COLUMNS": tile.columns, "INNER": tile.inner}
            yield Launch(
                f"{name}, {tile.rows} rows",
                kernel,
                {**dict.fromkeys(pointers, kind), **tables},
                {**shape, **of_tile, "PRECISION": precision(kind)},
                MEMORY if tile.rows == 16 else ARITHMETIC,
                tile.warps,
                tile.stages,
                (tile.rows + matrices * tile.columns) * tile.inner * itemsize,
            )


def fp8_launches(kind: str = "*bf16") -> Iterator[Launch]:
    """Inputs of 5,120 with a scale per token or per group; products with groups of 128."""
    for group in (5120, 128):
        arguments: dict[str, Any] = {"x": kind, "values": "*fp8e4nv", "scales": "*fp32"}
        block = triton.next_power_of_2(group)
        constants: dict[str, Any] = {"LIMIT": 448.0, "LEAST": 1e-10, "INPUTS": 5120}
        yield Launch(
            f"quantize, groups of {group}",
            triton_fp8._quantize,
            arguments,
            {**constants, "GROUP": group, "BLOCK": block},
            MEMORY,
            max(1, min(16, block // 512)),
        )
    for num_tokens in (1, 40, 1000):
        tokens, outputs, warps = triton_fp8.tile(num_tokens)
        arguments = {"x": "*fp8e4nv", "x_scales": "*fp32", "matrix": "*fp8e4nv", "out": kind}
        arguments |= {"matrix_scales": "*fp32", "num_tokens": num_tokens, "num_outputs": 5120}
        constants = {"INPUTS": 4096, "GROUP": 128, "BLOCK_I": 128}
        yield Launch(
            f"grouped_product, {tokens} tokens",
            triton_fp8._grouped_product,
            arguments,
            {**constants, "BLOCK_T": tokens, "BLOCK_O": outputs},
            MEMORY if num_tokens == 1 else ARITHMETIC,
            warps,
            4,
            (tokens + outputs) * 128,
        )


def small_batch_launches(kind: str = "*bf16") -> Iterator[Launch]:
    """The joined kernels of two models with norms of heads, of one with biases, and of a sparse
    one.
    """
    for model, hidden, features, heads, biased in (
        ("Qwen3-0.6B", 1024, 3072, (16, 8), False),
        ("Qwen3-14B", 5120, 17408, (40, 8), False),
        ("Qwen2.5-1.5B", 1536, 8960, (12, 2), True),
    ):
        yield _project_heads(model, hidden, heads, biased, kind)
        yield _gate_and_up(model, hidden, features, biased, kind)
        yield _add_product(model, features, hidden, biased, kind)
    model, hidden, features = "Qwen3-30B-A3B", 2048, 768
    yield _project_heads(model, hidden, (32, 4), False, kind)
    yield _add_product(model, 4096, hidden, False, kind)
    yield from _sparse_feed_forward(model, hidden, features, kind)


def _project_heads(
    model: str, hidden: int, heads: tuple[int, int], biased: bool, kind: str
) -> Launch:
    """With biases, the cache is in FP8."""
    rows, half, itemsize = MOST_TOKENS, 64, DTYPES[kind].itemsize
    inner = triton_small_batch._HEAD_BYTES // (half * itemsize)
    optional = ("bias",) if biased else ("q_weight", "k_weight")
    pointers = dict.fromkeys(("x", "norm", "weights", "cos", "sin", "qkv", *optional), kind)
    cache = dict.fromkeys(("keys", "values"), "*fp8e4nv" if biased else kind)
    numbers = {"eps": 1e-6, "head_eps": 1e-6, "num_tokens": rows}
    constants = {"NUM_HEADS": heads[0], "NUM_KV_HEADS": heads[1], "HALF": half, "INPUTS": hidden}
    constants |= {"INNER": inner, "LIMIT": 448.0 if biased else None}
    return Launch(
        f"project_heads, {model}",
        triton_small_batch._project_heads,
        {**pointers, **cache, "slots": "*i64", **numbers},
        {**constants, "PRECISION": precision(kind)},
        MEMORY,
        triton_small_batch._HEAD_WARPS,
        triton_small_batch._HEAD_STAGES,
        (rows + 2 * half) * inner * itemsize,
    )


def _gate_and_up(model: str, hidden: int, features: int, biased: bool, kind: str) -> Launch:
    rows, itemsize = MOST_TOKENS, DTYPES[kind].itemsize
    columns = triton_small_batch._FEATURES
    inner = triton_small_batch._FEATURE_BYTES // itemsize
    pointers = ("x", "norm", "weights", "out", *(("bias",) if biased else ()))
    constants = {"INPUTS": hidden, "FEATURES": features, "COLUMNS": columns, "INNER": inner}
    return Launch(
        f"gate_and_up, {model}",
        triton_small_batch._gate_and_up,
        {**dict.fromkeys(pointers, kind), "eps": 1e-6, "num_tokens": rows},
        {**constants, "PRECISION": precision(kind)},
        MEMORY,
        triton_small_batch._FEATURE_WARPS,
        triton_small_batch._FEATURE_STAGES,
        (rows + 2 * columns) * inner * itemsize,
    )


def _add_product(model: str, inputs: int, outputs: int, biased: bool, kind: str) -> Launch:
    rows, itemsize = MOST_TOKENS, DTYPES[kind].itemsize
    columns = triton_small_batch._OUTPUTS
    inner = triton_small_batch._OUTPUT_BYTES // itemsize
    pointers = ("x", "weights", "sums", *(("bias",) if biased else ()))
    constants = {"INPUTS": inputs, "OUTPUTS": outputs, "COLUMNS": columns, "INNER": inner}
    return Launch(
        f"add_product, {model}",
        triton_small_batch._add_product,
        {**dict.fromkeys(pointers, kind), "num_tokens": rows},
        {**constants, "PRECISION": precision(kind)},
        MEMORY,
        triton_small_batch._OUTPUT_WARPS,
        triton_small_batch._OUTPUT_STAGES,
        (rows + columns) * inner * itemsize,
    )


def _sparse_feed_forward(model: str, hidden: int, features: int, kind: str) -> Iterator[Launch]:
    """With 128 experts, 8 of them per token."""
    rows, itemsize, experts = MOST_TOKENS, DTYPES[kind].itemsize, {"NUM_EXPERTS": 128}
    given: dict[str, Any] = dict.fromkeys(("x", "norm", "weights", "hidden", "sums"), kind)
    given |= dict.fromkeys(("logits", "scores"), "*fp32")
    given |= {"tiles": "*i32", "eps": 1e-6, "num_tokens": rows}

    def launch(
        kernel: Any, limit: str, warps: int, stages: int, bytes_per_stage: int, **constants: Any
    ) -> Launch:
        arguments = {name: given[name] for name in kernel.arg_names if name in given}
        name = f"{kernel.__name__.removeprefix('_')}, {model}"
        return Launch(name, kernel, arguments, constants, limit, warps, stages, bytes_per_stage)

    columns = triton_small_experts._ROUTER_COLUMNS
    inner = triton_small_experts._ROUTER_BYTES // itemsize
    yield launch(
        triton_small_experts._multiply_router,
        LATENCY,
        triton_small_experts._ROUTER_WARPS,
        triton_small_experts._ROUTER_STAGES,
        (rows + 2 * columns) * inner * itemsize,
        INPUTS=hidden,
        COLUMNS=columns,
        INNER=inner,
        PRECISION=precision(kind),
        **experts,
    )
    yield launch(
        triton_small_experts._choose_experts,
        LATENCY,
        triton_small_experts._CHOOSE_WARPS,
        3,
        0,
        EXPERTS=128,
        PER_TOKEN=8,
        NORMALIZE=True,
        **experts,
    )
    columns = triton_small_experts._FEATURES
    inner = triton_small_experts._FEATURE_BYTES // itemsize
    yield launch(
        triton_small_experts._gate_and_up_of_experts,
        MEMORY,
        triton_small_experts._FEATURE_WARPS,
        triton_small_experts._FEATURE_STAGES,
        (rows + 2 * columns) * inner * itemsize,
        INPUTS=hidden,
        FEATURES=features,
        COLUMNS=columns,
        INNER=inner,
        PRECISION=precision(kind),
        **experts,
    )
    columns = triton_small_experts._OUTPUTS
    inner = triton_small_experts._OUTPUT_BYTES // itemsize
    yield launch(
        triton_small_experts._add_experts,
        MEMORY,
        triton_small_experts._OUTPUT_WARPS,
        triton_small_experts._OUTPUT_STAGES,
        (rows + columns) * inner * itemsize,
        FEATURES=features,
        OUTPUTS=hidden,
        COLUMNS=columns,
        INNER=inner,
        PRECISION=precision(kind),
    )


def precision(kind: str) -> str:
    """Of the products of matrices of this type."""
    return "ieee" if kind == "*fp32" else "tf32"
