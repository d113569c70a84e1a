"""Print the demo model's held-out accuracy as a table; exit status 1 if a target is missed."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from demo_model.evaluate import TARGETS, Evaluator, makers

PACKAGE = Path(__file__).parent.parent / "python" / "minisrv" / "checkpoint" / "demo_model"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=PACKAGE)
    parser.add_argument(
        "--prompts", type=int, default=200, help="per task; half as many for 1,000 tokens"
    )
    parser.add_argument("--tasks", nargs="*", help="substrings of the names of the rows to measure")
    parser.add_argument(
        "--mistakes", type=int, default=0, help="how many mistakes to print per task"
    )
    args = parser.parse_args()
    torch.set_num_threads(2)
    evaluator = Evaluator(args.model)
    missed = 0
    print("| task | held-out accuracy | target | prompts | mean prompt tokens |")
    print("|---|---|---|---|---|")
    for name, make in makers(evaluator.pieces).items():
        if args.tasks and not any(task in name for task in args.tasks):
            continue
        count = args.prompts // 2 if "1,000" in name else args.prompts
        accuracy, length, wrong = evaluator.row(make, count)
        missed += accuracy < TARGETS[name]
        print(
            f"| {name} | {accuracy:.1%} | {TARGETS[name]:.0%} | {count} | {length:.0f} |",
            flush=True,
        )
        for prompt, answer, wanted in wrong[: args.mistakes]:
            print(f"  {prompt[-90:]!r}: {answer[:90]!r}, not {wanted[:90]!r}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
