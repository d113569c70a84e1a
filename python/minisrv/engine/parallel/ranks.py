"""Rank 0's view of the other ranks: starts them, sends them steps, notices when one dies."""

from __future__ import annotations

import contextlib
import os
import selectors
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

from minisrv.config import ServerConfig
from minisrv.engine.forward_batch import ForwardBatch
from minisrv.engine.parallel.plan_pipe import encode_plan
from minisrv.errors import EngineDeadError, MinisrvError
from minisrv.supervision.child_handle import ChildProcess
from minisrv.supervision.records import StartProgress
from minisrv.supervision.run_dir import private_directory

JOINING = "join the other ranks"
_DEATH_SHOWS_S = 2.0


class Ranks:
    """The processes of ranks 1 .. tp - 1, which are children of this process and end with it.

    run_dir: a private directory for the rendezvous; by default a temporary one. A separate thread
    starts and watches the ranks: the kernel ends a child when the thread that started it exits,
    and the thread that creates an engine may exit before the engine does.
    """

    def __init__(self, config: ServerConfig, model_dir: Path, run_dir: Path | None = None) -> None:
        self._config, self._model_dir, self._given_dir = config, model_dir, run_dir
        self.run_dir = Path()
        self._children: list[ChildProcess] = []
        self._pipes: list[int] = []
        self._joining: set[str] = set()
        self._error: MinisrvError | None = None
        self._on_death: Callable[[], object] = lambda: None
        self._changed = threading.Condition()
        self._wake, self._woken = os.pipe()
        self._thread = threading.Thread(target=self._watch, name="ranks", daemon=True)
        self._thread.start()

    def wait_until_joining(self) -> None:
        """Block until every rank is about to join the group. Raises the error of one that died."""
        with self._changed:
            joined = self._changed.wait_for(
                lambda: self._error or len(self._joining) == self._config.tp - 1,
                self._config.start_timeout_s,
            )
        self.check()
        if not joined:
            raise EngineDeadError("not all ranks started within --start-timeout-s")

    def on_death(self, act: Callable[[], object]) -> None:
        """Have a thread call `act` when a rank dies. Raises the error of one that has died."""
        self._on_death = act
        self.check()

    def send_plan(self, batch: ForwardBatch) -> None:
        """Have all ranks compute a step. Raises EngineDeadError if one has died."""
        frame = encode_plan(batch)
        with self.explaining_failures():
            for pipe in self._pipes:
                view = memoryview(frame)
                while view:
                    view = view[os.write(pipe, view) :]

    def check(self) -> None:
        """Raise the error of the first rank that died, if any."""
        if self._error is not None:
            raise self._error

    @contextlib.contextmanager
    def explaining_failures(self) -> Iterator[None]:
        """Replace an error of a collective operation by that of the rank whose death caused it."""
        try:
            yield
        except (RuntimeError, OSError):
            with self._changed:
                self._changed.wait_for(lambda: self._error, _DEATH_SHOWS_S)
            self.check()
            raise

    def close(self) -> None:
        """End all ranks; `send_plan` fails from now on."""
        if self._thread.is_alive():
            os.write(self._woken, b"e")
            self._thread.join()
        while self._pipes:
            os.close(self._pipes.pop())
        self._error = self._error or EngineDeadError("the ranks of this model have been stopped")

    def _watch(self) -> None:
        given = self._given_dir
        with nullcontext(given) if given else private_directory() as self.run_dir:
            try:
                self._start()
                self._read_reports()
            except OSError as error:
                self._notify(error=EngineDeadError(f"cannot start the ranks: {error}"))
            finally:
                for child in self._children:
                    child.kill()

    def _start(self) -> None:
        for rank in range(1, self._config.tp):
            reading, writing = os.pipe()
            boot = {
                "config": self._config.to_dict(),
                "run_dir": str(self.run_dir),
                "epoch": 0,
                "index": rank,
                "model_dir": str(self._model_dir),
            }
            name, fds = f"rank {rank}", {"plan": reading}
            self._children.append(ChildProcess("rank", name, "minisrv.engine.parallel", boot, fds))
            self._pipes.append(writing)
            os.close(reading)

    def _read_reports(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake, selectors.EVENT_READ, None)
            for child in self._children:
                selector.register(child.status_fd, selectors.EVENT_READ, child)
            while True:
                for key, _ in selector.select():
                    if key.data is None:
                        return
                    self._note_reports(key.data)
                    if key.data.ended:
                        self._notify(error=key.data.error())
                        self._on_death()
                        return

    def _note_reports(self, child: ChildProcess) -> None:
        for report in child.read_reports():
            if isinstance(report, StartProgress) and report.phase == JOINING:
                self._joining.add(child.name)
                self._notify()

    def _notify(self, error: MinisrvError | None = None) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()
