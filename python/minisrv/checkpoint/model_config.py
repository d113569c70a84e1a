"""A checkpoint's config.json and generation_config.json, checked and in our terms.

Settings that change a model's results and are not implemented are refused by name: a checkpoint
that loads computes what its authors' code computes.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from minisrv.checkpoint.generation_config import read_defaults
from minisrv.checkpoint.gguf.files import find_gguf
from minisrv.errors import ConfigError, UnsupportedModelError
from minisrv.sampling_params import SamplingParams

Dtype = Literal["bfloat16", "float16", "float32"]
RopeType = Literal["default", "linear", "llama3", "yarn", "factors"]
Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding. The fields after `factor` are parameters of llama3, yarn and factors.

    factors: what the frequency of each pair of a head is divided by, as GGUF files have it.
    """

    rope_type: RopeType = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    factors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeConfig:
    """Sparse feed-forward layers: which ones, and how a token selects its experts."""

    num_experts: int
    num_experts_per_token: int
    intermediate_size: int
    norm_topk_prob: bool
    sparse_layers: frozenset[int]


@dataclass(frozen=True, slots=True)
class Fp8Config:
    """Weights are stored as FP8 with scales. block: rows and columns per scale, if block-wise."""

    block: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class PackedConfig:
    """Weights are stored in 2 to 8 bits. kinds: GGUF's names. num_bytes: of all tensors."""

    kinds: tuple[str, ...]
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One checkpoint. `max_position` is the model's context, `max_seq_len` the one to serve.

    dtype: None if the checkpoint does not state it. eos_token_ids: each of them ends a text.
    eos_is_assumed: no file states them; they are the default of the class in transformers.
    sampling_source: the file that has `sampling_defaults`. unapplied_defaults: its entries that are
    not used, and why.
    notes: sentences on what was decided where the files leave it open, for the start.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    max_seq_len: int
    norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    moe: MoeConfig | None = None
    fp8: Fp8Config | None = None
    packed: PackedConfig | None = None
    dtype: Dtype | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    eos_is_assumed: bool = False
    sampling_defaults: SamplingParams = field(default_factory=SamplingParams)
    sampling_source: str = "generation_config.json"
    unapplied_defaults: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def defaults_of(self, kind: Literal["model", "openai"]) -> SamplingParams:
        """The sampling defaults that --sampling-defaults `kind` selects."""
        return self.sampling_defaults if kind == "model" else SamplingParams()


@dataclass(frozen=True, slots=True)
class _Family:
    """Defaults of an architecture's config class in transformers.

    qkv_bias: None means that `attention_bias` decides, also for o_proj. num_kv_heads: None is the
    number of heads.
    """

    qkv_bias: bool | None = None
    reads_mlp_bias: bool = False
    head_dim: int | None = None
    window: Literal["never", "always", "if_used", "per_layer"] = "never"
    moe: bool = False
    num_kv_heads: int | None = 32
    max_position: int = 32768
    bos_token_id: int | None = None
    eos_token_id: int | None = None


_FAMILIES = {
    "LlamaForCausalLM": _Family(
        reads_mlp_bias=True, num_kv_heads=None, max_position=2048, bos_token_id=1, eos_token_id=2
    ),
    "MistralForCausalLM": _Family(
        qkv_bias=False,
        window="always",
        num_kv_heads=8,
        max_position=131072,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "Qwen2ForCausalLM": _Family(qkv_bias=True, window="per_layer"),
    "Qwen3ForCausalLM": _Family(head_dim=128, window="per_layer"),
    "Qwen3MoeForCausalLM": _Family(moe=True, window="if_used", num_kv_heads=4),
}

# Keys that change the result unless they are null, and that no family reads.
_REFUSED_KEYS = (
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "query_pre_attn_scalar",
    "attention_multiplier",
    "attention_chunk_size",
    "embedding_multiplier",
    "residual_multiplier",
    "logits_scaling",
    "logit_scale",
    "clip_qkv",
)
_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        *("factor", "original_max_position_embeddings", "attention_factor", "beta_fast"),
        *("beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "dynamic": ("factor", "original_max_position_embeddings"),
}


def load_model_config(path: str | Path, max_seq_len: int | None = None) -> ModelConfig:
    """Read a checkpoint: a directory, or GGUF files as `find_gguf` finds them.

    max_seq_len: the context to serve; None is the model's. Raises ConfigError for a missing or
    invalid file or a context beyond the model's, and UnsupportedModelError for a model that needs a
    feature minisrv does not implement.
    """
    directory = Path(path)
    if find_gguf(directory):
        # Imports the package `gguf`, which takes a while.
        from minisrv.checkpoint.gguf.config import load_gguf_config

        return load_gguf_config(directory, max_seq_len)
    raw = read_json(directory / "config.json", required=True)
    return make_model_config(raw, read_json(directory / "generation_config.json"), max_seq_len)


def make_model_config(raw: Json, generation: Json, max_seq_len: int | None) -> ModelConfig:
    """The model from the contents of config.json and generation_config.json.

    Raises as `load_model_config`.
    """
    architecture = ", ".join(map(str, raw.get("architectures") or ["(none)"]))
    _check_supported("architectures", [architecture], _FAMILIES)
    family = _FAMILIES[architecture]
    _refuse_keys(raw)
    dtype = raw.get("dtype") or raw.get("torch_dtype")
    _check_supported("dtype", [dtype], get_args(Dtype))
    heads = _positive(raw, "num_attention_heads")
    max_position, rope = _rope(raw, family, max_seq_len)
    if max_seq_len is not None and max_seq_len > max_position:
        raise ConfigError(
            f"--max-seq-len is {max_seq_len}; the model's context is {max_position} tokens"
        )
    kv_heads = heads if "num_key_value_heads" in raw else family.num_kv_heads or heads
    attention_bias = bool(raw.get("attention_bias", False))
    defaults, unused = read_defaults(generation)
    # Without a generation_config.json, what config.json leaves out is as the class has it.
    classes = {"bos_token_id": family.bos_token_id, "eos_token_id": family.eos_token_id}
    own = generation or {**classes, **raw}
    config = ModelConfig(
        architecture=architecture,
        vocab_size=_positive(raw, "vocab_size"),
        hidden_size=_positive(raw, "hidden_size"),
        intermediate_size=_positive(raw, "intermediate_size"),
        num_layers=_positive(raw, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=_positive(raw, "num_key_value_heads", kv_heads),
        head_dim=_positive(raw, "head_dim", family.head_dim or raw["hidden_size"] // heads),
        max_position=max_position,
        max_seq_len=max_seq_len or max_position,
        norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope=rope,
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        o_bias=attention_bias and family.qkv_bias is None,
        mlp_bias=family.reads_mlp_bias and bool(raw.get("mlp_bias", False)),
        moe=_moe(raw) if family.moe else None,
        fp8=_fp8(raw.get("quantization_config")),
        dtype=dtype,
        bos_token_id=next(iter(_token_ids("bos_token_id", own, raw)), None),
        eos_token_ids=_token_ids("eos_token_id", own, raw),
        eos_is_assumed=not generation and "eos_token_id" not in raw,
        sampling_defaults=defaults,
        unapplied_defaults=unused,
        notes=tuple(_rope_notes(raw)),
    )
    _check_heads(config)
    _check_window(config, raw, family)
    return config


def read_json(path: Path, *, required: bool = False) -> dict[str, Any]:
    """The object in a JSON file; empty if the file is missing and not `required`.

    Raises ConfigError.
    """
    if not path.is_file():
        if required:
            raise ConfigError(f"{path} does not exist; a checkpoint directory must contain it")
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must contain a JSON object")
    return value


def _check_supported(key: str, values: Iterable[Any], supported: Collection[Any]) -> None:
    for value in values:
        if value is not None and value not in supported:
            names = ", ".join(map(str, supported))
            raise UnsupportedModelError(
                f"config.json has {key} {value!r}; minisrv supports {names}"
            )


def _refuse_keys(raw: Json) -> None:
    for key in _REFUSED_KEYS:
        if raw.get(key) is not None:
            raise UnsupportedModelError(f"config.json has {key}, which minisrv does not implement")
    _check_supported("hidden_act", [str(raw.get("hidden_act", "silu"))], ("silu", "swish"))
    layer_types = raw.get("layer_types") or ()
    _check_supported("layer_types", layer_types, ("full_attention", "sliding_attention"))


def _fp8(quantization: Json | None) -> Fp8Config | None:
    if quantization is None:
        return None
    method = quantization.get("quant_method")
    block = quantization.get("weight_block_size")
    known = method in ("fp8", "fbgemm_fp8")
    if method == "compressed-tensors":
        weights = [g.get("weights") or {} for g in quantization.get("config_groups", {}).values()]
        blocks = [tuple(w["block_structure"]) for w in weights if w.get("block_structure")]
        block = blocks[0] if blocks else None
        plain = all(w.get("type") == "float" and w.get("num_bits") == 8 for w in weights)
        known = bool(weights) and plain and len(set(blocks)) <= 1
    if not known:
        raise UnsupportedModelError(
            f"config.json has quantization_config with quant_method {method!r}; minisrv reads FP8 "
            "weights (fp8, fbgemm_fp8, compressed-tensors with 8-bit floats) and unquantized ones"
        )
    if block is None:
        return Fp8Config()
    match block:
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return Fp8Config((rows, columns))
    raise ConfigError(
        f"config.json has weight_block_size {block!r}; it must be two positive integers"
    )


def _positive(raw: Json, key: str, default: int | None = None) -> int:
    value = raw.get(key)
    value = default if value is None else value
    if value is None:
        raise ConfigError(f"config.json lacks {key}")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"config.json has {key} {value!r}; it must be a positive integer")
    return value


def _rope(raw: Json, family: _Family, max_seq_len: int | None) -> tuple[int, RopeConfig]:
    """The model's context after scaling, and the rotary parameters.

    transformers 5 writes `rope_parameters`; older files have `rope_theta` and `rope_scaling`. As
    there, a `rope_scaling` replaces `rope_parameters` as a whole.
    """
    given = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    rope_type: Any = given.pop("rope_type", None) or given.pop("type", None) or "default"
    given.pop("type", None)
    theta = float(given.pop("rope_theta", None) or raw.get("rope_theta") or 10000.0)
    partial = given.pop("partial_rotary_factor", None) or raw.get("partial_rotary_factor")
    _check_supported("partial_rotary_factor", [partial], [1.0])
    _check_supported("rope_type", [rope_type], _ROPE_KEYS)
    _refuse_nested(given)
    outer = raw.get("original_max_position_embeddings")
    if rope_type in ("llama3", "yarn") and outer is not None:
        given["original_max_position_embeddings"] = outer
    keys = _ROPE_KEYS[rope_type]
    given = {key: given[key] for key in keys if given.get(key) is not None}
    if rope_type in ("linear", "llama3") and len(given) < len(keys):
        missing = ", ".join(key for key in keys if key not in given)
        raise ConfigError(f"config.json has rope_type {rope_type!r} but lacks its {missing}")
    position = _positive(raw, "max_position_embeddings", family.max_position)
    original = int(given.pop("original_max_position_embeddings", position))
    if rope_type == "dynamic":
        if max_seq_len is None or max_seq_len > original:
            raise UnsupportedModelError(
                "config.json has rope_type 'dynamic', which minisrv supports only up to the "
                f"original context; run with --max-seq-len {original} or less"
            )
        return original, RopeConfig(theta=theta)
    if rope_type == "yarn":
        given.setdefault("factor", position / original)
        position = int(original * given["factor"])
    return position, RopeConfig(
        rope_type=rope_type, theta=theta, original_max_position=original, **given
    )


def _refuse_nested(rope: Json) -> None:
    """Refuse parameters per kind of layer, and of rotations in several dimensions."""
    for key, value in rope.items():
        if isinstance(value, dict | list):
            raise UnsupportedModelError(
                f"config.json has rope parameters with {key}, which minisrv does not implement"
            )


def _rope_notes(raw: Json) -> Iterator[str]:
    """What of the rotary parameters is ignored, as in transformers."""
    scaling, parameters = raw.get("rope_scaling"), raw.get("rope_parameters")
    if scaling and parameters and scaling != parameters:
        yield "of rope_parameters and rope_scaling the latter is used, as in transformers"
    given = scaling or parameters or {}
    used = _ROPE_KEYS[given.get("rope_type") or given.get("type") or "default"]
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *used}
    if ignored := sorted(given.keys() - known):
        yield f"ignored rope parameters, as in transformers: {', '.join(ignored)}"


def _check_window(config: ModelConfig, raw: Json, family: _Family) -> None:
    """Refuse a context that a sliding window of some layer would cut."""
    if (types := raw.get("layer_types")) is None:
        some_layer = raw.get("max_window_layers", 28) < config.num_layers
    else:
        some_layer = "sliding_attention" in types
    used = bool(raw.get("use_sliding_window", False))
    slides = {"never": False, "always": True, "if_used": used, "per_layer": used and some_layer}
    window = raw.get("sliding_window", 4096)
    if slides[family.window] and window is not None and window < config.max_seq_len:
        raise UnsupportedModelError(
            f"the model attends to a sliding window of {window} tokens, shorter than the context "
            f"of {config.max_seq_len}; run with --max-seq-len {window} or less"
        )


def _check_heads(config: ModelConfig) -> None:
    if config.num_heads % config.num_kv_heads:
        raise ConfigError(
            f"config.json has {config.num_heads} attention heads, not a multiple of its "
            f"{config.num_kv_heads} key-value heads"
        )
    if config.head_dim % 2:
        raise ConfigError(f"config.json has head_dim {config.head_dim}; it must be even")


def _moe(raw: Json) -> MoeConfig:
    num_experts = _positive(raw, "num_experts", raw.get("num_local_experts"))
    if raw.get("num_local_experts") not in (None, num_experts):
        raise ConfigError("config.json has different num_experts and num_local_experts")
    per_token = _positive(raw, "num_experts_per_tok")
    if per_token > num_experts:
        raise ConfigError(f"config.json selects {per_token} of {num_experts} experts per token")
    step = _positive(raw, "decoder_sparse_step", 1)
    dense = set(raw.get("mlp_only_layers") or ())
    return MoeConfig(
        num_experts=num_experts,
        num_experts_per_token=per_token,
        intermediate_size=_positive(raw, "moe_intermediate_size"),
        norm_topk_prob=bool(raw.get("norm_topk_prob", False)),
        sparse_layers=frozenset(
            layer
            for layer in range(_positive(raw, "num_hidden_layers"))
            if layer not in dense and (layer + 1) % step == 0
        ),
    )


def _token_ids(key: str, *sources: Json) -> tuple[int, ...]:
    """The ids in the first source that sets `key`, without duplicates."""
    value: Any = next((source[key] for source in sources if source.get(key) is not None), [])
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise ConfigError(f"the checkpoint has the invalid {key} {value!r}")
    return tuple(dict.fromkeys(ids))
