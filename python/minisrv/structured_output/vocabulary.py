"""The tokenizer as llguidance needs it: the bytes of each token, and which tokens end a text."""

from __future__ import annotations

from collections.abc import Iterable

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from minisrv.checkpoint.tokenizer import HFTokenizer
from minisrv.errors import InvalidRequestError, MinisrvError
from minisrv.structured_output.matcher import Matcher

# llguidance counts its work in units of its own, so that a grammar passes on all machines or none.
# States take 1 to 2 kB each. A step of its defaults takes 15 ms at worst.
LIMITS = LLParserLimits(initial_lexer_fuel=500_000, max_lexer_states=50_000, verbose_errors=False)


def open_vocabulary(
    tokenizer: HFTokenizer, vocab_size: int, eos_ids: Iterable[int]
) -> Vocabulary | MinisrvError:
    """The vocabulary of a model, or why it can have none."""
    try:
        return Vocabulary(tokenizer, vocab_size, eos_ids)
    except MinisrvError as error:
        return error


class Vocabulary:
    """Compiles grammars for one model. Threads may share it; compiling does not hold the GIL.

    vocab_size: ids that the model knows, with or without a token. eos_ids: tokens that end a text.
    Raises MinisrvError for a tokenizer that llguidance cannot read, or without an end.
    """

    def __init__(
        self,
        tokenizer: HFTokenizer,
        vocab_size: int,
        eos_ids: Iterable[int],
        limits: LLParserLimits = LIMITS,
    ) -> None:
        size = max(vocab_size, tokenizer.vocab_size)
        ends = [token_id for token_id in eos_ids if token_id < size]
        if not ends:
            raise MinisrvError("the model names no end-of-text token")
        try:
            self._tokens = LLTokenizer(tokenizer.to_json(), n_vocab=size, eos_token=ends)
        except Exception as error:  # the library raises plain ValueError and its own
            raise MinisrvError(f"llguidance cannot use the tokenizer: {error}") from error
        self._limits = limits
        self.num_words = (size + 31) // 32

    def find_error(self, source: str) -> str | None:
        """What is wrong with the source of a grammar; takes as long as to compile it."""
        wrong, messages = LLMatcher.validate_grammar_with_warnings(
            source, self._tokens, limits=self._limits
        )
        return messages[0] if wrong else None

    def compile(self, source: str) -> Matcher:
        """A matcher at the start of the text. Raises InvalidRequestError."""
        inner = LLMatcher(self._tokens, source, log_level=0, limits=self._limits)
        # The first mask builds the automata that all copies share.
        inner.compute_bitmask()
        if inner.is_error():
            raise InvalidRequestError(f"the grammar cannot be compiled: {_reason(inner)}")
        return Matcher(inner)


def _reason(inner: LLMatcher) -> str:
    """Why there is no first token; for one case llguidance has but a word of its own."""
    error = inner.get_error().replace("<non-verbose/>", "").strip()
    if error == "NoExtensionBias":
        return "no text fits it, as when a rule never ends"
    return error[:300]
