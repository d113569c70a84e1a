"""Logits of llama.cpp, for quality.py; runs in a Python that has llama-cpp-python.

Standard input: JSON with the path of a GGUF file, lists of token ids, the number of tokens per
step, and threads. Standard output: for each list its logits [tokens, vocabulary] as float32.
"""

from __future__ import annotations

import json
import sys

import numpy as np
from llama_cpp import Llama


def main() -> None:
    task = json.load(sys.stdin)
    model = Llama(
        task["file"],
        n_ctx=max(map(len, task["windows"])),
        n_batch=task["step_tokens"],
        n_ubatch=task["step_tokens"],
        n_threads=task["threads"],
        n_threads_batch=task["threads"],
        logits_all=True,
        verbose=False,
    )
    for window in task["windows"]:
        model.reset()
        model.eval(window)
        logits = np.ascontiguousarray(model.scores[: len(window)], np.float32)
        sys.stdout.buffer.write(logits.tobytes())


if __name__ == "__main__":
    main()
