"""A model with FP8 blocks on the Triton kernels, whose interpreter needs a process of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from minisrv.engine import fp8
from tests.engine.test_fp8 import FP8, SCHEMES, write_pair
from tests.engine.test_triton_kernels import ROUND_AS_TORCH, run

pytest.importorskip("triton")

IDS = list(range(1, 20))
_LOGITS = (
    ROUND_AS_TORCH
    + """
import json, sys
from pathlib import Path
sys.path[:0] = PATHS
import minisrv.engine.rank_engine as module
from tests.support.step_driver import StepDriver, open_engine

module.keeps_fp8 = lambda *args: True
driver = StepDriver(open_engine(Path(MODEL)))
print(json.dumps(driver.logits(prefills=[(driver.add(), IDS)])[0].tolist()))
"""
)


def test_logits_are_those_of_transformers_with_rounded_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.engine.test_fp8.BLOCK", (32, 32))
    monkeypatch.setitem(SCHEMES, "block", ("_scale_inv", {**FP8, "weight_block_size": [32, 32]}))
    quantized, plain = write_pair(tmp_path, "llama", "block")
    model = AutoModelForCausalLM.from_pretrained(plain, attn_implementation="sdpa").eval()

    def round_input(module: torch.nn.Module, args: tuple[torch.Tensor]) -> torch.Tensor:
        rows = args[0].flatten(0, -2)
        values, scales = fp8.quantize(rows, 32)
        return (values.float() * scales.repeat_interleave(32, 1)).view(args[0].shape)

    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(round_input)
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0, -1]
    names = f"PATHS, MODEL, IDS = {sys.path}, {str(quantized)!r}, {IDS}\n"
    ours = torch.tensor(json.loads(run(names + _LOGITS, TRITON_INTERPRET="1").splitlines()[-1]))
    assert (ours - expected).norm() / expected.norm() < 0.01
