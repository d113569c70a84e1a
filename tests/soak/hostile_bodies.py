"""Bodies that are wrong in one or several places, made from good ones."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

from tests.soak.hostile import Hostile
from tests.soak.raw_http import request_bytes

_TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}
_CALL = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
_CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    {"role": "assistant", "content": None, "tool_calls": [_CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "3"},
    {"role": "user", "content": "and?"},
]
_SAMPLING = {
    "temperature": 1,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "seed": 7,
    "stop": ["x", "yz"],
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "repetition_penalty": 1.1,
    "logit_bias": {"5": 1},
    "stop_token_ids": [3],
    "min_tokens": 1,
}
GOOD_BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "Hi", "max_tokens": 3}),
    ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 2, "n": 2, "logprobs": 2}),
    ("/v1/completions", {"prompt": [[1, 2], [3]], "max_tokens": 2, "echo": True, **_SAMPLING}),
    ("/v1/completions", {"prompt": "Hi", "max_tokens": 4, "stream": True, "timings": True}),
    ("/v1/chat/completions", {"messages": _CHAT, "max_tokens": 3, "tools": [_TOOL]}),
    ("/v1/chat/completions", {"messages": _CHAT, "max_tokens": 3, "stream": True, **_SAMPLING}),
    (
        "/v1/chat/completions",
        {
            "messages": _CHAT[-1:],
            "max_completion_tokens": 3,
            "logprobs": True,
            "top_logprobs": 3,
            "n": 2,
            "stream": True,
            "stream_options": {"include_usage": True},
            "chat_template_kwargs": {"enable_thinking": False},
            "return_token_ids": True,
        },
    ),
    (
        "/v1/messages",
        {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
            "system": [{"type": "text", "text": "Be brief."}],
            "max_tokens": 3,
            "stop_sequences": ["x"],
            "tools": [{"name": "add", "input_schema": {"type": "object"}}],
            "tool_choice": {"type": "auto"},
            "stream": True,
        },
    ),
    ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "Hi"}]}),
    (
        "/v1/responses",
        {
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
                {"type": "function_call", "call_id": "c", "name": "add", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c", "output": "3"},
            ],
            "instructions": "Be brief.",
            "max_output_tokens": 3,
            "text": {"format": {"type": "text"}},
            "reasoning": {"effort": "low"},
            "metadata": {"a": "b"},
            "stream": True,
        },
    ),
    ("/v1/responses/input_tokens", {"input": "Hi"}),
    ("/generate", {"text": "Hi", "sampling_params": {"max_new_tokens": 3, "stop": ["x"]}}),
    ("/generate", {"input_ids": [1, 2], "sampling_params": {"max_new_tokens": 3}, "stream": True}),
    ("/tokenize", {"prompt": "Hi", "add_special_tokens": True}),
    ("/tokenize", {"messages": _CHAT, "tools": [_TOOL]}),
    ("/detokenize", {"tokens": [5, 6], "skip_special_tokens": True}),
    ("/apply_template", {"messages": _CHAT, "add_generation_prompt": False}),
]
LIMITED = {"max_tokens", "max_completion_tokens", "max_output_tokens", "max_new_tokens"}


class Raw(str):
    """Text to be written as it is, where JSON has a value."""


def _numbers(rng: random.Random) -> Any:
    if rng.random() < 0.05:
        return Raw(rng.choice(["NaN", "Infinity", "-Infinity", "0x10", "01", "+1", "1_0", ".5"]))
    return rng.choice(
        [
            rng.choice([0, -1, 1, 2, 128, 129, 513, 65536, 10**6, 2**31, 2**32, 2**53 + 1]),
            rng.choice([2**63 - 1, 2**63, -(2**63), 2**64, -(2**64), 10**30]),
            rng.choice([-0.0, 0.5, 1e-5, 1e-46, 1e39, 1.7e308, 5e-324, 1.0000000000000002]),
            Raw(rng.choice(["1e400", "1e-400", "1E+2", "-0", "0." + "0" * 3000 + "1"])),
            Raw("9" * rng.choice([18, 19, 20, 25, 400, 5000])),
            rng.uniform(-3, 3),
        ]
    )


def text(rng: random.Random) -> Any:
    """A string that somebody may stumble over."""
    odd = [
        "",
        " ",
        "\0",
        "\x1b[31m\r\n",
        "\ufeff",
        "\u202e\u2066",
        "e" + "\u0301" * 50,
        "👩‍👩‍👧‍👦" * 3,
        "\U0010ffff",
        "<|im_start|>system\n<|im_end|>",
        "<tool_call>{</tool_call>",
        "<think>",
        "{{ 7 * 7 }}{% for x in range(10**9) %}",
        "../../etc/passwd",
        "' OR 1=1 --",
        "%s%n%x",
        "a\n\ndata: [DONE]\n\n",
        "\u2028\u2029\x85",
    ]
    if rng.random() < 0.05:
        broken = ['"\\ud800"', '"\\udfff\\ud800"', '"a\\uD83D"', '"\\u00"', '"\t"', '"', '"\\x"']
        return Raw(rng.choice(broken))
    alphabet = "aZ0 .äß中😀\n\0\u0301"
    return rng.choice(
        [
            rng.choice(odd),
            rng.choice(odd),
            "".join(rng.choices(alphabet, k=rng.choice([1, 7, 70, 700]))),
            rng.choice(["a", "😀", "\u0301", " "]) * rng.choice([100, 5000, 50_000]),
        ]
    )


def _nested(rng: random.Random) -> Any:
    depth = rng.choice([5, 62, 63, 64, 65, 200, 5000])
    if rng.random() < 0.5:
        return Raw("[" * depth + "]" * depth)
    return Raw('{"a":' * depth + "1" + "}" * depth)


def _long(rng: random.Random) -> Any:
    count = rng.choice([17, 129, 257, 5000, 40_000])
    part = rng.choice(["1", '"a"', "[1]", "{}", "null", '{"role":"user","content":"a"}', "[[]]"])
    return Raw("[" + ",".join([part] * count) + "]")


def _many_keys(rng: random.Random) -> Any:
    count = rng.choice([2, 100, 20_000])
    same = rng.random() < 0.3
    return Raw("{" + ",".join(f'"{0 if same else i}":1' for i in range(count)) + "}")


def value(rng: random.Random) -> Any:
    """Anything that may stand where a good value stood."""
    makers: list[Callable[[random.Random], Any]] = [_numbers, _numbers, text, text, text]
    if rng.random() < 0.1:
        makers = [_nested, _long, _many_keys]
    simple = [None, True, False, [], {}, [None], {"": None}, [[]], {"type": "text"}, [{}]]
    return rng.choice(simple) if rng.random() < 0.3 else rng.choice(makers)(rng)


def write(part: Any) -> str:
    """JSON, with `Raw` as it is."""
    if isinstance(part, Raw):
        return part
    if isinstance(part, dict):
        return "{" + ",".join(f"{write(k)}:{write(v)}" for k, v in part.items()) + "}"
    if isinstance(part, list):
        return "[" + ",".join(map(write, part)) + "]"
    return json.dumps(part)


def mutate(body: Any, rng: random.Random, names: list[str]) -> Any:
    """A copy of `body` that is changed in one place. names: of fields that may be added."""
    if not isinstance(body, dict | list) or not body or rng.random() < 0.05:
        return value(rng)
    if isinstance(body, list):
        changed = list(body)
        index = rng.randrange(len(changed))
        if rng.random() < 0.2:
            changed[index:index] = rng.choice([[value(rng)], changed[:], changed[index:] * 3])
        else:
            changed[index] = mutate(changed[index], rng, names)
        return changed
    copy = dict(body)
    name = rng.choice(list(copy))
    what = rng.random()
    if what < 0.15:
        del copy[name]
    elif what < 0.45:
        copy[rng.choice(names)] = value(rng)
    elif what < 0.5:
        copy[text(rng)] = value(rng)
    elif what < 0.55:
        return Raw(write(copy)[:-1] + f",{write(name)}:{write(value(rng))}}}")
    else:
        copy[name] = mutate(copy[name], rng, names)
    return copy


def _spoil(data: bytes, rng: random.Random) -> bytes:
    """A change of the bytes, so that they are hardly JSON any more."""
    at = rng.randrange(len(data) + 1)
    junk = bytes(rng.choices(range(256), k=rng.randint(1, 8)))
    return rng.choice(
        [
            data[:at],
            data[:at] + junk + data[at:],
            data[:at] + data[at + 1 :],
            b"\xef\xbb\xbf" + data,
            data.decode().encode("utf-16"),
            data + b" " * 100_000,
            data + data,
            data + b"\0",
            b"",
            junk,
            data.replace(b'"', b"'"),
            data.replace(b":", b",", 1),
            b"[" * 100_000,
            b'{"a":' * 50_000,
            b'"' + b"\\" * 9999,
            b"1" * 100_000,
        ]
    )


def hostile_body(rng: random.Random, names: list[str]) -> Hostile:
    """A request whose body is wrong. names: of the fields that the server knows."""
    path, good = rng.choice(GOOD_BODIES)
    body: Any = good
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        body = mutate(body, rng, names)
    if isinstance(body, dict) and rng.random() < 0.9:
        # Without a limit many of them would run to the end of the context.
        body = {**{n: good[n] for n in LIMITED if n in good}, **body}
    data = write(body).encode("utf-8", "surrogatepass")
    if rng.random() < 0.15:
        data = _spoil(write(good).encode(), rng)
    return Hostile("body", (request_bytes(path, data),))


def large_body(rng: random.Random) -> Hostile:
    """A body of megabytes, up to the limit of 8 MiB: cheap to send, and costly to read."""
    size = rng.choice([1, 3, 7.9, 8.1]) * 2**20
    parts = {
        "/v1/completions": ('{"max_tokens":1,"prompt":[', ["1", "[1]", '"a"', "[]", "1.5"], "]}"),
        "/tokenize": ('{"prompt":"', ["a", " ", "\\u00e9", "ab ", "\\n"], '"}'),
        "/detokenize": ('{"tokens":[', ["1", "511", "512", "null"], "]}"),
        "/v1/chat/completions": (
            '{"max_tokens":1,"messages":[',
            ['{"role":"user","content":"a"}', "{}", '{"role":"user","content":[]}'],
            "]}",
        ),
        "/generate": ('{"sampling_params":{"stop":[', ['"a"', "1"], ']},"text":"a"}'),
        "/v1/messages": ('{"max_tokens":1,"system":"a","messages":[', ["null", "{}"], "]}"),
        "/v1/responses": ('{"input":[', ['{"role":"user","content":"a"}', "1"], "]}"),
        "/apply_template": ('{"messages":[{"role":"user","content":"', ["x", "<", "{{"], '"}]}'),
    }
    path = rng.choice(list(parts))
    start, choices, end = parts[path]
    part = rng.choice(choices)
    joint = "" if start.endswith('"') else ","
    count = max(1, int(size - len(start) - len(end)) // len(part + joint))
    data = (start + joint.join([part] * count) + end).encode()
    # Where it is refused at once, the reply may be lost to the reset of the connection.
    return Hostile("large body", (request_bytes(path, data),), 1 if len(data) <= 2**23 else None)


def hostile_text(rng: random.Random) -> Hostile:
    """Text and ids that are hard for a tokenizer."""
    path = rng.choice(
        ["/tokenize", "/detokenize", "/apply_template", "/v1/completions", "/generate"]
    )
    odd = [text(rng) for _ in range(rng.choice([1, 1, 3]))]
    joined = odd[0] if isinstance(odd[0], Raw) else "".join(t for t in odd if type(t) is str)
    ids = [
        rng.choice([0, 1, 2, 5, 255, 510, 511, rng.choice([512, -1, 2**31, 2**63])])
        for _ in "12345"
    ]
    many = rng.choices(range(512), k=rng.choice([0, 1, 100, 3000, 30_000]))
    tokens = rng.choice([ids, ids, many, many, rng.choice([[[1]], [1.0], ["a"], [True], joined])])
    bodies: dict[str, Any] = {
        "/tokenize": {"prompt": joined, "add_special_tokens": rng.choice([True, False])},
        "/detokenize": {"tokens": tokens, "skip_special_tokens": rng.choice([True, False])},
        "/apply_template": {"messages": [{"role": "user", "content": joined}]},
        "/v1/completions": {"prompt": rng.choice([joined, tokens, [joined, ""]]), "max_tokens": 3},
        "/generate": {"input_ids": tokens, "sampling_params": {"max_new_tokens": 3}},
    }
    data = write(bodies[path]).encode("utf-8", "surrogatepass")
    return Hostile("text", (request_bytes(path, data),))


def hostile_template(rng: random.Random) -> Hostile:
    """Messages and variables that are hard for a chat template."""
    names = ["messages", "tools", "bos_token", "add_generation_prompt", "raise_exception", "range"]
    names += ["strftime_now", "self", "loop", "caller", "varargs", "kwargs", "__class__", "0", ""]
    roles = ["user", "assistant", "system", "tool", "developer", "function"]
    if rng.random() < 0.05:
        roles = ["", "USER", None, 5]
    variables = {rng.choice(names): value(rng) for _ in range(rng.choice([0, 0, 1, 3]))}
    messages = [
        rng.choice(
            [
                {"role": rng.choice(roles), "content": text(rng)},
                {"role": rng.choice(roles[:4]), "content": text(rng), "name": text(rng)},
                {"role": "assistant", "tool_calls": mutate([_CALL], rng, ["id", "function"])},
                {"role": "tool", "content": text(rng), "tool_call_id": text(rng)},
                {"role": "user", "content": mutate([{"type": "text", "text": "a"}], rng, ["x"])},
                {"role": "assistant", "content": text(rng), "reasoning_content": text(rng)},
            ]
        )
        for _ in range(rng.choice([1, 1, 2, 2, 6]))
    ]
    body: dict[str, Any] = {"messages": messages, "chat_template_kwargs": variables}
    if rng.random() < 0.2:
        body["tools"] = mutate([_TOOL], rng, ["function", "name", "parameters"])
    if rng.random() < 0.3:
        body[rng.choice(["add_generation_prompt", "continue_final_message"])] = True
    if rng.random() < 0.02:
        body["chat_template"] = "{% for i in range(10**9) %}{{ i }}{% endfor %}"
    path = rng.choice(["/v1/chat/completions", "/apply_template", "/tokenize"])
    if path == "/v1/chat/completions":
        body["max_tokens"] = 3
    data = write(body).encode("utf-8", "surrogatepass")
    return Hostile("template", (request_bytes(path, data),))
