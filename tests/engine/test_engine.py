"""The engine against transformers, and against itself however a sequence is cut or placed."""

from __future__ import annotations

import random
import re
import statistics
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from minisrv.checkpoint.model_config import RopeConfig
from minisrv.engine.engine import Engine
from minisrv.engine.layers.rope import RotaryEmbedding
from minisrv.errors import ConfigError
from tests.support.checkpoints import ARCHITECTURES, make_checkpoint
from tests.support.step_driver import StepDriver, open_engine

PROMPT_LEN = 45
# These models enlarge rounding: after 200 tokens transformers too is up to 1e-4 from float64.
LONG_TOLERANCE = 3e-4


@pytest.fixture(scope="module", params=ARCHITECTURES)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Engine, PreTrainedModel]:
    """Our engine and transformers' model of the same checkpoint."""
    path = make_checkpoint(tmp_path_factory.mktemp("model"), request.param)
    return open_engine(path), oracle(path)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return open_engine(make_checkpoint(tmp_path_factory.mktemp("model"), "llama"))


def oracle(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="sdpa").eval()


def oracle_logits(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """The logits after each of the ids, [len(ids), V]."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float()


def prompt(seed: int, length: int = PROMPT_LEN) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(256) for _ in range(length)]


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


def test_prefill_has_the_logits_of_transformers(pair: tuple[Engine, PreTrainedModel]) -> None:
    engine, model = pair
    driver = StepDriver(engine)
    prompts = [prompt(seed, length) for seed, length in enumerate((1, 16, 17, 45))]
    ours = driver.logits(prefills=[(driver.add(), ids) for ids in prompts])
    assert_close(ours, torch.stack([oracle_logits(model, ids)[-1] for ids in prompts]))


def test_decodes_beside_a_chunked_prefill_have_the_logits_of_transformers(
    pair: tuple[Engine, PreTrainedModel],
) -> None:
    engine, model = pair
    driver, texts = StepDriver(engine, seed=1), [prompt(1, 9), prompt(2, 33)]
    decoding = [driver.add() for _ in texts]
    fed = driver.run(prefills=list(zip(decoding, texts, strict=True)))
    late, late_prompt = driver.add(), prompt(3)
    for first in range(0, PROMPT_LEN, 20):
        for text, token in zip(texts, fed, strict=True):
            text.append(token)
        chunk = late_prompt[first : first + 20]
        ours = driver.logits(decodes=decoding, prefills=[(late, chunk)])
        expected = [oracle_logits(model, text)[-1] for text in texts]
        expected.append(oracle_logits(model, late_prompt)[first + len(chunk) - 1])
        assert_close(ours, torch.stack(expected))


def test_greedy_text_is_that_of_transformers_generate(pair: tuple[Engine, PreTrainedModel]) -> None:
    engine, model = pair
    ids = prompt(7)
    made = model.generate(
        torch.tensor([ids]), do_sample=False, max_new_tokens=24, min_new_tokens=24, eos_token_id=-1
    )
    assert StepDriver(engine).generate(ids, 24) == made[0, len(ids) :].tolist()


@pytest.mark.parametrize(
    ("arch", "variant"),
    [
        ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
        ("qwen3", {"attention_bias": True, "head_dim": 32}),
        ("qwen3_moe", {"norm_topk_prob": True, "mlp_only_layers": [1]}),
        ("qwen3_moe", {"decoder_sparse_step": 2}),
        ("mistral", {"rms_norm_eps": 1e-2}),
    ],
)
def test_a_variant_has_the_logits_of_transformers(
    tmp_path: Path, arch: str, variant: dict[str, object]
) -> None:
    path = make_checkpoint(tmp_path, arch, **variant)
    driver, ids = StepDriver(open_engine(path)), prompt(4)
    assert_close(
        driver.logits(prefills=[(driver.add(), ids)])[0], oracle_logits(oracle(path), ids)[-1]
    )


ROPE = {
    "theta": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn-mscale": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "mscale": 1.5,
        "mscale_all_dim": 0.5,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
    "yarn-attention": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 2.0,
        "original_max_position_embeddings": 128,
        "attention_factor": 1.3,
    },
}


@pytest.mark.parametrize("rope", ROPE.values(), ids=ROPE)
def test_a_rope_variant_has_the_logits_of_transformers(
    tmp_path: Path, rope: dict[str, object]
) -> None:
    path = make_checkpoint(tmp_path, "llama", rope_parameters=rope, max_position_embeddings=256)
    driver, ids = StepDriver(open_engine(path)), prompt(5, 200)
    ours = driver.logits(prefills=[(driver.add(), ids)])[0]
    assert_close(ours, oracle_logits(oracle(path), ids)[-1], LONG_TOLERANCE)


@pytest.mark.parametrize("arch", ["llama", "qwen3_moe"])
def test_bfloat16_is_as_close_to_float32_as_transformers_bfloat16(
    tmp_path: Path, arch: str
) -> None:
    path = make_checkpoint(tmp_path, arch, dtype=torch.bfloat16)
    driver = StepDriver(open_engine(path))
    exact = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    our_errors, their_errors = [], []
    for seed in range(40):
        ids, sequence = prompt(seed), driver.add()
        ours = driver.logits(prefills=[(sequence, ids)])[0]
        driver.release(sequence)
        reference = oracle_logits(exact, ids)[-1]
        our_errors.append((ours - reference).square().mean().item())
        their_errors.append((oracle_logits(theirs, ids)[-1] - reference).square().mean().item())
    assert 0 < statistics.median(our_errors) < 1.3 * statistics.median(their_errors)


def test_how_a_prompt_is_cut_changes_nothing(llama: Engine) -> None:
    driver, ids = StepDriver(llama), prompt(11, 70)
    whole = driver.generate(ids, 8)
    for sizes in ([1] * 70, [16, 16, 16, 22], [15, 17, 31, 7], [69, 1]):
        sequence, first = driver.add(), 0
        for size in sizes[:-1]:
            assert not driver.run(prefills=[(sequence, ids[first : first + size])], samples=[])
            first += size
        tokens = driver.run(prefills=[(sequence, ids[first:])])
        while len(tokens) < 8:
            tokens += driver.run(decodes=[sequence])
        driver.release(sequence)
        assert tokens == whole, sizes


def test_neighbours_of_any_length_change_nothing(llama: Engine) -> None:
    driver = StepDriver(llama, seed=2)
    prompts = [prompt(seed, length) for seed, length in enumerate((3, 40, 700, 180, 16, 1))]
    alone = [driver.generate(ids, 6) for ids in prompts]
    sequences = [driver.add() for _ in prompts]
    outputs = [driver.run(prefills=[pair]) for pair in zip(sequences, prompts, strict=True)]
    for _ in range(5):
        for output, token in zip(outputs, driver.run(decodes=sequences), strict=True):
            output.append(token)
    assert outputs == alone


def test_pages_and_rows_can_be_used_again(llama: Engine) -> None:
    driver, ids = StepDriver(llama), prompt(13)
    first = driver.generate(ids, 5)
    used = set(range(llama.num_pages)) - set(driver.free[:-8])
    for seed in range(4):
        driver.generate(prompt(seed, 100), 3)
        driver.free.sort(key=lambda page: page not in used)
    assert driver.generate(ids, 5) == first


def test_a_page_of_another_sequence_serves_as_a_prefix(llama: Engine) -> None:
    driver, ids = StepDriver(llama), prompt(14, 40)
    alone = driver.generate(ids, 6)
    owner, sharer = driver.add(), driver.add()
    driver.run(prefills=[(owner, ids[:32])], samples=[])
    sharer.pages, sharer.num_computed = owner.pages[:2], 32
    for column, page in enumerate(sharer.pages):
        llama._rank_0.runner._page_table.pages[sharer.row, column] = page
    tokens = driver.run(prefills=[(sharer, ids[32:])])
    while len(tokens) < 6:
        tokens += driver.run(decodes=[sharer])
    assert tokens == alone


@pytest.mark.parametrize("prefix_len", [32, 256, 512])
def test_decodes_that_share_a_prefix_have_the_logits_of_transformers(
    pair: tuple[Engine, PreTrainedModel], prefix_len: int
) -> None:
    engine, model = pair
    driver, prefix = StepDriver(engine, seed=3), prompt(16, prefix_len)
    texts = [prefix + prompt(20 + i, length) for i, length in enumerate((1, 15, 16, 40))]
    sequences = [driver.add() for _ in texts]
    driver.run(prefills=[(sequences[0], prefix)])
    tokens = []
    for sequence, text in zip(sequences, texts, strict=True):
        if sequence is not sequences[0]:
            sequence.pages = sequences[0].pages[: prefix_len // 16]
            sequence.num_computed = prefix_len
            engine._rank_0.runner._page_table.pages[sequence.row, : prefix_len // 16] = (
                sequence.pages
            )
        tokens += driver.run(prefills=[(sequence, text[prefix_len:])])
    ours = driver.logits(decodes=sequences)
    expected = [oracle_logits(model, [*text, tokens[i]])[-1] for i, text in enumerate(texts)]
    tolerance = 1e-4 if prefix_len < 200 else LONG_TOLERANCE
    assert_close(ours, torch.stack(expected), tolerance)


@pytest.mark.parametrize("page_size", [1, 4, 64])
def test_the_page_size_changes_nothing(tmp_path: Path, llama: Engine, page_size: int) -> None:
    path = make_checkpoint(tmp_path, "llama")
    other = open_engine(path, page_size=page_size, max_seq_len=256)
    ids = prompt(15, 50)
    assert StepDriver(other).generate(ids, 6) == StepDriver(llama).generate(ids, 6)


def test_a_seeded_text_is_the_same_alone_and_in_a_batch(llama: Engine) -> None:
    driver = StepDriver(llama)
    columns = {"temperature": 1.5, "top_k": 40, "top_p": 0.9}
    prompts = [prompt(seed, 20 + seed) for seed in range(4)]
    alone = [driver.generate(ids, 6, seeds=seed, **columns) for seed, ids in enumerate(prompts)]
    sequences = [driver.add() for _ in prompts]
    seeds = list(range(4))
    steps = [
        driver.run(prefills=list(zip(sequences, prompts, strict=True)), seeds=seeds, **columns)
    ]
    steps += [driver.run(decodes=sequences, seeds=seeds, **columns) for _ in range(5)]
    assert [list(text) for text in zip(*steps, strict=True)] == alone
    assert driver.generate(prompts[0], 6, seeds=99, **columns) != alone[0]


def test_the_memory_plan_names_pages_and_whole_contexts(tmp_path: Path) -> None:
    engine = open_engine(make_checkpoint(tmp_path, "llama"), num_pages=192)
    assert engine.num_pages == 192
    text = engine.describe()
    assert "192 pages of 16 tokens, 3072 tokens" in text
    assert "room for 1.5 requests of the full context of 2048" in text
    counts = r"\ntoken counts +\S+ KiB  for penalties, taken as requests need it\n"
    assert re.search(counts, text)


def test_positions_that_the_cache_has_no_room_for_are_freed(
    tmp_path: Path, llama: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[int] = []
    shorten = RotaryEmbedding.shorten

    def record(rope: RotaryEmbedding, num_positions: int) -> None:
        kept.append(num_positions)
        shorten(rope, num_positions)

    monkeypatch.setattr(RotaryEmbedding, "shorten", record)
    small = open_engine(make_checkpoint(tmp_path, "llama"), num_pages=3)
    assert kept == [48]
    ids = prompt(15, 40)
    assert StepDriver(small).generate(ids, 8) == StepDriver(llama).generate(ids, 8)


def test_a_shortened_table_has_the_rows_that_are_left() -> None:
    rope = RotaryEmbedding(RopeConfig(), 16, 20, torch.float32, torch.device("cpu"))
    before = [rows.clone() for rows in rope.rows(torch.arange(9))]
    rope.shorten(30)
    rope.rows(torch.tensor([19]))
    rope.shorten(9)
    assert all(map(torch.equal, rope.rows(torch.arange(9)), before))
    with pytest.raises((IndexError, RuntimeError)):
        rope.rows(torch.tensor([9]))


def test_the_cache_is_never_larger_than_the_requests_can_use(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "llama")
    assert open_engine(path, max_running_requests=3, max_seq_len=100).num_pages == 3 * 7


def test_kv_memory_is_kept_and_a_cache_of_no_page_is_refused(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "llama")
    page_bytes = (
        3 * 2 * 16 * 2 * 16 * 4
    )  # layers, keys and values, tokens, heads, head_dim, float32
    assert open_engine(path, kv_memory=str(page_bytes * 5 + 1)).num_pages == 5
    with pytest.raises(ConfigError, match=r"12 KiB.*--kv-memory"):
        open_engine(path, kv_memory=str(page_bytes - 1))


def test_dummy_weights_need_no_weight_file(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "qwen3_moe")
    (path / "model.safetensors").unlink()
    driver = StepDriver(open_engine(path, load_format="dummy"))
    tokens = driver.generate(prompt(1), 4)
    assert len(tokens) == 4
    assert all(0 <= token < 384 for token in tokens)
