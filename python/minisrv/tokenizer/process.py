"""A tokenizer process: requests on their way to the scheduler, refusals on their way back."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from minisrv.checkpoint.model_config import load_model_config
from minisrv.checkpoint.tokenizer import load_tokenizer
from minisrv.supervision.child_main import Child, run_child
from minisrv.supervision.records import ChildReady
from minisrv.tokenizer.chat_template import ChatTemplate
from minisrv.tokenizer.worker import TokenizerWorker
from minisrv.wire.messages import TOKENIZER_INBOX, AnswerMsg, UserReply
from minisrv.wire.sockets import Inbox, Outbox


def main() -> None:
    run_child("tokenizer", _serve)


def _serve(child: Child) -> None:
    boot, run_dir = child.boot, Path(child.boot.run_dir)
    inbox = Inbox(run_dir, f"tokenizer-{boot.index}", TOKENIZER_INBOX, boot.epoch)
    scheduler = Outbox(run_dir, "scheduler", boot.epoch)
    frontend = Outbox(run_dir, "frontend", boot.epoch)
    model = load_model_config(boot.model_dir, child.config.max_seq_len)
    tokenizer = load_tokenizer(Path(boot.tokenizer_dir), child.config.chat_template)
    worker = TokenizerWorker(
        tokenizer,
        ChatTemplate(tokenizer.chat_templates, tokenizer.special_tokens),
        model.max_seq_len,
        model.vocab_size,
    )
    child.report(ChildReady({"chat_format": asdict(worker.chat_format)}))
    while inbox.wait():
        for message in inbox.drain():
            outgoing = worker.handle(message)
            receiver = frontend if isinstance(outgoing, UserReply | AnswerMsg) else scheduler
            receiver.send(outgoing)
