"""`minisrv plan`: its tables, its parameter counts beside transformers', and advice that works."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from minisrv.checkpoint.model_config import load_model_config
from minisrv.commands import cli
from minisrv.commands.plan import Deployment, advise, fits, load_model, make_plan
from minisrv.config import ServerConfig
from minisrv.engine.engine import Engine
from minisrv.engine.gpus import find_gpu
from minisrv.engine.model_size import count_parameters
from minisrv.engine.parallel.shard import Sharding
from minisrv.errors import ConfigError
from tests.support.checkpoints import ARCHITECTURES, make_checkpoint

ROOT = Path(__file__).parent.parent.parent
GOLDEN = Path(__file__).parent / "tables.txt"
MODELS = [
    ROOT / "benchmark/models/Qwen3-0.6B",
    ROOT / "benchmark/models/Qwen3-8B",
    ROOT / "benchmark/models/Qwen3-14B",
    ROOT / "tests/configs/Llama-3.1-8B",
    ROOT / "tests/configs/Qwen3-30B-A3B",
]
CASES = [part.split("\n", 1) for part in GOLDEN.read_text().split("$ minisrv plan ")[1:]]


def plan(command: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    status = cli.main(["plan", *shlex.split(command)])
    printed = capsys.readouterr()
    return status, printed.out + printed.err


@pytest.mark.parametrize(("command", "table"), CASES, ids=[command for command, _ in CASES])
def test_the_tables_are_as_recorded(
    command: str,
    table: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    status, text = plan(command, capsys)
    assert f"{text}exit status {status}" == table.strip()


@pytest.mark.parametrize("directory", MODELS, ids=lambda path: path.name)
def test_parameters_are_those_of_transformers(directory: Path) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    # Tied parameters are given once.
    expected = sum(parameter.numel() for parameter in model.parameters())
    assert count_parameters(load_model_config(directory)).total == expected


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_engine_takes_the_planned_bytes(
    tmp_path: Path, arch: str, tied: bool, bias: bool
) -> None:
    variant: dict[str, Any] = {"tie_word_embeddings": tied}
    if bias and arch in ("llama", "qwen3"):
        variant["attention_bias"] = True
    if bias and arch == "llama":
        variant["mlp_bias"] = True
    path = make_checkpoint(tmp_path, arch, **variant)
    model = load_model_config(path)
    config = ServerConfig(model=str(path), load_format="dummy", num_pages=4, num_threads=1)
    engine = Engine(config, path, model)
    planned = make_plan(Deployment(model, config, 2**34))
    assert engine.memory_plan.weights == planned.weights
    assert engine.memory_plan.page_bytes == planned.page_bytes
    assert engine.memory_plan.token_counts == planned.token_counts == 256 * 2 * model.vocab_size


@pytest.mark.parametrize("same", [False, True])
def test_a_tied_head_is_counted_if_the_files_have_other_values_for_it(
    tmp_path: Path, same: bool
) -> None:
    path = make_checkpoint(tmp_path, "llama", tie_word_embeddings=True)
    tensors = load_file(path / "model.safetensors")
    table = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = table.clone() if same else table.roll(1, 0).contiguous()
    save_file(tensors, path / "model.safetensors")
    model = load_model(path, None)
    config = ServerConfig(model=str(path), num_pages=4, num_threads=1)
    engine = Engine(config, path, load_model_config(path))
    assert engine.memory_plan.weights == make_plan(Deployment(model, config, 2**34)).weights
    assert model.tie_word_embeddings == same


@pytest.mark.parametrize("directory", MODELS, ids=lambda path: path.name)
@pytest.mark.parametrize("tp", [2, 4, 8])
def test_ranks_share_all_but_norms_routers_and_repeated_heads(directory: Path, tp: int) -> None:
    model = load_model_config(directory)
    whole = count_parameters(model)
    ranks = [count_parameters(model, Sharding(rank, tp)) for rank in range(tp)]
    assert sum(rank.embedding for rank in ranks) == whole.embedding
    assert sum(rank.experts for rank in ranks) == whole.experts
    assert {rank.vectors for rank in ranks} == {whole.vectors}
    heads = max(0, tp - model.num_kv_heads) * 2 * model.head_dim
    routers = 0 if model.moe is None else (tp - 1) * model.moe.num_experts
    repeated = model.num_layers * model.hidden_size * (heads + routers)
    assert sum(rank.matrices for rank in ranks) == whole.matrices + repeated


@pytest.mark.parametrize("memory", ["10GiB", "16GiB", "20GiB", "24GiB", "31GiB", "33GiB", "48GiB"])
@pytest.mark.parametrize("directory", MODELS, ids=lambda path: path.name)
def test_what_is_advised_makes_it_fit(
    directory: Path, memory: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = f"{directory} --gpu-memory {memory}"
    status, text = plan(command, capsys)
    if status == 0:
        return
    assert status == 2
    if "use a GPU with more memory" in text:
        return
    options = re.findall(r"--[a-z-]+ \S+", text.split("run with ")[1])
    assert options
    for option in options:
        assert plan(f"{command} {option}", capsys)[0] == 0, option


def test_the_older_names_of_the_flags_still_work(capsys: pytest.CaptureFixture[str]) -> None:
    for older, newer in (("--card l4", "--gpu l4"), ("--card-memory 24G", "--gpu-memory 24G")):
        assert plan(f"{MODELS[0]} {older}", capsys) == plan(f"{MODELS[0]} {newer}", capsys)


def test_a_lower_context_is_advised_where_the_cache_is_short(
    capsys: pytest.CaptureFixture[str],
) -> None:
    status, text = plan(f"{MODELS[1]} --gpu 'RTX 4090'", capsys)
    assert status == 2
    assert "does not fit: the cache holds 30544 tokens, one full context is 40960" in text
    assert "run with --tp 2 or --max-seq-len 30544" in text


def test_a_smaller_prefill_budget_is_advised_where_it_is_enough() -> None:
    model = load_model_config(MODELS[2], 4096)
    config = ServerConfig(max_prefill_tokens=32768, max_running_requests=8)
    deployment = Deployment(model, config, 34 * 2**30)
    assert not fits(deployment)
    assert "--max-prefill-tokens 8192" in advise(deployment)
    assert fits(replace(deployment, config=replace(config, max_prefill_tokens=8192)))


def test_pages_that_are_asked_for_must_fit(capsys: pytest.CaptureFixture[str]) -> None:
    command = f"{MODELS[0]} --gpu l4 --num-pages"
    assert plan(f"{command} 3000", capsys)[0] == 0
    status, text = plan(f"{command} 30000", capsys)
    assert status == 2
    assert re.search(r"the cache has room for \d+ of the 30000 pages of --num-pages", text)
    value = re.search(r"run with --num-pages (\d+)", text)
    assert value is not None
    assert plan(f"{command} {value[1]}", capsys)[0] == 0


def test_fp8_checkpoints_are_planned_at_the_most_that_they_can_take(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = json.loads((MODELS[1] / "config.json").read_text())
    raw["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    status, text = plan(f"{tmp_path} --gpu h200", capsys)
    assert status == 0
    assert "8,190,735,360 parameters, FP8 in the checkpoint, counted as bfloat16" in text
    assert "weights       15.26 GiB" in text


def test_an_fp8_cache_holds_twice_the_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    plain, halved = (
        plan(f"{MODELS[1]} --gpu l40s --kv-cache-dtype {name}", capsys) for name in ("auto", "fp8")
    )
    pages = [int(re.search(r"(\d+) pages", text)[1]) for _, text in (plain, halved)]  # type: ignore[index]
    assert abs(pages[1] - 2 * pages[0]) <= 1


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("demo --gpu abacus", "--gpu is 'abacus'; known GPUs are B200, H200, H100 80GB"),
        ("demo --gpu-memory much", "invalid size 'much'"),
        ("/nowhere/at/all --gpu l4", "no such directory"),
        (f"{MODELS[2]} --gpu l4 --tp 3", "40 attention heads cannot be split into 3"),
    ],
)
def test_a_wrong_option_ends_with_a_sentence(
    command: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, text = plan(command, capsys)
    assert status == 2
    assert sentence in text


@pytest.mark.parametrize("name", ["H100", "h100-80gb", "NVIDIA H100 80GB"])
def test_a_gpu_is_found_however_it_is_written(name: str) -> None:
    assert find_gpu(name).name == "H100 80GB"


def test_a_gpu_must_be_named() -> None:
    with pytest.raises(ConfigError):
        find_gpu("")
    done = subprocess.run(
        [sys.executable, "-m", "minisrv", "plan", "demo"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "one of the arguments --gpu/--card --gpu-memory/--card-memory is required" in done.stderr
