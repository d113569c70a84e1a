"""The workloads: lists of (prompt token ids, output tokens), the same for every engine.

W1: one request, 128 tokens in, 128 out. W2: one request, 1,024 in, 1 out. W3: 16 requests at once,
100-300 in, 50-150 out. W4: 16 requests at once with a shared 1,024-token prefix, 32 unique prompt
tokens and 32 out each; "W4 warm" is the same once more with other unique tokens. Lengths are the
same in every repetition, tokens are not, so no cache hit occurs that the workload does not intend.
"""

from __future__ import annotations

from random import Random

Workload = list[tuple[list[int], int]]

_FIRST_ID, _LAST_ID = 1000, 6999


def make_workload(name: str, repetition: int) -> Workload:
    """The requests of one repetition."""
    rng = Random(f"{name}-{repetition}")
    if name == "W1":
        return [(_tokens(rng, 128), 128)]
    if name == "W3":
        shape = Random("W3 lengths")
        lengths = [(shape.randint(100, 300), shape.randint(50, 150)) for _ in range(16)]
        return [(_tokens(rng, prompt), output) for prompt, output in lengths]
    prompt = _tokens(rng, 1024)
    if name == "W2":
        return [(prompt, 1)]
    if name == "W4 warm":
        prompt = make_workload("W4", repetition)[0][0][:1024]
    return [(prompt + _tokens(rng, 32), 32) for _ in range(16)]


def output_tokens(workload: Workload) -> int:
    """The number of output tokens that the workload asks for."""
    return sum(count for _, count in workload)


def _tokens(rng: Random, count: int) -> list[int]:
    return [rng.randint(_FIRST_ID, _LAST_ID) for _ in range(count)]
