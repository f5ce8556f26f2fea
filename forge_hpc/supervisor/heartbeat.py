"""How long a run has given no heartbeat, as seen from a process that may itself have stood still."""

from __future__ import annotations

import time

from forge_hpc.files import Look
from forge_hpc.run_dir import RunDir
from forge_hpc.supervisor import deadlines


class HeartbeatMonitor:
    """Measures it from when it was made, by looks at the run's status, which its controller writes every few seconds.

    Time in which the looker was stopped, or waited for the file system, counts as one look: then the run may have
    stood still for the same reason.
    """

    def __init__(self, run_dir: RunDir) -> None:
        self._run_dir = run_dir
        self._last = self._look()
        self._looked = time.monotonic()
        self._silent_s = 0.0

    def silent_s(self) -> float:
        """Seconds without a heartbeat; to be called every ``LOOK_S`` or oftener."""
        now = time.monotonic()
        self._silent_s += min(now - self._looked, 2 * deadlines.LOOK_S)
        self._looked = now
        heartbeat = self._look()
        if heartbeat is not None and heartbeat != self._last:
            self._last, self._silent_s = heartbeat, 0.0
        return self._silent_s

    def _look(self) -> Look | None:
        try:
            return self._run_dir.heartbeat()
        except OSError:  # a pause of the file server
            return None
