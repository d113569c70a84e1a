"""What a grammar costs per token: python benchmark/micro/structured_output.py [--results FILE].

Runs the same requests with and without a JSON schema, alternating, on the model of
`benchmark/model.py`, all requests at once. The schema is an endless array of objects, so both kinds
of run generate the same number of tokens; the masks are those of names, strings and numbers.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from minisrv import LLM, Grammar, SamplingParams
from model import make_model

SCHEMA = {
    "type": "array",
    "minItems": 10_000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 20},
            "score": {"type": "number"},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 8}, "maxItems": 3},
        },
        "required": ["name", "score", "tags"],
        "additionalProperties": False,
    },
}
TARGET = 0.10


def run(
    llm: LLM, batch: int, tokens: int, grammar: Grammar | None, clock: Callable[[], float]
) -> float:
    """Milliseconds per step of `batch` tokens."""
    params = SamplingParams(
        temperature=1.0, seed=1, max_tokens=tokens, ignore_eos=True, grammar=grammar
    )
    prompts = [[i, *range(1, 32)] for i in range(batch)]
    start = clock()
    outputs = llm.generate_outputs(prompts, params, use_tqdm=False)
    elapsed = clock() - start
    assert all(len(output.outputs[0].token_ids) == tokens for output in outputs)
    return elapsed / tokens * 1e3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument(
        "--threads", type=int, help="CPU threads of the engine (default: all cores)"
    )
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    # With one thread, its CPU time is measured: other work on the machine does not lengthen it.
    clock = time.thread_time if args.threads == 1 else time.perf_counter
    what = "CPU time of the one thread" if args.threads == 1 else "wall time"
    grammar = Grammar.json_schema(SCHEMA)
    free: list[float] = []
    held: list[float] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        LLM(make_model(Path(folder) / "tiny"), num_threads=args.threads) as llm,
    ):
        for kind in (None, grammar):
            run(llm, args.batch, 20, kind, clock)
        for _ in range(args.runs):
            free.append(run(llm, args.batch, args.tokens, None, clock))
            held.append(run(llm, args.batch, args.tokens, grammar, clock))
    overhead = statistics.median(b / a - 1 for a, b in zip(free, held, strict=True))
    table = (
        "| batch | without, ms per step | with a schema, ms per step | overhead, median of pairs "
        "| target |\n"
        "|---|---|---|---|---|\n"
        f"| {args.batch} | {statistics.median(free):.2f} | {statistics.median(held):.2f} "
        f"| {overhead:.1%} | {TARGET:.0%} |"
    )
    print(table)
    if args.results:
        option = "" if args.threads is None else f"--threads {args.threads}"
        args.results.write_text(
            f"# What a grammar costs per token, {date.today()}\n\n"
            f"`python benchmark/micro/structured_output.py {option}`: {what}, medians of "
            f"{args.runs} runs of {args.tokens} tokens each. {platform.machine()}, "
            f"Python {platform.python_version()}, torch {version('torch')}, "
            f"llguidance {version('llguidance')}.\n\n{table}\n"
        )
    return 0 if overhead < TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
