import itertools
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minisrv.detokenizer.stop_strings import StopMatcher

SHORT = st.text(alphabet="ab", max_size=40)
STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=4)


def first_stop(text: str, stops: list[str]) -> tuple[int, str] | None:
    """Start of the stop string that ends first (the longest of those), found the slow way."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return end - len(longest), longest
    return None


def cut(text: str, cuts: list[int]) -> list[str]:
    edges = sorted({0, len(text), *(c % (len(text) + 1) for c in cuts)})
    return [text[a:b] for a, b in itertools.pairwise(edges)]


@given(SHORT, STOPS, st.lists(st.integers(0, 100)))
@example("aaab", ["aab"], [1, 2, 3])
@example("abababb", ["ababb", "bbb"], [3])
def test_text_and_stop_equal_a_search_of_the_whole_text(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    matcher, shown = StopMatcher(stops), ""
    expected = first_stop(text, stops)
    for piece in cut(text, cuts):
        new, stop = matcher.push(piece)
        shown += new
        if stop is not None:
            assert expected == (len(shown), stop)
            assert text.startswith(shown)
            return
    assert expected is None
    assert shown + matcher.flush() == text


PIECES = st.lists(st.tuples(st.text(alphabet="ab", max_size=4), st.sampled_from(["", "aba", "b"])))


@given(PIECES, STOPS, st.booleans())
def test_hidden_text_is_compared_and_shown_only_in_the_stop_string(
    pieces: list[tuple[str, str]], stops: list[str], include: bool
) -> None:
    matcher, shown = StopMatcher(stops, include), ""
    text = "".join(plain + hidden for plain, hidden in pieces)
    marks = [keep for p, h in pieces for keep in [*[True] * len(p), *[False] * len(h)]]
    expected = first_stop(text, stops)
    for plain, hidden in pieces:
        new, stop = matcher.push(plain + hidden, len(hidden))
        shown += new
        if stop is not None:
            assert expected is not None
            begin, wanted = expected
            before = "".join(itertools.compress(text[:begin], marks))
            assert (shown, stop) == (before + wanted if include else before, wanted)
            return
    assert expected is None
    assert shown + matcher.flush() == "".join(itertools.compress(text, marks))


@given(SHORT, STOPS, st.lists(st.integers(0, 100)))
def test_just_what_may_begin_a_stop_string_is_held_back(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    matcher, seen, shown = StopMatcher(stops), "", ""
    for piece in cut(text, cuts):
        new, stop = matcher.push(piece)
        if stop is not None:
            return
        seen, shown = seen + piece, shown + new
        beginnings = [s[:n] for s in stops for n in range(1, len(s)) if seen.endswith(s[:n])]
        assert len(seen) - len(shown) == max(map(len, beginnings), default=0)


@given(st.lists(st.text(alphabet="xyz", min_size=1, max_size=4), min_size=1, max_size=3))
def test_a_single_stop_is_cut_where_find_finds_it(words: list[str]) -> None:
    text = " ".join(words)
    matcher = StopMatcher([words[-1]])
    shown, stop = matcher.push(text)
    assert (shown, stop) == (text[: text.find(words[-1])], words[-1])


@pytest.mark.parametrize(("stop", "char"), [("a" * 255 + "b", "a"), ("ab" * 128, "ab")])
def test_the_cost_of_a_character_does_not_grow_with_what_is_held(stop: str, char: str) -> None:
    matcher = StopMatcher([stop + "!"])
    started = time.process_time()
    text = "".join(matcher.push(char)[0] for _ in range(50_000)) + matcher.flush()
    assert text == char * 50_000
    assert time.process_time() - started < 2.0


def test_without_stop_strings_all_text_passes() -> None:
    assert StopMatcher([]).push("text") == ("text", None)


@given(SHORT, STOPS, st.lists(st.integers(0, 100)))
def test_an_included_stop_string_ends_the_text(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    matcher, shown = StopMatcher(stops, include=True), ""
    found = first_stop(text, stops)
    for piece in cut(text, cuts):
        new, stop = matcher.push(piece)
        shown += new
        if stop is not None:
            break
    expected = text if found is None else text[: found[0] + len(found[1])]
    assert shown + ("" if found else matcher.flush()) == expected
