"""The detokenizer process: tokens of a step to text, and stop strings back to the scheduler."""

from __future__ import annotations

from pathlib import Path

from minisrv.checkpoint.tokenizer import load_tokenizer
from minisrv.detokenizer.worker import DetokenizerWorker
from minisrv.supervision.child_main import BEAT_S, Child, end_start, run_child
from minisrv.supervision.records import ChildReady
from minisrv.wire.messages import DETOKENIZER_INBOX
from minisrv.wire.sockets import Epoch, Inbox, Outbox


def main() -> None:
    run_child("detokenizer", _serve)


def _serve(child: Child) -> None:
    boot, run_dir = child.boot, Path(child.boot.run_dir)
    worker = DetokenizerWorker(load_tokenizer(Path(boot.tokenizer_dir), child.config.chat_template))
    epoch = Epoch(boot.epoch)
    inbox = Inbox(run_dir, "detokenizer", DETOKENIZER_INBOX, epoch, worker.drop_requests)
    scheduler = Outbox(run_dir, "scheduler", epoch)
    frontend = Outbox(run_dir, "frontend", epoch)
    progress = child.open_progress()
    progress.beat()
    end_start()
    child.report(ChildReady())
    while True:
        inbox.wait(BEAT_S)
        progress.beat()
        for message in inbox.drain():
            progress.begin(0, message.uids)
            reply, abort = worker.handle(message)
            progress.end(0)
            if reply is not None:
                frontend.send(reply)
            if abort is not None:
                scheduler.send(abort)
