"""The request schema means in the check what it means in the docs: jsonschema is the oracle."""

from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisrv.errors import InvalidRequestError
from minisrv.frontend.apis.openai.fields import CHAT_FIELDS, COMPLETION_FIELDS
from minisrv.frontend.fields.schema import INTEGER, Schema, check_value
from minisrv.frontend.fields.table import Treatment, request_schema

SCHEMAS = {
    (endpoint, name): field.schema
    for endpoint, table in (("chat", CHAT_FIELDS), ("completion", COMPLETION_FIELDS))
    for name, field in table.items()
    if field.treatment is Treatment.SUPPORTED
}
# No whole floats and no nulls in objects: there the check is stricter, or takes null for absent.
SCALARS = (
    st.booleans()
    | st.integers(-5, 5)
    | st.floats(0.1, 0.9)
    | st.sampled_from(["user", "tool", "text", "a"])
)
NAMES = st.sampled_from(["role", "content", "type", "text", "include_usage", "name", "x"])
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)


def refused_at(value: Any, schema: Schema, path: str) -> str | None:
    try:
        check_value(value, schema, path)
    except InvalidRequestError as error:
        return error.param
    return None


@given(value=VALUES, key=st.sampled_from(sorted(SCHEMAS)))
@settings(max_examples=250, deadline=None)
def test_the_check_agrees_with_json_schema(value: Any, key: tuple[str, str]) -> None:
    schema = SCHEMAS[key]
    param = refused_at(value, schema, key[1])
    assert (param is None) == jsonschema.Draft202012Validator(schema).is_valid(value)
    assert param is None or param.split(".")[0] == key[1]


@pytest.mark.parametrize("table", [CHAT_FIELDS, COMPLETION_FIELDS])
def test_the_schema_in_the_docs_is_a_valid_json_schema(table: dict[str, Any]) -> None:
    schema = request_schema(table)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["properties"].keys() == {
        name for name, field in table.items() if field.treatment is not Treatment.REJECTED
    }


@pytest.mark.parametrize("whole", [1.0, 2.0])
def test_a_whole_float_is_not_an_integer(whole: float) -> None:
    with pytest.raises(InvalidRequestError, match="an integer"):
        check_value(whole, INTEGER, "n")


def test_a_message_shows_little_of_a_long_value() -> None:
    with pytest.raises(InvalidRequestError) as raised:
        check_value("x" * 10_000, INTEGER, "n")
    assert raised.value.message == "n is a string of 10000 characters; it must be an integer"
