"""Calls as GLM writes them, from 4.5 on; the line breaks are missing from 4.7 on.

<tool_call>name
<arg_key>key</arg_key>
<arg_value>value</arg_value>
</tool_call>
"""

from __future__ import annotations

import re

from minisrv.frontend.tool_calls.json_call import MAX_NAME_CHARS
from minisrv.frontend.tool_calls.parser import State
from minisrv.frontend.tool_calls.tagged import TaggedParser, next_tag

_NAME = re.compile(rf"[\w.-]{{1,{MAX_NAME_CHARS}}}")
_KEY_END, _VALUE = "</arg_key>", "<arg_value>"


class GlmParser(TaggedParser):
    """The name follows the tag of the call."""

    markers = ("<tool_call>",)
    opening = "<arg_key>"
    closing = "</arg_value>"
    ends = ("</tool_call>",)
    value_has_own_lines = False

    def read_head(self) -> State | None:
        """A name, and then the tag of an argument or the end."""
        if not self._hold_space():
            return None
        name = _NAME.match(self._text)
        if name is None:
            return self._no_call()
        tag = next_tag(self._text[name.end() :].lstrip(), (self.opening, *self.ends))
        if tag is None:
            return None
        return self.start_arguments(name[0], name.end()) if tag else self._no_call()

    def read_key(self, text: str) -> tuple[str | None, int] | None:
        """The key has a closing tag, which the tag of the value follows."""
        end = text.find(_KEY_END)
        if end < 0:
            return None
        after = end + len(_KEY_END)
        value = text[after:].lstrip()
        tag = next_tag(value, (_VALUE,))
        if tag is None:
            return None
        return (text[:end].strip(), len(text) - len(value) + len(tag)) if tag else (None, after)
