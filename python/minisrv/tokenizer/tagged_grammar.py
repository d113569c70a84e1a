"""Grammars of calls whose arguments stand between tags: the forms of Qwen3-Coder and GLM.

An argument that its schema requires must be there, and all come in the order of the schema. A value
that may be a string is bare text; if it can be nothing else, it has the pattern of the schema, or
else the lengths. Any other value is JSON under its schema.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

from minisrv.checkpoint.chat_format import ToolFormat
from minisrv.structured_output.source import JSON_OPTIONS
from minisrv.structured_output.value_types import resolve, types_of

Rule = str

_ANY_TEXT = "(?s:.*)"
# Anchors in the middle, word boundaries and look-around.
_NO_PLAIN_PATTERN = re.compile(r"(?<![\\\[])\^|(?<!\\)\$|\\[bB]|\(\?[=!<]")


@dataclass(frozen=True, slots=True)
class Tags:
    """What stands around the names, keys and values of a call, in Lark.

    head, end: around the arguments, after the name's `before_name`. key_end: between a key and its
    value. closing: ends a value: literal text, or the name of the token that it begins with.
    key: the characters of a key.
    """

    before_name: Rule
    head: str
    end: Rule
    before_key: Rule
    key_end: Rule
    closing: str
    closing_token: Rule | None
    key: str

    @classmethod
    def of(
        cls, tool_format: ToolFormat | None, written: str, mark: Callable[[str], Rule]
    ) -> Tags | None:
        """The tags of a format, or None if it has none.

        written: the chat templates. mark: a tag in Lark, by the id of its token if it is one.
        """
        if tool_format == "qwen3_coder":
            return cls(
                before_name=json.dumps("<function="),
                head=">\n",
                end=json.dumps("</function>"),
                before_key=json.dumps("<parameter="),
                key_end=json.dumps(">\n"),
                closing="\n</parameter>\n",
                closing_token=None,
                key=r"[^>\n]{1,64}",
            )
        if tool_format != "glm":
            return None
        line = "\n" if re.search(r"</arg_key>\s*\n\s*<arg_value>", written) else ""
        newline = json.dumps(line) if line else ""
        value_end = mark("</arg_value>")
        return cls(
            before_name="",
            head=line,
            end="",
            before_key=mark("<arg_key>"),
            key_end=f"{mark('</arg_key>')} {newline} {mark('<arg_value>')}",
            closing=f"</arg_value>{line}",
            closing_token=f"{value_end} {newline}" if value_end.startswith("<[") else None,
            key=r"[^<\n]{1,64}",
        )

    def call(self, rule: str, name: str, schema: Mapping[str, Any]) -> Iterator[Rule]:
        """The rules of a call of `name` under the schema of its arguments."""
        resolved = resolve(schema, schema)
        properties = _mapping(resolved.get("properties"))
        required = _list(resolved.get("required"))
        free = resolved.get("additionalProperties", not properties)
        parts = []
        for i, (key, value) in enumerate(properties.items()):
            parts.append(f"{rule}_{i}" + "?" * (key not in required))
            yield from self._argument(f"{rule}_{i}", json.dumps(key), value, schema)
        if free is not False and not (free is True and properties):
            parts.append(f"{rule}_free*")
            yield from self._argument(f"{rule}_free", f"/{self.key}/", free, schema)
        head = json.dumps(f"{name}{self.head}")
        yield f"{rule}: {self.before_name} {head} {' '.join(parts)} {self.end}"

    def _argument(self, rule: str, key: Rule, schema: Any, root: Any) -> Iterator[Rule]:
        yield f"{rule}: {self.before_key} {key} {self.key_end} {rule}_value"
        known, types = _mapping(resolve(schema, root)), types_of(schema, root)
        closing = self.closing_token or json.dumps(self.closing)
        values = [known["const"]] if "const" in known else _list(known.get("enum"))
        if values:
            written = " | ".join(json.dumps(_bare(value)) for value in values)
            yield f"{rule}_value: ({written}) {closing}"
        elif "string" not in types:
            definitions = {name: root[name] for name in ("$defs", "definitions") if name in root}
            yield f"{rule}_value: {json_rule({**definitions, **known})} {closing}"
        elif self.closing_token:
            yield f"{rule}_value: /{_text_pattern(known, types)}/ {self.closing_token}"
        else:  # one lexeme, up to the first closing tag
            end = _escape(self.closing)
            yield f"{rule}_value[lazy]: /{_text_pattern(known, types)}{end}/"


def json_rule(schema: Mapping[str, Any]) -> Rule:
    """JSON under a schema, with the white space of all JSON."""
    return f"%json {json.dumps({**schema, 'x-guidance': JSON_OPTIONS})}"


def _bare(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _text_pattern(schema: Mapping[str, Any], types: Set[str]) -> str:
    """A regular expression for bare text, as far as the schema can be written as one."""
    pattern = schema.get("pattern")
    lengths = [schema.get(name) for name in ("minLength", "maxLength")]
    low, high = (int(n) if isinstance(n, int | float) else None for n in lengths)
    if types != {"string"}:
        return _ANY_TEXT
    if isinstance(pattern, str) and not _NO_PLAIN_PATTERN.search(pattern[1:-1]):
        begin = "" if pattern.startswith("^") else _ANY_TEXT
        end = "" if re.search(r"(?<!\\)\$$", pattern) else _ANY_TEXT
        body = pattern.removeprefix("^")
        return f"{begin}(?:{_escape(body if end else body[:-1])}){end}"
    return f"(?s:.{{{low or 0},{'' if high is None else high}}})"


def _escape(pattern: str) -> str:
    return re.sub(r"(?<!\\)/", r"\/", pattern).replace("\n", r"\n")


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
