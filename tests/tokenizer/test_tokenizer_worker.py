import json
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from minisrv.checkpoint.tokenizer import HFTokenizer
from minisrv.errors import MinisrvError
from minisrv.sampling_params import SamplingParams, TokenBias
from minisrv.tokenizer.chat_template import ChatTemplate
from minisrv.tokenizer.worker import TokenizerWorker
from minisrv.wire.codec import decode, encode
from minisrv.wire.messages import (
    FRONTEND_INBOX,
    SCHEDULER_INBOX,
    AbortMsg,
    AnswerMsg,
    DecodeMsg,
    DescribeMsg,
    EncodeMsg,
    Failure,
    FlushMsg,
    GenerateMsg,
    TokenizeMsg,
    UserReply,
)
from tests.support import own_tokenizers

SOURCE = (
    "{{ bos_token }}{% for m in messages %}{{ raise_exception('no jokes') if m.content == 'joke' "
    "}}[{{ m.role }}]{{ m.content }}{% endfor %}{% if loud %}!{% endif %}[assistant]"
)


def make_tokenizer(name: str = "llama_like", **config: Any) -> HFTokenizer:
    backend = Tokenizer.from_str(own_tokenizers.MAKERS[name]().to_str())
    return HFTokenizer(backend, {**own_tokenizers.NAMED, **config}, {})


def make_worker(tokenizer: HFTokenizer | None = None, **options: Any) -> TokenizerWorker:
    tokenizer = tokenizer or make_tokenizer()
    template = ChatTemplate({"default": SOURCE}, tokenizer.special_tokens)
    settings = {"max_seq_len": 100, "vocab_size": tokenizer.vocab_size, **options}
    return TokenizerWorker(tokenizer, template, **settings)


def message(n: int = 1, max_tokens: int | None = None, **fields: Any) -> TokenizeMsg:
    return TokenizeMsg(uid=40, sampling=SamplingParams(n=n, max_tokens=max_tokens), **fields)


def generated(worker: TokenizerWorker, **fields: Any) -> list[int]:
    out = worker.handle(message(**fields))
    assert isinstance(out, GenerateMsg), out
    assert decode(encode(out), SCHEDULER_INBOX).uid == out.uid == 40
    return out.prompt_ids.tolist()


def failed(worker: TokenizerWorker, **fields: Any) -> Failure:
    out = worker.handle(message(**fields))
    assert isinstance(out, UserReply), out
    assert decode(encode(out), FRONTEND_INBOX).failures == out.failures
    assert len(out.uids) == 0
    assert [failure.uid for failure in out.failures] == list(range(40, 40 + fields.get("n", 1)))
    return out.failures[0]


def test_a_prompt_is_encoded_with_one_bos() -> None:
    tokenizer = make_tokenizer()
    ids = generated(make_worker(tokenizer), prompt="the quick")
    assert ids == tokenizer.encode("the quick")
    assert ids.count(tokenizer.bos_id) == 1


def test_messages_are_rendered_and_get_no_second_bos() -> None:
    tokenizer = make_tokenizer()
    chat = ({"role": "user", "content": "hi"},)
    ids = generated(make_worker(tokenizer), messages=chat, template_kwargs={"loud": True})
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s> [user]hi![assistant]"
    assert ids.count(tokenizer.bos_id) == 1


def test_token_ids_pass_unchanged() -> None:
    assert generated(make_worker(), prompt=np.array([5, 3, 5], np.int32)) == [5, 3, 5]


def test_an_empty_prompt_is_the_bos_or_an_invalid_request() -> None:
    assert generated(make_worker(), prompt="") == [1]
    assert generated(make_worker(make_tokenizer("byte_level_bpe")), prompt="") == [1]
    without = make_worker(make_tokenizer("byte_level_bpe", bos_token=None))
    assert failed(without, prompt="").status == 400
    assert failed(make_worker(), prompt=np.array([], np.int32)).status == 400


@pytest.mark.parametrize("ids", [(-1,), (3, 5000)])
def test_an_id_outside_the_vocabulary_is_an_invalid_request(ids: tuple[int, ...]) -> None:
    failure = failed(make_worker(vocab_size=300), prompt=np.array(ids, np.int32))
    assert (failure.status, failure.param) == (400, "prompt")
    assert str(ids[-1]) in failure.message


@pytest.mark.parametrize(
    ("name", "ids"), [("stop_token_ids", (300,)), ("logit_bias", (TokenBias(300, 1.0),))]
)
def test_a_named_id_outside_the_vocabulary_is_an_invalid_request(name: str, ids: Any) -> None:
    sampling = SamplingParams(**{name: ids})
    reply = make_worker(vocab_size=300).handle(
        TokenizeMsg(uid=40, sampling=sampling, prompt=np.array([5], np.int32))
    )
    assert isinstance(reply, UserReply)
    assert [(f.status, f.param) for f in reply.failures] == [(400, name)]


def test_a_tokenizer_larger_than_the_model_cannot_send_its_ids() -> None:
    failure = failed(make_worker(vocab_size=10), prompt="the quick")
    assert failure.status == 400
    assert "from 0 to 9" in failure.message


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "fits"),
    [(99, None, True), (100, None, False), (60, 40, True), (60, 41, False), (500, None, False)],
)
def test_the_context_holds_prompt_and_completion(
    prompt: int, max_tokens: int | None, fits: bool
) -> None:
    fields: dict[str, Any] = {"prompt": np.full(prompt, 5, np.int32), "max_tokens": max_tokens}
    if fits:
        assert len(generated(make_worker(), **fields)) == prompt
        return
    failure = failed(make_worker(), **fields)
    asked, room = max_tokens or 1, 100 - prompt
    way_out = f", or ask for at most {room} tokens of completion" if room > 0 else ""
    assert (failure.status, failure.code) == (400, "context_length_exceeded")
    assert failure.message == (
        "This model's maximum context length is 100 tokens. However, you requested "
        f"{prompt + asked} tokens ({prompt} in the prompt, {asked} in the completion). "
        f"Please reduce the length of the prompt{way_out} (context_length_exceeded)."
    )


@pytest.mark.parametrize(("prompt", "fits"), [(99, True), (100, False)])
def test_a_capped_output_needs_room_for_one_token(prompt: int, fits: bool) -> None:
    request = TokenizeMsg(
        uid=40,
        prompt=np.full(prompt, 5, np.int32),
        sampling=SamplingParams(max_tokens=5000),
        caps_output=True,
    )
    out = make_worker().handle(request)
    assert isinstance(out, GenerateMsg) is fits
    assert not isinstance(out, GenerateMsg) or out.caps_output


@pytest.mark.parametrize(("prompt", "fits"), [(32_768, True), (32_769, False)])
def test_the_logprobs_of_a_prompt_are_limited(prompt: int, fits: bool) -> None:
    sampling = SamplingParams(n=2, max_tokens=0, prompt_logprobs=7)
    request = TokenizeMsg(uid=40, prompt=np.full(prompt, 5, np.int32), sampling=sampling)
    out = make_worker(max_seq_len=100_000).handle(request)
    if fits:
        assert isinstance(out, GenerateMsg)
        return
    assert isinstance(out, UserReply)
    assert {(failure.status, failure.param) for failure in out.failures} == {(400, "logprobs")}


def test_too_long_messages_are_named_as_such() -> None:
    failure = failed(make_worker(), messages=({"role": "user", "content": "x" * 500},))
    assert (failure.code, failure.param) == ("context_length_exceeded", "messages")
    assert "Please reduce the length of the messages (" in failure.message


def test_a_failure_goes_to_every_choice() -> None:
    failure = failed(make_worker(), n=3, messages=({"role": "user", "content": "joke"},))
    assert (failure.status, failure.error_type) == (400, "invalid_request_error")
    assert "no jokes" in failure.message


def test_a_lone_surrogate_fails_only_its_request() -> None:
    worker = make_worker()
    assert failed(worker, prompt="\ud83d").status == 400
    assert failed(worker, messages=({"role": "user", "content": "\ud83d"},)).status == 400
    assert generated(worker, prompt="x")


class BrokenTokenizer(HFTokenizer):
    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        if text == "break":
            raise RuntimeError("secret detail")
        return super().encode(text, add_special_tokens)


def test_an_unexpected_error_is_a_500_only_for_its_request() -> None:
    backend = Tokenizer.from_str(own_tokenizers.llama_like().to_str())
    worker = make_worker(BrokenTokenizer(backend, own_tokenizers.NAMED, {}))
    failure = failed(worker, n=2, prompt="break")
    assert (failure.status, failure.error_type) == (500, MinisrvError.error_type)
    assert "secret" not in failure.message
    assert generated(worker, prompt="fine")


def test_an_abort_is_forwarded() -> None:
    abort = AbortMsg(uids=(4, 5))
    assert make_worker().handle(abort) == abort


def answer(worker: TokenizerWorker, query: EncodeMsg | DecodeMsg | DescribeMsg) -> AnswerMsg:
    out = worker.handle(query)
    assert isinstance(out, AnswerMsg)
    assert out.query == query.query
    assert decode(encode(out), FRONTEND_INBOX) == out
    return out


def shown(worker: TokenizerWorker, query: EncodeMsg | DecodeMsg) -> dict[str, Any]:
    """What an answer shows, read from JSON."""
    if isinstance(query, EncodeMsg):
        count = answer(worker, query).value
        query = replace(query, show_tokens=True)
        value = answer(worker, query).value
        assert count == {"count": value.pop("count")}
        assert count["count"] == len(json.loads(value["ids"]))
    else:
        value = answer(worker, query).value
    return {name: json.loads(text) for name, text in value.items()}


def test_a_text_is_encoded_and_decoded_on_request() -> None:
    tokenizer = make_tokenizer()
    worker = make_worker(tokenizer)
    for special in (True, False):
        value = shown(worker, EncodeMsg(query=1, prompt="hi", add_special_tokens=special))
        assert value["ids"] == tokenizer.encode("hi", special)
        assert value["tokens"] == [tokenizer.token(id) for id in value["ids"]]
        assert value["text"] == "hi"
    ids = np.array([1, *tokenizer.encode("hi", False)], np.int32)
    for skip, text in ((False, "<s> hi"), (True, "hi")):
        query = DecodeMsg(query=2, token_ids=ids, skip_special_tokens=skip)
        assert shown(worker, query)["text"] == text


def test_messages_are_rendered_on_request_with_or_without_the_assistants_turn() -> None:
    worker = make_worker()
    chat = ({"role": "user", "content": "hi"},)
    query = EncodeMsg(query=1, messages=chat, add_special_tokens=False)
    assert shown(worker, query)["text"] == "<s>[user]hi[assistant]"
    query = replace(query, continue_final_message=True)
    assert shown(worker, query)["text"] == "<s>[user]hi"
    refused = answer(
        worker,
        EncodeMsg(
            query=2, messages=({"role": "user", "content": "joke"},), add_special_tokens=False
        ),
    )
    assert refused.failure is not None
    assert (refused.failure.status, refused.failure.param) == (400, "messages")


def test_tools_reach_the_template_on_request() -> None:
    tokenizer = make_tokenizer()
    source = "{{ tools[0].function.name }}"
    template = ChatTemplate({"default": source}, tokenizer.special_tokens)
    worker = TokenizerWorker(tokenizer, template, 100, tokenizer.vocab_size)
    query = EncodeMsg(
        query=1,
        messages=({"role": "user", "content": "hi"},),
        tools=({"type": "function", "function": {"name": "add"}},),
        add_special_tokens=False,
    )
    assert shown(worker, query)["text"] == "add"


def test_arguments_as_text_reach_the_template_as_objects_where_the_frontend_says_so() -> None:
    tokenizer = make_tokenizer()
    source = "{{ messages[0].tool_calls[0].function.arguments | tojson }}"
    template = ChatTemplate({"default": source}, tokenizer.special_tokens)
    worker = TokenizerWorker(tokenizer, template, 100, tokenizer.vocab_size)
    text = '{"wei": 1000000000000000000000}'
    call = {"type": "function", "function": {"name": "f", "arguments": text}}
    query = EncodeMsg(
        query=1,
        messages=({"role": "assistant", "tool_calls": [call]},),
        add_special_tokens=False,
    )
    assert shown(worker, query)["text"] == json.dumps(text)
    assert shown(worker, replace(query, text_arguments=True))["text"] == text


def test_the_tokenizer_describes_itself() -> None:
    value = answer(make_worker(), DescribeMsg(query=9)).value
    assert (value["bos_token"], value["bos_token_id"]) == ("<s>", 1)
    assert value["vocab_size"] == make_tokenizer().vocab_size


def test_a_flush_is_passed_on() -> None:
    assert make_worker().handle(FlushMsg(query=1)) == FlushMsg(query=1)


@pytest.mark.parametrize("fields", ["prompt", "messages"])
def test_a_text_that_no_context_can_hold_is_refused_before_it_is_encoded(fields: str) -> None:
    text = "the quick " * 500_000
    chat = ({"role": "user", "content": text},)
    began = time.process_time()
    failure = failed(make_worker(), **{fields: chat if fields == "messages" else text})
    assert time.process_time() - began < 0.5
    assert (failure.status, failure.code) == (400, "context_length_exceeded")
    assert failure.message.startswith("This model's maximum context length is 100 tokens.")
    assert failure.param == fields
    query = EncodeMsg(query=1, prompt=text, add_special_tokens=True)
    refused = answer(make_worker(), query).failure
    assert refused is not None
    assert refused.code == "context_length_exceeded"


def test_no_text_that_fits_is_refused_for_its_characters() -> None:
    tokenizer = make_tokenizer("byte_level_bpe")
    longest = max((tokenizer.decode([id], False) for id in range(tokenizer.vocab_size)), key=len)
    ids = generated(make_worker(tokenizer), prompt=longest * 99, max_tokens=1)
    assert len(ids) <= 99
