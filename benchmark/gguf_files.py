"""GGUF files of a model with random weights: python benchmark/gguf_files.py KIND ...

A KIND that the package gguf can write (BF16, Q8_0, Q4_0, ...) has all matrices in that type; any
other (Q4_K_M, Q5_K_M, Q6_K, ...) is made by llama.cpp's llama-quantize, which mixes types, and
needs --llama-quantize PATH. The files are written beside the model's folder, unless they exist.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import gguf
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file
from transformers import Qwen3Config

from model import END_OF_TEXT, make_model

SHAPE = Path(__file__).parent / "models" / "Qwen3-0.6B"
CACHE = Path.home() / ".cache" / "minisrv-bench" / "Qwen3-0.6B"
WRITTEN = (Kind.BF16, Kind.Q8_0, Kind.Q5_1, Kind.Q5_0, Kind.Q4_1, Kind.Q4_0)


@dataclass(frozen=True, slots=True)
class FileSize:
    """step_bytes: of the weights that a decode step reads, all but an embedding without a head.

    num_weights: how many these are. kinds: the number of tensors by type.
    """

    step_bytes: int
    num_weights: int
    kinds: dict[str, int]

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.kinds.items())
        bits = 8 * self.step_bytes / self.num_weights
        return (
            f"{self.step_bytes / 1e6:.0f} MB per decode step, {bits:.2f} bits per weight ({kinds})"
        )


def measure_file(path: Path) -> FileSize:
    """What a GGUF file holds."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    kinds = Counter(tensor.tensor_type.name for tensor in tensors.values())
    if "output.weight" in tensors:
        del tensors["token_embd.weight"]
    return FileSize(
        step_bytes=sum(int(tensor.n_bytes) for tensor in tensors.values()),
        num_weights=sum(int(tensor.n_elements) for tensor in tensors.values()),
        kinds=dict(kinds.most_common()),
    )


def make_gguf(folder: Path, kind: str, llama_quantize: str | None = None) -> Path:
    """The checkpoint in `folder`, made by `make_model`, as a GGUF file; returns its path.

    llama_quantize: the program, for a `kind` that the package gguf cannot write.
    """
    path = folder.parent / f"{folder.name}-{kind}.gguf"
    if path.exists():
        return path
    partial = path.with_suffix(".partial")
    if kind in (one.name for one in WRITTEN):
        _write(folder, Kind[kind], partial)
    elif llama_quantize is None:
        raise SystemExit(f"{path.name} can only be made with --llama-quantize")
    else:
        source = make_gguf(folder, Kind.BF16.name)
        command = [llama_quantize, str(source), str(partial), kind, str(os.cpu_count())]
        subprocess.run(command, check=True, stdout=sys.stderr)
    partial.rename(path)
    return path


def _write(folder: Path, kind: Kind, path: Path) -> None:
    config = Qwen3Config.from_pretrained(folder)
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.name}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    _add_tokenizer(writer, folder, config.eos_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config.num_hidden_layers)
    for name, tensor in load_file(folder / "model.safetensors").items():
        to = names.get_name(name, try_suffixes=(".weight",))
        values = tensor.float().numpy()
        if tensor.dim() == 1:
            writer.add_tensor(to, values)
        else:
            writer.add_tensor(to, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path, eos_token_id: int) -> None:
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([*sorted(vocabulary, key=vocabulary.__getitem__), END_OF_TEXT])
    writer.add_token_types([gguf.TokenType.NORMAL] * len(vocabulary) + [gguf.TokenType.CONTROL])
    # llama.cpp wants one. It never applies: nothing is merged into its first part.
    writer.add_token_merges(["word256 0"])
    writer.add_eos_token_id(eos_token_id)
    writer.add_add_bos_token(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="+", metavar="KIND")
    parser.add_argument("--llama-quantize", help="llama.cpp's program")
    parser.add_argument("--model-dir", type=Path, default=CACHE)
    args = parser.parse_args()
    model = make_model(args.model_dir, SHAPE)
    for kind in args.kinds:
        path = make_gguf(model, kind, args.llama_quantize)
        print(f"{path}: {measure_file(path)}")


if __name__ == "__main__":
    main()
