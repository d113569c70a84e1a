"""Masks against the regex package's partial matches: which tokens may come, and when the end."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
import regex
from tokenizers import Tokenizer

from minisrv.checkpoint.tokenizer import HFTokenizer
from minisrv.errors import InvalidRequestError
from minisrv.sampling_params import Grammar
from minisrv.structured_output.matcher import Matcher
from minisrv.structured_output.source import to_source
from minisrv.structured_output.vocabulary import Vocabulary, open_vocabulary, read_vocabulary
from tests.support import own_tokenizers
from tests.support.builders import DEMO_EOS, demo_tokenizer, demo_vocabulary

PATTERNS = [
    "[a-c]+x?",
    "(yes|no|maybe so)",
    "[0-9]{2,4}-[ab ]*",
    "a(b|c a){0,3}",
    "how can( I| you)?",
]


def allowed_tokens(matcher: Matcher, num_words: int, banned: tuple[int, ...] = ()) -> set[int]:
    words = np.empty(num_words, np.int32)
    matcher.fill(words, banned)
    return set(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_mask_allows_just_the_tokens_with_which_the_text_can_go_on(pattern: str) -> None:
    tokenizer, vocabulary = demo_tokenizer(), demo_vocabulary()
    texts = {i: tokenizer.decode([i], skip_special_tokens=False) for i in range(512)}
    whole = {i for i in texts if "\ufffd" not in texts[i] and i not in tokenizer.special_ids}
    start = vocabulary.compile(to_source(Grammar.regex(pattern)))
    for seed in range(5):
        rng, matcher, text = Random(seed), start.copy(), ""
        for _ in range(12):
            allowed = allowed_tokens(matcher, vocabulary.num_words)
            expected = {i for i in whole if regex.fullmatch(pattern, text + texts[i], partial=True)}
            if allowed - {DEMO_EOS} != expected:
                # Where the next characters are given, only the tokens of their usual spelling.
                longest = max((texts[i] for i in expected), key=len)
                assert all(longest.startswith(texts[i]) for i in expected)
                assert allowed
                assert allowed < expected
            assert (DEMO_EOS in allowed) == bool(regex.fullmatch(pattern, text))
            assert matcher.accepts == bool(regex.fullmatch(pattern, text))
            if not expected:
                break
            token_id = rng.choice(sorted(allowed - {DEMO_EOS}))
            matcher.advance(token_id)
            text += texts[token_id]
            if matcher.ended:
                assert regex.fullmatch(pattern, text)
                break


def test_a_copy_goes_its_own_way() -> None:
    vocabulary, tokenizer = demo_vocabulary(), demo_tokenizer()
    start = vocabulary.compile(to_source(Grammar.choice(["ab", "cd"])))
    other = start.copy()
    (a,) = tokenizer.encode("a")
    other.advance(a)
    assert allowed_tokens(start, 16) == {*tokenizer.encode("a"), *tokenizer.encode("c")}
    assert allowed_tokens(other, 16) == {*tokenizer.encode("b")}


def test_banned_tokens_go_unless_they_are_all_there_is() -> None:
    vocabulary, (a,) = demo_vocabulary(), demo_tokenizer().encode("a")
    matcher = vocabulary.compile(to_source(Grammar.regex("a{1,3}")))
    assert allowed_tokens(matcher, 16, (a,)) == {a}
    matcher.advance(a)
    assert allowed_tokens(matcher, 16) == {a, DEMO_EOS}
    assert allowed_tokens(matcher, 16, (DEMO_EOS,)) == {a}


def test_a_token_that_does_not_fit_is_an_error_for_good() -> None:
    matcher = demo_vocabulary().compile(to_source(Grammar.regex("a")))
    matcher.advance(7)
    assert matcher.error
    assert not matcher.ended
    assert len(allowed_tokens(matcher, 16)) == 512


@pytest.mark.parametrize("name", ["byte_level_bpe", "llama_like"])
def test_every_id_of_a_model_has_a_bit_and_every_end_token_ends(name: str) -> None:
    tokenizer = HFTokenizer(
        Tokenizer.from_str(own_tokenizers.MAKERS[name]().to_str()), own_tokenizers.NAMED, {}
    )
    ends = [tokenizer.eos_id or 0, 0]
    vocabulary = Vocabulary(read_vocabulary(tokenizer, tokenizer.vocab_size + 100, ends))
    assert vocabulary.num_words * 32 >= tokenizer.vocab_size + 100
    matcher = vocabulary.compile(to_source(Grammar.regex("[a-z]*")))
    assert set(ends) <= allowed_tokens(matcher, vocabulary.num_words)


def test_a_tokenizer_that_cannot_be_used_says_why() -> None:
    assert "end-of-text" in str(open_vocabulary(demo_tokenizer(), 512, []))


def test_a_rule_that_never_ends_is_reported_in_our_words() -> None:
    for text in ("root ::= root", "start: s\ns: s s"):
        with pytest.raises(
            InvalidRequestError, match=r"no text matches it; a rule may be infinitely recursive$"
        ):
            demo_vocabulary().compile(to_source(Grammar.lark(text)))
