"""Held-out accuracy of a demo checkpoint, by greedy decoding in transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo_model import corpus, tools
from demo_model.tokenizer import word_pieces

Maker = Callable[[Random], corpus.Exchange]

TARGETS = {
    "greeting": 0.99,
    "identity": 0.99,
    "counting": 0.95,
    "spelling": 0.95,
    "repeating": 0.95,
    "JSON": 0.95,
    "addition": 0.90,
    "lookup in 200 tokens": 0.95,
    "lookup in 1,000 tokens": 0.85,
    "tool call": 0.95,
    "tool answer": 0.95,
}
BATCH = 25


def makers(pieces: list[str]) -> dict[str, Maker]:
    """A generator of exchanges for each row of the table."""
    spelling = corpus.make_spelling(pieces)

    def lookup(entries: int) -> Maker:
        def make(rng: Random) -> corpus.Exchange:
            prompt, answer = corpus.lookup_prompt(rng, corpus.key_value_list(rng, entries))
            return corpus.Exchange(prompt, answer, "lookup")

        return make

    return {
        "greeting": corpus.greeting,
        "identity": corpus.identity,
        "counting": corpus.counting,
        "spelling": spelling,
        "repeating": corpus.repeating,
        "JSON": corpus.as_json,
        "addition": corpus.addition,
        "lookup in 200 tokens": lookup(LOOKUP_200),
        "lookup in 1,000 tokens": lookup(LOOKUP_1000),
        "tool call": tools.call,
        "tool answer": tools.answer,
    }


# List entries that make a prompt of about 200 and 1,000 tokens.
LOOKUP_200, LOOKUP_1000 = 22, 116


def absent(exchange: corpus.Exchange) -> bool:
    """Whether this prompt cannot be in the corpus: training rejects what this accepts."""
    if exchange.task == "addition":
        a, b = exchange.assistant.split("so ")[1].split(" = ")[0].split(" + ")
        return corpus.held_out(f"{a}+{b}")
    return exchange.task != "spelling of common words" and corpus.held_out(exchange.user)


def held_out_exchanges(make: Maker, count: int) -> list[corpus.Exchange]:
    rng = Random(2026)
    found: dict[str, corpus.Exchange] = {}
    while len(found) < count:
        made = make(rng)
        if absent(made):
            found[made.user] = made
    return list(found.values())


def messages(exchange: corpus.Exchange) -> list[dict[str, str]]:
    """The chat up to the answer to be measured."""
    before = messages(exchange.before) if exchange.before else []
    if exchange.before:
        before.append({"role": "assistant", "content": exchange.before.assistant})
    return [*before, {"role": "user", "content": exchange.user}]


class Evaluator:
    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        self.pieces = word_pieces(self.tokenizer.backend_tokenizer)

    def answers(self, exchanges: list[corpus.Exchange]) -> Iterator[str]:
        chats = [
            self.tokenizer.apply_chat_template(
                messages(exchange),
                tools=list(exchange.tools) or None,
                tokenize=False,
                add_generation_prompt=True,
            )
            for exchange in exchanges
        ]
        for first in range(0, len(chats), BATCH):
            batch = self.tokenizer(chats[first : first + BATCH], return_tensors="pt", padding=True)
            ids = self.model.generate(**batch, max_new_tokens=160, do_sample=False)
            new = ids[:, batch["input_ids"].shape[1] :]
            yield from self.tokenizer.batch_decode(new, skip_special_tokens=True)

    def row(self, make: Maker, count: int) -> tuple[float, float, list[tuple[str, str, str]]]:
        """Accuracy, mean prompt length in tokens, and the mistakes (prompt, answer, expected)."""
        exchanges = held_out_exchanges(make, count)
        lengths = [len(self.tokenizer.encode(exchange.user)) for exchange in exchanges]
        wrong = [
            (e.user, answer, e.assistant)
            for e, answer in zip(exchanges, self.answers(exchanges), strict=True)
            if not right(e, answer)
        ]
        return 1 - len(wrong) / count, sum(lengths) / count, wrong


def right(exchange: corpus.Exchange, answer: str) -> bool:
    if exchange.task != "JSON":
        return answer == exchange.assistant
    try:
        return bool(json.loads(answer) == json.loads(exchange.assistant))
    except ValueError:
        return False
