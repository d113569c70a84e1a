"""The tools of a response: what the model sees of them, and which tool each of its calls is for.

The model sees functions only. A function of a namespace is shown as `namespace__name`, and a custom
tool as a function whose one argument, `input`, is the text. Tools that OpenAI's own server runs are
not shown.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from minisrv.checkpoint.chat_format import ChatFormat
from minisrv.errors import InvalidRequestError
from minisrv.frontend.apis.responses.history import History
from minisrv.frontend.apis.responses.left_out import LeftOut
from minisrv.frontend.fields.names import FieldNames
from minisrv.frontend.fields.schema import (
    BOOLEAN,
    OBJECT,
    STRING,
    array_of,
    check_value,
    describe,
    object_of,
    one_of,
)
from minisrv.frontend.fields.tools import NamedTool, ToolChoice, ToolUse, read_choice, read_tools

Tool = dict[str, Any]

_FUNCTION = object_of(["name"], name=STRING, description=STRING, parameters=OBJECT, strict=BOOLEAN)
_FORMAT = object_of(
    ["type"], type=one_of("text", "grammar"), syntax=one_of("lark", "regex"), definition=STRING
)
_GRAMMAR = object_of(["syntax", "definition"])
_CUSTOM = object_of(["name"], name=STRING, description=STRING, format=_FORMAT)
_TYPED = array_of(object_of(["type"], type=STRING))
_NAMESPACE = object_of(["name", "tools"], name=STRING, description=STRING, tools=_TYPED)
_ADDITIONAL = object_of(["tools"], tools=_TYPED)
_ALLOWED = object_of(["mode", "tools"])
_SYNTAXES = {"lark": "Lark grammar", "regex": "regular expression"}


@dataclass(frozen=True, slots=True)
class Callee:
    """What a call is for, as the client named it. custom: its argument is a text.

    path: of the tool in the request.
    """

    name: str
    namespace: str | None = None
    custom: bool = False
    path: str = ""

    @property
    def shown_name(self) -> str:
        """Its name for the model."""
        return f"{self.namespace}__{self.name}" if self.namespace else self.name


class Tools:
    """The tools that a request offers. left_out: what of the request the model does not see."""

    def __init__(self, fields: Mapping[str, Any], history: History, left_out: LeftOut) -> None:
        """Raises InvalidRequestError for a tool that cannot be read."""
        self.left_out = left_out
        self._callees: list[Callee] = []
        self._shown: list[Tool] = []
        for path, tool in _tools_of(fields, history):
            self._read(tool, path)
        self._by_name = {callee.shown_name: callee for callee in self._callees}

    def names_in(self, names: FieldNames) -> FieldNames:
        """`names`, for errors about a tool that is shown."""
        return _ToolNames(names, [callee.path for callee in self._callees])

    def callee(self, name: str) -> Callee:
        """What the model calls: a tool by the name shown or, if that is clear, without namespace.

        A name that none of the tools has stands for a function.
        """
        if name in self._by_name:
            return self._by_name[name]
        bare = [callee for callee in self._callees if callee.name == name]
        return bare[0] if len(bare) == 1 else Callee(name)

    def use(self, fields: Mapping[str, Any], chat_format: ChatFormat) -> ToolUse | None:
        """How the request uses its tools. Raises InvalidRequestError."""
        choice, names = self._choice(fields.get("tool_choice", "auto"))
        if not self._shown and self.left_out.tools and choice not in ("none", "auto"):
            raise InvalidRequestError(
                "tool_choice requires a call, but this server can run none of the tools",
                param="tool_choice",
            )
        shown = [tool for tool in self._shown if names is None or tool["function"]["name"] in names]
        return read_tools(shown, choice, fields.get("parallel_tool_calls", True), chat_format)

    def _read(self, tool: Tool, path: str) -> None:
        if tool["type"] != "namespace":
            return self._read_callable(tool, path, None)
        check_value(tool, _NAMESPACE, path)
        for i, inner in enumerate(tool["tools"]):
            if i == 0 and tool.get("description"):
                inner = _described(inner, f"{tool['name']}: {tool['description']}")
            self._read_callable(inner, f"{path}.tools.{i}", tool["name"])

    def _read_callable(self, tool: Tool, path: str, namespace: str | None) -> None:
        match tool["type"]:
            case "function":
                check_value(tool, _FUNCTION, path)
                names = ("description", "parameters", "strict")
                own = {name: tool[name] for name in names if tool.get(name) is not None}
            case "custom":
                own = self._read_custom(tool, path)
            case kind:
                return self.left_out.add_tool(kind, f"{path}.type")
        callee = Callee(tool["name"], namespace, tool["type"] == "custom", path)
        self._callees.append(callee)
        self._shown.append({"type": "function", "function": {"name": callee.shown_name, **own}})

    def _read_custom(self, tool: Tool, path: str) -> dict[str, Any]:
        """The description and the parameters of the function that stands for a custom tool."""
        check_value(tool, _CUSTOM, path)
        text_format = tool.get("format") or {"type": "text"}
        meaning = "The input of the tool, a text"
        if text_format["type"] == "grammar":
            check_value(text_format, _GRAMMAR, f"{path}.format")
            meaning += f" that follows this {_SYNTAXES[text_format['syntax']]}:\n"
            meaning += text_format["definition"]
            self.left_out.warn(f"{path}.format is shown to the model, but not enforced")
        description = {"description": tool["description"]} if tool.get("description") else {}
        parameters = {
            "type": "object",
            "properties": {"input": {"type": "string", "description": meaning}},
            "required": ["input"],
            "additionalProperties": False,
        }
        return {**description, "parameters": parameters}

    def _choice(self, choice: str | dict[str, Any]) -> tuple[ToolChoice, set[str] | None]:
        """The choice, and the names of the tools that are allowed if those are not all."""
        if isinstance(choice, str):
            return read_choice(choice, nested=False), None
        match choice["type"]:
            case "function" | "custom":
                return NamedTool(self._name_in(choice, "tool_choice")), None
            case "allowed_tools":
                check_value(choice, _ALLOWED, "tool_choice")
                mode: Literal["auto", "required"] = choice["mode"]
                return mode, set(self._allowed(choice["tools"]))
        raise InvalidRequestError(
            f"tool_choice.type is {describe(choice['type'])}, which this server cannot run; it "
            "must be function, custom or allowed_tools; none, auto and required are strings",
            param="tool_choice.type",
            code="unsupported_parameter",
        )

    def _allowed(self, tools: list[Tool]) -> Iterator[str]:
        for i, tool in enumerate(tools):
            path = f"tool_choice.tools.{i}"
            if tool["type"] not in ("function", "custom"):
                self.left_out.add_tool(tool["type"], f"{path}.type")
                continue
            name = self._name_in(tool, path)
            if name not in self._by_name:
                raise InvalidRequestError(
                    f"{path}.name is {name[:80]!a}, which is not one of the tools",
                    param=f"{path}.name",
                )
            yield name

    def _name_in(self, choice: Tool, path: str) -> str:
        """The shown name of the tool that a choice names."""
        check_value(choice, object_of(["name"], name=STRING, namespace=STRING), path)
        if choice.get("namespace"):
            return Callee(choice["name"], choice["namespace"]).shown_name
        return self.callee(choice["name"]).shown_name


class _ToolNames(FieldNames):
    """Names of fields, for a request whose tools have other places than those shown."""

    def __init__(self, names: FieldNames, paths: list[str]) -> None:
        """paths: of the tools in the request, in the order in which they are shown."""
        self._names = names
        self._paths = {f"tools.{i}.function": path for i, path in enumerate(paths)}

    def own(self, path: str) -> str:
        shown = ".".join(path.split(".")[:3])
        if shown in self._paths:
            return self._paths[shown] + path.removeprefix(shown)
        return self._names.own(path)


def custom_arguments(text: str) -> str:
    """The arguments of a call of a custom tool, as the model writes them."""
    return json.dumps({"input": text}, ensure_ascii=False)


def _described(tool: Tool, namespace: str) -> Tool:
    """The first tool of a namespace, whose description begins with that of the `namespace`."""
    own = tool.get("description")
    return (
        tool
        if own and not isinstance(own, str)
        else {**tool, "description": "\n\n".join([namespace, *([own] if own else [])])}
    )


def _tools_of(fields: Mapping[str, Any], history: History) -> Iterator[tuple[str, Tool]]:
    """Each tool with its path: those of `tools`, and those that Codex adds as items."""
    for i, tool in enumerate(fields.get("tools", [])):
        yield f"tools.{i}", tool
    given = history.given if isinstance(history.given, list) else []
    for name, items in (("previous_response_id", history.past), ("input", given)):
        for i, item in enumerate(items):
            if item.get("type") == "additional_tools":
                check_value(item, _ADDITIONAL, f"{name}.{i}")
                for j, tool in enumerate(item["tools"]):
                    yield f"{name}.{i}.tools.{j}", tool
