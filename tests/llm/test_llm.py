"""LLM: the server's answers without a server."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from minisrv import LLM, SamplingParams
from minisrv.errors import ConfigError, InvalidRequestError, MinisrvError
from minisrv.llm.outputs import PromptsFailedError
from minisrv.sampling_params import TokenBias
from tests.support.failing_choices import fail_choices
from tests.support.oracle import load_reference, make_prompts, reference_tokens
from tests.support.server_process import wait_until

OPTIONS = {"dtype": torch.float32, "kv_memory": "64MiB", "num_threads": 1}


@pytest.fixture(scope="module")
def llm(model_dir: Path) -> Iterator[LLM]:
    with LLM(model_dir, **OPTIONS) as made:
        yield made


def test_generated_tokens_equal_those_of_transformers(llm: LLM, model_dir: Path) -> None:
    prompts = make_prompts(6, 300, longest=80)
    expected = reference_tokens(load_reference(model_dir), prompts)
    outputs = llm.generate_outputs(
        prompts, temperature=0, max_tokens=32, ignore_eos=True, use_tqdm=False
    )
    assert [output.outputs[0].token_ids for output in outputs] == expected
    assert {output.outputs[0].finish_reason for output in outputs} == {"length"}
    assert [output.prompt_token_ids for output in outputs] == prompts


def test_text_prompts_one_or_many_and_fields_over_params(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=4)
    alone = llm.generate("Hello", params)
    assert len(alone) == 1
    assert llm.generate(["Hello", "Hello"], [params, params]) == alone * 2
    longer = llm.generate(["Hello"], params, max_tokens=8, ignore_eos=True)
    assert longer[0].startswith(alone[0].rstrip("\ufffd"))
    assert llm.generate([], params) == []


def test_choices_differ_by_seed_and_come_again_with_it(llm: LLM) -> None:
    params = SamplingParams(temperature=1.5, seed=3, n=3, max_tokens=12, ignore_eos=True)
    (first,) = llm.generate_outputs("Hello", params)
    beside = llm.generate_outputs(["other", "Hello", "third"], params)[1]
    texts = [choice.token_ids for choice in first.outputs]
    assert [choice.token_ids for choice in beside.outputs] == texts
    assert len({tuple(text) for text in texts}) == 3
    assert first.usage.completion_tokens == 36


def test_a_stop_string_ends_the_text_before_it(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    (whole,) = llm.generate("abc", params)
    stop = whole[10:13]
    (output,) = llm.generate_outputs("abc", params, stop=stop)
    choice = output.outputs[0]
    assert choice.text == whole[: whole.index(stop)]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)
    assert len(choice.token_ids) < 24


def test_an_included_stop_string_is_the_end_of_the_text(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    (whole,) = llm.generate("abc", params)
    stop = whole[10:13]
    (text,) = llm.generate("abc", params, stop=stop, include_stop_str_in_output=True)
    assert text == whole[: whole.index(stop) + len(stop)]


def test_a_special_token_that_is_not_shown_ends_the_text_as_a_stop_string() -> None:
    fields = {"logit_bias": (TokenBias(1, 100.0),), "max_tokens": 5, "temperature": 0}
    with LLM("demo", num_threads=1, num_pages=100) as demo:
        (output,) = demo.generate_outputs("a", SamplingParams(**fields), stop="<|im_start|>")
    (choice,) = output.outputs
    assert (choice.text, len(choice.token_ids)) == ("", 1)
    assert (choice.finish_reason, choice.stop_reason) == ("stop", "<|im_start|>")


def test_a_biased_id_outside_the_vocabulary_is_refused(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="logit_bias holds 100000"):
        llm.generate("abc", logit_bias=(TokenBias(100000, 1.0),))


def test_a_repeat_is_cached(llm: LLM) -> None:
    prompt = list(range(100, 200))
    llm.generate([prompt], max_tokens=1, temperature=0)
    (output,) = llm.generate_outputs([prompt], max_tokens=1, temperature=0)
    assert output.usage.cached_tokens == 96


def test_chat_goes_through_the_template(llm: LLM) -> None:
    chat = [{"role": "user", "content": "hi"}]
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    ids = llm.tokenizer.encode(text, add_special_tokens=False)
    assert llm.chat(chat, params) == llm.chat([chat], params) == llm.generate([ids], params)


@pytest.mark.parametrize(
    ("prompts", "fields", "message"),
    [
        (["a", 5], {}, "prompt 1 is a int"),
        ([[1, 2], [3, 100_000]], {}, "prompt 1: .*token id 100000"),
        (["a", "b" * 5000], {}, "prompt 1: This model's maximum context length is 2048"),
        (["a"], {"n": 2}, "generate_outputs"),
        (["a"], {"temperature": -1}, "temperature"),
        (["a"], {"sampling_params": [SamplingParams()] * 2}, "1 prompts and 2 sampling_params"),
    ],
)
def test_a_wrong_request_is_named_before_anything_runs(
    llm: LLM, prompts: list[object], fields: dict[str, object], message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        llm.generate(prompts, **fields)  # type: ignore[arg-type]
    assert not llm._loop.busy


def test_an_unknown_option_or_field_names_its_neighbours(llm: LLM, model_dir: Path) -> None:
    with pytest.raises(TypeError, match="max_tokens"):
        llm.generate("a", max_tokns=3)
    with pytest.raises(TypeError, match="page_size"):
        LLM(model_dir, page_sise=3)
    with pytest.raises(ConfigError, match="no such directory"):
        LLM("./nowhere")


@pytest.fixture
def _interruptible() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored under xdist
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
def test_an_interrupt_leaves_it_usable(llm: LLM) -> None:
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    prompts = ["x", "y"] * 200
    with pytest.raises(KeyboardInterrupt):
        llm.generate(prompts, max_tokens=1000, ignore_eos=True, use_tqdm=False)
    timer.join()
    assert not llm._loop.busy
    llm._loop.scheduler.check()
    assert len(llm.generate("x", max_tokens=2)) == 1


def test_a_prompt_that_fails_raises_its_error_and_one_of_several_with_all_outputs(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LLM(model_dir, **OPTIONS) as made:
        whole = made.generate(["a", "b", "c"], max_tokens=3, temperature=0, use_tqdm=False)
        fail_choices(monkeypatch, {4, 6})
        with pytest.raises(PromptsFailedError, match="1 of 3 prompts failed; prompt 1: no") as some:
            made.generate(["a", "b", "c"], max_tokens=3, temperature=0, use_tqdm=False)
        assert (some.value.param, some.value.code) == ("prompt", "grammar_too_complex")
        assert some.value.http_status == 400
        outputs = some.value.outputs
        assert [output.error is None for output in outputs] == [True, False, True]
        texts = [output.outputs[0].text for output in outputs]
        assert (texts[0], texts[2]) == (whole[0], whole[2])
        with pytest.raises(InvalidRequestError, match="no") as single:
            made.generate("a", max_tokens=3, use_tqdm=False)
        assert single.value.code == "grammar_too_complex"


def test_closing_ends_what_runs_in_another_thread(model_dir: Path) -> None:
    made = LLM(model_dir, **OPTIONS)

    def close() -> None:
        wait_until(lambda: made._loop.scheduler.running)
        made.close()

    closing = threading.Thread(target=close)
    closing.start()
    with pytest.raises(MinisrvError, match="closed") as caught:
        made.generate(["x", "y"] * 20, max_tokens=1000, ignore_eos=True, use_tqdm=False)
    assert caught.value.code == "server_draining"
    closing.join()


def test_it_can_be_made_again_and_refuses_work_when_closed(model_dir: Path) -> None:
    texts = []
    for _ in range(2):
        with LLM(model_dir, **OPTIONS) as made:
            texts += made.generate("again", temperature=0, max_tokens=8, use_tqdm=False)
    assert texts[0] == texts[1]
    with pytest.raises(RuntimeError, match="closed"):
        made.generate("again")
