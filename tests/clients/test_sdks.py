"""What SDKs do beyond the programs of docs/clients, with the demo model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from minisrv.checkpoint.hub import DEMO_DIR
from tests.clients.pages import DEFAULT_URL, programs
from tests.clients.running import Machine

MakeMachine = Callable[[str], Machine]
LANGCHAIN_OVERFLOW = """
from langchain_anthropic import ChatAnthropic
from langchain_core.exceptions import ContextOverflowError
from langchain_openai import ChatOpenAI

options = {"model": "demo", "api_key": "none"}
for model in (
    ChatOpenAI(base_url="http://127.0.0.1:8000/v1", **options),
    ChatOpenAI(base_url="http://127.0.0.1:8000/v1", use_responses_api=True, **options),
    ChatAnthropic(base_url="http://127.0.0.1:8000", **options),
):
    for ask in (model.invoke, lambda text: list(model.stream(text))):
        try:
            ask("word " * 5000)
        except ContextOverflowError:
            print("overflow")
"""
LITELLM_OVERFLOW = """
import litellm

litellm.suppress_debug_info = True
question = [{"role": "user", "content": "word " * 5000}]
for model, url in {"openai/demo": "http://127.0.0.1:8000/v1", "anthropic/demo": "http://127.0.0.1:8000"}.items():
    try:
        litellm.completion(model=model, api_base=url, api_key="none", messages=question)
    except litellm.ContextWindowExceededError:
        print("overflow")
"""
LITELLM_RESPONSES = """
import litellm

litellm.suppress_debug_info = True
options = {"api_base": "http://127.0.0.1:8000/v1", "api_key": "none", "model": "openai/demo"}
print(litellm.responses(input="Spell river.", **options).output[-1].content[0].text)
"""
INSTRUCTOR_MODES = """
import instructor
from openai import OpenAI
from pydantic import BaseModel, Field


class Add(BaseModel):
    \"\"\"Add two numbers.\"\"\"

    a: int = Field(ge=0, le=999)
    b: int = Field(ge=0, le=999)


openai = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
question = [{"role": "user", "content": "What is 250 + 117?"}]
for mode in (
    instructor.Mode.TOOLS,
    instructor.Mode.TOOLS_STRICT,
    instructor.Mode.RESPONSES_TOOLS,
    instructor.Mode.JSON_SCHEMA,
):
    client = instructor.from_openai(openai, mode=mode)
    added = client.create(model="demo", response_model=Add, messages=question, max_retries=0)
    print(type(added).__name__)
"""
NODE_TOOLS = """
import OpenAI from "openai";

const parameters = {
  type: "object",
  properties: { a: { type: "integer" }, b: { type: "integer" } },
  required: ["a", "b"],
};
const add = { name: "add", description: "Add two numbers.", parse: JSON.parse, parameters };
add.function = ({ a, b }) => String(a + b);
const client = new OpenAI({ baseURL: "http://127.0.0.1:8000/v1", apiKey: "none" });
const messages = [{ role: "user", content: "What is 250 + 117?" }];
for (const stream of [false, true]) {
  const tools = [{ type: "function", function: add }];
  const runner = client.chat.completions.runTools({ model: "demo", stream, messages, tools });
  console.log(await runner.finalContent());
}
"""
AI_SDK_TURNS = """
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { generateText } from "ai";

globalThis.AI_SDK_LOG_WARNINGS = false;
const server = { baseURL: "http://127.0.0.1:8000/v1", apiKey: "none" };
const openai = createOpenAI(server);
for (const model of [openai("demo"), openai.chat("demo"), createAnthropic(server)("demo")]) {
  const messages = [{ role: "user", content: "My name is Nora." }];
  const first = await generateText({ model, messages });
  messages.push(...first.response.messages, { role: "user", content: "What is my name?" });
  console.log((await generateText({ model, messages })).text);
}
"""
CASES = [
    ("langchain", "overflow by its exception", "python", LANGCHAIN_OVERFLOW, "overflow\n" * 6),
    ("litellm", "overflow by its exception", "python", LITELLM_OVERFLOW, "overflow\n" * 2),
    ("litellm", "responses", "python", LITELLM_RESPONSES, "r-i-v-e-r\n"),
    ("instructor", "four modes", "python", INSTRUCTOR_MODES, "Add\n" * 4),
    ("openai-node", "runTools", "js", NODE_TOOLS, "250 + 117 = 367\n" * 2),
    ("ai-sdk", "a second turn", "js", AI_SDK_TURNS, "Your name is Nora.\n" * 3),
]


@pytest.mark.parametrize(
    ("client", "language", "source", "output"),
    [
        pytest.param(client, *rest, marks=pytest.mark.client(client, tried), id=f"{client} {tried}")
        for client, tried, *rest in CASES
    ],
)
def test_an_sdk_gets_what_it_expects(
    machine: MakeMachine, demo_url: str, client: str, language: str, source: str, output: str
) -> None:
    done = machine(client).program(source.replace("http://127.0.0.1:8000", demo_url), language)
    assert done.status == 0, str(done)
    assert done.stdout == output, str(done)


@pytest.mark.client("lm-eval", "log-likelihoods beside transformers'")
def test_lm_eval_gets_the_loglikelihoods_of_transformers(
    machine: MakeMachine, demo_url: str
) -> None:
    (recipe,) = [program for program in programs() if program.page == "lm-eval"]
    computer = machine("lm-eval")
    done = computer.program(recipe.source.replace(DEFAULT_URL, demo_url), "sh")
    assert done.status == 0, str(done)
    (path,) = computer.work.glob("results/*/samples_small_*.jsonl")
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    requests = [
        (values["arg_0"], values["arg_1"], float(reply[0][0]))
        for sample in samples
        for values, reply in zip(sample["arguments"].values(), sample["resps"], strict=True)
    ]
    assert len(requests) == 4
    for context, continuation, value in requests:
        assert math.isclose(value, loglikelihood(context, continuation), abs_tol=1e-4)


def loglikelihood(context: str, continuation: str) -> float:
    """Of the continuation, in float32, by transformers."""
    folder = DEMO_DIR
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = len(tokenizer(context).input_ids)
    ids = torch.tensor([tokenizer(context + continuation).input_ids])
    with torch.inference_mode():
        logprobs = model(ids).logits.log_softmax(-1)[0]
    return float(sum(logprobs[i - 1, ids[0, i]] for i in range(before, ids.shape[1])))
