"""The starts of a run, ``RUN_DIR/starts.jsonl``: one line when a start begins, one when it ends, one when somebody
changes the configuration in between.

A start that was killed leaves no second line. What the file is for: a run that fails again and again without progress
must end, and somebody who looks at a run of many restarts wants to know why there were so many.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from forge_hpc.files import asking, atomic_write_text, is_there
from forge_hpc.run_dir import RunDir, open_private
from forge_hpc.supervisor.ending import FAILURES


@dataclass(frozen=True)
class EndRecord:
    """How a start ended."""

    state: str
    """As in ``status.json``."""
    cause: str
    """An `ending.Cause`, also of an older version."""
    message: str
    step: int
    """Step of the newest checkpoint, as `newest_step`."""
    progress: int
    """The same with the steps of the warm start."""


class StartLog:
    """Reads and writes ``starts.jsonl``; used by who submits the run, and then by the supervisor of its first node."""

    def __init__(self, run_dir: RunDir) -> None:
        self._run_dir = run_dir
        self._path = run_dir.path / "starts.jsonl"

    def begin(self, *, job_id: str | None, restart: int, nodes: int, requeues: int = 0) -> None:
        """A start begins from the newest checkpoint; ``requeues`` is how often Slurm has started the job again.

        It goes on in a new file: what an earlier start that was cut off still has under way goes nowhere.
        """
        record = {"event": "begin", "job_id": job_id, "requeues": requeues, "restart": restart, "nodes": nodes}
        line = _line(record | {"step": newest_step(self._run_dir)})
        earlier = self._text()
        atomic_write_text(self._path, earlier + ("\n" if earlier and not earlier.endswith("\n") else "") + line)

    def end(self, *, state: str, cause: str, message: str) -> None:
        """The start that began last has ended."""
        record = EndRecord(state, cause, message, newest_step(self._run_dir), progress(self._run_dir))
        self._append({"event": "end"} | asdict(record))

    def newest(self) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """The line of the start that began last and, where it has one, the line of its end."""
        end = None
        for record in reversed(self.read()):
            if record["event"] == "begin":
                return record, end
            if record["event"] == "end":
                end = end or record
        return None, None

    def changed(self, changes: Sequence[str]) -> None:
        """The next start has another configuration than the last."""
        self._append({"event": "changed", "changes": list(changes)})

    def left_out(self, nodes: Mapping[str, str]) -> None:
        """The start that began last goes on without these nodes, for these reasons."""
        self._append({"event": "left out", "nodes": dict(nodes)})

    def without(self) -> list[str]:
        """The nodes that the start that began last goes on without, each as ``node 1 (NAME)``: the others are numbered
        anew, in their order."""
        found: list[str] = []
        for record in reversed(self.read()):
            if record["event"] == "begin":
                break
            if record["event"] == "left out":
                found += record["nodes"]
        return found

    def phases(self, seconds: Mapping[str, float]) -> None:
        """How long the start that began last took to come to its first step, by phase."""
        self._append({"event": "phases", "seconds": {name: round(value, 3) for name, value in seconds.items()}})

    def forked(self, source: str, step: int, optimizer: bool, changes: Sequence[str]) -> None:
        """The run begins with a checkpoint of another one, in ``source``; ``changes`` is what differs from it."""
        record = {"event": "forked", "from": source, "step": step, "optimizer": optimizer, "changes": list(changes)}
        self._append(record)

    def failures_without_progress(self) -> int:
        """How many starts in a row have failed without a newer checkpoint than the one before them.

        Starts that were preempted, cancelled or killed from outside neither count nor end the row; those that ended for
        one of ``ending.FAILURES`` count. A start without an end was killed, and by whom is not known here: a preemption
        or a lost node leaves no more than that. Where it is certain that the run itself died, the job script adds the
        end.
        """
        failures, newest = 0, progress(self._run_dir)
        for record in reversed(self.read()):
            if record["event"] != "end":
                continue
            if record.get("progress", record["step"]) < newest or record["state"] == "completed":
                break
            failures += record["cause"] in FAILURES
        return failures

    def read(self) -> list[dict[str, Any]]:
        """All records, oldest first; a torn line is left out."""
        records = []
        for line in self._text().splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                continue
        return [record for record in records if isinstance(record, dict) and "event" in record]

    def _text(self) -> str:
        try:
            return asking(self._path, lambda: self._path.read_text(encoding="utf-8", errors="replace"))
        except FileNotFoundError:
            return ""

    def _append(self, record: dict[str, Any]) -> None:
        data = _line(record)
        fd = open_private(self._path, os.O_RDWR | os.O_APPEND)
        try:
            size = os.fstat(fd).st_size
            if size and os.pread(fd, 1, size - 1) != b"\n":  # torn by a crash
                data = "\n" + data
            os.write(fd, data.encode())
            os.fsync(fd)
        finally:
            os.close(fd)


def _line(record: dict[str, Any]) -> str:
    return json.dumps({"time": time.time(), **record}) + "\n"


def progress(run_dir: RunDir) -> int:
    """Step of the newest checkpoint, and that of the warm start's newest: both are work that a start goes on with."""
    return newest_step(run_dir) + newest_step(RunDir(run_dir.warmstart))


def newest_step(run_dir: RunDir) -> int:
    """Step of the newest checkpoint by name, verified or not; 0 where there is none. Of several adapters on one base,
    which save in directories of their own, the sum of theirs."""
    adapters = run_dir.adapters.iterdir() if is_there(run_dir.adapters) else ()
    return _newest(run_dir) + sum(_newest(RunDir(path)) for path in adapters if path.name.isdigit())


def _newest(run_dir: RunDir) -> int:
    names = [path.name for path in run_dir.checkpoints.glob("step-*")] if is_there(run_dir.checkpoints) else []
    return max((int(name.removeprefix("step-")) for name in names if name[5:].isdigit()), default=0)
