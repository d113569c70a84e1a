"""The detokenizer process: tokens of a step to text, and stop strings back to the scheduler."""

from __future__ import annotations

from pathlib import Path

from minisrv.checkpoint.tokenizer import load_tokenizer
from minisrv.detokenizer.worker import DetokenizerWorker
from minisrv.supervision.child_main import Child, run_child
from minisrv.supervision.records import ChildReady
from minisrv.wire.messages import DETOKENIZER_INBOX
from minisrv.wire.sockets import Inbox, Outbox


def main() -> None:
    run_child("detokenizer", _serve)


def _serve(child: Child) -> None:
    boot, run_dir = child.boot, Path(child.boot.run_dir)
    inbox = Inbox(run_dir, "detokenizer", DETOKENIZER_INBOX, boot.epoch)
    scheduler = Outbox(run_dir, "scheduler", boot.epoch)
    frontend = Outbox(run_dir, "frontend", boot.epoch)
    worker = DetokenizerWorker(load_tokenizer(Path(boot.tokenizer_dir), child.config.chat_template))
    child.report(ChildReady())
    while inbox.wait():
        for message in inbox.drain():
            reply, abort = worker.handle(message)
            if reply is not None:
                frontend.send(reply)
            if abort is not None:
                scheduler.send(abort)
