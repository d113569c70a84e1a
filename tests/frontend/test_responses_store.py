"""Stored responses: continued, referred to, read, listed and deleted; bounded; one key's own."""

import functools
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from openai.types.responses import Response

from minisrv.errors import InvalidRequestError
from minisrv.frontend.apis.responses.store import ResponseStore, StoredResponse
from tests.support.http_server import HttpServer, serve
from tests.support.played_model import TEMPLATES, PlayedModel
from tests.support.response_wire import CALL, PATH, TOOLS, USER, error_of, events, play, post

THINKS_AND_CALLS = f"<think>\nhm\n</think>\n\nI look.{CALL}"


@pytest.fixture(scope="module")
def hermes() -> Iterator[HttpServer]:
    make = functools.partial(PlayedModel, template=TEMPLATES["hermes"])
    with serve(make_backend=make) as running:
        yield running


def create(server: HttpServer, said: str, given: Any, **fields: Any) -> Response:
    play(server, said)
    return server.openai.responses.create(model="org/tiny", input=given, tools=TOOLS, **fields)


def last_prompt(server: HttpServer) -> str:
    prompt: str = server.backend.prompts[-1]  # type: ignore[attr-defined]
    return prompt


def output_of(response: Response) -> dict[str, Any]:
    call_id = response.output[-1].call_id  # type: ignore[union-attr]
    return {"type": "function_call_output", "call_id": call_id, "output": "12:00"}


def test_a_response_continues_another(hermes: HttpServer) -> None:
    first = create(hermes, THINKS_AND_CALLS, "hi", instructions="Be brief.")
    output = output_of(first)
    second = create(hermes, "Noon.", [output], previous_response_id=first.id)
    assert second.previous_response_id == first.id
    third = create(hermes, "Bye.", "Thanks", previous_response_id=second.id)
    continued = last_prompt(hermes)
    said = [[item.model_dump(exclude_none=True) for item in r.output] for r in (first, second)]
    whole: list[Any] = [USER, *said[0], output, *said[1], {"role": "user", "content": "Thanks"}]
    create(hermes, "Bye.", whole, store=False)
    assert last_prompt(hermes) == continued
    assert "Be brief." not in continued
    body = {"input": "Thanks", "previous_response_id": second.id, "tools": TOOLS}
    counted = hermes.http.post(f"{PATH}/input_tokens", json=body).json()["input_tokens"]
    assert third.usage is not None
    assert counted == third.usage.input_tokens


def test_items_are_referred_to_as_the_ai_sdk_does(hermes: HttpServer) -> None:
    first = create(hermes, THINKS_AND_CALLS, "hi")
    said = [item.model_dump(exclude_none=True) for item in first.output]
    create(hermes, "Noon.", [USER, *said, output_of(first)], store=False)
    whole = last_prompt(hermes)
    references: list[Any] = [{"type": "item_reference", "id": item["id"]} for item in said]
    del references[0]["type"]  # it may be missing
    second = create(hermes, "Noon.", [USER, *references, output_of(first)])
    assert last_prompt(hermes) == whole
    third = create(hermes, "Bye.", "Thanks", previous_response_id=second.id)
    assert last_prompt(hermes).startswith(whole)
    hermes.openai.responses.delete(first.id)  # what refers to it has its items
    create(hermes, "Bye.", "Thanks", previous_response_id=third.id)
    assert last_prompt(hermes).startswith(whole)


def test_a_stored_response_is_read_as_it_was_sent(hermes: HttpServer) -> None:
    whole = create(hermes, THINKS_AND_CALLS, "hi", metadata={"a": "b"})
    assert hermes.openai.responses.retrieve(whole.id).to_dict() == whole.to_dict()
    streamed = events(hermes, tools=TOOLS, max_output_tokens=3)[-1].response
    assert streamed.status == "incomplete"
    assert hermes.openai.responses.retrieve(streamed.id).to_dict() == streamed.to_dict()
    answer = hermes.http.head(f"{PATH}/{whole.id}")
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["content-type"] == "application/json"
    refused = hermes.http.patch(f"{PATH}/{whole.id}")
    assert set(refused.headers["allow"].split(", ")) == {"GET", "HEAD", "DELETE"}
    error = error_of(hermes.http.get(f"{PATH}/{whole.id}", params={"stream": "true"}))
    assert error["param"] == "stream"
    error = error_of(hermes.http.post(f"{PATH}/{whole.id}/cancel"))
    assert "has ended" in error["message"]


def test_the_items_of_a_conversation_are_listed(hermes: HttpServer) -> None:
    items = [{"role": "developer", "content": "Be brief."}, USER, {**USER, "id": "msg_mine"}]
    items.append({"role": "assistant", "content": "a"})
    first = create(hermes, THINKS_AND_CALLS, items)
    reference = {"type": "item_reference", "id": first.output[1].id}
    second = create(hermes, "b", [output_of(first), reference], previous_response_id=first.id)
    client = hermes.openai.responses.input_items
    listed = [item.to_dict() for item in client.list(second.id, order="asc", limit=2)]
    kinds = [(item["type"], item.get("role")) for item in listed]
    assert kinds == [
        *(("message", role) for role in ("developer", "user", "user", "assistant")),
        *(("reasoning", None), ("message", "assistant"), ("function_call", None)),
        *(("function_call_output", None), ("message", "assistant")),
    ]
    assert listed[2]["id"] == "msg_mine"
    assert listed[4:7] == [item.to_dict() for item in first.output]
    assert {**listed[8], "id": listed[5]["id"]} == listed[5]
    assert [item.to_dict() for item in client.list(second.id, limit=4)] == listed[::-1]
    for item in client.list(second.id):
        type(item).model_validate_json(json.dumps(item.to_dict()), strict=True)
    page = client.list(first.id, limit=1)
    assert (page.has_more, page.data[0].id) == (True, listed[3]["id"])
    for name, value in (("limit", "0"), ("limit", "x"), ("order", "up"), ("after", "msg_9")):
        answer = hermes.http.get(f"{PATH}/{second.id}/input_items", params={name: value})
        assert error_of(answer)["param"] == name


def test_what_is_not_stored_is_not_found(hermes: HttpServer) -> None:
    kept = create(hermes, "a", "hi")
    dropped = create(hermes, "a", "hi", store=False)
    assert (kept.to_dict()["store"], dropped.to_dict()["store"]) == (True, False)
    hermes.openai.responses.delete(kept.id)
    client = hermes.openai.responses
    calls: list[Any] = [client.retrieve, client.delete, client.cancel, client.input_items.list]
    for response in (kept, dropped):
        for call in calls:
            with pytest.raises(openai.NotFoundError, match="Send store: false") as raised:
                list(call(response.id))
            assert raised.value.param == "response_id"
        with pytest.raises(openai.NotFoundError, match="Send store: false") as raised:
            create(hermes, "a", "hi", previous_response_id=response.id)
        assert raised.value.param == "previous_response_id"
        assert raised.value.code == "previous_response_not_found"
        reference = {"type": "item_reference", "id": response.output[0].id}
        with pytest.raises(openai.NotFoundError, match="Send store: false") as raised:
            create(hermes, "a", [reference])
        assert raised.value.param == "input.0.id"


def test_an_item_is_referred_to_once(hermes: HttpServer) -> None:
    reference = {"type": "item_reference", "id": create(hermes, "a", "hi").output[0].id}
    error = error_of(post(hermes, input=[reference, USER, reference]))
    assert error["param"] == "input.2.id"


def test_a_failed_response_is_not_stored(server: HttpServer) -> None:
    failed = events(server, input="break")[-1].response
    assert failed.status == "failed"
    assert server.http.get(f"{PATH}/{failed.id}").status_code == 404


def test_a_server_may_store_nothing() -> None:
    with serve(response_store_bytes=0) as server:
        reply = post(server, store=True).json()
        assert reply["store"] is False
        answer = server.http.get(f"{PATH}/{reply['id']}")
        assert answer.status_code == 404
        assert "stores: none (--response-store-bytes)" in answer.json()["error"]["message"]


def test_the_oldest_response_makes_room() -> None:
    with serve(response_store_bytes=20_000) as server:
        first, second, third = (post(server, input="x" * 5000).json()["id"] for _ in range(3))
        assert server.http.get(f"{PATH}/{first}").status_code == 404
        assert server.http.get(f"{PATH}/{second}").status_code == 200
        fourth = post(server, input="x" * 5000).json()["id"]
        found = [server.http.get(f"{PATH}/{id}").status_code for id in (second, third, fourth)]
        assert found == [200, 404, 200]
        huge = post(server, input="x" * 30_000)
        assert huge.status_code == 200
        assert server.http.get(f"{PATH}/{huge.json()['id']}").status_code == 404


def test_a_response_belongs_to_the_key_that_asked_for_it() -> None:
    with serve(api_key=["a", "b"], admin_key="c") as server:
        keys = [{"Authorization": f"Bearer {key}"} for key in "abc"]
        body = {"input": "hi", "request_id": "mine"}
        reply = server.http.post(PATH, json=body, headers=keys[0]).json()
        reference = {"type": "item_reference", "id": reply["output"][0]["id"]}
        for headers, status in zip(keys, (200, 404, 404), strict=True):
            assert server.http.get(f"{PATH}/resp_mine", headers=headers).status_code == status
            for more in ({"previous_response_id": "resp_mine"}, {"input": [reference]}):
                answer = server.http.post(PATH, json={"input": "hi", **more}, headers=headers)
                assert answer.status_code == status
        assert server.http.delete(f"{PATH}/resp_mine", headers=keys[1]).status_code == 404
        server.http.post(PATH, json=body, headers=keys[1])  # the same id, another response
        deleted = server.http.delete(f"{PATH}/resp_mine", headers=keys[1])
        assert deleted.json() == {"id": "resp_mine", "object": "response", "deleted": True}
        assert server.http.get(f"{PATH}/resp_mine", headers=keys[0]).status_code == 200


class StoreMachine(RuleBasedStateMachine):
    """Any use of a store, beside a model that keeps the order of uses and counts what is reachable.

    Responses are made from others that were found before, and may be added when those are gone.
    """

    LIMIT = 6000

    def __init__(self) -> None:
        super().__init__()
        self.store = ResponseStore(self.LIMIT)
        self.order: list[StoredResponse] = []
        self.made: list[StoredResponse] = []

    @rule(data=st.data(), size=st.integers(0, 3000), owner=st.integers(0, 1))
    def add(self, data: st.DataObject, size: int, owner: int) -> None:
        pick = st.sampled_from(self.made) if self.made else st.nothing()
        used = data.draw(st.lists(pick, max_size=3, unique=True)) if self.made else []
        number = len(self.made)
        response = StoredResponse(
            id=f"resp_{data.draw(st.integers(0, number))}",
            owner=owner,
            body=b"x" * size,
            input=(b"a",),
            output_ids=(f"msg_{number}",),
            previous=used[0] if used else None,
            referred={id: other for other in used[1:] for id in other.output_ids},
        )
        self.made.append(response)
        self.order = [r for r in self.order if (r.owner, r.id) != (owner, response.id)]
        self.order.append(response)
        while self.reachable() > self.LIMIT and self.order:
            del self.order[0]
        self.store.add(response)

    @rule(data=st.data(), by_item=st.booleans(), deletes=st.booleans())
    def use(self, data: st.DataObject, by_item: bool, deletes: bool) -> None:
        if not self.made:
            return
        response = data.draw(st.sampled_from(self.made))
        held = response in self.order
        try:
            if by_item:
                found = self.store.holder_of(response.owner, response.output_ids[0], "p")
            else:
                found = self.store.get(response.owner, response.id, "p")
        except InvalidRequestError:
            assert not held
            return
        if by_item:
            assert found is response
        self.order.remove(found)
        if deletes:
            self.store.delete(found.owner, found.id, "p")
        else:
            self.order.append(found)

    def reachable(self) -> int:
        seen: set[StoredResponse] = set()
        todo = list(self.order)
        while todo:
            if (response := todo.pop()) not in seen:
                seen.add(response)
                todo += response.uses()
        return sum(response.num_bytes for response in seen)

    @invariant()
    def counts_what_is_reachable(self) -> None:
        assert self.store.used_bytes == self.reachable() <= self.LIMIT
        assert len(self.store) == len(self.order)


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
