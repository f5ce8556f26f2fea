"""Writes ``status.json`` beside whatever else a process does."""

from __future__ import annotations

import logging
import threading
from errno import ETIMEDOUT
from typing import Any

from forge_hpc.config.errors import UserError
from forge_hpc.run_dir import RunDir

logger = logging.getLogger(__name__)


class StatusWriter:
    """Tells the status of a run from a thread of its own: who has something to say never waits for the file system.

    A file server may hold a write up for a minute and a half (docs/nfs.md). What is told meanwhile becomes one write.
    Each write repeats all that this writer has ever told: a late one of an earlier start stands for one heartbeat.

    Example:
        status = StatusWriter(run_dir)
        status.update(state="running", step=3)
        status.flush(5.0)
    """

    def __init__(self, run_dir: RunDir) -> None:
        self._run_dir = run_dir
        self._fields: dict[str, Any] = {}
        self._changed = threading.Condition()
        self._asked = self._done = 0
        self._error: OSError | UserError | None = None
        self._thread: threading.Thread | None = None

    def update(self, **status: Any) -> None:
        """Have ``RunDir.write_status`` called with what is given here and was before; with nothing, a heartbeat.

        What cannot be written is said in the log, and by ``flush``.
        """
        with self._changed:
            if "state" in status and status["state"] != self._fields.get("state"):
                self._fields["message"] = ""
            self._fields |= status
            self._asked += 1
            if self._thread is None:
                self._thread = threading.Thread(target=self._write, name="status", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def flush(self, within_s: float) -> None:
        """Return when all that was told is on the disk.

        Raises:
            OSError: it could not be written, or not within ``within_s`` seconds (TimeoutError).
            UserError: what is there is damaged, or of a newer version.
        """
        with self._changed:
            wanted = self._asked
            if not self._changed.wait_for(lambda: self._done >= wanted, within_s):
                raise TimeoutError(ETIMEDOUT, f"{self._run_dir.status} has not been written for {within_s:.0f} s")
            if self._error is not None:
                raise self._error

    def _write(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._asked > self._done)
                asked, fields = self._asked, dict(self._fields)
            error: OSError | UserError | None = None
            try:
                self._run_dir.write_status(**fields)
            except (OSError, UserError) as failure:  # a full disk: it keeps nobody from what matters more
                logger.warning("%s: %s", self._run_dir.status, failure)
                error = failure
            with self._changed:
                self._done, self._error = asked, error
                self._changed.notify_all()
