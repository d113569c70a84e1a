"""What the demo model is asked, and what it answers to that."""

from __future__ import annotations

from typing import Any

ANSWERS = {
    "Spell river.": "r-i-v-e-r",
    "Count from 1 to 12.": "1 2 3 4 5 6 7 8 9 10 11 12",
    "What is 17 + 25?": "7 + 5 = 12, 1 + 2 + 1 = 4, so 17 + 25 = 42",
    "Answer in JSON: city is Oslo, number is 42": '{"city": "Oslo", "number": 42}',
}
COUNT = "Count from 1 to 12."


def ask(question: str, **fields: Any) -> dict[str, Any]:
    """The arguments of a chat with one question; the answer is never long."""
    messages = [{"role": "user", "content": question}]
    return {"model": "demo", "messages": messages, "max_tokens": 100, **fields}
