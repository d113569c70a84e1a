"""Requests that are hard at the level of HTTP: lines, headers, framing, pipelines."""

from __future__ import annotations

import json
import random

from tests.soak.hostile import Hostile
from tests.soak.raw_http import json_request, request_bytes

_BODY = json.dumps({"prompt": "Hi", "max_tokens": 2}).encode()
_LENGTH = f"Content-Length: {len(_BODY)}\r\n".encode()
_JSON = b"Content-Type: application/json\r\n"
_POST = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
_PATHS = [
    "/",
    "/health",
    "/ready",
    "/metrics",
    "/version",
    "/openapi.json",
    "/docs",
    "/v1/models",
    "/v1/loads",
    "/server_info",
    "/tokenizer_info",
    "/v1/completions",
    "/v1/responses/x/cancel",
]


def hostile_request(rng: random.Random) -> Hostile:
    """One of the kinds below."""
    return rng.choice(
        [
            _odd_path,
            _odd_header,
            _odd_header,
            _odd_method,
            _large_head,
            _framing,
            _framing,
            _chunked,
            _garbage,
            _incomplete,
            _in_pieces,
            pipeline,
            pipeline,
        ]
    )(rng)


def _odd_path(rng: random.Random) -> Hostile:
    path = rng.choice(_PATHS)
    odd = [
        path + "/",
        "/" + path,
        path.upper(),
        path + "?" + "a=b&" * rng.choice([1, 1000]),
        path + "?%00=%ff&%",
        path + "#part",
        "/%2e%2e" + path,
        "/.." * 20 + path,
        path.replace("/", "/%2F"),
        path + "%",
        path + "%zz%ff%00",
        path + ";x=1",
        "/v1/models/" + rng.choice(["%2e%2e%2f", "a" * 3000, "%F0%9F%98%80", "%00", "a/b//c", "é"]),
        "http://127.0.0.1" + path,
        "http://other.example" + path,
        "/" + "a/" * 2000,
        "*",
        "//",
    ]
    return Hostile("path", (request_bytes(rng.choice(odd), method="GET"),), None)


def _odd_header(rng: random.Random) -> Hostile:
    """A good request with one header too many; it must be answered, whatever the answer is."""
    long = rng.choice(["x", "é", ",", ";", '"', "a=b; "]) * rng.choice([1, 100, 8000])
    odd = [
        ("Content-Type", rng.choice(["", "application/jsonx", "text/plain", long, "a/b;charset"])),
        ("Content-Type", 'application/json; charset="utf-16"; boundary=x'),
        ("Content-Encoding", rng.choice(["gzip", "identity", "br, gzip", long, ""])),
        ("Accept", rng.choice(["", "text/event-stream", "application/xml;q=0", long])),
        ("Accept-Encoding", rng.choice(["gzip", "*;q=0", long])),
        ("Authorization", rng.choice(["", "Bearer", "Bearer " + long, "Basic %%%", "Bearer a b"])),
        ("X-Api-Key", long),
        ("X-Request-Id", rng.choice(["", "a" * 129, "a b", "<script>", "%0d%0aX: y", long])),
        ("Connection", rng.choice(["close", "keep-alive, Upgrade", "te", "x" * 100])),
        ("Upgrade", rng.choice(["websocket", "h2c", "TLS/1.0"])),
        ("Expect", rng.choice(["100-continue", "200-ok", ""])),
        ("Transfer-Encoding", rng.choice(["identity", "gzip"])),
        ("Host", rng.choice(["", "127.0.0.1:99999999", "[::1]", "a b", "other.example", long])),
        ("Origin", rng.choice(["null", "https://other.example", long])),
        ("Access-Control-Request-Method", "POST"),
        ("Cookie", long),
        ("Range", "bytes=0-0,-1,5-1"),
        ("If-None-Match", "*"),
        ("Te", "trailers, deflate;q=0.5"),
        ("Trailer", "Content-Length"),
        ("X-Forwarded-For", long),
        ("X-Forwarded-Proto", "ftp"),
        ("Forwarded", "for=" + long),
        ("Date", "yesterday"),
        ("Max-Forwards", "-1"),
        ("anthropic-version", long),
        ("x" * rng.choice([1, 1000]), "y"),
    ]
    name, text = rng.choice(odd)
    data = request_bytes("/v1/completions", _BODY, headers={name: text})
    counted = 1 if name not in ("Host", "Transfer-Encoding", "Upgrade", "Connection") else None
    return Hostile("header", (data,), counted)


def _odd_method(rng: random.Random) -> Hostile:
    names = ["HEAD", "OPTIONS", "PUT", "PATCH", "DELETE", "TRACE", "CONNECT", "PRI", "get", "G@T"]
    method = rng.choice([*names, "QUERY", "LINK", "A" * 500, "", "POST POST"])
    path = rng.choice(_PATHS)
    data = request_bytes(path, method=method)
    if method == "HEAD":
        return Hostile("method", (data,), 1, for_head=True)
    return Hostile("method", (data,), 1 if method in names[1:6] else None)


def _large_head(rng: random.Random) -> Hostile:
    """Around and beyond the limits on the head: 64 KiB and 100 headers."""
    size = rng.choice([65_000, 65_536, 66_000, 200_000])
    number = rng.choice([97, 98, 99, 100, 101, 500])
    many = b"".join(b"X-%d: 1\r\n" % i for i in range(number))
    data = rng.choice(
        [
            b"GET /health HTTP/1.1\r\nHost: a\r\nX: " + b"a" * size + b"\r\n\r\n",
            b"GET /health HTTP/1.1\r\nHost: a\r\n" + b"a" * size + b": x\r\n\r\n",
            b"GET /" + b"a" * size + b" HTTP/1.1\r\nHost: a\r\n\r\n",
            b"GET /health HTTP/1.1\r\nHost: a\r\n" + many + b"\r\n",
            b"GET /health HTTP/1.1\r\nHost: a\r\nX: " + b"a" * size,
        ]
    )
    return Hostile("large head", (data,), 1 if data.endswith(b"\r\n\r\n") else None)


def _framing(rng: random.Random) -> Hostile:
    """Where the body ends is doubtful."""
    lengths = [b"0", b"-1", b"+5", b"1e3", b"0x10", b"99999999999999999999", b" ", b"5, 5", b"\xb2"]
    lengths += [b"8388608", b"8388609", b"9223372036854775807", b"9223372036854775808", b"00005"]
    heads = [
        b"Content-Length: " + rng.choice(lengths) + b"\r\n",
        _LENGTH + _LENGTH,
        _LENGTH + b"Content-Length: 5\r\n",
        _LENGTH + b"Transfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked\r\n" + _LENGTH,
        b"Transfer-Encoding: " + rng.choice([b"xchunked", b"chunked, chunked", b"CHUNKED", b""]),
        b"Transfer-Encoding: gzip, chunked\r\n",
        b"Content-Length : 5\r\n",
        b" Content-Length: 5\r\n",
        b"X: a\r\n b\r\n" + _LENGTH,
        b"X: a\nY: b\n" + _LENGTH,
        b"X: \0\x01\x7f\r\n" + _LENGTH,
        b"X\xff: \xff\xfe\r\n" + _LENGTH,
        b": no name\r\n" + _LENGTH,
        b"no colon\r\n" + _LENGTH,
        b"Expect: 100-continue\r\n" + _LENGTH,
        b"",
    ]
    return Hostile("framing", (_POST + _JSON + rng.choice(heads) + b"\r\n" + _BODY,), None)


def _chunked(rng: random.Random) -> Hostile:
    """A body in chunks, right or wrong."""
    sizes = [b"%x" % len(_BODY), b"%X" % len(_BODY), b"000%x" % len(_BODY)]
    wrong = [b"%x;a=b" % len(_BODY), b"-1", b"ffffffffffffffff", b"fffffffffffffffff", b"g", b""]
    size = rng.choice(sizes + wrong)
    ends = [b"0\r\n\r\n", b"0\r\nX: y\r\n\r\n", b"0\r\nContent-Length: 3\r\n\r\n", b"0\r\n", b""]
    end = rng.choice(ends)
    head = _POST + _JSON + b"Transfer-Encoding: chunked\r\n\r\n"
    if rng.random() < 0.3:
        pieces = [head, *(b"1\r\n%c\r\n" % byte for byte in _BODY), b"0\r\n\r\n"]
        return Hostile("chunked", tuple(pieces))
    complete = size in sizes and end in ends[:2]
    return Hostile(
        "chunked", (head + size + b"\r\n" + _BODY + b"\r\n" + end,), 1 if complete else None
    )


def _garbage(rng: random.Random) -> Hostile:
    junk = bytes(rng.choices(range(256), k=rng.choice([1, 20, 500, 70_000])))
    return Hostile(
        "garbage",
        (
            rng.choice(
                [
                    junk,
                    junk + b"\r\n\r\n",
                    b"\r\n" * rng.choice([1, 10, 40_000]),
                    b"\0" * 1000,
                    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + junk,
                    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + junk,
                    b"GET / HTTP/" + rng.choice([b"0.9", b"1.0", b"1.2", b"2", b"11", b"x"]),
                    b"GET /health HTTP/1.0\r\n\r\n",
                    b"GET /health HTTP/9.9\r\nHost: a\r\n\r\n",
                    b"GET /\r\n\r\n",
                    b"GET  /health  HTTP/1.1\r\n\r\n",
                    b"GET /health HTTP/1.1\nHost: a\n\n",
                    b"SSH-2.0-OpenSSH_9.9\r\n",
                    b"*1\r\n$4\r\nPING\r\n",
                ]
            ),
        ),
        None,
    )


def _incomplete(rng: random.Random) -> Hostile:
    """A request that stops somewhere."""
    data = request_bytes("/v1/completions", _BODY)
    return Hostile("incomplete", (data[: rng.randrange(1, len(data))],), None)


def _in_pieces(rng: random.Random) -> Hostile:
    """A good request in many small pieces."""
    data = request_bytes("/v1/completions", _BODY)
    cuts = sorted(rng.sample(range(1, len(data)), rng.choice([1, 3, 20])))
    ends = [*cuts, len(data)]
    return Hostile("pieces", tuple(data[a:b] for a, b in zip([0, *cuts], ends, strict=True)))


def pipeline(rng: random.Random) -> Hostile:
    """Several requests at once, good ones and ones that are refused without closing."""
    requests = [
        request_bytes("/health", method="GET"),
        request_bytes("/v1/models", method="GET"),
        request_bytes("/nowhere", method="GET"),
        request_bytes("/v1/completions", _BODY),
        json_request("/v1/completions", {"prompt": "a", "max_tokens": 3, "stream": True}),
        json_request("/v1/completions", {"prompt": "a", "temperature": 9}),
        json_request("/v1/chat/completions", {"messages": []}),
        json_request("/tokenize", {"prompt": "a b c"}),
        request_bytes("/tokenize", b"{"),
    ]
    chosen = rng.choices(requests, k=rng.choice([2, 3, 8, 30]))
    data = b"".join(chosen)
    cuts = sorted(rng.sample(range(1, len(data)), rng.choice([0, 0, 1, 5])))
    pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    return Hostile("pipeline", tuple(pieces), len(chosen))
