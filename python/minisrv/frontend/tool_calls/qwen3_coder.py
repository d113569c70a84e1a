"""Calls as Qwen3-Coder writes them.

<tool_call>
<function=name>
<parameter=key>
value
</parameter>
</function>
</tool_call>
"""

from __future__ import annotations

import re

from minisrv.frontend.tool_calls.json_call import MAX_NAME_CHARS
from minisrv.frontend.tool_calls.parser import State, starts_with
from minisrv.frontend.tool_calls.tagged import TaggedParser, next_tag

_FUNCTION = "<function="
_NAME = re.compile(rf"[\w.-]{{1,{MAX_NAME_CHARS}}}")


class Qwen3CoderParser(TaggedParser):
    """The tag around a call, which these models forget at times, may be missing."""

    markers = ("<tool_call>", _FUNCTION)
    opening = "<parameter="
    closing = "</parameter>"
    ends = ("</function>", "</tool_call>")
    value_has_own_lines = True

    def read_head(self) -> State | None:
        """A name in the tag of the function, and then the tag of an argument or the end."""
        if not self._hold_space():
            return None
        if _FUNCTION not in self._pending:
            begins = starts_with(self._text, _FUNCTION)
            if not begins:
                return None if begins is None else self._no_call()
            self._hold(len(_FUNCTION))
        name = _NAME.match(self._text)
        if name is None:
            return None if not self._text else self._no_call()
        rest = self._text[name.end() :]
        if not rest.startswith(">"):
            return self._no_call() if rest else None
        tag = next_tag(rest[1:].lstrip(), (self.opening, *self.ends))
        if tag is None:
            return None
        return self.start_arguments(name[0], name.end() + 1) if tag else self._no_call()

    def read_key(self, text: str) -> tuple[str | None, int] | None:
        """The key ends with the tag."""
        end = text.find(">")
        return None if end < 0 else (text[:end].strip(), end + 1)
