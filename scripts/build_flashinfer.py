"""Compile the FlashInfer modules that minisrv uses in one run of ninja; --list prints their names.

Otherwise FlashInfer compiles them one by one, each at its first use. The compiled modules are in
FlashInfer's cache, under FLASHINFER_WORKSPACE_BASE.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from minisrv.engine.backends import FLASHINFER_DTYPES, FLASHINFER_HEAD_DIMS


def module_specs(head_dims: list[int], dtype: torch.dtype) -> list[Any]:
    """Norms, the activation and, per head size, the attention of both prompts and decodes."""
    from flashinfer.jit import gen_act_and_mul_module, gen_batch_prefill_module
    from flashinfer.jit.norm import gen_norm_module

    specs = [gen_norm_module(), gen_act_and_mul_module("silu")]
    for head_dim in head_dims:
        types = (dtype, dtype, dtype, torch.int32)
        # No position encoding, no sliding window, no soft cap, no 16-bit reduction.
        specs.append(
            gen_batch_prefill_module("fa2", *types, head_dim, head_dim, 0, False, False, False)
        )
    return specs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--head-dims", type=int, nargs="+", choices=FLASHINFER_HEAD_DIMS)
    parser.add_argument("--dtype", choices=[str(d)[6:] for d in FLASHINFER_DTYPES])
    parser.add_argument("--list", action="store_true", help="print the names and compile nothing")
    args = parser.parse_args()
    # FlashInfer looks for ninja on PATH; pip installs it next to the interpreter.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    specs = module_specs(args.head_dims or [64, 128], getattr(torch, args.dtype or "bfloat16"))
    for spec in specs:
        print(spec.name)
    if args.list:
        return 0
    from flashinfer.jit import build_jit_specs

    began = time.perf_counter()
    build_jit_specs(specs)
    print(f"compiled in {time.perf_counter() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
