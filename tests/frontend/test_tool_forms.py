"""Random calls in each form, written by chat templates, are read back equal, whole and in pieces.

MINISRV_LLAMA_CPP_MODELS: the folder `models` of llama.cpp's source, whose `templates` are those of
the models themselves; without it only our own short ones are used.
"""

import json
import os
import re
from pathlib import Path
from random import Random
from typing import Any

import pytest

from minisrv.checkpoint.chat_format import find_chat_format
from minisrv.frontend.tool_calls.formats import CallReading, make_call_id
from minisrv.frontend.tool_calls.pieces import Text, ToolCallStart
from minisrv.tokenizer.chat_template import ChatTemplate
from tests.support.tool_form_templates import TEMPLATES

MODELS = os.environ.get("MINISRV_LLAMA_CPP_MODELS")
NUM_CALLS = 200
FORMS_OF_MODELS = {
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": "hermes",
    "Qwen-Qwen2.5-7B-Instruct": "hermes",
    "Qwen-Qwen3-0.6B": "hermes",
    "Qwen-QwQ-32B": "hermes",
    "MiMo-VL": "hermes",
    "ibm-granite-granite-4.0": "hermes",
    "meta-llama-Llama-3.1-8B-Instruct": "llama",
    "meta-llama-Llama-3.2-3B-Instruct": "llama",
    "meta-llama-Llama-3.3-70B-Instruct": "llama",
    "mistralai-Mistral-Nemo-Instruct-2407": "mistral",
    "Mistral-Small-3.2-24B-Instruct-2506": "mistral",
    "unsloth-mistral-Devstral-Small-2507": "mistral",
    "mistralai-Ministral-3-14B-Reasoning-2512": "mistral",
    "Qwen3-Coder": "qwen3_coder",
    "Qwen3.5-4B": "qwen3_coder",
    "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": "qwen3_coder",
    "StepFun3.5-Flash": "qwen3_coder",
    "GLM-4.6": "glm",
    "GLM-4.7-Flash": "glm",
    "Spark2.5": "glm",
    "inclusionai-ling-3.0-flash": "glm",
    "poolside-Laguna-XS.2": "glm",
    "poolside-Laguna-S-2.1": "glm",
    "deepseek-ai-DeepSeek-V3.1": "deepseek",
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": "deepseek",
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": "deepseek",
    "llama-cpp-deepseek-r1": "deepseek",
}
# Of the models whose forms are not read, those that are named.
UNREAD = {
    "ByteDance-Seed-OSS": "Seed-OSS",
    "deepseek-ai-DeepSeek-V3.2": "DeepSeek V3.2 and V4",
    "deepseek-ai-DeepSeek-V4": "DeepSeek V3.2 and V4",
    "Kimi-K2-Instruct": "Kimi K2",
    "MiniMax-M2": "MiniMax M2",
    "MiniMax-M3": "MiniMax M3",
    "openai-gpt-oss-120b": "gpt-oss",
    "google-gemma-4-31B-it": "Gemma 4",
    "meetkai-functionary-medium-v3.1": "Functionary",
    "unsloth-Apriel-1.5": "MiniMax M1 and Apriel",
}
MOST_CALLS = {  # in one message
    **dict.fromkeys([name for name, form in FORMS_OF_MODELS.items() if form == "llama"], 1),
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": 2,
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": 2,
}

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "file-path": {"$ref": "#/$defs/path"},
        "color": {"enum": ["red", "5", "null"]},
        "count": {"type": "integer"},
        "size": {"anyOf": [{"type": "number"}, {"type": "null"}]},
        "flag": {"type": "boolean"},
        "map": {"type": "object"},
        "items": {"type": ["array", "null"]},
    },
    "$defs": {"path": {"type": "string", "minLength": 1}},
}
WORDS = [
    *[
        "a",
        "Zürich",
        "\U0001f600",
        " ",
        "\n",
        "\t",
        '"',
        "\\",
        "{",
        "}",
        "[",
        "]",
        "'",
        "<",
        ">",
        "&",
    ],
    *["</", "<tool_call>", "</tool_call>", "<function=f>", "</function>", "<parameter=x>", "```"],
    *["</parameter>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "[ARGS]", "true"],
    *["<｜tool▁call▁end｜>", "None", "5", "//", "; ", "[TOOL_CALLS]", "\u2028", "\r\n"],
]
# Nothing can know these ends of a value from the true one.
AMBIGUOUS = re.compile(
    r"</parameter>\s{0,16}(<parameter=|</function>|</tool_call>)"
    r"|</arg_value>\s{0,16}(<arg_key>|</tool_call>)"
)


def make_text(rng: Random) -> str:
    while True:
        text = "".join(rng.choice(WORDS) for _ in range(rng.choice([0, 1, 3, 8, 20])))
        if not AMBIGUOUS.search(f"{text}\n</parameter>") and not text.endswith("</arg_value>"):
            return text


def make_json(rng: Random, depth: int = 2) -> Any:
    if depth and rng.random() < 0.4:
        if rng.random() < 0.5:
            return [make_json(rng, depth - 1) for _ in range(rng.randrange(3))]
        return {make_text(rng): make_json(rng, depth - 1) for _ in range(rng.randrange(3))}
    return rng.choice([None, True, False, 0, -7, 2**70, 0.5, 1e300, -2.5e-9, make_text(rng)])


def make_value(rng: Random, key: str) -> Any:
    match key:
        case "text" | "file-path":
            return make_text(rng)
        case "color":
            return rng.choice(["red", "5", "null"])
        case "count":
            return rng.choice([0, 1, -12, 2**64])
        case "size":
            return rng.choice([None, 0.5, 3, -1e-7, 1e21])
        case "flag":
            return rng.random() < 0.5
        case "map":
            return {make_text(rng): make_json(rng) for _ in range(rng.randrange(3))}
    return rng.choice([None, [], [make_json(rng), make_json(rng)]])


def make_arguments(rng: Random) -> dict[str, Any]:
    keys = [key for key in SCHEMA["properties"] if rng.random() < 0.5]
    rng.shuffle(keys)
    return {key: make_value(rng, key) for key in keys}


def make_call(rng: Random) -> dict[str, Any]:
    function = {"name": rng.choice(NAMES), "arguments": make_arguments(rng)}
    return {"id": make_call_id("mistral"), "type": "function", "function": function}


NAMES = ("look", "a.b-c_9")
# Some templates fail on the parts of SCHEMA.
SHOWN = {"type": "object", "properties": {"text": {"type": "string"}}}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": "d", "parameters": SHOWN}}
    for name in NAMES
]


def written_by(template: ChatTemplate, calls: list[dict[str, Any]]) -> str:
    """A reply that makes `calls`, with what the template puts behind it."""
    user = {"role": "user", "content": "hi"}
    message = {"role": "assistant", "content": None, "tool_calls": calls}
    before = template.render([user], tools=TOOLS)
    text = template.render([user, message], tools=TOOLS, add_generation_prompt=False)
    same = next((i for i, (a, b) in enumerate(zip(before, text, strict=False)) if a != b), None)
    # A generation prompt that goes on in another way, with reasoning, may share part of a tag.
    return text[len(before) if same is None else before.rfind("<", 0, same) :]


def cut(text: str, rng: Random) -> list[str]:
    places = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(1, 30)))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


def read(tool_format: Any, deltas: list[str]) -> tuple[str, list[tuple[str, str]]]:
    schemas = dict.fromkeys(NAMES, SCHEMA)
    parser = CallReading(tool_format=tool_format, schemas=schemas).make_parser()
    content, calls = "", list[tuple[str, str]]()
    for piece in [piece for delta in deltas for piece in parser.push(delta)] + parser.flush():
        if isinstance(piece, Text):
            content += piece.text
        elif isinstance(piece, ToolCallStart):
            calls.append((piece.name, ""))
        else:
            calls[-1] = (calls[-1][0], calls[-1][1] + piece.text)
    assert parser.whole
    return content, calls


def check_round_trips(source: str, most_calls: int, tool_format: str) -> None:
    found = find_chat_format({"default": source})
    assert found.tool_format == tool_format
    template = ChatTemplate({"default": source}, {"bos_token": "<s>", "eos_token": "</s>"})
    rng, left = Random(7), NUM_CALLS
    while left > 0:
        calls = [make_call(rng) for _ in range(rng.randint(1, most_calls))]
        left -= len(calls)
        reply = written_by(template, calls)
        content, read_calls = read(tool_format, [reply])
        expected = [(call["function"]["name"], call["function"]["arguments"]) for call in calls]
        assert [(name, json.loads(text)) for name, text in read_calls] == expected
        assert "look" not in content
        assert read(tool_format, cut(reply, rng)) == (content, read_calls)


@pytest.mark.parametrize("form", TEMPLATES)
def test_random_calls_in_each_form_are_read_back_equal(form: str) -> None:
    check_round_trips(TEMPLATES[form], 3, form.split()[0])


def source_of(model: str) -> str:
    return (Path(MODELS or "") / "templates" / f"{model}.jinja").read_text(encoding="utf-8")


@pytest.mark.skipif(MODELS is None, reason="MINISRV_LLAMA_CPP_MODELS is not set")
@pytest.mark.parametrize("model", FORMS_OF_MODELS)
def test_random_calls_written_by_the_template_of_a_model_are_read_back_equal(model: str) -> None:
    check_round_trips(source_of(model), MOST_CALLS.get(model, 3), FORMS_OF_MODELS[model])


@pytest.mark.skipif(MODELS is None, reason="MINISRV_LLAMA_CPP_MODELS is not set")
@pytest.mark.parametrize("model", UNREAD)
def test_a_form_that_is_not_read_is_known_by_name(model: str) -> None:
    found = find_chat_format({"default": source_of(model)})
    assert (found.tool_format, found.unread_form) == (None, UNREAD[model])
