"""Curves at a server of somebody else's (W&B, MLflow): it neither holds up nor ends a training."""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from queue import SimpleQueue
from typing import ClassVar, Protocol

from forge_hpc.config.errors import UserError
from forge_hpc.run_dir import RunDir

logger = logging.getLogger(__name__)
START_S = 30.0
"""A run that has not trained yet waits so long to hear whether the server takes it."""
FINISH_S = 15.0


class RemoteRun(Protocol):
    """A run at the server. All calls may hang, or raise anything."""

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def finish(self) -> None: ...


class RemoteWriter(ABC):
    """Sends scalars to one run at a server, which ``_start`` begins or finds again.

    All calls are made in a thread of their own: one that fails or hangs is said once in the log, costs the curves there
    from then on, and nothing else. Nor does ``close`` wait: see ``finish_runs``.

    Raises:
        UserError: nothing was trained yet, and the client is not installed or the server takes nobody.
    """

    NAME: ClassVar[str]
    """As people say it."""
    LATER: ClassVar[str]
    """What may be done about points that did not get there."""

    def __init__(self, run_dir: RunDir, resume_step: int) -> None:
        self._run_dir, self._resume_step = run_dir, resume_step
        self._points: SimpleQueue[tuple[int, dict[str, float]] | None] = SimpleQueue()
        self._error: Exception | None = None
        self._started = threading.Event()
        ours = self.NAME, run_dir.path  # others of this process write to runs of their own
        earlier = [each for each in _threads() if (each.writer.NAME, each.writer._run_dir.path) == ours]
        self._thread = _Thread(self, earlier)
        self._thread.start()
        if resume_step == 0:
            self._started.wait(START_S)
            if isinstance(self._error, UserError):
                raise self._error

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add one point to each curve; steps that the server has already are dropped."""
        if self._thread.is_alive():
            self._points.put((step, dict(values)))

    def close(self) -> None:
        """Have the rest sent, beside whatever comes next."""
        self._points.put(None)

    def send(self, earlier: list[_Thread]) -> None:
        """What the thread does."""
        try:
            for thread in earlier:  # of this run, before its trainers were lost: one writer at a time
                thread.join()
            run = self._start()
            self._started.set()
            for step, values in iter(self._points.get, None):
                run.log(values, step=step)
            run.finish()
        except Exception as error:
            self._error = error
            reason = " ".join(str(error).split()) or type(error).__name__
            logger.warning("nothing more is sent to %s, the training goes on: %s", self.NAME, reason)
        finally:
            self._started.set()

    @abstractmethod
    def _start(self) -> RemoteRun: ...


class _Thread(threading.Thread):
    def __init__(self, writer: RemoteWriter, earlier: list[_Thread]) -> None:
        super().__init__(target=writer.send, args=(earlier,), name=writer.NAME, daemon=True)
        self.writer = writer


def finish_runs(timeout_s: float = FINISH_S) -> None:
    """Wait until what was written and closed is at its servers, but no longer than ``timeout_s``. For the end of a
    process, when all that the run needs itself is saved."""
    deadline = time.monotonic() + timeout_s
    late = {}
    for thread in _threads():
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():  # of a run whose trainers were lost there are several
            late[thread.writer.NAME, thread.writer._run_dir.path] = thread.writer
    for writer in late.values():
        logger.warning("%s has not finished within %.0f s; %s", writer.NAME, timeout_s, writer.LATER)


def _threads() -> list[_Thread]:
    return [thread for thread in threading.enumerate() if isinstance(thread, _Thread)]
