"""How byte-level BPE tokenizers split a text before they merge, by the names in GGUF files.

`tokenizer.ggml.pre` names the tokenizer of a model; those that split alike are one entry here. The
expressions are those of the tokenizers' own tokenizer.json: each is applied to the pieces that the
one before has left, and separates what it matches.
"""

from __future__ import annotations

from dataclasses import dataclass

from minisrv.checkpoint.gguf.reading import GgufCheckpoint
from minisrv.errors import UnsupportedModelError


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """splits: expressions, the first one first. whole_words: a piece that is a token stays one.

    adds_bos: before a text, unless the file says otherwise. composes: characters are composed
    first (NFC).
    """

    splits: tuple[str, ...]
    whole_words: bool = False
    adds_bos: bool = False
    composes: bool = False


_DIGIT = r"\p{N}"
_UP_TO_3_DIGITS = r"\p{N}{1,3}"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_OTHER = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_LLAMA3 = "|".join([_CONTRACTIONS, _WORD, _UP_TO_3_DIGITS, _OTHER, _SPACES])
_QWEN2 = "|".join([_CONTRACTIONS, _WORD, _DIGIT, _OTHER, _SPACES])
_MARKED_WORD = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"
_QWEN35 = "|".join(
    [_CONTRACTIONS, _MARKED_WORD, _DIGIT, r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*", _SPACES]
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_PATHS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_CASES = (f"{_BEFORE}{_UPPER}*{_LOWER}+", f"{_BEFORE}{_UPPER}+{_LOWER}*")
_TEKKEN = "|".join([*_CASES, _DIGIT, _PATHS, _SPACES])
_GPT4O = "|".join(
    [*(f"{case}{_CONTRACTIONS}?" for case in _CASES), _UP_TO_3_DIGITS, _PATHS, _SPACES]
)
_SEED = "|".join([_CONTRACTIONS, _WORD, _DIGIT, r" ?[^\s\p{L}\p{N}\r\n]+", _SPACES])
_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_CJK_AND_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|" + _SPACES
)
# Letters with upper and lower case, as the tokenizer lists them.
_CASED = (
    "A-Za-z"
    "\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1"
    "\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8"
    "-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-"
    "\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-"
    "\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-"
    "\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-"
    "\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149"
    "\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    "\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13"
    "-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df"
    "\U0001e900-\U0001e943"
)
_DEEPSEEK_PUNCTUATION = "[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"

_GPT2_LIKE = PreTokenizer((_GPT2,))
_DIGITS_THEN_GPT2 = PreTokenizer((_DIGIT, _GPT2))
_LLAMA3_LIKE = PreTokenizer((_LLAMA3,), whole_words=True, adds_bos=True)
_QWEN2_LIKE = PreTokenizer((_QWEN2,))
_GPT4O_LIKE = PreTokenizer((_GPT4O,))
_DEEPSEEK3_LIKE = PreTokenizer((_UP_TO_3_DIGITS, _CJK_AND_KANA, _DEEPSEEK3))
_PRE_TOKENIZERS = {
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral"), _LLAMA3_LIKE),
    **dict.fromkeys(("midm-2.0", "lfm2"), _LLAMA3_LIKE),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe"), PreTokenizer((_LLAMA3,))),
    "glm4": PreTokenizer((_LLAMA3,), whole_words=True),
    "qwen2": PreTokenizer((_QWEN2,), composes=True),
    **dict.fromkeys(("deepseek-r1-qwen", "stablelm2", "hunyuan", "megrez"), _QWEN2_LIKE),
    **dict.fromkeys(("kormo", "solar-open", "grok-2"), _QWEN2_LIKE),
    "qwen35": PreTokenizer((_QWEN35,)),
    **dict.fromkeys(("gpt-2", "phi-2", "gigachat", "mellum", "exaone4", "a.x-4.0"), _GPT2_LIKE),
    **dict.fromkeys(("jais", "trillion", "granite-docling"), _GPT2_LIKE),
    **dict.fromkeys(("mpt", "olmo"), PreTokenizer((_GPT2,), composes=True)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell"), _DIGITS_THEN_GPT2),
    **dict.fromkeys(("exaone", "minerva-7b", "mellum2"), _DIGITS_THEN_GPT2),
    "command-r": PreTokenizer((_DIGIT, _GPT2), composes=True),
    "falcon": PreTokenizer((r"[\p{P}$+<=>^~|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "tekken": PreTokenizer((_TEKKEN,), whole_words=True, adds_bos=True),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "minimax-m2"), _GPT4O_LIKE),
    "seed-coder": PreTokenizer((_SEED,)),
    "deepseek-llm": PreTokenizer(
        (
            r"[\r\n]",
            rf"\s?[{_CASED}]+",
            rf"\s?{_DEEPSEEK_PUNCTUATION}",
            r"\s+$",
            _CJK,
            r"\p{N}+",
        )
    ),
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, _DIGIT)),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm"), _DEEPSEEK3_LIKE),
}


def find_pre_tokenizer(checkpoint: GgufCheckpoint) -> PreTokenizer:
    """That of `tokenizer.ggml.pre`. Raises UnsupportedModelError if it is unknown."""
    name = checkpoint.get("tokenizer.ggml.pre", str)
    if name not in _PRE_TOKENIZERS:
        what = f"the pre-tokenizer {name!r}" if name else "no pre-tokenizer (an old file)"
        raise UnsupportedModelError(
            f"{checkpoint.name} has {what}; minisrv supports {', '.join(_PRE_TOKENIZERS)}"
        )
    return _PRE_TOKENIZERS[name]
