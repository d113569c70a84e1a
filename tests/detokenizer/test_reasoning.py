"""Thoughts apart from the text, in whatever pieces the reply comes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisrv.detokenizer.reasoning import ReasoningSplitter


def split(pieces: list[str], opened: bool = False) -> tuple[str, str]:
    splitter = ReasoningSplitter("<think>", "</think>", opened)
    got = [splitter.push(piece) for piece in pieces] + [splitter.flush()]
    return "".join(thought for thought, _ in got), "".join(text for _, text in got)


@pytest.mark.parametrize(
    ("reply", "opened", "thought", "text"),
    [
        ("<think>\nhm\n</think>\n\nHello", False, "hm", "Hello"),
        ("\n<think>hm</think>Hello\n", False, "hm", "Hello\n"),
        ("hm\n\nso\n</think>\n\nHello", True, "hm\n\nso", "Hello"),
        ("<think>\nhm</think> Hello", True, "hm", " Hello"),
        ("<think>\n\n</think>\n\nHello", False, "", "Hello"),
        ("Hello <think>hm</think>", False, "", "Hello <think>hm</think>"),
        ("  Hello", False, "", "  Hello"),
        ("<thin", False, "", "<thin"),
        ("<think>hm, I wo\n", False, "hm, I wo", ""),
        ("<think>a </thin", False, "a </thin", ""),
        ("<think>a</think></think>", False, "a", "</think>"),
        ("", True, "", ""),
    ],
)
def test_only_a_thought_at_the_beginning_goes_apart(
    reply: str, opened: bool, thought: str, text: str
) -> None:
    assert split([reply], opened) == (thought, text)
    assert split(list(reply), opened) == (thought, text)


def test_a_thought_is_passed_on_as_it_comes() -> None:
    splitter = ReasoningSplitter("<think>", "</think>", opened=False)
    assert splitter.push("<think>\nso") == ("so", "")
    assert splitter.push(" it") == (" it", "")
    assert splitter.in_reasoning
    assert not splitter.closed
    assert splitter.push(" is\n</") == (" is", "")
    assert splitter.push("think>\n") == ("", "")
    assert splitter.closed
    assert not splitter.done
    assert splitter.push("\nYes") == ("", "Yes")
    assert splitter.done


MARKS = ("<think>", "</think>", "<", "</", "think>", "\n", " ", "e\u0301", "\U0001f600", "\u4f60")
REPLY = st.lists(st.sampled_from(MARKS) | st.text(max_size=3), max_size=12).map("".join)


@settings(max_examples=400)
@given(REPLY, st.booleans(), st.lists(st.integers(0, 1000), max_size=20))
def test_where_the_reply_is_cut_changes_nothing(
    reply: str, opened: bool, borders: list[int]
) -> None:
    places = sorted({border % (len(reply) + 1) for border in borders})
    pieces = [reply[a:b] for a, b in zip([0, *places], [*places, len(reply)], strict=True)]
    assert split(pieces, opened) == split([reply], opened) == split(list(reply), opened)
