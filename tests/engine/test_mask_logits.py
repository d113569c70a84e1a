"""A grammar's mask on the logits: all implementations against numpy, bit by bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support.kernels import implementations


@pytest.mark.parametrize("vocab_size", [1, 31, 64, 97, 1000, 40_000])
def test_only_refused_tokens_of_the_named_samples_change(vocab_size: int) -> None:
    rng = np.random.default_rng(vocab_size)
    samples = np.array([0, 2, 5], np.int32)
    bits = rng.integers(0, 2, (3, -(-(vocab_size + 40) // 32) * 32), dtype=np.uint8)
    bits[1, :64] = 1
    bits[2, :64] = 0
    masks = np.packbits(bits, axis=1, bitorder="little").view(np.int32)
    logits = torch.randn(6, vocab_size)
    expected = logits.clone()
    for row, sample in enumerate(samples):
        expected[sample][torch.from_numpy(bits[row, :vocab_size] == 0)] = -torch.inf
    for kernels in implementations(torch.bfloat16):
        ours = logits.clone()
        kernels.mask_logits_(ours, torch.from_numpy(samples), torch.from_numpy(masks))
        assert torch.equal(ours, expected), type(kernels).__name__
