import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from minisrv.checkpoint.tokenizer import load_tokenizer, needs_conversion
from minisrv.errors import ConfigError, InvalidRequestError
from tests.support import own_tokenizers

TEXTS = [
    *own_tokenizers.SENTENCES,
    "",
    " ",
    "  leading and trailing  ",
    "<s>special</s> <tool> é→ <new> <more><first> quick <new>",
    "emoji 👩‍👩‍👧 and e\u0301 and \x00 and \U0010ffff",
]
CONFIGS: list[dict[str, Any]] = [
    {},
    {"add_bos_token": True},
    {"add_bos_token": False},
    {"add_bos_token": True, "add_eos_token": True},
    {"add_eos_token": True},
    {"add_bos_token": True, "bos_token": None},
    {"add_bos_token": None},
    {"additional_special_tokens": ["<new>", "quick"]},
    {"extra_special_tokens": {"image_token": "<new>"}},
    {"eos_token": "<tool>", "image_token": "quick"},
    {"extra_special_tokens": {"image_token": "<tool>"}},
    {"eos_token": {"__type": "AddedToken", "content": "<tool>", "special": True}},
    {
        "added_tokens_decoder": {
            "900": {"content": "<new>", "special": True, "normalized": False},
            "2": {"content": "</s>", "special": True, "normalized": False},
        }
    },
]


@pytest.mark.parametrize("config", CONFIGS, ids=json.dumps)
@pytest.mark.parametrize("name", own_tokenizers.MAKERS)
def test_ids_and_text_equal_those_of_transformers(
    tmp_path: Path, name: str, config: dict[str, Any]
) -> None:
    check_against_transformers(own_tokenizers.save(tmp_path, name, **config))


def check_against_transformers(path: Path) -> None:
    ours, theirs = load_tokenizer(path), AutoTokenizer.from_pretrained(path)
    for text in TEXTS:
        for special in (True, False):
            ids = theirs.encode(text, add_special_tokens=special)
            assert ours.encode(text, add_special_tokens=special) == ids, (text, special)
            for skip in (True, False):
                expected = theirs.decode(ids, skip_special_tokens=skip)
                assert ours.decode(ids, skip_special_tokens=skip) == expected
    assert ours.vocab_size == len(theirs)
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert (ours.bos_token, ours.eos_token) == (theirs.bos_token, theirs.eos_token)
    assert ours.special_tokens == theirs.special_tokens_map


# Files of the old form: added_tokens.json, special_tokens_map.json, tokenizer_config.json.
OLD_FORMS: list[tuple[dict[str, int], dict[str, Any], dict[str, Any]]] = [
    ({"<new>": 900, "quick": 901}, {}, {}),
    ({"<new>": 901, "<first>": 900}, {}, {}),
    ({"<new>": 900}, {"eos_token": "<new>"}, {}),
    ({"<new>": 900}, {"eos_token": {"content": "<new>", "lstrip": True}}, {}),
    ({"<new>": 900}, {}, {"eos_token": "<new>"}),
    ({"<new>": 900}, {"additional_special_tokens": ["<new>", "<more>"]}, {}),
    ({"<new>": 900}, {}, {"additional_special_tokens": ["<new>", "<more>"]}),
    ({"<new>": 900}, {}, {"extra_special_tokens": ["<new>"]}),
    ({"<new>": 900}, {}, {"extra_special_tokens": {"image_token": "<new>"}}),
    (
        {"<new>": 900},
        {"additional_special_tokens": ["<more>"]},
        {"additional_special_tokens": ["<new>"]},
    ),
    ({"<s>": 1, "</s>": 2, "<new>": 3}, {"eos_token": "</s>"}, {}),
    ({"<tool>": 900, "<new>": 901}, {}, {}),
    (
        {"<new>": 900},
        {"eos_token": "<new>"},
        {"added_tokens_decoder": {"2": {"content": "</s>", "special": True}}},
    ),
]


@pytest.mark.parametrize(("added", "names", "config"), OLD_FORMS, ids=json.dumps)
@pytest.mark.parametrize("name", own_tokenizers.MAKERS)
def test_files_of_the_old_form_give_the_ids_and_texts_of_transformers(
    tmp_path: Path, name: str, added: dict[str, int], names: Any, config: dict[str, Any]
) -> None:
    path = own_tokenizers.save(tmp_path, name, **config)
    (path / "added_tokens.json").write_text(json.dumps(added))
    (path / "special_tokens_map.json").write_text(json.dumps(names))
    check_against_transformers(path)


def test_a_special_tokens_map_of_the_old_form_is_read(tmp_path: Path) -> None:
    path = own_tokenizers.save(tmp_path, "byte_level_bpe", eos_token="<pad>")
    names = {"eos_token": {"content": "</s>", "lstrip": False}, "cls_token": "<cls>"}
    (path / "special_tokens_map.json").write_text(json.dumps(names))
    ours, theirs = load_tokenizer(path), AutoTokenizer.from_pretrained(path)
    assert ours.special_tokens == theirs.special_tokens_map
    assert ours.encode("a<cls>b</s>") == theirs.encode("a<cls>b</s>")


def test_stored_truncation_and_padding_are_off(tmp_path: Path) -> None:
    path = own_tokenizers.save(tmp_path, "byte_level_bpe")
    stored = Tokenizer.from_file(str(path / "tokenizer.json"))
    stored.enable_truncation(4)
    stored.enable_padding(length=64)
    stored.save(str(path / "tokenizer.json"))
    tokenizer = load_tokenizer(path)
    long_text = "the quick brown fox " * 10
    assert tokenizer.decode(tokenizer.encode(long_text)) == long_text
    assert len(tokenizer.encode("a")) == 1


@pytest.mark.parametrize("text", ["\ud800", "ok \udfff end"])
def test_a_lone_surrogate_is_an_invalid_request(tmp_path: Path, text: str) -> None:
    tokenizer = load_tokenizer(own_tokenizers.save(tmp_path, "llama_like"))
    with pytest.raises(InvalidRequestError, match="lone surrogate"):
        tokenizer.encode(text)


def test_threads_share_a_tokenizer(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(own_tokenizers.save(tmp_path, "byte_level_bpe"))
    expected = {text: tokenizer.encode(text) for text in TEXTS}
    wrong: list[str] = []

    def work() -> None:
        for _ in range(50):
            for text, ids in expected.items():
                if tokenizer.encode(text) != ids or tokenizer.decode(ids, False) != text:
                    wrong.append(text)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


NAMED_TEMPLATES = [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]


def test_chat_templates_are_found_where_transformers_finds_them(tmp_path: Path) -> None:
    path = own_tokenizers.save(tmp_path, "byte_level_bpe")
    assert load_tokenizer(path).chat_templates == {}
    (path / "chat_template.json").write_text(json.dumps({"chat_template": "from json"}))
    assert load_tokenizer(path).chat_templates == {"default": "from json"}
    own_tokenizers.save(tmp_path, "byte_level_bpe", chat_template="from config")
    assert load_tokenizer(path).chat_templates == {"default": "from config"}
    assert AutoTokenizer.from_pretrained(path).chat_template == "from config"
    own_tokenizers.save(tmp_path, "byte_level_bpe", chat_template=NAMED_TEMPLATES)
    assert load_tokenizer(path).chat_templates == {"default": "A", "tool_use": "B"}
    assert AutoTokenizer.from_pretrained(path).chat_template == {"default": "A", "tool_use": "B"}
    (path / "chat_template.jinja").write_text("from jinja")
    assert load_tokenizer(path).chat_templates == {"default": "from jinja"}
    assert AutoTokenizer.from_pretrained(path).chat_template == "from jinja"
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "rag.jinja").write_text("R")
    assert load_tokenizer(path).chat_templates == {"default": "from jinja", "rag": "R"}
    assert AutoTokenizer.from_pretrained(path).chat_template == {
        "default": "from jinja",
        "rag": "R",
    }


def test_the_template_of_the_option_replaces_all(tmp_path: Path) -> None:
    path = own_tokenizers.save(tmp_path, "byte_level_bpe", chat_template="from config")
    (tmp_path / "mine.jinja").write_text("mine")
    tokenizer = load_tokenizer(path, str(tmp_path / "mine.jinja"))
    assert tokenizer.chat_templates == {"default": "mine"}
    with pytest.raises(ConfigError, match=r"missing\.jinja"):
        load_tokenizer(path, str(tmp_path / "missing.jinja"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", '{"model": {"type": "Nonsense"}}'),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"chat_template": [1]}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}'),
    ],
)
def test_a_broken_file_is_a_config_error(tmp_path: Path, name: str, content: str) -> None:
    path = own_tokenizers.save(tmp_path, "byte_level_bpe")
    (path / name).write_text(content)
    with pytest.raises(ConfigError):
        load_tokenizer(path)


def test_a_directory_without_tokenizer_json_needs_conversion(tmp_path: Path) -> None:
    assert needs_conversion(tmp_path)
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json"):
        load_tokenizer(tmp_path)
    assert not needs_conversion(own_tokenizers.save(tmp_path, "unigram"))


def test_the_text_modules_load_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, minisrv.checkpoint.tokenizer; "
        "import minisrv.tokenizer.worker, minisrv.detokenizer.worker; "
        "sys.exit(','.join({'torch', 'transformers'} & sys.modules.keys()) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
