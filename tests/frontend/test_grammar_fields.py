"""The fields that constrain the text: what is read from them, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from minisrv.errors import InvalidRequestError
from minisrv.frontend.apis.openai.fields import CHAT_FIELDS
from minisrv.frontend.fields.grammar import read_grammar
from minisrv.frontend.fields.table import read_fields
from minisrv.sampling_params import Grammar

SCHEMA = {"type": "object"}


def read(body: dict[str, Any]) -> Grammar | None:
    fields, _ = read_fields(body, CHAT_FIELDS)
    return read_grammar(fields)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": None, "structured_outputs": None}, None),
        ({"response_format": {"type": "json_object"}}, Grammar.json_object("response_format")),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {}},
                }
            },
            Grammar.json_schema({}, "response_format.json_schema.schema"),
        ),
        ({"guided_json": SCHEMA}, Grammar.json_schema(SCHEMA, "guided_json")),
        (
            {"structured_outputs": {"choice": ["a"], "regex": None}},
            Grammar.choice(["a"], "structured_outputs.choice"),
        ),
        *(
            (
                {"structured_outputs": {"json_object": True, "disable_any_whitespace": value}},
                Grammar.json_object("structured_outputs.json_object"),
            )
            for value in (True, False)
        ),
    ],
    ids=str,
)
def test_a_body_gives_its_grammar(body: dict[str, Any], expected: Grammar | None) -> None:
    assert read(body) == expected


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": "json_object"}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
            "response_format.json_schema.name",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {}, "strict": "yes"},
                }
            },
            "response_format.json_schema.strict",
        ),
        ({"guided_choice": "a"}, "guided_choice"),
        ({"guided_choice": ["a", 5]}, "guided_choice.1"),
        ({"guided_regex": 5}, "guided_regex"),
        ({"guided_json": SCHEMA, "guided_regex": "a"}, "guided_regex"),
        (
            {"regex": "a", "response_format": {"type": "json_object"}},
            "response_format",
        ),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs.regex"),
        ({"structured_outputs": {"nothing": None}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": {}}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"made_up": 1}}, "structured_outputs.made_up"),
        ({"guided_regex": "a" * 200_000}, "guided_regex"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_cannot_be_honoured_is_refused_by_name(body: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        read(body)
    assert caught.value.param == param
