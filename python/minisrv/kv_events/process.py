"""The process that publishes what joins and leaves the cache, for routers."""

from __future__ import annotations

from pathlib import Path

from minisrv.kv_events.blocks import CachedBlocks
from minisrv.kv_events.publisher import Publisher
from minisrv.option_values import read_endpoint
from minisrv.supervision.child_main import BEAT_S, Child, end_start, run_child
from minisrv.supervision.records import ChildReady
from minisrv.wire.messages import KV_EVENTS_INBOX
from minisrv.wire.sockets import Epoch, Inbox


def main() -> None:
    run_child("kv_events", _serve)


def _serve(child: Child) -> None:
    boot, config = child.boot, child.config
    inbox = Inbox(Path(boot.run_dir), "kv_events", KV_EVENTS_INBOX, Epoch(boot.epoch))
    assert config.kv_events_endpoint is not None
    replay = config.kv_events_replay_endpoint
    publisher = Publisher(
        read_endpoint(config.kv_events_endpoint, "kv_events_endpoint"),
        None if replay is None else read_endpoint(replay, "kv_events_replay_endpoint"),
        config.kv_events_topic.replace("{model}", config.served_name),
        config.kv_events_buffer,
    )
    blocks = CachedBlocks(config.page_size)
    progress = child.open_progress()
    progress.beat()
    end_start()
    child.report(ChildReady())
    while True:
        inbox.wait(BEAT_S, publisher.replay_socket)
        for message in inbox.drain():
            progress.beat()
            publisher.publish(blocks.apply(message))
        progress.beat()
        publisher.answer_replay(blocks.all_events)
