"""The supervisor of a program that is the frontend itself."""

from __future__ import annotations

import atexit
import logging
import threading

from minisrv.errors import MinisrvError
from minisrv.supervision.supervisor import Supervisor

logger = logging.getLogger("minisrv.supervision.supervisor")


class SupervisorThread:
    """A supervisor in a thread of a process that is the frontend itself.

    error: what `Supervisor.run` raised, once the thread has ended. A process that exits without
    calling `stop` ends the children too.
    """

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self.error: MinisrvError | None = None
        self._thread = threading.Thread(target=self._run, name="minisrv supervisor", daemon=True)

    def start(self) -> None:
        """Run the supervisor in its thread."""
        atexit.register(self.stop)
        self._thread.start()

    def stop(self) -> None:
        """End all children and wait until they are gone."""
        atexit.unregister(self.stop)
        self._supervisor.stop()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._supervisor.run()
        except MinisrvError as error:
            self.error = error
            logger.error("%s", error.message)
        except Exception as error:
            self.error = MinisrvError(f"the supervisor failed: {error}")
            logger.exception("the supervisor failed")
