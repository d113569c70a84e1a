"""A tokenizer process: requests on their way to the scheduler, refusals on their way back."""

from __future__ import annotations

from array import array
from dataclasses import asdict
from pathlib import Path

from minisrv.checkpoint.model_config import load_model_config
from minisrv.checkpoint.tokenizer import load_tokenizer
from minisrv.supervision.child_main import BEAT_S, Child, end_start, run_child
from minisrv.supervision.records import ChildReady
from minisrv.tokenizer.backlog import Backlog, uids_of
from minisrv.tokenizer.chat_template import ChatTemplate
from minisrv.tokenizer.worker import TokenizerWorker
from minisrv.wire.messages import (
    TOKENIZER_INBOX,
    AnswerMsg,
    GenerateMsg,
    Message,
    PromptsMsg,
    TakenMsg,
    UserReply,
)
from minisrv.wire.sockets import REPORT_BYTES, Epoch, Inbox, Outbox

MAX_LENGTHS = 64  # of prompts in one message


def main() -> None:
    run_child("tokenizer", _serve)


def _serve(child: Child) -> None:
    boot, run_dir = child.boot, Path(child.boot.run_dir)
    backlog, epoch = Backlog(), Epoch(boot.epoch)
    lengths: dict[int, int] = {}

    def drop_work() -> None:
        backlog.clear()
        lengths.clear()

    inbox = Inbox(run_dir, f"tokenizer-{boot.index}", TOKENIZER_INBOX, epoch, drop_work)
    scheduler = Outbox(run_dir, "scheduler", epoch)
    frontend = Outbox(run_dir, "frontend", epoch)
    model = load_model_config(boot.model_dir, child.config.max_seq_len)
    tokenizer = load_tokenizer(Path(boot.tokenizer_dir), child.config.chat_template)
    worker = TokenizerWorker(
        tokenizer,
        ChatTemplate(
            tokenizer.chat_templates,
            tokenizer.special_tokens,
            describes_tools=child.config.describes_tools,
        ),
        model.max_seq_len,
        model.vocab_size,
    )
    progress = child.open_progress()
    progress.beat()
    end_start()
    child.report(ChildReady({"chat_format": asdict(worker.chat_format)}))

    def send(message: Message) -> None:
        receiver = frontend if isinstance(message, UserReply | AnswerMsg) else scheduler
        receiver.send(message)

    # One text may take seconds: the inbox is looked at before each, for aborts.
    while True:
        if not backlog:
            inbox.wait(BEAT_S)
        progress.beat()
        for message in backlog.add(inbox.drain_frames()):
            send(message)
        if backlog:
            work = backlog.take()
            progress.begin(0, array("l", uids_of(work)))
            made = worker.handle(work)
            progress.end(0)
            if isinstance(made, GenerateMsg):
                lengths[made.uid] = len(made.prompt_ids)
            send(made)
        if len(lengths) >= MAX_LENGTHS or (lengths and not backlog):
            frontend.send(PromptsMsg(uids=(*lengths,), prompt_tokens=(*lengths.values(),)))
            lengths.clear()
        if backlog.taken_bytes >= REPORT_BYTES:
            frontend.send(TakenMsg(tokenizer=boot.index, num_bytes=backlog.taken_bytes))
            backlog.taken_bytes = 0
