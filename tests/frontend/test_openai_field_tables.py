"""What is done with every field of the two OpenAI routes, written down a second time.

Each is supported, with a test that shows what it does; harmless, and changes nothing; or refused by
name. The server's tables say the same, neither more nor less.
"""

import ast
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from minisrv.frontend.apis.openai.fields import CHAT_FIELDS, COMPLETION_FIELDS
from minisrv.frontend.fields.table import Field, Treatment
from tests.support.http_server import HttpServer

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TABLES: dict[str, dict[str, Field]] = {CHAT: CHAT_FIELDS, COMPLETIONS: COMPLETION_FIELDS}
TESTS = Path(__file__).parent

ENGINE, EFFECTS = "test_field_effects_on_the_demo_model.py", "test_effect_of_each_field.py"
TOOLS, ROUTES = "test_tools_and_reasoning.py", "test_generation_routes.py"
_DRAW = f"{ENGINE}::test_the_draw_follows_temperature_top_p_top_k_min_p_and_seed"
_PENALTIES = f"{ENGINE}::test_penalties_change_a_text"
_STOPS = f"{ENGINE}::test_stop_stop_token_ids_and_min_tokens_end_the_text"
_END_TOKENS = (
    f"{ENGINE}::test_logit_bias_ignore_eos_and_skip_special_tokens_make_a_text_of_end_tokens"
)
_STREAM = (
    f"{ENGINE}::test_a_stream_joins_to_the_whole_text_with_the_usage_that_stream_options_ask_for"
)
_STRUCTURE = f"{ENGINE}::test_the_text_is_held_to_its_structure"
_NAMED = f"{ENGINE}::test_a_request_is_named_and_timed_if_it_says_so"
_PROMPT = f"{ENGINE}::test_each_form_of_prompt_gives_the_same_text"
_IDS = (
    f"{EFFECTS}::test_return_token_ids_gives_a_chat_its_prompt_once_and_each_choice_its_output",
    f"{EFFECTS}::test_a_completion_has_the_ids_of_prompt_and_output",
)
_LOGPROBS = f"{ENGINE}::test_logprobs_and_top_logprobs_tell_of_the_tokens_and_echo_of_the_prompt"
_TURN = f"{EFFECTS}::test_the_assistants_turn_is_begun_or_not_or_its_text_continued"

# Each with the tests that show what it does.
SUPPORTED: dict[str, str | tuple[str, ...]] = {
    "model": f"{ENGINE}::test_a_model_must_be_the_served_one",
    "max_tokens": f"{ENGINE}::test_max_tokens_bounds_the_output",
    **dict.fromkeys(("temperature", "top_p", "top_k", "min_p", "seed", "sampling_seed"), _DRAW),
    **dict.fromkeys(("stop", "stop_token_ids", "min_tokens"), _STOPS),
    **dict.fromkeys(("include_stop_str_in_output", "no_stop_trim"), _STOPS),
    **dict.fromkeys(("ignore_eos", "skip_special_tokens", "logit_bias"), _END_TOKENS),
    "n": f"{ENGINE}::test_n_choices_are_drawn_apart",
    **dict.fromkeys(("stream", "stream_options"), _STREAM),
    **dict.fromkeys(("presence_penalty", "frequency_penalty"), _PENALTIES),
    **dict.fromkeys(("repetition_penalty", "repeat_penalty"), _PENALTIES),
    **dict.fromkeys(("response_format", "structured_outputs", "guided_json"), _STRUCTURE),
    **dict.fromkeys(("guided_regex", "guided_choice", "guided_grammar"), _STRUCTURE),
    **dict.fromkeys(("json_schema", "regex", "grammar", "ebnf"), _STRUCTURE),
    **dict.fromkeys(("timings", "request_id", "rid"), _NAMED),
    **dict.fromkeys(("return_token_ids", "return_tokens"), _IDS),
    "return_prompt": f"{EFFECTS}::test_return_prompt_gives_each_prompt_as_the_model_saw_it",
    "return_progress": f"{ENGINE}::test_return_progress_reports_how_far_the_prompt_is",
    "cache_salt": f"{ENGINE}::test_a_cached_prompt_is_found_only_under_its_own_salt",
}
HONOURED_BY: dict[str, dict[str, str | tuple[str, ...]]] = {
    CHAT: {
        "messages": f"{ROUTES}::test_messages_reach_the_template_as_it_knows_them",
        "chat_template_kwargs": f"{ROUTES}::test_messages_reach_the_template_as_it_knows_them",
        "prompt": _PROMPT,
        "max_completion_tokens": f"{ENGINE}::test_max_tokens_bounds_the_output",
        "tools": f"{TOOLS}::test_the_template_shows_the_tools_as_they_were_sent",
        "tool_choice": f"{TOOLS}::test_a_call_that_must_be_made_is_held_to_by_a_grammar",
        "parallel_tool_calls": f"{TOOLS}::test_without_parallel_calls_the_first_ends_the_reply",
        "reasoning_effort": f"{TOOLS}::test_a_thought_that_the_prompt_opens_needs_no_tag",
        "enable_thinking": f"{TOOLS}::test_thinking_is_turned_off",
        "logprobs": _LOGPROBS,
        "top_logprobs": _LOGPROBS,
        "add_generation_prompt": _TURN,
        "continue_final_message": _TURN,
    },
    COMPLETIONS: {
        "prompt": _PROMPT,
        "best_of": f"{ENGINE}::test_n_choices_are_drawn_apart",
        "logprobs": _LOGPROBS,
        "echo": _LOGPROBS,
    },
}
IGNORED = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
    *("prompt_cache_options", "prompt_cache_retention", "verbosity", "prediction"),
)
# Each with the values, besides null, that ask for nothing and pass.
REFUSED: dict[str, tuple[Any, ...]] = {
    "stop_regex": ([],),
    "spaces_between_special_tokens": (True,),
    "priority": (0,),
    "truncate_prompt_tokens": (),
    "thinking_token_budget": (),
    "timings_per_token": (False,),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "logprob_token_ids": ([],),
    "prompt_logprobs": (),
}
REFUSED_BY: dict[str, dict[str, tuple[Any, ...]]] = {
    CHAT: {
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "web_search_options": (),
        "moderation": (),
        "chat_template": (),  # supported with a flag: see test_field_effects.py
    },
    COMPLETIONS: {"suffix": ("",), "messages": (), "top_logprobs": (0,)},
}
# The names of OpenAI, vLLM, SGLang and llama.cpp that the server has to know.
CONTRACT = set(
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
enable_thinking chat_template add_generation_prompt continue_final_message structured_outputs
guided_json guided_regex guided_choice guided_grammar regex ebnf json_schema grammar priority
cache_salt return_token_ids return_tokens truncate_prompt_tokens thinking_token_budget request_id
rid timings_per_token return_progress bad_words allowed_token_ids logprob_token_ids prompt_logprobs
stop_regex sampling_seed
""",
    )
)


def supported(path: str) -> dict[str, str | tuple[str, ...]]:
    return SUPPORTED | HONOURED_BY[path]


def refused(path: str) -> dict[str, tuple[Any, ...]]:
    return REFUSED | REFUSED_BY[path]


def of_both(names: Callable[[str], Iterable[str]]) -> list[tuple[str, str]]:
    """(route, name) for each route's names."""
    return [(path, name) for path in TABLES for name in names(path)]


def sent(server: HttpServer, path: str, **fields: Any) -> Any:
    """The message behind a request that is accepted without a warning."""
    response = server.http.post(path, json={"prompt": "hi", **fields})
    assert response.status_code == 200, response.text
    assert "x-minisrv-warnings" not in response.headers
    message = server.backend.requests[-1]
    seed = message.sampling.seed if fields.get("seed") is not None else None
    return replace(message, uid=0, sent_at=0.0, sampling=replace(message.sampling, seed=seed))


@pytest.mark.parametrize("path", TABLES)
def test_the_server_does_with_each_field_what_is_written_here(path: str) -> None:
    expected = dict.fromkeys(supported(path), Treatment.SUPPORTED)
    expected |= dict.fromkeys(IGNORED, Treatment.IGNORED)
    expected |= dict.fromkeys(refused(path), Treatment.REJECTED)
    assert {name: field.treatment for name, field in TABLES[path].items()} == expected
    assert len(expected) == len(supported(path)) + len(IGNORED) + len(refused(path))
    for name, neutral in refused(path).items():
        assert TABLES[path][name].neutral == neutral, name


def test_no_field_of_the_contract_or_of_the_openai_client_is_unknown() -> None:
    assert CHAT_FIELDS.keys() | COMPLETION_FIELDS.keys() >= CONTRACT
    chat = chat_create_params.CompletionCreateParamsBase.__annotations__.keys()
    completion = completion_create_params.CompletionCreateParamsBase.__annotations__.keys()
    assert chat <= CHAT_FIELDS.keys()
    assert completion <= COMPLETION_FIELDS.keys()


@pytest.mark.parametrize(("path", "name"), of_both(refused))
def test_a_refused_field_is_a_400_that_names_it(server: HttpServer, path: str, name: str) -> None:
    for value in (["anything", 5], {"any": 1}, "anything", 0.5):
        response = server.http.post(path, json={"prompt": "hi", name: value})
        assert response.status_code == 400
        error = response.json()["error"]
        assert (error["param"], error["code"]) == (name, "unsupported_parameter")
        assert name in error["message"]


@pytest.mark.parametrize(("path", "name"), of_both(refused))
def test_a_value_that_asks_for_nothing_passes_and_changes_nothing(
    server: HttpServer, path: str, name: str
) -> None:
    plain = sent(server, path)
    for value in (None, *refused(path)[name]):
        assert sent(server, path, **{name: value}) == plain


@pytest.mark.parametrize(("path", "name"), of_both(lambda path: IGNORED))
def test_a_harmless_field_changes_nothing(server: HttpServer, path: str, name: str) -> None:
    plain = sent(server, path)
    for value in (None, "x", 1, {"any": [1]}, ["x"]):
        assert sent(server, path, **{name: value}) == plain


@pytest.mark.parametrize("path", TABLES)
def test_a_null_counts_as_absent(server: HttpServer, path: str) -> None:
    assert sent(server, path, **dict.fromkeys(TABLES[path].keys() - {"prompt"})) == sent(
        server, path
    )


@cache
def sources_of(file: str) -> dict[str, str]:
    """The source of each test of a module, with its decorators."""
    text = (TESTS / file).read_text()
    lines = text.splitlines()
    functions = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    sources = {}
    for node in functions:
        first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
        sources[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
    return {name: text for name, text in sources.items() if name.startswith("test_")}


@pytest.mark.parametrize(("path", "name"), of_both(supported))
def test_each_honoured_field_has_a_test_of_what_it_does(path: str, name: str) -> None:
    references = supported(path)[name]
    sources = []
    for reference in (references,) if isinstance(references, str) else references:
        file, _, test = reference.partition("::")
        assert test in sources_of(file), f"{reference} does not exist"
        sources.append(sources_of(file)[test])
    source = "\n".join(sources)
    assert re.search(rf"\b{name}\b", source), f"{references} does not speak of {name}"
    if name not in HONOURED_BY[path]:
        assert "@ROUTES" in source or ("CHAT" in source and "COMPLETIONS" in source), references
