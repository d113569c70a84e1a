"""The scheduler's replies: tokens, ends and refusals, until the loop sends them."""

from __future__ import annotations

from dataclasses import dataclass, field

from minisrv.scheduler.request import Request, Status
from minisrv.scheduler.step_plan import Chunk
from minisrv.wire.logprobs import TokenLogprobs
from minisrv.wire.messages import Failure, Finish, PrefillProgress, Start


@dataclass(slots=True)
class Replies:
    """One row per token or end, `starts` of new requests, refusals, and prefill progress.

    prompt_tokens, cached_tokens: of the prompts that got their first token.
    """

    uids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finishes: list[Finish] = field(default_factory=list)
    starts: list[Start] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    progress: list[PrefillProgress] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0

    def add_token(self, request: Request, token_id: int, finish: Finish, now: float) -> None:
        """Add a token, or with ABORT an end without one."""
        if not request.started:
            start = request.make_start(now, aborted=finish is Finish.ABORT)
            self.starts.append(start)
            if finish is not Finish.ABORT:
                self.prompt_tokens += start.prompt_tokens
                self.cached_tokens += start.cached_tokens
        self.uids.append(request.uid)
        self.token_ids.append(token_id)
        self.finishes.append(finish)

    def add_progress(self, chunks: list[Chunk], now: float) -> None:
        """Report the prompts that these chunks advance but do not complete."""
        for chunk in chunks:
            request = chunk.request
            if request.status is not Status.FINISHED and not request.started:
                began = now if request.admitted_at is None else request.admitted_at
                self.progress.append(
                    PrefillProgress(
                        uid=request.uid,
                        total=len(request.prompt_ids),
                        cached=request.cached_tokens,
                        processed=chunk.start + chunk.length,
                        seconds=now - began,
                    )
                )

    def __bool__(self) -> bool:
        return bool(self.uids or self.failures or self.progress)
