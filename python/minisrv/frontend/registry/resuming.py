"""In which order open requests are sent again, and which may have ended a process."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping, Sequence

from minisrv.errors import OverloadedError
from minisrv.frontend.registry.open_request import PROVEN_TOKENS, OpenRequest
from minisrv.wire.messages import TokenizeMsg

MESSAGES_AT_ONCE = 64  # of one request, before others run
FULL_INBOX_S = 0.05
SUSPECT_GROUPS = 16
PROOF_POLL_S, LONGEST_PROOF_S = 0.005, 5.0

Dispatch = Callable[[OpenRequest, TokenizeMsg], None]


def causes(suspects: Mapping[int, OpenRequest]) -> list[int]:
    """The uids to give up of those on which a process worked when it died.

    That are those for which it is the second time, and of these the ones that have not gone on in
    between, if there are any.
    """
    progress = {uid: request.suspect(uid) for uid, request in suspects.items()}
    again = {uid: tokens for uid, tokens in progress.items() if tokens is not None}
    stuck = [uid for uid, tokens in again.items() if tokens < PROVEN_TOKENS]
    return stuck or list(again)


async def send_again(
    messages: Mapping[OpenRequest, Sequence[TokenizeMsg]], dispatch: Dispatch
) -> None:
    """Send what is open of these messages of each request, suspects first.

    Messages that a request gets from now on are not among them: those are sent at once.
    Suspects are sent a few at a time, each time when those before have gone on: if the process dies
    again, few can be the cause. dispatch: sends one message; it may raise OverloadedError.
    """
    suspects = [request for request in messages if not request.is_proven]
    others = [request for request in messages if request.is_proven]
    at_once = math.ceil(len(suspects) / SUSPECT_GROUPS)
    for number, request in enumerate([*suspects, *others]):
        for i, message in enumerate(messages[request]):
            if i % MESSAGES_AT_ONCE == 0:
                await asyncio.sleep(0)
            await _send(request, message, dispatch)
        if number < len(suspects) and (number + 1) % at_once == 0:
            await _wait_until_proven(suspects[: number + 1])


async def _send(request: OpenRequest, message: TokenizeMsg, dispatch: Dispatch) -> None:
    while not request.aborted and (rest := request.continued(message)) is not None:
        try:
            return dispatch(request, rest)
        except OverloadedError:
            await asyncio.sleep(FULL_INBOX_S)


async def _wait_until_proven(requests: Sequence[OpenRequest]) -> None:
    deadline = time.monotonic() + LONGEST_PROOF_S
    while time.monotonic() < deadline and not all(one.is_proven for one in requests):
        await asyncio.sleep(PROOF_POLL_S)
