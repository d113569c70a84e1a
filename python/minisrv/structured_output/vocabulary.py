"""The vocabulary in llguidance's form: the bytes of each token, and the end-of-text tokens."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minisrv.errors import InvalidRequestError, MinisrvError
from minisrv.structured_output.matcher import Matcher

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

    from minisrv.checkpoint.tokenizer import HFTokenizer


def open_vocabulary(
    tokenizer: HFTokenizer, vocab_size: int, eos_ids: Iterable[int]
) -> Vocabulary | MinisrvError:
    """The vocabulary of a model, or the error that explains why it has none."""
    try:
        return Vocabulary(read_vocabulary(tokenizer, vocab_size, eos_ids))
    except MinisrvError as error:
        return error


def default_limits() -> LLParserLimits:
    """The work that one grammar may cost.

    llguidance counts in its own units, not in time, so that a grammar passes on every machine or on
    none. A state takes 1 to 2 kB. With the default step limits, a mask takes 15 ms at most.
    """
    from llguidance import LLParserLimits

    return LLParserLimits(initial_lexer_fuel=500_000, max_lexer_states=50_000, verbose_errors=False)


@dataclass(frozen=True, slots=True)
class VocabularySource:
    """A tokenizer.json, the number of ids, and the ids that end a text (at least one)."""

    tokenizer: str
    size: int
    eos_ids: list[int]


def read_vocabulary(
    tokenizer: HFTokenizer, vocab_size: int, eos_ids: Iterable[int]
) -> VocabularySource:
    """The source of a model's vocabulary.

    vocab_size: number of ids in the model, including ids without a token. eos_ids: tokens that end
    a text. Raises MinisrvError if none of them exists.
    """
    size = max(vocab_size, tokenizer.vocab_size)
    ends = [token_id for token_id in eos_ids if token_id < size]
    if not ends:
        raise MinisrvError("the model defines no end-of-text token")
    return VocabularySource(tokenizer.to_json(), size, ends)


class Vocabulary:
    """Compiles grammars for one model. Thread-safe; compiling releases the GIL, loading does not.

    limits: None is `default_limits`. Raises MinisrvError if llguidance is not installed.
    """

    def __init__(self, source: VocabularySource, limits: LLParserLimits | None = None) -> None:
        try:
            import llguidance
        except ImportError as error:
            raise MinisrvError(f"llguidance cannot be imported: {error}") from error
        self.source = source
        self._library = llguidance
        self._limits = default_limits() if limits is None else limits
        self._lock = threading.Lock()
        self._tokens: LLTokenizer | MinisrvError | None = None
        self.num_words = (source.size + 31) // 32

    def load(self) -> LLTokenizer:
        """Read the tokenizer if that was not done yet: most of a second for 150,000 tokens.

        Raises MinisrvError if llguidance cannot use it.
        """
        with self._lock:
            if self._tokens is None:
                self._tokens = self._read()
            if isinstance(self._tokens, MinisrvError):
                raise self._tokens
            return self._tokens

    def _read(self) -> LLTokenizer | MinisrvError:
        source = self.source
        try:
            return self._library.LLTokenizer(
                source.tokenizer, n_vocab=source.size, eos_token=source.eos_ids
            )
        except Exception as error:  # the library raises ValueError and its own types
            return MinisrvError(f"llguidance cannot use the tokenizer: {error}")

    def find_error(self, source: str) -> str | None:
        """The error in the source of a grammar, or None; takes as long as compiling it."""
        wrong, messages = self._library.LLMatcher.validate_grammar_with_warnings(
            source, self.load(), limits=self._limits
        )
        return messages[0] if wrong else None

    def compile(self, source: str) -> Matcher:
        """A matcher at the start of the text. Raises InvalidRequestError."""
        inner = self._library.LLMatcher(self.load(), source, log_level=0, limits=self._limits)
        # The first mask builds the automata that all copies share.
        inner.compute_bitmask()
        if inner.is_error():
            raise InvalidRequestError(f"cannot compile the grammar: {_reason(inner)}")
        return Matcher(inner)


def _reason(inner: LLMatcher) -> str:
    """Why no first token is possible; replaces one internal code of llguidance by a sentence."""
    error = inner.get_error().replace("<non-verbose/>", "").strip()
    if error == "NoExtensionBias":
        return "no text matches it; a rule may be infinitely recursive"
    return error[:300]
