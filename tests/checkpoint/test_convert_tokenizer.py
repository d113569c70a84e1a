import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import AutoTokenizer

from minisrv.checkpoint import convert_tokenizer
from minisrv.checkpoint.tokenizer import load_tokenizer, needs_conversion
from minisrv.detokenizer.incremental import TextDecoder
from tests.support import own_tokenizers

TEXTS = [*own_tokenizers.SENTENCES, "", " ", "emoji 👍🏽 end", "  a  b ", "<s> and </s>"]


def run_convert(model_dir: Path, out_dir: Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "minisrv.checkpoint.convert_tokenizer",
        str(model_dir),
        str(out_dir),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def train_sentencepiece(path: Path, kind: str) -> Path:
    corpus = path / "corpus.txt"
    corpus.write_text("\n".join(own_tokenizers.SENTENCES * 5))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(path / "tokenizer"),
        vocab_size=420,
        model_type=kind,
        byte_fallback=True,
        character_coverage=0.99,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    corpus.unlink()
    return path / "tokenizer.model"


def save_llama(path: Path) -> None:
    train_sentencepiece(path, "bpe")
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "chat_template": "{{ bos_token }}{{ messages[0].content }}",
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))


def save_gpt2(path: Path) -> None:
    saved = json.loads(own_tokenizers.byte_level_bpe().to_str())["model"]
    (path / "vocab.json").write_text(json.dumps(saved["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in saved["merges"])
    (path / "merges.txt").write_text("#version: 0.2\n" + merges + "\n")
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "</s>", "bos_token": "<s>"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("save", [save_llama, save_gpt2])
def test_a_converted_tokenizer_equals_that_of_transformers(tmp_path: Path, save: Any) -> None:
    model_dir, out_dir = tmp_path / "model", tmp_path / "out"
    model_dir.mkdir()
    save(model_dir)
    assert needs_conversion(model_dir)
    assert convert_tokenizer.main([str(model_dir), str(out_dir)]) == 0
    assert not needs_conversion(out_dir)
    ours, theirs = load_tokenizer(out_dir), AutoTokenizer.from_pretrained(model_dir)
    decoder = TextDecoder(ours)
    for text in TEXTS:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        stream = decoder.stream(True)
        joined = "".join(map(stream.push, ids)) + stream.flush()
        assert joined == ours.decode(ids)
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    template = theirs.chat_template
    assert ours.chat_templates == ({} if template is None else {"default": template})


def test_the_ids_are_those_of_sentencepiece_itself(tmp_path: Path) -> None:
    save_llama(tmp_path)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert convert_tokenizer.main([str(tmp_path), str(tmp_path / "out")]) == 0
    ours = load_tokenizer(tmp_path / "out")
    for text in own_tokenizers.SENTENCES:
        assert ours.encode(text, add_special_tokens=False) == reference.encode(text)


def test_nothing_to_convert_is_refused_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert_tokenizer.main([str(tmp_path), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "has no tokenizer" in error
    assert error.count("\n") == 1


def test_a_broken_tokenizer_is_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    done = run_convert(tmp_path, tmp_path / "out")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "cannot be converted to tokenizer.json" in done.stderr.splitlines()[-1]
