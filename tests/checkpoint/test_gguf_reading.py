"""GGUF files as bytes: what is read equals the package's own reader; bad files are refused."""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from minisrv.checkpoint.gguf.files import find_gguf
from minisrv.checkpoint.gguf.reading import open_gguf
from minisrv.errors import ConfigError
from tests.support.checkpoints import make_checkpoint
from tests.support.gguf_files import Kind, split_gguf, write_gguf

NUM_MUTATIONS = 200
ROOT = Path(__file__).parents[2]
# Reads each file as a server does, with little memory above what the imports take.
LOAD = """
import json, resource, sys
from pathlib import Path
import torch
from minisrv.checkpoint.model_config import load_model_config
from minisrv.checkpoint.tokenizer import load_tokenizer
from minisrv.engine.gguf_weights import GgufWeights
from minisrv.errors import MinisrvError
from tests.support.gguf_files import take_all
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20),) * 2)
for path in map(Path, sys.argv[1:]):
    try:
        config = load_model_config(path)
        load_tokenizer(path)
        take_all(GgufWeights(path, config, dtype=torch.float32, device=torch.device("cpu")), config)
        print(json.dumps(None), flush=True)
    except MinisrvError as error:
        print(json.dumps(error.message), flush=True)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    original = make_checkpoint(folder / "original", "llama", num_hidden_layers=1)
    return write_gguf(original, folder / "model.gguf", Kind.Q8_0)


def test_metadata_and_tensors_equal_those_of_the_package(model: Path) -> None:
    ours, theirs = open_gguf(model), gguf.GGUFReader(model)
    keys = [key for key in theirs.fields if not key.startswith("GGUF.")]
    assert ours.keys == keys
    for key in keys:
        expected = theirs.fields[key].contents()
        if isinstance(expected, float):
            expected = pytest.approx(expected, rel=1e-7)
        assert ours.value(key) == expected, key
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        read = ours.tensors[tensor.name]
        assert read.kind == tensor.tensor_type
        assert read.shape == tuple(reversed(tensor.shape.tolist()))
        assert np.array_equal(ours.data(tensor.name).ravel(), tensor.data.view(np.uint8).ravel())
        ours.forget(tensor.name)
        assert np.array_equal(ours.data(tensor.name).ravel(), tensor.data.view(np.uint8).ravel())


def test_some_texts_of_an_array_are_those_at_their_places(model: Path) -> None:
    checkpoint, key = open_gguf(model), "tokenizer.ggml.tokens"
    tokens = checkpoint.value(key)
    assert checkpoint.count(key) == len(tokens)
    places = [0, 5, len(tokens) - 1]
    assert checkpoint.some_texts(key, places) == {i: tokens[i] for i in places}
    assert checkpoint.count("general.architecture") == checkpoint.count("missing") == 0
    for other in ("tokenizer.ggml.token_type", "general.architecture", "missing"):
        with pytest.raises(ConfigError, match=f"no texts in {other}"):
            checkpoint.some_texts(other, places)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_split_model_is_found_by_any_of_its_files(
    number: int, model: Path, tmp_path: Path
) -> None:
    paths = split_gguf(model, tmp_path, 3)
    whole, parts = open_gguf(model), open_gguf(paths[number - 1])
    assert find_gguf(tmp_path) == tuple(paths)
    assert list(whole.tensors) == list(parts.tensors)
    for name in whole.tensors:
        assert np.array_equal(whole.data(name), parts.data(name))


def test_a_split_model_that_lacks_a_file_is_refused(model: Path, tmp_path: Path) -> None:
    paths = split_gguf(model, tmp_path, 3)
    paths[1].unlink()
    with pytest.raises(ConfigError, match=r"00002-of-00003.gguf does not exist"):
        open_gguf(paths[0])


def test_files_of_a_split_model_that_are_exchanged_are_refused(model: Path, tmp_path: Path) -> None:
    paths = split_gguf(model, tmp_path, 3)
    paths[2].write_bytes(paths[1].read_bytes())
    with pytest.raises(ConfigError, match=r"00003.gguf has \S+ again"):
        open_gguf(paths[0])


def changed(contents: bytes, at: int, form: str, value: int) -> bytes:
    return contents[:at] + struct.pack(form, value) + contents[at + struct.calcsize(form) :]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda old: b"", "has only 0 bytes"),
        (lambda old: old[:20], "is cut off"),
        (lambda old: old[:200], "that its|is cut off|beyond its end|can hold"),
        (lambda old: old[:-40], "ends at byte .*, but the file has"),
        (lambda old: b"GGML" + old[4:], "begins with b'GGML'"),
        (lambda old: changed(old, 4, "<I", 1), "version 1; minisrv reads versions 2 and 3"),
        (lambda old: changed(old, 4, ">I", 3), "is big-endian"),
        (lambda old: changed(old, 8, "<Q", 1 << 60), "states 1152921504606846976 tensors"),
        (lambda old: changed(old, 16, "<Q", 1 << 60), "entries of metadata, more than its"),
        (lambda old: changed(old, 24, "<Q", 1 << 62), "a text of 4611686018427387904 bytes"),
        (lambda old: tensor_field(old, 4 + 8 + 8, "<I", 77), "unknown type 77"),
        (lambda old: tensor_field(old, 4 + 8 + 8, "<I", 8 + 9), "impossible for|begins at byte"),
        (lambda old: tensor_field(old, 4 + 8 + 8 + 4, "<Q", 1 << 40), "begins at byte"),
        (lambda old: tensor_field(old, 4, "<Q", 1 << 63), "impossible|ends at byte"),
        (lambda old: tensor_field(old, 0, "<I", 5), "has 5 dimensions"),
    ],
)  # fmt: skip
def test_a_bad_file_is_refused_in_one_sentence(
    change: Any, reason: str, model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(change(model.read_bytes()))
    with pytest.raises(ConfigError, match=reason) as failure:
        open_gguf(path)
    assert str(path) in failure.value.message
    assert "\n" not in failure.value.message


def tensor_field(contents: bytes, offset: int, form: str, value: int) -> bytes:
    """Changes the description of the first matrix, at `offset` behind its name."""
    name = b"token_embd.weight"
    return changed(contents, contents.index(name) + len(name) + offset, form, value)


def test_mutated_files_are_refused_or_read_with_little_memory(model: Path, tmp_path: Path) -> None:
    contents, rng = model.read_bytes(), random.Random(15)
    first = min(tensor.start for tensor in open_gguf(model).tensors.values())
    paths = []
    for number in range(NUM_MUTATIONS):
        mutated = bytearray(contents)
        for _ in range(rng.choice([1, 1, 1, 4])):
            mutated[rng.randrange(first)] = rng.choice([0, 1, 127, 255, rng.randrange(256)])
        if rng.random() < 0.1:
            del mutated[rng.randrange(len(mutated)) :]
        paths.append(tmp_path / f"{number}.gguf")
        paths[-1].write_bytes(mutated)
    command = [sys.executable, "-c", LOAD, *map(str, paths)]
    env = {**os.environ, "PYTHONPATH": f"{ROOT / 'python'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == NUM_MUTATIONS
    sentences = [answer for answer in answers if answer is not None]
    assert len(sentences) > NUM_MUTATIONS // 10
    for sentence in sentences:
        assert "\n" not in sentence
        assert len(sentence) < 1000
