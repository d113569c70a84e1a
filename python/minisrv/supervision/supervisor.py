"""Starts the processes in order, watches them, starts those that die again, and ends all together.

A lifeline runs from this process to every child, and a status pipe back; the closing of the pipe
and the child's pidfd report a death at once. A child that dies while the server serves is started
again in a new epoch: the others drop what they were working on when they receive the first message
of that epoch, and the frontend sends what is open again (`frontend.registry`). A death during the
start, or one too many, ends all. The thread in `Supervisor.run` starts all children and outlives
them, because the kernel ties each to the thread that started it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import selectors
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from minisrv import log
from minisrv.checkpoint.hub import find_local_model
from minisrv.checkpoint.tokenizer import needs_conversion
from minisrv.config import ServerConfig
from minisrv.errors import ConfigError, EngineDeadError, MinisrvError
from minisrv.restart_limit import RestartLimit
from minisrv.supervision.child_handle import ChildProcess
from minisrv.supervision.child_main import STACKS_SIGNAL
from minisrv.supervision.kinds import MODULES, workers
from minisrv.supervision.last_progress import LastProgress
from minisrv.supervision.progress import progress_path
from minisrv.supervision.records import (
    FIRST_EPOCH,
    ChildReady,
    DrainRequested,
    EngineEnded,
    EngineLost,
    EngineReady,
    EngineStalled,
    NewEpoch,
    Notice,
    StartProgress,
)
from minisrv.supervision.restarts import Restarts
from minisrv.supervision.run_dir import private_directory
from minisrv.supervision.stall_watch import StallWatch
from minisrv.supervision.standard_streams import open_standard_streams

logger = logging.getLogger("minisrv.supervision.supervisor")

END_GRACE_S = 3.5
HURRIED_GRACE_S = 0.5
# A frontend that does not report the end of its drain in time is not waited for any longer.
DRAIN_MARGIN_S = 0.5
LATE_START = 3  # a restart may take so many times as long as the first start
_NO_SIGNAL = 0  # in place of a signal's number
STACKS_S = 1.0  # from the request for its stacks to the end of a stalled process


class _StopRequested(Exception):
    """The children are to be ended."""


class Supervisor:
    """Runs the engine's processes, and with `listeners` the frontend process that serves it.

    Without `listeners` the caller is the frontend: it binds the inbox in `run_dir`, and `on_notice`
    is called in the thread of `run` with the notices that a frontend process would receive. A
    caller that wants to drain does so before `stop`.
    """

    def __init__(
        self,
        config: ServerConfig,
        *,
        listeners: Sequence[socket.socket] = (),
        on_notice: Callable[[Notice], None] = lambda notice: None,
    ) -> None:
        open_standard_streams()
        self._config = config
        self._listeners = listeners
        self._on_notice = on_notice
        self._exit_stack = contextlib.ExitStack()
        self.run_dir = self._exit_stack.enter_context(private_directory())
        self._wake_receiver, self._wake_sender = socket.socketpair()
        self._wake_receiver.setblocking(False)
        self._wake_sender.setblocking(False)
        self._selector = selectors.DefaultSelector()
        for resource in (self._selector, self._wake_receiver, self._wake_sender):
            self._exit_stack.callback(resource.close)
        self._selector.register(self._wake_receiver, selectors.EVENT_READ)
        self._model_dir, self._tokenizer_dir = Path(), Path()
        self._children: list[ChildProcess] = []
        self._frontend: ChildProcess | None = None
        self._progress = LastProgress()
        self._num_stops = 0
        self._drains = False  # whether the first stop lets the frontend drain
        self._restarts = Restarts(RestartLimit.parse(config.restart_limit))
        self._epoch = FIRST_EPOCH
        self._announced = 0  # the epoch of the last EngineReady
        self._ready_notice: EngineReady | None = None  # that the caller does not know yet
        self._lost_at = 0.0
        self._suspects: set[int] = set()  # since the last EngineReady
        self._start_s: dict[str, float] = {}  # by kind, how long its first start took
        self._stall_watch = StallWatch(config.stall_timeout)
        self._stalled: tuple[ChildProcess, float] | None = None  # and when it is to be killed
        self._num_restarts: Counter[str] = Counter()

    @property
    def wake_fd(self) -> int:
        """For signal.set_wakeup_fd: every byte written to it counts as a call of `stop`."""
        return self._wake_sender.fileno()

    def stop(self) -> None:
        """Have `run` end all children. Allowed in every state.

        Once a frontend process serves, the first call has it drain for up to --drain-timeout; the
        second ends all children, and gives the frontend HURRIED_GRACE_S for its last words.
        """
        with contextlib.suppress(OSError):
            self._wake_sender.send(bytes([_NO_SIGNAL]))

    def run(self) -> None:
        """Start the children and watch them; return after `stop`, when none is left.

        Raises ConfigError if the model or an option cannot be used, EngineDeadError if a process
        dies during the start or more often than --restart-limit allows, MinisrvError if the start
        takes too long.
        """
        try:
            self._start()
            self._serve()
        except _StopRequested:
            self._end(EngineEnded("the server is stopping", stopping=True))
        except Exception as error:
            self._end(EngineEnded(str(error), stopping=False))
            raise
        finally:
            self._end_children()
            self._exit_stack.close()

    def _start(self) -> None:
        local_model_dir = find_local_model(self._config.model)
        self._spawn_frontend()
        # A download has no deadline.
        self._model_dir = local_model_dir or Path(self._prepare("hub")["model_dir"])
        deadline = time.monotonic() + self._config.start_timeout_s
        self._tokenizer_dir = self._model_dir
        if needs_conversion(self._model_dir):
            out = self.run_dir / "tokenizer"
            self._prepare("converter", self._model_dir, out, deadline=deadline)
            self._tokenizer_dir = out
        for kind, index in workers(self._config):
            self._spawn_worker(kind, index)
        self._watch_until_ready(self._workers, deadline)
        self._announce()
        if self._frontend is not None:
            self._watch_until_ready([self._frontend], deadline)
        self._report_ready()

    def _serve(self) -> None:
        """Watch the children. Raises _StopRequested when they are to be ended."""
        self._drains = self._frontend is not None
        self._watch_until(lambda: self._num_stops > 0)
        if self._listeners and self._frontend is None:  # it has died, and its requests with it
            raise _StopRequested
        self._close_listeners()
        self._notify(DrainRequested())
        deadline = time.monotonic() + self._config.drain_timeout + DRAIN_MARGIN_S
        self._watch_until(lambda: False, deadline)
        raise _StopRequested

    def _prepare(self, kind: str, *paths: Path, deadline: float = math.inf) -> dict[str, Any]:
        """Run a child that ends before the engine starts; return its facts."""
        child = self._spawn(kind, *paths)
        self._watch_until_ready([child], deadline)
        self._retire(child)
        return child.ready.facts if child.ready else {}

    @property
    def _workers(self) -> list[ChildProcess]:
        """The engine's processes."""
        return [child for child in self._children if child is not self._frontend]

    def _spawn_frontend(self) -> None:
        if self._listeners:
            fds = {f"listener-{i}": one.fileno() for i, one in enumerate(self._listeners)}
            self._frontend = self._spawn("frontend", fds=fds)

    def _spawn_worker(self, kind: str, index: int) -> None:
        self._spawn(kind, self._model_dir, self._tokenizer_dir, index=index)

    def _spawn(
        self,
        kind: str,
        model_dir: Path | None = None,
        tokenizer_dir: Path | None = None,
        *,
        index: int = 0,
        fds: dict[str, int] | None = None,
    ) -> ChildProcess:
        boot = {
            "config": self._config.to_dict(),
            "run_dir": str(self.run_dir),
            "epoch": self._epoch,
            "index": index,
            "model_dir": str(model_dir or ""),
            "tokenizer_dir": str(tokenizer_dir or ""),
        }
        name = f"{kind}-{index}" if kind == "tokenizer" else kind
        if MODULES[kind] != MODULES["hub"]:
            boot["progress"] = str(progress_path(self.run_dir, name))
        child = ChildProcess(kind, name, MODULES[kind], boot, fds or {})
        self._children.append(child)
        for fd in child.watched_fds:
            self._selector.register(fd, selectors.EVENT_READ, child)
        logger.debug("started %s pid=%d", name, child.pid)
        return child

    def _retire(self, child: ChildProcess) -> None:
        """Kill a child and forget it."""
        self._children.remove(child)
        self._unwatch(child)
        child.kill()

    def _lose(self, child: ChildProcess) -> None:
        """Have a dead child started again soon. Raises its error if that is not to be tried."""
        error, now = child.error(), time.monotonic()
        ends = child is self._frontend and (self._num_stops > 0 or child.drains)
        if not self._announced or isinstance(error, ConfigError) or ends:
            raise error
        delay_s = self._restarts.delay_s(now)
        if delay_s is None:
            raise EngineDeadError(error.message + self._restarts.refusal)
        logger.error("%s; it is started again", error.message)
        if self._announced == self._epoch:
            self._lost_at = now
        if self._stalled is not None:
            self._stalled[0].killed_because = None
        self._stalled = self._ready_notice = None
        if child.progress is not None and child is not self._frontend:
            self._suspects |= child.progress.working_on()
        self._epoch += 1
        self._num_restarts[child.kind] += 1
        self._retire(child)
        self._restarts.add(child.kind, child.index, now + delay_s)
        if child is self._frontend:
            self._frontend = None
            for worker in self._workers:
                if worker.kind == "scheduler":
                    worker.notify(NewEpoch(self._epoch))
        else:
            self._notify(EngineLost(error.message))

    def _restart_due(self) -> None:
        """Start the children whose time has come, and announce an engine that is whole again.

        Raises MinisrvError if that takes too long.
        """
        now = time.monotonic()
        for kind, index in self._restarts.take_due(now):
            if kind == "frontend":
                self._spawn_frontend()
            else:
                self._spawn_worker(kind, index)
        if 0 < self._announced < self._epoch:
            if self._restarts.next_at == math.inf and all(one.ready for one in self._workers):
                self._announce()
            elif now > self._lost_at + self._config.start_timeout_s:
                self._raise_late()
        self._report_ready()

    def _watch_progress(self) -> float:
        """Act on a process that makes no progress; returns when to look again.

        Its stacks are written to the log. A second later it is killed, unless it goes on: it may
        have been stopped, and SIGCONT continues it.
        """
        now = time.monotonic()
        if self._announced != self._epoch or not all(child.ready for child in self._children):
            self._stall_watch.restart_clocks(now)
            if self._announced and self._config.stall_timeout:
                self._kill_late_starts(now)
            return self._stall_watch.next_check_at if self._announced else math.inf
        views = [(one, one.progress) for one in self._children if one.progress is not None]
        if self._stalled is None and now >= self._stall_watch.next_check_at:
            if (found := self._stall_watch.stalled(views, now)) is not None:
                self._ask_for_stacks(*found, now)
        elif self._stalled is not None and now >= self._stalled[1]:
            self._judge(self._stalled[0], now)
        return self._stalled[1] if self._stalled is not None else self._stall_watch.next_check_at

    def _kill_late_starts(self, now: float) -> None:
        """Kill what takes much longer to start than at its first time."""
        for child in self._children:
            expected_s = self._start_s.get(child.kind, math.inf)
            limit_s = self._config.stall_timeout + LATE_START * expected_s
            if not child.ready and now - child.started_at > limit_s and not child.killed_because:
                child.killed_because = f"did not start within {limit_s:.1f} s and was killed"
                child.send_signal(signal.SIGKILL)

    def _ask_for_stacks(self, child: ChildProcess, silent_s: float, now: float) -> None:
        child.killed_because = f"made no progress for {silent_s:.1f} s and was killed"
        sentence = f"the {child.name} process has made no progress for {silent_s:.1f} s"
        logger.error("%s; its stacks follow", sentence)
        self._notify(EngineStalled(sentence))
        for number in (signal.SIGCONT, STACKS_SIGNAL):
            child.send_signal(number)
        self._stalled = child, now + STACKS_S

    def _judge(self, child: ChildProcess, now: float) -> None:
        self._stalled = None
        self._stall_watch.restart_clocks(now)
        if child.progress is not None and child.progress.last_beat > now - STACKS_S:
            logger.error("the %s process goes on", child.name)
            child.killed_because = None
            self._announce()
        else:
            child.send_signal(signal.SIGKILL)

    def _announce(self) -> None:
        """Notify the frontend that the engine serves."""
        facts = {k: v for w in self._workers if w.ready for k, v in w.ready.facts.items()}
        self._announced = self._epoch
        suspects = tuple(sorted(self._suspects))
        self._suspects.clear()
        self._ready_notice = EngineReady(facts, self._epoch, suspects, dict(self._num_restarts))
        if self._frontend is not None:
            self._frontend.notify(self._ready_notice)

    def _report_ready(self) -> None:
        """Notify the caller, once the frontend serves too."""
        serves = self._frontend.ready if self._frontend is not None else not self._listeners
        if self._ready_notice is not None and serves:
            notice, self._ready_notice = self._ready_notice, None
            self._on_notice(notice)

    def _watch_until_ready(self, children: list[ChildProcess], deadline: float) -> None:
        """Watch until all `children` are ready. Raises MinisrvError if `deadline` passes first."""
        if not self._watch_until(lambda: all(child.ready for child in children), deadline):
            self._raise_late()

    def _raise_late(self) -> None:
        late = ", ".join(child.name for child in self._children if not child.ready)
        raise MinisrvError(
            f"the start took more than {self._config.start_timeout_s:g} s, waiting for "
            f"{late}; raise --start-timeout-s if it needs longer"
        )

    def _watch_until(self, done: Callable[[], bool], deadline: float = math.inf) -> bool:
        """Read reports and start dead children again until `done`; False if `deadline` is first.

        Raises _StopRequested, and the error of a dead child that is not started again.

        A child may report and exit before this process runs again. Its last reports are therefore
        read, and `done` is checked, before its exit counts as a death.
        """
        while True:
            if self._must_stop:
                raise _StopRequested
            dead = next((child for child in self._children if child.ended), None)
            if dead is not None:
                self._read_reports(dead)
            if done():
                return True
            if dead is not None:
                self._lose(dead)
                continue
            self._restart_due()
            if time.monotonic() >= deadline:
                return False
            self._poll(min(deadline, self._restarts.next_at, self._watch_progress()))

    @property
    def _must_stop(self) -> bool:
        drained = self._frontend is not None and self._frontend.drained
        return drained or self._num_stops > self._drains

    def _poll(self, deadline: float) -> None:
        """Wait for reports, deaths and stops until `deadline` at the latest, and record them."""
        timeout_s = None if deadline == math.inf else max(0.0, deadline - time.monotonic())
        for key, _ in self._selector.select(timeout_s):
            if key.data is None:
                self._count_stops(self._wake_receiver.recv(4096))
            elif key.fd == key.data.status_fd:
                self._read_reports(key.data)
            if key.data is not None and key.data.ended:
                self._unwatch(key.data)

    def _count_stops(self, numbers: bytes) -> None:
        """Count calls of `stop`, and signals, by their numbers."""
        for number in numbers:
            self._num_stops += 1
            if number != _NO_SIGNAL:
                what = "ending" if self._must_stop else "stopping"
                log.event(logger, logging.INFO, what, {"signal": signal.Signals(number).name})

    def _read_reports(self, child: ChildProcess) -> None:
        for report in child.read_reports():
            if isinstance(report, ChildReady):
                self._start_s.setdefault(child.kind, time.monotonic() - child.started_at)
            elif isinstance(report, StartProgress) and self._progress.is_news(report):
                self._notify(report)

    def _notify(self, notice: Notice) -> None:
        if self._frontend is not None:
            self._frontend.notify(notice)
        self._on_notice(notice)

    def _unwatch(self, child: ChildProcess) -> None:
        for fd in child.watched_fds:
            with contextlib.suppress(KeyError):
                self._selector.unregister(fd)

    def _close_listeners(self) -> None:
        """Close the listening sockets, which are kept open for a frontend that is started again."""
        for listener in self._listeners:
            listener.close()

    def _end(self, notice: EngineEnded) -> None:
        self._close_listeners()
        self._notify(notice)

    def _end_children(self) -> None:
        """Kill the workers, which have nothing to save; give the frontend time to end."""
        serving = self._frontend if self._frontend and self._frontend.ready else None
        for child in list(self._children):
            if child is not serving:
                self._retire(child)
        if serving is None:
            return
        hurried = self._num_stops > self._drains
        deadline = time.monotonic() + (HURRIED_GRACE_S if hurried else END_GRACE_S)
        num_stops = self._num_stops
        while not serving.ended and self._num_stops == num_stops and time.monotonic() < deadline:
            self._poll(deadline)
        self._retire(serving)
