"""What is done with each field that api clients send."""

import re
from typing import Any

import pytest
from http_server import HttpServer, serve
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from minisrv.frontend.openai_types import CHAT_FIELDS, COMPLETION_FIELDS, Treatment

# The names that the two OpenAI endpoints, vLLM, SGLang and llama.cpp know, see docs.
KNOWN = set(
    re.findall(
        r"\w+",
        """
messages model max_completion_tokens max_tokens temperature top_p n stop stream stream_options seed
presence_penalty frequency_penalty logit_bias logprobs top_logprobs response_format tools
tool_choice parallel_tool_calls reasoning_effort user metadata store service_tier safety_identifier
prompt_cache_key prompt_cache_options prompt_cache_retention verbosity prediction modalities audio
web_search_options moderation functions function_call prompt echo best_of suffix top_k min_p
repetition_penalty repeat_penalty ignore_eos min_tokens stop_token_ids skip_special_tokens
spaces_between_special_tokens include_stop_str_in_output no_stop_trim chat_template_kwargs
chat_template add_generation_prompt continue_final_message structured_outputs guided_json
guided_regex guided_choice guided_grammar regex ebnf json_schema grammar priority cache_salt
return_token_ids return_tokens truncate_prompt_tokens thinking_token_budget request_id rid
timings_per_token return_progress bad_words allowed_token_ids logprob_token_ids prompt_logprobs
stop_regex sampling_seed
""",
    )
)
HARMLESS = set(
    re.findall(
        r"\w+",
        """
user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_options
prompt_cache_retention verbosity prediction
""",
    )
)
HI = [{"role": "user", "content": "hi"}]
UNSUPPORTED_CHAT = [n for n, f in CHAT_FIELDS.items() if f.treatment is Treatment.UNSUPPORTED]
UNSUPPORTED_COMPLETION = [
    n for n, f in COMPLETION_FIELDS.items() if f.treatment is Treatment.UNSUPPORTED
]


def test_every_known_field_is_in_a_table() -> None:
    assert not KNOWN - CHAT_FIELDS.keys() - COMPLETION_FIELDS.keys()


def test_every_field_of_the_openai_client_is_in_the_table_of_its_endpoint() -> None:
    chat = chat_create_params.CompletionCreateParamsBase.__annotations__.keys()
    completion = completion_create_params.CompletionCreateParamsBase.__annotations__.keys()
    assert chat <= CHAT_FIELDS.keys()
    assert completion <= COMPLETION_FIELDS.keys()


def test_the_harmless_fields_are_the_listed_ones() -> None:
    for table in (CHAT_FIELDS, COMPLETION_FIELDS):
        harmless = {n for n, f in table.items() if f.treatment is Treatment.HARMLESS}
        assert harmless == HARMLESS


@pytest.mark.parametrize(
    ("path", "name"),
    [("/v1/chat/completions", name) for name in UNSUPPORTED_CHAT]
    + [("/v1/completions", name) for name in UNSUPPORTED_COMPLETION],
)
def test_an_unsupported_field_is_refused_by_name(server: HttpServer, path: str, name: str) -> None:
    response = server.http.post(path, json={"prompt": "hi", name: ["anything", 5]})
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (name, "unsupported_parameter")


@pytest.mark.parametrize(
    ("path", "table"),
    [("/v1/chat/completions", CHAT_FIELDS), ("/v1/completions", COMPLETION_FIELDS)],
)
def test_a_null_and_a_neutral_value_never_fail(
    server: HttpServer, path: str, table: dict[str, Any]
) -> None:
    nulls = dict.fromkeys(table) | {"prompt": "hi"}
    assert server.http.post(path, json=nulls).status_code == 200
    for name, field in table.items():
        for neutral in field.neutral:
            response = server.http.post(path, json={"prompt": "hi", name: neutral})
            assert response.status_code == 200, (name, neutral, response.text)


@pytest.mark.parametrize(
    ("name", "value"),
    [("suffix", 0), ("top_logprobs", False), ("best_of", 2), ("functions", [{}])],
)
def test_a_value_that_only_resembles_a_neutral_one_is_refused(
    server: HttpServer, name: str, value: Any
) -> None:
    path = "/v1/chat/completions" if name == "functions" else "/v1/completions"
    response = server.http.post(path, json={"prompt": "hi", name: value})
    assert response.json()["error"]["code"] == "unsupported_parameter"


def test_best_of_may_be_n(server: HttpServer) -> None:
    body = {"prompt": "hi", "best_of": 2, "n": 2}
    assert server.http.post("/v1/completions", json=body).status_code == 200


def test_harmless_fields_change_nothing(server: HttpServer) -> None:
    body = {"messages": HI, **{name: {"any": [1]} for name in HARMLESS}}
    response = server.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200
    assert "x-minisrv-warnings" not in response.headers


def test_an_unknown_field_is_accepted_counted_logged_once_and_told(
    server: HttpServer, caplog: pytest.LogCaptureFixture
) -> None:
    name = "made_up\u20ac\n"
    options = {"include_usage": True, "extra": 1}
    for _ in range(2):
        response = server.chat(**{name: 1}, stream=True, stream_options=options)
        assert response.status_code == 200
        assert (
            response.headers["x-minisrv-warnings"]
            == r"unknown fields ignored: made_up\u20ac\n, stream_options.extra"
        )
    assert server.app.state.unknown_fields.counts[r"made_up\u20ac\n"] == 2
    assert len(re.findall(r"unknown request field made_up\\u20ac\\n", caplog.text)) == 1


def test_many_unknown_fields_fit_a_header(server: HttpServer) -> None:
    response = server.chat(**{f"{i:03}" + "x" * 500: 1 for i in range(300)})
    assert response.status_code == 200
    assert response.headers["x-minisrv-warnings"].endswith("and 284 more")
    assert len(response.headers["x-minisrv-warnings"]) < 2000


def test_strict_params_refuses_an_unknown_field() -> None:
    with serve(strict_params=True) as server:
        response = server.chat(made_up=1)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "made_up"
        assert server.chat(user="me").status_code == 200


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "tokenize"])
def test_template_variables_of_the_server_cannot_be_set(server: HttpServer, name: str) -> None:
    response = server.chat(chat_template_kwargs={name: 1})
    assert response.json()["error"]["param"] == f"chat_template_kwargs.{name}"
