"""Where the time of a start goes, from the queue to the first step: one line at the terminal, and ``starts.jsonl``.

    queue ─ launch ─ gate ─ environment ─ attach ─ model ─ engine ─ weights ─ evaluation ─ rollout ─ step
    Slurm   Slurm    supervisor ─────────┴─ controller ──────────────────────────────────────────────────

A phase begins where the one before it ends, so that together they are the whole start. docs/gate.md says what is in
each.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from forge_hpc.observability.tables import table
from forge_hpc.run_dir import RunDir
from forge_hpc.supervisor.starts import StartLog


class StartPhases:
    """Seconds by phase, of one start.

    Example:
        phases = StartPhases()
        ...                    # the gate
        phases.end("gate")
        StartPhases.resume(phases.as_record()).end("environment")  # in another process of this host
    """

    def __init__(self, before: Mapping[str, float] | None = None, began: float | None = None) -> None:
        self.seconds = dict(before or {})
        self._began = time.time() if began is None else began  # the clock that processes of a host share

    def end(self, phase: str) -> None:
        """The phase has ended, and the next one begins. One that comes again is longer."""
        now = time.time()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + max(0.0, now - self._began)
        self._began = now

    def as_record(self) -> dict[str, Any]:
        """As JSON, for the process that goes on."""
        return {"seconds": self.seconds, "began": self._began}

    @classmethod
    def resume(cls, record: Mapping[str, Any]) -> StartPhases:
        """Go on with what ``as_record`` gave."""
        return cls(record["seconds"], record["began"])

    def describe(self) -> str:
        """In one line; the queue is no part of the sum."""
        ours = {phase: seconds for phase, seconds in self.seconds.items() if phase != "queue"}
        queue = f", after {self.seconds['queue']:.0f} s in the queue" if "queue" in self.seconds else ""
        parts = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in ours.items())
        return f"start to first step: {sum(ours.values()):.1f} s{queue} ({parts})"


def start_table(run_dir: RunDir) -> list[str]:
    """The phases of every start that came to a step, a column a start; nothing where there is none."""
    records = [record["seconds"] for record in StartLog(run_dir).read() if record["event"] == "phases"]
    if not records:
        return []
    names = list(dict.fromkeys(name for record in records for name in record))
    rows = [[name, *(f"{record[name]:.1f}" if name in record else "" for record in records)] for name in names]
    return table(("phase", *(f"start {number}, s" for number in range(1, len(records) + 1))), rows)
