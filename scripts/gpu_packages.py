"""The packages that scripts/gpu_check.sh needs: report which are missing, or download them.

    scripts/gpu_packages.py check
    scripts/gpu_packages.py fetch [FOLDER]

A machine with a GPU is expected to have torch and transformers with what they need, and may have no
network. `fetch` fills .whl/ with the others, for Python 3.12 on Linux x86-64, in the versions of
constraints.txt; scripts/gpu_check.sh installs what it finds there.
"""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parent.parent
MAX_BYTES = 64 * 2**20
GLIBC = 39  # 2.39, as in Ubuntu 24.04

# The name to import -> the package.
CARRIED = {
    "flashinfer": "flashinfer-python",
    "tvm_ffi": "apache-tvm-ffi",
    "zmq": "pyzmq",
    "llguidance": "llguidance",
}
EXPECTED = {
    "torch": "torch",
    "triton": "triton",
    "numpy": "numpy",
    "transformers": "transformers",
    "tokenizers": "tokenizers",
    "safetensors": "safetensors",
    "huggingface_hub": "huggingface-hub",
    "msgpack": "msgpack",
    "jinja2": "jinja2",
    "tqdm": "tqdm",
    "pytest": "pytest",
    # FlashInfer imports these.
    "filelock": "filelock",
    "packaging": "packaging",
    "pynvml": "nvidia-ml-py",
    "requests": "requests",
}


def check() -> int:
    """Print a sentence for each missing package; the exit status is 1 if there is one."""
    missing = [
        f"{package} is not installed: install it, or bring .whl/ along, which "
        "`scripts/gpu_packages.py fetch` fills on a machine with a network"
        for module, package in {**EXPECTED, **CARRIED}.items()
        if find_spec(module) is None
    ]
    print("\n".join(missing) or f"all {len(EXPECTED) + len(CARRIED)} packages are installed")
    return 1 if missing else 0


def fetch(folder: Path) -> int:
    """Download the wheels of CARRIED; the exit status is 1 if they are too large to carry."""
    versions = dict(
        re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    )
    wanted = [f"{package}=={versions[package]}" for package in CARRIED.values()]
    # pip takes each name of a platform literally; GLIBC is the newest that the wheels may need.
    tags = ["1", "2010", "2014", *(f"_2_{minor}" for minor in range(17, GLIBC + 1))]
    platforms = [f"--platform=manylinux{tag}_x86_64" for tag in tags]
    options = ["--no-deps", "--only-binary=:all:", "--python-version=3.12", "--implementation=cp"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(folder)]
    subprocess.run([*command, *options, *platforms, *wanted], check=True)
    sizes = {path.name: path.stat().st_size for path in sorted(folder.glob("*.whl"))}
    for name, size in sizes.items():
        print(f"{size / 2**20:8.2f} MiB  {name}")
    print(f"{sum(sizes.values()) / 2**20:8.2f} MiB  together, of {MAX_BYTES / 2**20:.0f}")
    return 1 if sum(sizes.values()) > MAX_BYTES else 0


def main(arguments: list[str]) -> int:
    match arguments:
        case ["check"]:
            return check()
        case ["fetch"]:
            return fetch(ROOT / ".whl")
        case ["fetch", folder]:
            return fetch(Path(folder))
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
