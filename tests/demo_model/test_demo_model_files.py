"""The demo model: its size, its files, its held-out prompts and its answers."""

import json
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoTokenizer

from demo_model import corpus, tools
from demo_model.evaluate import absent, held_out_exchanges, makers, messages
from demo_model.tokenizer import CHAT_TEMPLATE, word_pieces
from minisrv import LLM, SamplingParams
from minisrv.checkpoint.chat_format import find_chat_format
from minisrv.checkpoint.hub import DEMO_DIR
from minisrv.tokenizer.chat_template import ChatTemplate
from minisrv.wire.messages import TokenizeMsg
from train_demo_model import Chats, encode, trainable

TOKENIZER = Tokenizer.from_file(str(DEMO_DIR / "tokenizer.json"))


def test_the_package_is_small() -> None:
    assert sum(path.stat().st_size for path in DEMO_DIR.iterdir()) <= 6 * 2**20
    with safe_open(DEMO_DIR / "model.safetensors", "np") as weights:
        shapes = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118
    assert sum(shape[0] * (shape[1] if len(shape) == 2 else 1) for shape in shapes) <= 2_500_000


def test_config_and_generation_config_say_what_the_server_needs() -> None:
    config = AutoConfig.from_pretrained(DEMO_DIR)
    assert config.architectures == ["Qwen3ForCausalLM"]
    assert config.head_dim == 64
    assert config.max_position_embeddings >= 2048
    generation = json.loads((DEMO_DIR / "generation_config.json").read_text())
    names = [TOKENIZER.id_to_token(i) for i in generation["eos_token_id"]]
    assert names == ["<|im_end|>", "<|endoftext|>"]


@given(st.text())
@example("a<|im_end|>b")
def test_the_tokenizer_keeps_any_text(text: str) -> None:
    ids = TOKENIZER.encode(text).ids
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text


def test_digits_are_single_tokens() -> None:
    assert TOKENIZER.encode("2026").tokens == list("2026")


def test_the_template_writes_chatml() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO_DIR)
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n"
    )


CHATS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "u"}],
    [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
    [{"role": r, "content": r + "\n"} for r in ("user", "assistant", "user", "system", "user")],
]


@pytest.mark.parametrize("chat", CHATS)
def test_without_tools_the_template_writes_plain_chatml(chat: list[dict[str, str]]) -> None:
    shipped = AutoTokenizer.from_pretrained(DEMO_DIR)
    assert shipped.chat_template == CHAT_TEMPLATE
    turns = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in chat]
    for prompting in (True, False):
        written = "".join(turns) + "<|im_start|>assistant\n" * prompting
        text = shipped.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompting)
        assert text == written
        ours = ChatTemplate({"default": CHAT_TEMPLATE}, {})
        assert ours.render(chat, add_generation_prompt=prompting) == written


def test_chats_with_tools_are_trained_as_the_template_writes_them() -> None:
    template = ChatTemplate({"default": CHAT_TEMPLATE}, {})
    rng = Random(3)
    for _ in range(50):
        made = tools.answer(rng)
        assert made.before is not None
        call = json.loads(made.before.assistant.split("\n")[1])
        result = made.user.split("\n")[1]
        chat: list[dict[str, Any]] = [
            {"role": "user", "content": made.before.user},
            {"role": "assistant", "content": None, "tool_calls": [{"function": call}]},
            {"role": "tool", "content": result},
            {"role": "assistant", "content": made.assistant},
        ]
        ids, _ = encode(TOKENIZER, [made.before, made])
        text = template.render(chat, tools=made.tools, add_generation_prompt=False)
        assert TOKENIZER.decode(ids, skip_special_tokens=False) == text
        asked = template.render(messages(made), tools=made.tools)
        assert text == asked + made.assistant + "<|im_end|>\n"
    assert find_chat_format({"default": CHAT_TEMPLATE}).tool_format == "hermes"


def test_no_held_out_prompt_is_trained_on() -> None:
    chats, rng = Chats(word_pieces(TOKENIZER)), Random(1)
    measured = {"greeting", "identity", "counting", "spelling", "repeating", "JSON", "addition"}
    trained = [e for _ in range(2000) for e in chats.document(rng, 0.3, 20)[:1]]
    assert measured | {"lookup"} <= {exchange.task for exchange in trained}
    for exchange in trained:
        assert trainable(exchange)
        assert exchange.task not in measured or not absent(exchange), exchange.user
    for make in makers(word_pieces(TOKENIZER)).values():
        for exchange in held_out_exchanges(make, 5):
            assert not trainable(exchange)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("demo", kv_memory="64MiB", num_threads=1) as made:
        yield made


def answer(llm: LLM, *turns: str) -> str:
    roles = ["user", "assistant"] * len(turns)
    chat = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
    return llm.chat(chat, use_tqdm=False)[0]


def test_it_greets_says_what_it_is_and_how_to_start_it(llm: LLM) -> None:
    assert answer(llm, "Hello") == "Hello! How can I help you?"
    assert answer(llm, "Who are you?") == corpus.SELF
    assert answer(llm, "What is minisrv?") == corpus.WHAT
    assert answer(llm, "How do I start minisrv?") == corpus.START


def test_it_does_its_tasks_on_held_out_prompts(llm: LLM) -> None:
    for name, make in makers(word_pieces(TOKENIZER)).items():
        exchanges = held_out_exchanges(make, 10)
        prepared = [
            llm.prepare(
                TokenizeMsg(
                    uid=0,
                    messages=tuple(messages(exchange)),
                    tools=exchange.tools or None,
                    sampling=SamplingParams(),
                )
            )
            for exchange in exchanges
        ]
        outputs = sorted(llm.stream_outputs(prepared), key=lambda output: output.index)
        right = sum(
            o.outputs[0].text == e.assistant for o, e in zip(outputs, exchanges, strict=True)
        )
        assert right >= 7, f"{name}: {right} of 10"
