"""Rank 0's view of the other ranks: starts them, sends them steps, notices when one dies."""

from __future__ import annotations

import contextlib
import os
import selectors
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from minisrv.config import ServerConfig
from minisrv.engine.forward_batch import ForwardBatch
from minisrv.engine.parallel.plan_pipe import encode_plan
from minisrv.errors import EngineDeadError, MinisrvError
from minisrv.supervision.child_handle import ChildProcess
from minisrv.supervision.records import StartProgress

JOINING = "join the other ranks"
_DEATH_SHOWS_S = 2.0


class Ranks:
    """The processes of ranks 1 .. tp - 1, which are children of this process and end with it.

    The ranks meet in `run_dir`, a private directory that each start makes: the rendezvous file of a
    start that was killed must not mislead the next one. It lies in `parent_dir` or, by default,
    where temporary files do. A separate thread starts and watches the ranks: the kernel ends a
    child when the thread that started it exits, and the thread that creates an engine may exit
    before the engine does.
    """

    def __init__(
        self, config: ServerConfig, model_dir: Path, parent_dir: Path | None = None
    ) -> None:
        self._config, self._model_dir, self._parent_dir = config, model_dir, parent_dir
        self.run_dir = Path()
        self._children: list[ChildProcess] = []
        self._pipes: list[int] = []
        self._joining: set[str] = set()
        self._error: MinisrvError | None = None
        self._on_death: Callable[[], object] = lambda: None
        self._changed = threading.Condition()
        self._wake_pipe = list(os.pipe())
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
        """Raise the error of the first rank that died, if any.

        A new one each time: its traceback holds the engine, which may be gone before this object.
        """
        if self._error is not None:
            raise type(self._error)(self._error.message)

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
            os.write(self._wake_pipe[1], b"e")
            self._thread.join()
        for pipes in (self._pipes, self._wake_pipe):
            while pipes:
                os.close(pipes.pop())
        self._error = self._error or EngineDeadError("the ranks of this model have been stopped")

    def _watch(self) -> None:
        try:
            with tempfile.TemporaryDirectory(
                prefix="minisrv-ranks-", dir=self._parent_dir, ignore_cleanup_errors=True
            ) as run_dir:
                self.run_dir = Path(run_dir)
                self._start_and_read()
        except OSError as error:
            self._notify(error=EngineDeadError(f"cannot start the ranks: {error}"))

    def _start_and_read(self) -> None:
        try:
            self._start()
            self._read_reports()
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
            selector.register(self._wake_pipe[0], selectors.EVENT_READ, None)
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
