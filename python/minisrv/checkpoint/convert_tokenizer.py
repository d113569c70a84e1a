"""Write a tokenizer.json: `python -m minisrv.checkpoint.convert_tokenizer MODEL_DIR OUT_DIR`.

A short-lived process, the one place where a tokenizer is loaded by transformers: it reads a
sentencepiece or tiktoken file or a vocabulary with merges, writes tokenizer.json,
tokenizer_config.json and the chat template into OUT_DIR, and exits with 0. What cannot be
converted is one sentence on stderr and exit status 2.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from minisrv.checkpoint.tokenizer import load_tokenizer
from minisrv.errors import ConfigError, MinisrvError

_SOURCES = ("tokenizer.model", "*.model", "*.tiktoken", "vocab.json", "vocab.txt", "tekken.json")


def convert(model_dir: Path, out_dir: Path) -> None:
    """Write the tokenizer of `model_dir` into `out_dir` in the form that `load_tokenizer` reads.

    Raises ConfigError when there is nothing to convert or transformers cannot.
    """
    if not any(any(model_dir.glob(pattern)) for pattern in _SOURCES):
        raise ConfigError(
            f"{model_dir} has no tokenizer: neither tokenizer.json nor a file to make it from "
            f"({', '.join(_SOURCES)})"
        )
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)
        tokenizer.save_pretrained(out_dir)
    except Exception as error:  # transformers raises whatever its readers raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"the tokenizer in {model_dir} cannot be converted to tokenizer.json: {reason}"
        ) from error
    load_tokenizer(out_dir)


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    if len(arguments) != 2:
        print(
            "usage: python -m minisrv.checkpoint.convert_tokenizer MODEL_DIR OUT_DIR",
            file=sys.stderr,
        )
        return 2
    try:
        convert(Path(arguments[0]), Path(arguments[1]))
    except MinisrvError as error:
        print(error.message, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
