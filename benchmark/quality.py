"""What quantization costs in quality: python benchmark/quality.py REFERENCE [FILE ...].

Perplexity on text that ships with Python, and the KL divergence from float32, of minisrv and, with
--llama-python, of llama.cpp: once with one token per step, as in decoding, and once with all tokens
of a text in one step, as in prefill. REFERENCE is the folder of a checkpoint or a GGUF file, FILE a
GGUF file with the same vocabulary. transformers computes both in float32: the divergence from
REFERENCE shows all that a file and an engine lose, and the divergence from the file itself only
what the engine loses.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from minisrv.checkpoint.model_config import load_model_config
from minisrv.config import ServerConfig
from minisrv.engine.engine import Engine
from minisrv.engine.forward_batch import ForwardBatch, LogprobColumns, SamplingColumns
from run import describe_cpu

WINDOW = 500  # tokens of a text
Windows = Sequence[Sequence[int]]
HEADER = (
    "| weights | computed by | tokens per step | perplexity | KL from the reference "
    "| KL from the same weights in float32 | best token as in the reference |\n" + "|---" * 7 + "|"
)


@dataclass(frozen=True, slots=True)
class Score:
    """Means over all tokens. kl: from the reference; own_kl: from the same weights in float32."""

    perplexity: float
    kl: float
    own_kl: float | None
    agreement: float

    def cells(self) -> list[str]:
        """The cells of the table."""
        own = "" if self.own_kl is None else f"{self.own_kl:.2e}"
        return [f"{self.perplexity:.3f}", f"{self.kl:.2e}", own, f"{self.agreement:.2%}"]


def score(
    logprobs: Iterator[Tensor],
    windows: Windows,
    reference: Sequence[Tensor],
    own: Sequence[Tensor] | None = None,
) -> Score:
    """Compare logprobs [L, V], one tensor for each window, with those of the reference."""
    losses, kl, own_kl, same = [], [], [], []
    for index, window_LV in enumerate(logprobs):
        ids = torch.tensor(windows[index][1:])
        losses.append(-window_LV[:-1].gather(1, ids[:, None]).double())
        kl.append(divergence(reference[index], window_LV))
        if own is not None:
            own_kl.append(divergence(own[index], window_LV))
        same.append((reference[index].argmax(-1) == window_LV.argmax(-1)).double())
    assert len(losses) == len(windows)
    return Score(
        perplexity=float(torch.cat(losses).mean().exp()),
        kl=float(torch.cat(kl).mean()),
        own_kl=float(torch.cat(own_kl).mean()) if own is not None else None,
        agreement=float(torch.cat(same).mean()),
    )


def divergence(exact_LV: Tensor, logprobs_LV: Tensor) -> Tensor:
    """KL divergence [L] of each row from the exact one."""
    return (exact_LV.exp() * (exact_LV - logprobs_LV)).sum(-1, dtype=torch.float64)


def read_windows(reference: Path, num_tokens: int) -> list[list[int]]:
    """Texts of Python's own help, of WINDOW tokens each, in the reference's tokens."""
    tokenizer = AutoTokenizer.from_pretrained(**_source(reference))
    text = "\n".join(topics[name] for name in sorted(topics))
    ids = tokenizer(text[: 20 * num_tokens])["input_ids"][:num_tokens]
    assert len(ids) == num_tokens
    return [ids[start : start + WINDOW] for start in range(0, num_tokens, WINDOW)]


def exact_logprobs(file: Path, windows: Windows) -> list[Tensor]:
    """Those of transformers in float32, from dequantized weights if the file has others."""
    options = {"quantization_config": GgufConfig(dequantize=True)} if file.is_file() else {}
    model = AutoModelForCausalLM.from_pretrained(
        **_source(file), **options, dtype=torch.float32
    ).eval()
    with torch.inference_mode():
        return [model(torch.tensor([ids])).logits[0].log_softmax(-1) for ids in windows]


def _source(model: Path) -> dict[str, Any]:
    """The arguments that name a model for transformers."""
    if model.is_dir():
        return {"pretrained_model_name_or_path": model}
    return {"pretrained_model_name_or_path": model.parent, "gguf_file": model.name}


def engine_logprobs(
    model: Path, windows: Windows, step_tokens: int, **options: Any
) -> Iterator[Tensor]:
    """Those of minisrv's engine, [L, V] for each window."""
    config = ServerConfig(model=str(model), device="cpu", max_running_requests=1, **options)
    model_config = load_model_config(model, WINDOW + 1)
    engine = Engine(config, model, model_config)
    num_vocab = model_config.vocab_size
    for ids in windows:
        window_LV = torch.empty(len(ids), num_vocab)
        for start in range(0, len(ids), step_tokens):
            chunk = ids[start : start + step_tokens]
            batch = _step(engine.page_size, start, chunk, num_vocab)
            logprobs = engine.wait(engine.launch(batch)).logprobs
            assert logprobs is not None
            order = torch.from_numpy(logprobs.top_ids).long()
            rows = window_LV[start : start + len(chunk)]
            rows.scatter_(1, order, torch.from_numpy(logprobs.top_logprobs))
        yield window_LV
    engine.close()


def _step(page_size: int, start: int, ids: Sequence[int], num_vocab: int) -> ForwardBatch:
    """The next tokens of one sequence, in the first row and pages; it asks for all logprobs."""
    none, count = np.empty(0, np.int32), len(ids)
    floats = np.empty(0, np.float32)
    pages = np.arange(-(-start // page_size), -(-(start + count) // page_size), dtype=np.int32)
    return ForwardBatch(
        step_id=0,
        num_decodes=0,
        rows=np.zeros(1, np.int32),
        query_lens=np.array([count], np.int32),
        start_positions=np.array([start], np.int32),
        prefill_ids=np.array(ids, np.int32),
        page_rows=np.zeros_like(pages),
        page_columns=pages,
        page_ids=pages,
        sample_indices=none,
        sampling=SamplingColumns(
            *(floats, floats, none, floats, none.astype(np.int64), none, none, none)
        ),
        prompt_logprob_tokens=np.arange(count, dtype=np.int32),
        logprobs=LogprobColumns(num_vocab, none, np.array(ids, np.int32)),
    )


def llama_logprobs(
    python: str, file: Path, windows: Windows, step_tokens: int, threads: int, num_vocab: int
) -> Iterator[Tensor]:
    """Those of llama.cpp, [L, V] for each window. `python` has llama-cpp-python."""
    task = {"file": str(file), "windows": windows, "step_tokens": step_tokens, "threads": threads}
    script = Path(__file__).parent / "llama_logits.py"
    with subprocess.Popen(
        [python, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(task).encode())
        process.stdin.close()
        for ids in windows:
            data = process.stdout.read(len(ids) * num_vocab * 4)
            logits = torch.frombuffer(bytearray(data), dtype=torch.float32)
            yield logits.view(len(ids), num_vocab).log_softmax(-1)


def rows(args: argparse.Namespace) -> Iterator[str]:
    """The rows of the table, as they are measured."""
    windows = read_windows(args.reference, args.tokens)
    reference = exact_logprobs(args.reference, windows)
    num_vocab = reference[0].shape[1]

    def row(
        weights: str,
        engine: str,
        step: str,
        logprobs: Iterator[Tensor],
        own: Sequence[Tensor] | None = None,
    ) -> str:
        cells = score(logprobs, windows, reference, own).cells()
        return f"| {weights} | {engine} | {step} | " + " | ".join(cells) + " |"

    yield row(args.reference.name, "transformers, float32", "all", iter(reference))
    options = {"num_threads": args.threads, "kernels": args.kernels}
    for format in args.quantization:
        for step in args.steps:
            rounded = engine_logprobs(args.reference, windows, step, quantization=format, **options)
            yield row(f"{args.reference.name} as {format}", "minisrv", str(step), rounded)
    for file in args.files:
        own = exact_logprobs(file, windows)
        yield row(file.name, "transformers, float32", "all", iter(own))
        for step in args.steps:
            ours = engine_logprobs(file, windows, step, **options)
            yield row(file.name, "minisrv", str(step), ours, own)
            if args.llama_python:
                theirs = llama_logprobs(
                    args.llama_python, file, windows, step, args.threads, num_vocab
                )
                yield row(file.name, "llama.cpp", str(step), theirs, own)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reference", type=Path, metavar="REFERENCE")
    parser.add_argument("files", type=Path, nargs="*", metavar="FILE")
    parser.add_argument(
        "--quantization", nargs="*", default=[], help="--quantization of REFERENCE in minisrv"
    )
    parser.add_argument("--kernels", default="auto", help="--kernels of minisrv")
    parser.add_argument("--llama-python", help="a Python that has llama-cpp-python")
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, WINDOW], help="tokens per step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, metavar="PAGE", help="file to write the page to")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lines = [HEADER]
    print(HEADER)
    for line in rows(args):
        print(line, flush=True)
        lines.append(line)
    if args.results:
        packages = ", ".join(
            f"{name} {version(name)}" for name in ("minisrv", "torch", "transformers")
        )
        args.results.write_text(
            f"# Quality of quantized weights, {date.today()}\n\n"
            f"`python {' '.join(sys.argv)}`\n\n{describe_cpu()}, Python "
            f"{platform.python_version()}, {packages}. {args.tokens:,} tokens of `help()` in texts "
            f"of {WINDOW}, all tokens scored.\n\n" + "\n".join(lines) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
