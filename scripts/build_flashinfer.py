"""Compile the FlashInfer modules that minisrv uses in one run of ninja.

    scripts/build_flashinfer.py                       # what scripts/gpu_check.sh asks for
    scripts/build_flashinfer.py --head-dims 128 --kv-dtypes auto fp8
    scripts/build_flashinfer.py --decode-kernels cuda_core
    scripts/build_flashinfer.py --output .aot         # for Hopper, on any machine with nvcc
    scripts/build_flashinfer.py --prebuilt .aot       # take from there, compile the rest

Otherwise FlashInfer compiles them one by one, each at its first use. What is compiled is kept in
FlashInfer's cache, under FLASHINFER_WORKSPACE_BASE. --output needs no GPU; the modules are for
compute capability 9.0 and this version of FlashInfer, and --prebuilt copies them to where
FlashInfer loads them without ninja or nvcc.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from minisrv.engine.backends import FLASHINFER_DTYPES, FLASHINFER_HEAD_DIMS
from minisrv.engine.cuda_paths import find_cuda
from minisrv.engine.flashinfer_library import import_flashinfer

HOPPER = "9.0a"
MADE_FOR = "made_for.json"
KV_DTYPES = {"auto": None, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True, slots=True)
class Attention:
    """One module, for prompts and for decodes, with any number of heads and any page size."""

    dtype: str
    kv_dtype: str
    head_dim: int

    def __str__(self) -> str:
        return f"{self.dtype}-{self.kv_dtype}-{self.head_dim}"


@dataclass(frozen=True, slots=True)
class Decode:
    """The module of a kernel of --decode-kernel other than fa2, which needs none of its own.

    Those for XQA support pages of `page_size` tokens and `group` query heads per key head.
    """

    kernel: str
    attention: Attention
    group: int | None = None
    page_size: int = 16

    def __str__(self) -> str:
        return f"{self.kernel}-{self.attention}{f'-group{self.group}' * bool(self.group)}"


# What scripts/gpu_check.sh runs, the most important first.
CHECKED = (
    Attention("bfloat16", "auto", 128),
    Attention("bfloat16", "auto", 64),
    Attention("bfloat16", "fp8", 128),
    Attention("float16", "auto", 128),
    Attention("bfloat16", "auto", 256),
)
CHECKED_DECODES = (
    Decode("cuda_core", Attention("bfloat16", "auto", 128)),
    Decode("cuda_core", Attention("bfloat16", "fp8", 128)),
    *(Decode("xqa", Attention("bfloat16", "auto", 128), group) for group in (2, 4, 5, 8)),
    Decode("xqa", Attention("bfloat16", "fp8", 128), 2),
)


def module_specs(modules: Iterable[Attention], decodes: Iterable[Decode] = ()) -> list[Any]:
    """Norms, the activation and attention, in FlashInfer's own terms."""
    from flashinfer.jit import gen_act_and_mul_module, gen_batch_prefill_module
    from flashinfer.jit.norm import gen_norm_module

    specs = [gen_norm_module(), gen_act_and_mul_module("silu")]
    # No position encoding, no sliding window, no soft cap, no 16-bit reduction.
    specs += [
        gen_batch_prefill_module("fa2", *_types_and_sizes(module), 0, False, False, False)
        for module in modules
    ]
    return specs + [decode_spec(decode) for decode in decodes]


def decode_spec(decode: Decode) -> Any:
    """The module of a decode kernel, in FlashInfer's own terms."""
    from flashinfer.jit import gen_batch_decode_module
    from flashinfer.jit.xqa import gen_xqa_module

    types_and_sizes = _types_and_sizes(decode.attention)
    if decode.kernel == "cuda_core":
        return gen_batch_decode_module(*types_and_sizes, 0, False, False)
    query, cache, out, _, head_dim, _ = types_and_sizes
    # No sliding window, one query per sequence.
    return gen_xqa_module(query, cache, decode.page_size, head_dim, decode.group, False, out)


def _types_and_sizes(module: Attention) -> tuple[Any, ...]:
    """Of queries, cache, output and indices; head sizes."""
    dtype = getattr(torch, module.dtype)
    types = (dtype, KV_DTYPES[module.kv_dtype] or dtype, dtype, torch.int32)
    return (*types, module.head_dim, module.head_dim)


def made_for() -> dict[str, str]:
    """What compiled modules depend on; not on torch, whose library they do not call."""
    packages = ("flashinfer-python", "apache-tvm-ffi")
    return {"capability": HOPPER, **{name: version(name) for name in packages}}


def cross_build(specs: list[Any], output: Path) -> None:
    """Compile for Hopper and copy to `output`, as NAME/NAME.so each."""
    from flashinfer.jit import build_jit_specs

    build_jit_specs(specs, skip_prebuilt=False)
    for spec in specs:
        (output / spec.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(spec.jit_library_path, output / spec.name)
    (output / MADE_FOR).write_text(json.dumps(made_for(), indent=1) + "\n")
    sizes = {spec.name: spec.jit_library_path.stat().st_size for spec in specs}
    for name, size in sizes.items():
        print(f"{size / 2**20:8.2f} MiB  {name}")
    print(f"{sum(sizes.values()) / 2**20:8.2f} MiB  together")


def unsuitable(prebuilt: Path, capability: tuple[int, int]) -> str | None:
    """Why the modules in `prebuilt` cannot be used with this GPU and this FlashInfer, or None."""
    if not (prebuilt / MADE_FOR).exists():
        return f"there are no compiled modules in {prebuilt}"
    if f"{capability[0]}.{capability[1]}a" != HOPPER:
        return f"the compiled modules are for {HOPPER}; this GPU is {capability[0]}.{capability[1]}"
    theirs, ours = json.loads((prebuilt / MADE_FOR).read_text()), made_for()
    different = [
        f"{name} {theirs[name]} instead of {ours[name]}"
        for name in ours
        if theirs[name] != ours[name]
    ]
    return f"the compiled modules are for {', '.join(different)}" if different else None


def install(prebuilt: Path, specs: list[Any]) -> int:
    """Copy the modules that are in `prebuilt` to where FlashInfer looks first; returns how many."""
    count = 0
    for spec in specs:
        source = prebuilt / spec.name / f"{spec.name}.so"
        if source.exists():
            spec.aot_path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, spec.aot_path)
            count += 1
    return count


def link_without_driver(folder: Path) -> None:
    """Let the linker find a libcuda.so where there is no driver: an empty one of the same name."""
    folder.mkdir(parents=True, exist_ok=True)
    name = ["-shared", "-Wl,-soname,libcuda.so.1", "-o", str(folder / "libcuda.so")]
    compiler = os.environ.get("CXX", "c++")
    subprocess.run([compiler, "-x", "c++", "/dev/null", *name], check=True)
    given = os.environ.get("FLASHINFER_EXTRA_LDFLAGS", "")
    os.environ["FLASHINFER_EXTRA_LDFLAGS"] = f"{given} -L{folder}".strip()


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--head-dims", type=int, nargs="+", choices=FLASHINFER_HEAD_DIMS)
    parser.add_argument("--dtypes", nargs="+", choices=[str(d)[6:] for d in FLASHINFER_DTYPES])
    parser.add_argument("--kv-dtypes", nargs="+", choices=KV_DTYPES)
    kernels = sorted({decode.kernel for decode in CHECKED_DECODES})
    parser.add_argument(
        "--decode-kernels",
        nargs="+",
        choices=kernels,
        help="the modules that the checks of these kernels need",
    )
    parser.add_argument("--list", action="store_true", help="print the names and compile nothing")
    parser.add_argument("--output", type=Path, help="compile for Hopper into this folder")
    parser.add_argument("--prebuilt", type=Path, help="use the modules that --output made")
    return parser.parse_args()


def chosen_modules(args: argparse.Namespace) -> tuple[list[Attention], list[Decode]]:
    """Without options, all that are checked."""
    sizes = args.head_dims or args.dtypes or args.kv_dtypes
    if not (sizes or args.decode_kernels):
        return list(CHECKED), list(CHECKED_DECODES)
    options = (args.dtypes or ["bfloat16"], args.kv_dtypes or ["auto"], args.head_dims or [64, 128])
    modules = [Attention(*values) for values in itertools.product(*options)] if sizes else []
    chosen = args.decode_kernels or ()
    return modules, [decode for decode in CHECKED_DECODES if decode.kernel in chosen]


def main() -> int:
    args = read_arguments()
    # FlashInfer looks for ninja on PATH; pip installs it next to the interpreter.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    if args.output:
        os.environ["FLASHINFER_CUDA_ARCH_LIST"] = HOPPER
        if find_cuda().driver is None:
            link_without_driver(args.output.resolve() / "no_driver")
    import_flashinfer()
    specs = module_specs(*chosen_modules(args))
    if args.list:
        print("\n".join(spec.name for spec in specs))
        return 0
    began = time.perf_counter()
    if args.output:
        cross_build(specs, args.output)
    else:
        from flashinfer.jit import build_jit_specs

        if args.prebuilt:
            reason = unsuitable(args.prebuilt, torch.cuda.get_device_capability())
            print(reason or f"{install(args.prebuilt, specs)} of {len(specs)} need no compiler")
        build_jit_specs(specs)
    print(f"{len(specs)} modules in {time.perf_counter() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
