"""The GGUF files of the benchmarks, read by the package gguf and by transformers."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GgufConfig

BLOCK_BYTES = {"BF16": 64, "Q8_0": 34, "Q5_1": 24, "Q5_0": 22, "Q4_1": 20, "Q4_0": 18}  # of 32


@pytest.mark.parametrize("kind", BLOCK_BYTES)
def test_a_file_holds_the_model_in_its_type(kind: str, bench_model: Path) -> None:
    from gguf_files import make_gguf, measure_file

    path = make_gguf(bench_model, kind)
    assert path == bench_model.parent / f"bench-{kind}.gguf"
    weights = load_file(bench_model / "model.safetensors")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert len(tensors) == len(weights)
    embedding = weights["model.embed_tokens.weight"].float().numpy()
    stored = tensors["token_embd.weight"]
    read = gguf.dequantize(stored.data, stored.tensor_type)
    assert read.shape == embedding.shape
    step = {"BF16": 0.0, "Q8_0": 1 / 127, "Q5_1": 2 / 31, "Q4_1": 2 / 15}
    bound = step.get(kind, 1 / 8 if kind == "Q4_0" else 1 / 16) * abs(embedding).max()
    assert abs(read - embedding).max() <= bound
    size = measure_file(path)
    assert size.kinds == {kind: 15, "F32": 9}
    matrices = sum(weight.numel() for weight in weights.values() if weight.dim() == 2)
    vectors = sum(weight.numel() for weight in weights.values() if weight.dim() == 1)
    assert size.num_weights == matrices + vectors
    assert size.step_bytes == matrices // 32 * BLOCK_BYTES[kind] + 4 * vectors


def test_transformers_reads_the_same_weights(bench_model: Path) -> None:
    from gguf_files import make_gguf

    path = make_gguf(bench_model, "BF16")
    read = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    ).state_dict()
    for name, weight in load_file(bench_model / "model.safetensors").items():
        torch.testing.assert_close(read[name], weight.float(), rtol=0, atol=0)


def test_a_file_is_made_once_and_completely(
    bench_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gguf_files

    path = gguf_files.make_gguf(bench_model, "Q8_0")
    made = path.stat().st_mtime_ns
    assert gguf_files.make_gguf(bench_model, "Q8_0").stat().st_mtime_ns == made
    path.unlink()
    monkeypatch.setattr(gguf, "quantize", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gguf_files.make_gguf(bench_model, "Q8_0")
    assert not path.exists()


def test_k_types_need_llama_quantize(bench_model: Path) -> None:
    from gguf_files import make_gguf

    with pytest.raises(SystemExit, match=r"bench-Q4_K_M\.gguf can only be made with"):
        make_gguf(bench_model, "Q4_K_M")


def test_the_weights_of_a_step_are_all_without_an_embedding_beside_a_head(tmp_path: Path) -> None:
    from gguf_files import measure_file

    path = tmp_path / "two.gguf"
    writer = gguf.GGUFWriter(path, "qwen3")
    for name in ("token_embd.weight", "output.weight"):
        writer.add_tensor(name, torch.zeros(64, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    size = measure_file(path)
    assert (size.step_bytes, size.num_weights) == (4 * 64 * 32, 64 * 32)
    assert str(size) == "0 MB per decode step, 32.00 bits per weight (2 F32)"
