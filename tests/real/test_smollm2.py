"""A real model of 135 M parameters, in bfloat16, against transformers in float32."""

from __future__ import annotations

from importlib.metadata import files
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from make_real_model import default_folder
from tests.support.step_driver import StepDriver, open_engine

SOAK = pytest.mark.soak

pytestmark = pytest.mark.skipif(
    not (default_folder() / "config.json").exists(),
    reason="SmolLM2 is not here; `make real` downloads it",
)


def licence_text() -> str:
    (path,) = (path for path in files("transformers") or [] if path.name == "LICENSE")
    return path.read_text()


def reference_logits(folder: Path, ids: list[int], dtype: torch.dtype) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([ids])).logits[0].float()
    return logits


def mean_kl(exact: torch.Tensor, logits: torch.Tensor) -> float:
    exact, logits = exact.log_softmax(-1), logits.log_softmax(-1)
    return float((exact.exp() * (exact - logits)).sum(-1).mean())


def agreement(exact: torch.Tensor, logits: torch.Tensor) -> float:
    return float((exact.argmax(-1) == logits.argmax(-1)).float().mean())


def share_of_ties(logits: torch.Tensor) -> float:
    best = logits.topk(2).values
    return float((best[:, 0] == best[:, 1]).float().mean())


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("num_tokens", "least_agreement", "largest_share"),
    [(200, 0.95, 1.0), pytest.param(1500, 0.98, 0.75, marks=SOAK)],
)
def test_bfloat16_weights_with_float32_logits_are_close_to_float32(
    num_tokens: int,
    least_agreement: float,
    largest_share: float,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = default_folder()
    ids = AutoTokenizer.from_pretrained(folder)(licence_text())["input_ids"][:num_tokens]
    assert len(ids) == num_tokens
    driver = StepDriver(open_engine(folder, max_seq_len=2048))
    sequence = driver.add()
    ours = torch.cat([driver.logits(prefills=[(sequence, [token])]) for token in ids])
    exact = reference_logits(folder, ids, torch.float32)
    theirs = reference_logits(folder, ids, torch.bfloat16)
    rows = {"minisrv": ours, "transformers": theirs}
    figures = {
        name: (share_of_ties(logits), agreement(exact, logits), mean_kl(exact, logits))
        for name, logits in rows.items()
    }
    with capsys.disabled():
        for name, (ties, agree, kl) in figures.items():
            print(f"\n{name}: ties {ties:.2%}, argmax agrees {agree:.2%}, KL {kl:.2e}", end=" ")
    ties, agree, kl = figures["minisrv"]
    assert ours.dtype is torch.float32
    assert ties == 0
    assert agree >= least_agreement
    assert kl <= largest_share * figures["transformers"][2]
