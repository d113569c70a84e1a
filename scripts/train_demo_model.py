"""Train the demo model: python scripts/train_demo_model.py [--steps N] [--out DIR].

The corpus is made by rules while training, from the seed and the step alone. A checkpoint in
--work lets an interrupted training go on; the package folder is written at every --export-every.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from demo_model import corpus, tools
from demo_model.muon import Muon
from demo_model.network import Network, Shape, export_state, hf_config
from demo_model.tokenizer import (
    END_OF_TEXT,
    IM_END,
    SPECIAL_TOKENS,
    save_tokenizer,
    train_tokenizer,
    word_pieces,
)

PACKAGE = Path(__file__).parent.parent / "python" / "minisrv" / "checkpoint" / "demo_model"
SEED = 7
VOCAB_SIZE = 512
FINISHING_STEPS = 1400
TOOLS_SHARE = 0.15
TOKENS_A_STEP = 4096

Document = list[corpus.Exchange]


class Chats:
    """Random documents whose prompts are all in the training nine tenths.

    `finishing` is the mixture of the last steps: more of what is learned slowest.
    """

    def __init__(self, pieces: list[str], finishing: bool = False) -> None:
        slow, spelling = (3.0, 8.0) if finishing else (1.0, 1.6)
        self.simple: list[tuple[corpus.Task, float]] = [
            (corpus.greeting, 0.5),
            (corpus.identity, 0.7),
            (corpus.counting, 1.5 * slow),
            (corpus.make_spelling(pieces), spelling),
            (corpus.addition, 3.0),
            (corpus.repeating, 1.0),
            (corpus.random_copy, 0.6),
            (corpus.as_json, 1.0),
            (corpus.thanks, 0.15),
            (corpus.fallback, 0.3),
        ]

    def exchange(self, rng: Random) -> corpus.Exchange:
        tasks, weights = zip(*self.simple, strict=True)
        while True:
            made: corpus.Exchange = rng.choices(tasks, weights)[0](rng)
            if trainable(made):
                return made

    def document(self, rng: Random, lookup_share: float, most_entries: int) -> Document:
        kind = rng.random()
        if kind < lookup_share:
            entries = max(2, int(most_entries * rng.random() ** 1.5))
            chat = corpus.lookup_chat(rng, entries)
            return chat if trainable(chat[0]) else self.document(rng, 1.0, most_entries)
        if kind < lookup_share + 0.04:
            return corpus.name_chat(rng, [self.exchange])
        if kind < lookup_share + 0.04 + TOOLS_SHARE:
            return self.tools_document(rng)
        return [self.exchange(rng) for _ in range(rng.choice([1, 1, 1, 2, 3]))]

    def tools_document(self, rng: Random) -> Document:
        """A call and mostly its answer, and another round; or a task that needs no tool."""
        if rng.random() < 0.2:
            return [tools.unneeded(rng, self.exchange)]
        document = self.tool_round(rng, ())
        if len(document) == 2 and rng.random() < 0.3:
            document += self.tool_round(rng, document[0].tools)
        return document

    def tool_round(self, rng: Random, shown: tuple[corpus.Tool, ...]) -> Document:
        while True:
            made = tools.answer(rng, shown)
            assert made.before is not None
            if trainable(made.before) and trainable(made):
                return [made.before, made] if rng.random() < 0.7 else [made.before]


def trainable(exchange: corpus.Exchange) -> bool:
    if exchange.task == "addition":
        a, b = exchange.assistant.split("so ")[1].split(" = ")[0].split(" + ")
        return not corpus.held_out(f"{a}+{b}")
    common = exchange.task in ("spelling of common words", "fallback", "thanks", "name")
    return common or not corpus.held_out(exchange.user)


def encode(tokenizer: Tokenizer, document: Document) -> tuple[list[int], list[float]]:
    """Ids and loss weights of a chat; only answers are learned."""
    ids: list[int] = []
    weights: list[float] = []

    def add(text: str, weight: float) -> None:
        new = tokenizer.encode(text).ids
        ids.extend(new)
        weights.extend([weight] * len(new))

    if document[0].tools:
        add(f"<|im_start|>system\n{tools.tools_text(document[0].tools)}<|im_end|>\n", 0.0)
    for exchange in document:
        add(f"<|im_start|>user\n{exchange.user}<|im_end|>\n<|im_start|>assistant\n", 0.0)
        add(f"{exchange.assistant}<|im_end|>", 1.0)
        add("\n", 0.0)
    return ids, weights


def batches(
    tokenizer: Tokenizer, pieces: list[str], first: int, steps: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows packed with documents; lists grow over the first half, long rows come in between."""
    pad = tokenizer.token_to_id(END_OF_TEXT)
    for step in range(first, steps + FINISHING_STEPS):
        rng = Random(f"{SEED}-{step}")
        done = min(1.0, step / steps)
        chats = Chats(pieces, finishing=step >= steps)
        long = done > 0.3 and step % 3 == 0
        length = 1280 if long else 512
        share = 0.75 if long else 0.25
        entries = 140 if long else int(6 + min(1.0, done / 0.3) * 26)
        rows, row_weights = [], []
        for _ in range(TOKENS_A_STEP // length):
            ids, weights = list[int](), list[float]()
            while len(ids) < length:
                more, new_weights = encode(tokenizer, chats.document(rng, share, entries))
                if len(more) > length - len(ids):
                    if len(ids) > length // 2 or len(more) > length:
                        break
                    continue
                ids += more
                weights += new_weights
            space = length - len(ids)
            rows.append(ids + [pad] * space)
            row_weights.append(weights + [0.0] * space)
        yield torch.tensor(rows), torch.tensor(row_weights)


def make_tokenizer(path: Path, new: bool) -> Tokenizer:
    """The tokenizer of this training, else the shipped one, which keeps old chats' tokens."""
    for known in [path] if new else [path, PACKAGE / "tokenizer.json"]:
        if known.exists():
            return Tokenizer.from_file(str(known))
    rng = Random(SEED)
    chats = Chats([])
    documents = (chats.document(rng, 0.15, 12) for _ in range(20_000))
    texts = [part for doc in documents for e in doc for part in (e.user, e.assistant)]
    tokenizer = train_tokenizer([*texts, "user\n", "assistant\n"], VOCAB_SIZE)
    tokenizer.save(str(path))
    return tokenizer


def export(network: Network, tokenizer: Tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    eos = [tokenizer.token_to_id(IM_END), tokenizer.token_to_id(END_OF_TEXT)]
    config = hf_config(network.shape, eos, eos[1])
    generation = {"do_sample": False, "eos_token_id": eos, "pad_token_id": eos[1]}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    save_tokenizer(tokenizer, folder, network.shape.context)
    partial = folder / "model.safetensors.partial"
    save_file(export_state(network), partial, metadata={"format": "pt"})
    os.replace(partial, folder / "model.safetensors")


def learning_rate(step: int, steps: int) -> float:
    """Up over the first hundredth, flat, down over the last 40 %; then a small second ramp."""
    if step >= steps:
        return 0.25 * (1.0 - (step - steps) / FINISHING_STEPS)
    done = step / steps
    return min(1.0, done / 0.01, (1.0 - done) / 0.4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4400, help=f"and {FINISHING_STEPS} to finish")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("/tmp/minisrv-demo-training"))
    parser.add_argument("--out", type=Path, default=PACKAGE)
    parser.add_argument("--new-tokenizer", action="store_true", help="not the shipped one")
    parser.add_argument("--export-every", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    args.work.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(args.work / "tokenizer.json", args.new_tokenizer)
    train(args, tokenizer)


def train(args: argparse.Namespace, tokenizer: Tokenizer) -> None:
    network = Network(Shape(vocab_size=tokenizer.get_vocab_size()))
    matrices = [p for n, p in network.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in network.named_parameters() if p.ndim != 2 or "embed" in n]
    muon = Muon(matrices, lr=0.02)
    adam = torch.optim.AdamW(others, lr=0.004, betas=(0.9, 0.98), weight_decay=0.0)
    parameters = sum(p.numel() for p in network.parameters())
    print(f"{parameters:,} parameters, vocabulary {network.shape.vocab_size}", file=sys.stderr)
    first, spent = resume(args.work, network, [muon, adam])
    began = time.monotonic()
    pieces = word_pieces(tokenizer)
    last = args.steps + FINISHING_STEPS
    for step, (ids, weights) in enumerate(
        batches(tokenizer, pieces, first, args.steps), start=first + 1
    ):
        for optimizer, top in ((muon, 0.02), (adam, 0.004)):
            optimizer.param_groups[0]["lr"] = top * learning_rate(step - 1, args.steps)
        with torch.autocast("cpu", torch.bfloat16):
            loss = network.loss(ids, weights)
        loss.backward()
        muon.step()
        adam.step()
        network.zero_grad(set_to_none=True)
        if step % 20 == 0:
            seconds = spent + time.monotonic() - began
            print(f"step {step} loss {loss.item():.4f} {seconds:.0f} s", flush=True)
        if step % args.export_every == 0 or step == last:
            save(args.work, network, [muon, adam], step, spent + time.monotonic() - began)
            export(network, tokenizer, args.out)


def save(
    work: Path, network: Network, optimizers: list[torch.optim.Optimizer], step: int, spent: float
) -> None:
    tensors = {f"network.{n}": t.contiguous() for n, t in network.state_dict().items()}
    for i, optimizer in enumerate(optimizers):
        for key, state in optimizer.state_dict()["state"].items():
            tensors.update({f"optimizer.{i}.{key}.{n}": t for n, t in state.items()})
    partial = work / "checkpoint.partial"
    save_file(tensors, partial, metadata={"step": str(step), "spent": str(spent)})
    os.replace(partial, work / "checkpoint.safetensors")


def resume(
    work: Path, network: Network, optimizers: list[torch.optim.Optimizer]
) -> tuple[int, float]:
    """Go on where a checkpoint was written: its step and the seconds spent."""
    path = work / "checkpoint.safetensors"
    if not path.exists():
        return 0, 0.0
    from safetensors import safe_open

    tensors = load_file(path)
    network.load_state_dict({n[8:]: t for n, t in tensors.items() if n.startswith("network.")})
    for i, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith(f"optimizer.{i}."):
                _, _, key, field = name.split(".")
                state.setdefault(int(key), {})[field] = tensor
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    return int(metadata["step"]), float(metadata["spent"])


if __name__ == "__main__":
    assert SPECIAL_TOKENS
    main()
