"""GGUF files from the random checkpoints, written with the package `gguf` as llama.cpp does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from minisrv.checkpoint.model_config import ModelConfig
from minisrv.engine.weights import Weights
from tests.support.checkpoints import CHAT_TEMPLATE, EOS_ID, SPECIAL_TOKENS

_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
}
Kind = gguf.GGMLQuantizationType


def write_gguf(
    model_dir: Path,
    path: Path,
    kind: Kind = Kind.F32,
    metadata: dict[str, Any] | None = None,
    tensors: bool = True,
    others: Mapping[str, Kind] = MappingProxyType({}),
) -> Path:
    """The checkpoint in `model_dir` as the GGUF file `path`, its matrices of type `kind`.

    metadata: entries that are added or, with None, left out. others: types of the matrices whose
    names end so.
    """
    config = AutoConfig.from_pretrained(model_dir)
    arch = _ARCHITECTURES[config.model_type]
    writer = _Writer(path, gguf.MODEL_ARCH_NAMES[arch], metadata or {})
    _add_config(writer, config)
    add_tokenizer(writer, model_dir)
    if tensors:
        for name, tensor in gguf_tensors(model_dir).items():
            of_this = next((k for end, k in others.items() if name.endswith(end)), kind)
            _add_tensor(writer, name, tensor, of_this)
    writer.finish()
    return path


class _Writer(gguf.GGUFWriter):
    """Leaves out what `changes` sets to None, and adds the rest of it."""

    def __init__(self, path: Path, arch: str, changes: dict[str, Any]) -> None:
        super().__init__(path, arch)
        self._changes = changes

    def finish(self) -> None:
        for key, value in self._changes.items():
            for entries in self.kv_data:
                entries.pop(key, None)
            if value is not None:
                kind = gguf.GGUFValueType.get_type(value)
                self.add_key_value(key, value, kind)
        self.write_header_to_file()
        self.write_kv_data_to_file()
        self.write_tensors_to_file()
        self.close()


def _add_config(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    rope = config.rope_parameters
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    if head_dim := getattr(config, "head_dim", None):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if config.model_type == "qwen3_moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def add_tokenizer(writer: gguf.GGUFWriter, model_dir: Path) -> None:
    """The vocabulary of `make_tokenizer`."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    kinds = [
        gguf.TokenType.CONTROL if token in SPECIAL_TOKENS else gguf.TokenType.NORMAL
        for token, _ in vocabulary
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    # A file cannot have an empty list of merges: the last filler becomes two bytes of 0.
    zero = "\u0100"
    writer.add_token_list([*(token for token, _ in vocabulary[:-1]), zero * 2])
    writer.add_token_types(kinds)
    writer.add_token_merges([f"{zero} {zero}"])
    writer.add_eos_token_id(EOS_ID)
    writer.add_chat_template(CHAT_TEMPLATE)


def gguf_tensors(model_dir: Path) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """The tensors of the checkpoint in float32 by their names in GGUF, as llama.cpp has them."""
    config = AutoConfig.from_pretrained(model_dir)
    names = gguf.get_tensor_name_map(_ARCHITECTURES[config.model_type], config.num_hidden_layers)
    tensors: dict[str, Any] = {}
    experts: dict[str, list[torch.Tensor]] = {}
    for file in sorted(model_dir.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            part, _, suffix = name.rpartition(".")
            if ".experts." in part:
                stem, _, rest = part.partition(".experts.")
                number, _, last = rest.partition(".")
                stacked = experts.setdefault(f"{stem}.experts.{last}", [])
                stacked += [torch.empty(0)] * (config.num_experts - len(stacked))
                stacked[int(number)] = tensor
                continue
            if config.model_type in ("llama", "mistral") and part.endswith(("q_proj", "k_proj")):
                tensor = _neighbours(tensor, config.head_dim)
            tensors[f"{names.get_name(part)}.{suffix}"] = tensor
    for part, parts in experts.items():
        tensors[f"{names.get_name(part)}.weight"] = torch.stack(parts)
    if config.rope_parameters["rope_type"] == "llama3":
        tensors["rope_freqs.weight"] = _llama3_factors(config)
    return {name: tensor.float().numpy() for name, tensor in tensors.items()}


def _neighbours(tensor: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The two halves of each head, one row of the first, one of the second, and so on."""
    halves = tensor.unflatten(0, (-1, 2, head_dim // 2))
    return halves.transpose(1, 2).reshape(tensor.shape)


def in_halves(tensor: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The reverse of `_neighbours`."""
    pairs = tensor.unflatten(0, (-1, head_dim // 2, 2))
    return pairs.transpose(1, 2).reshape(tensor.shape)


def _llama3_factors(config: PretrainedConfig) -> torch.Tensor:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    exponents = torch.arange(0, config.head_dim, 2) / config.head_dim
    return 1.0 / config.rope_parameters["rope_theta"] ** exponents / scaled


def _add_tensor(
    writer: gguf.GGUFWriter, name: str, tensor: np.ndarray[Any, Any], kind: Kind
) -> None:
    """As llama.cpp does, vectors and the router stay in float32."""
    if tensor.ndim == 1 or kind is Kind.F32 or "ffn_gate_inp" in name:
        writer.add_tensor(name, np.ascontiguousarray(tensor))
        return
    quantized = gguf.quants.quantize(tensor, kind)
    writer.add_tensor(name, quantized, raw_dtype=kind)


def read_back(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The tensors of a file in float32, by the package's own reader."""
    reader = gguf.GGUFReader(path)
    return {
        one.name: gguf.quants.dequantize(one.data, one.tensor_type).astype(np.float32)
        for one in reader.tensors
    }


def dequantized_checkpoint(model_dir: Path, path: Path, kind: Kind) -> Path:
    """A copy of the checkpoint whose matrices have been rounded to `kind` and back."""
    path.mkdir()
    for file in model_dir.iterdir():
        if file.suffix == ".json" and "index" not in file.name:
            (path / file.name).write_text(file.read_text())
    from safetensors.torch import save_file

    rounded = {}
    for file in sorted(model_dir.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            value = tensor.float().numpy()
            if tensor.dim() > 1 and not name.endswith("mlp.gate.weight"):
                value = gguf.quants.dequantize(gguf.quants.quantize(value, kind), kind)
            rounded[name] = torch.from_numpy(value.reshape(tensor.shape).copy())
    save_file(rounded, path / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**raw, "dtype": "float32"}))
    return path


def split_gguf(path: Path, folder: Path, count: int) -> list[Path]:
    """The model in `path` as `count` files, the metadata in the first one, as llama.cpp does."""
    reader = gguf.GGUFReader(path)
    share = -(-len(reader.tensors) // count)
    paths = []
    for number in range(count):
        paths.append(folder / f"{path.stem}-{number + 1:05}-of-{count:05}.gguf")
        writer = gguf.GGUFWriter(paths[-1], reader.fields["general.architecture"].contents())
        for key, field in reader.fields.items() if number == 0 else ():
            if not key.startswith("GGUF.") and key != "general.architecture":
                kind, *parts = field.types
                writer.add_key_value(key, field.contents(), kind, parts[0] if parts else None)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in reader.tensors[number * share : (number + 1) * share]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths


def take_all(weights: Weights, config: ModelConfig) -> dict[str, torch.Tensor]:
    """Every tensor that a model asks for, in float32, and that there is no other."""
    hidden, head_dim = config.hidden_size, config.head_dim
    q_size, kv_size = config.num_heads * head_dim, config.num_kv_heads * head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    for i in range(config.num_layers):
        layer = f"model.layers.{i}"
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        for name, size in (("q", q_size), ("k", kv_size), ("v", kv_size)):
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (size, hidden)
            if config.qkv_bias:
                shapes[f"{layer}.self_attn.{name}_proj.bias"] = (size,)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (hidden, q_size)
        if config.architecture.startswith("Qwen3"):
            shapes[f"{layer}.self_attn.q_norm.weight"] = (head_dim,)
            shapes[f"{layer}.self_attn.k_norm.weight"] = (head_dim,)
        mlps, size = [f"{layer}.mlp"], config.intermediate_size
        if config.moe is not None:
            shapes[f"{layer}.mlp.gate.weight"] = (config.moe.num_experts, hidden)
            mlps = [f"{layer}.mlp.experts.{e}" for e in range(config.moe.num_experts)]
            size = config.moe.intermediate_size
        for mlp in mlps:
            shapes[f"{mlp}.gate_proj.weight"] = shapes[f"{mlp}.up_proj.weight"] = (size, hidden)
            shapes[f"{mlp}.down_proj.weight"] = (hidden, size)
    taken = {}
    for name, shape in shapes.items():
        loaded = weights.load_matrix(name, shape) if len(shape) > 1 else None
        loaded = weights.load_tensor(name, shape) if loaded is None else loaded
        taken[name] = loaded if isinstance(loaded, torch.Tensor) else loaded.dequantized()
    weights.finish()
    return taken
