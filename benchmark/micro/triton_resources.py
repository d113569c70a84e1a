"""Registers, shared memory and occupancy of the Triton kernels on sm_90 (H100, H200).

Compiles the kernels ahead of time as they are launched for Qwen3 models, so no GPU is needed:

    python -m benchmark.micro.triton_resources

A kernel that waits for memory needs enough loads in flight: many warps, and where it loads ahead
into shared memory (cp.async), enough bytes. The table says for each kernel what limits it, and for
those that load ahead how many bytes are in flight per SM.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import __file__ as nvidia_backend
from triton.backends.nvidia.compiler import get_ptxas_version
from triton.compiler import ASTSource

from benchmark.micro.triton_launches import Launch, all_launches

TARGET = GPUTarget("cuda", 90, 32)
# Of one SM; from the occupancy tables for compute capability 9.0 in the CUDA programming guide.
MAX_WARPS, MAX_PROGRAMS, REGISTERS, SHARED = 64, 32, 65_536, 228 * 1024
REGISTER_UNIT, SHARED_UNIT, RESERVED_SHARED = 256, 128, 1024  # allocated per warp; per program
# An H200's 4.8 TB/s over 132 SMs, times a latency of about a microsecond.
BYTES_TO_FLY = 40 * 1024


@dataclass(frozen=True, slots=True)
class Resources:
    """Of one program, and how many of them an SM holds."""

    registers: int  # per thread
    spilled: int  # bytes per thread
    shared: int  # bytes
    num_warps: int
    in_flight: int  # bytes per program that are loaded ahead
    ptx: str = field(repr=False)

    @property
    def programs(self) -> int:
        per_warp = -(-self.registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
        shared = -(-(self.shared + RESERVED_SHARED) // SHARED_UNIT) * SHARED_UNIT
        by_registers = REGISTERS // 4 // per_warp * 4 // self.num_warps
        return min(MAX_PROGRAMS, MAX_WARPS // self.num_warps, by_registers, SHARED // shared)

    @property
    def occupancy(self) -> float:
        """Warps of an SM that are in use, at most."""
        return self.programs * self.num_warps / MAX_WARPS


def compile_ahead(launch: Launch) -> Any:
    """The kernel compiled for sm_90, specialised as for the arguments of the launch."""
    signature, attributes = {}, {}
    constants = dict(launch.constants)
    for i, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments.get(name)
        if isinstance(value, str):
            signature[name] = value
            unaligned = launch.kernel.params[i].do_not_specialize_on_alignment
            aligned = value.startswith("*") and not unaligned
        elif isinstance(value, float):
            signature[name], aligned = "fp32", False
        elif value is None:
            signature[name], aligned = "constexpr", False
            constants.setdefault(name, None)
        else:
            signature[name] = "i32"
            aligned = value % 16 == 0 and not launch.kernel.params[i].do_not_specialize
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    return triton.compile(source, target=TARGET, options=options)


def measure(launch: Launch) -> Resources:
    """Compiles the kernel and reads what it needs from its binary."""
    built = compile_ahead(launch)
    tool = Path(nvidia_backend).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", shown)}
    return Resources(
        registers=found["REG"],
        spilled=found["STACK"] + found["LOCAL"],
        shared=built.metadata.shared,
        num_warps=launch.num_warps,
        in_flight=min(launch.bytes_per_stage * (launch.num_stages - 1), built.metadata.shared),
        ptx=built.asm["ptx"],
    )


def main() -> None:
    ptxas = re.findall(r"V(\d\S+)", get_ptxas_version(90))[0]
    print(f"triton {triton.__version__}, ptxas {ptxas}, for sm_90\n")
    titles = ("kernel", "limited by", "warps", "registers", "spilled B", "shared KiB")
    print(
        "| " + " | ".join((*titles, "programs per SM", "occupancy", "KiB in flight per SM")) + " |"
    )
    print("|---|---|" + "---:|" * 7)
    for launch in all_launches():
        needs = measure(launch)
        cells = (
            launch.name,
            launch.limit,
            needs.num_warps,
            needs.registers,
            needs.spilled,
            f"{needs.shared / 1024:.1f}",
            needs.programs,
            f"{needs.occupancy:.0%}",
            needs.in_flight * needs.programs // 1024 or "",
        )
        print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
