"""The two tools that the demo model calls, `get_time` and `add`, and the chats that use them.

A chat with tools looks as the template writes it: the tools in a system turn, a call between tags,
its result in a user turn.
"""

from __future__ import annotations

import json
from random import Random

from demo_model.corpus import CITIES, Exchange, Task, Tool


def _function(name: str, description: str, **properties: str) -> Tool:
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {
                "type": "object",
                "properties": {key: {"type": kind} for key, kind in properties.items()},
                "required": list(properties),
            },
        },
    }


def _as_some_library_writes_it(tool: Tool, rng: Random) -> Tool:
    """The same function with schema keys that pydantic and others add, in their key order."""
    function = dict(tool["function"])
    schema = dict(function["parameters"])
    if rng.random() < 0.3:
        titled = {key: {"title": key.title(), **kind} for key, kind in schema["properties"].items()}
        schema["properties"] = titled
    if rng.random() < 0.4:
        schema["additionalProperties"] = False
    if rng.random() < 0.5:
        schema = dict(sorted(schema.items()))
    function["parameters"] = schema
    if rng.random() < 0.15:
        function["strict"] = True
    if rng.random() < 0.1:
        del function["description"]
    return {"type": "function", "function": function}


_TIME_WORDS = ["Tell the time in a city.", "The time in a city", "Get the time.", "Current time"]
_TIME_QUESTIONS = [
    *["What time is it in {}", "What is the time in {}", "Tell me the time in {}", "Time in {}"],
    *["How late is it in {}", "Which time is it now in {}", "The time in {}"],
]
_ADD_QUESTIONS = [
    *["What is {} + {}", "Add {} and {}", "Compute {} + {}", "How much is {} + {}", "{} + {}"],
    *["What is {} plus {}", "Sum up {} and {}", "Calculate {} + {}"],
]
_ADD_WORDS = ["Add two numbers.", "The sum of two numbers", "Add numbers.", "Sum of a and b"]


def get_time_tool(description: str = _TIME_WORDS[0]) -> Tool:
    return _function("get_time", description, city="string")


def add_tool(description: str = _ADD_WORDS[0]) -> Tool:
    return _function("add", description, a="integer", b="integer")


def tools_text(tools: tuple[Tool, ...]) -> str:
    """The content of the template's system turn."""
    lines = [json.dumps(tool["function"], ensure_ascii=False) for tool in tools]
    example = '{"name": "...", "arguments": {...}}'
    return "\n".join(["Tools:", *lines, f"Call one with <tool_call>\n{example}\n</tool_call>"])


def call_text(name: str, **arguments: object) -> str:
    """The text that calls a tool."""
    call = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>\n{call}\n</tool_call>"


def result_text(result: str) -> str:
    """The turn with a tool's result."""
    return f"<tool_response>\n{result}\n</tool_response>"


def _some_tools(rng: Random, needed: str) -> tuple[Tool, ...]:
    """The needed tool, often with the other one, in random order and with random descriptions."""
    tools = {
        "get_time": get_time_tool(rng.choice(_TIME_WORDS)),
        "add": add_tool(rng.choice(_ADD_WORDS)),
    }
    names = [needed] if rng.random() < 0.3 else ["get_time", "add"]
    rng.shuffle(names)
    return tuple(_as_some_library_writes_it(tools[name], rng) for name in names)


def _names(tools: tuple[Tool, ...]) -> list[str]:
    return [tool["function"]["name"] for tool in tools]


def get_time(rng: Random, tools: tuple[Tool, ...] = ()) -> Exchange:
    city = rng.choice(CITIES)
    asked = rng.choice(_TIME_QUESTIONS)
    end = rng.choice(["?", "?", "", ".", ", please?", " now?"])
    call = call_text("get_time", city=city)
    return Exchange(
        asked.format(city) + end, call, "tool call", tools or _some_tools(rng, "get_time")
    )


def add(rng: Random, tools: tuple[Tool, ...] = ()) -> Exchange:
    a, b = rng.randint(0, 999), rng.randint(0, 999)
    asked = rng.choice(_ADD_QUESTIONS)
    end = rng.choice(["?", "?", "", ".", " =", ", please."])
    call = call_text("add", a=a, b=b)
    return Exchange(asked.format(a, b) + end, call, "tool call", tools or _some_tools(rng, "add"))


def call(rng: Random, tools: tuple[Tool, ...] = ()) -> Exchange:
    """A question that one of the tools answers, and the call; from `tools`, if given."""
    makers = {"get_time": get_time, "add": add}
    names = _names(tools) or list(makers)
    return makers[rng.choice(names)](rng, tools)


def answer(rng: Random, tools: tuple[Tool, ...] = ()) -> Exchange:
    """The answer to a tool's result, with the call as the exchange before it."""
    before = call(rng, tools)
    called = json.loads(before.assistant.split("\n")[1])
    arguments = called["arguments"]
    if called["name"] == "get_time":
        result = f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}"
        text = f"It is {result} in {arguments['city']}."
    else:
        result = str(arguments["a"] + arguments["b"])
        text = f"{arguments['a']} + {arguments['b']} = {result}"
    return Exchange(result_text(result), text, "tool answer", before.tools, before)


def unneeded(rng: Random, others: Task) -> Exchange:
    """A task that needs no tool, in a chat whose tools do not answer it."""
    made = others(rng)
    tools = _some_tools(rng, "get_time")
    if made.task == "addition":
        tools = tuple(tool for tool in tools if _names((tool,)) == ["get_time"])
    return Exchange(made.user, made.assistant, made.task, tools)
