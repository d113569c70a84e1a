"""Write a tokenizer.json: `python -m minisrv.checkpoint.convert_tokenizer MODEL_DIR OUT_DIR`.

Runs in a short-lived process, the only one that loads a tokenizer with transformers. It reads a
sentencepiece or tiktoken file, or a vocabulary with merges, and writes tokenizer.json,
tokenizer_config.json and the chat template into OUT_DIR. Exit status 0; 2 with a message on stderr
if the tokenizer cannot be converted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from minisrv.checkpoint.tokenizer import load_tokenizer
from minisrv.errors import ConfigError, MinisrvError

_SOURCES = ("tokenizer.model", "*.model", "*.tiktoken", "vocab.json", "vocab.txt", "tekken.json")


def convert(model_dir: Path, out_dir: Path) -> None:
    """Write the tokenizer of `model_dir` into `out_dir` in the format that `load_tokenizer` reads.

    Raises ConfigError if there is no source file or transformers cannot convert it.
    """
    if not any(any(model_dir.glob(pattern)) for pattern in _SOURCES):
        raise ConfigError(
            f"{model_dir} has no tokenizer: neither tokenizer.json nor a file to convert "
            f"({', '.join(_SOURCES)})"
        )
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)
        tokenizer.save_pretrained(out_dir)
    except Exception as error:  # transformers passes on whatever its readers raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"the tokenizer in {model_dir} cannot be converted to tokenizer.json: {reason}"
        ) from error
    load_tokenizer(out_dir)


def main(arguments: Sequence[str]) -> int:
    """Run the command; return its exit status."""
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
