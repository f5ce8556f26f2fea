"""Following a run that has been submitted: its status, whether it still lives, what its job prints."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TextIO

from forge_hpc.config import UserError
from forge_hpc.files import Look, is_there, look
from forge_hpc.finding import find_run as find_run  # known here to all commands of one run
from forge_hpc.run_dir import RunDir, Status
from forge_hpc.slurm.job import is_active, is_active_state, is_job_id, job_state

_POLL_S = 0.5
_ASK_SLURM_S = 10.0
_NO_HEARTBEAT_S = 60.0


class StatusReader:
    """The status of a run for those who look again and again: ``status.json`` is opened only when it has moved.

    Whoever has a file open over NFS can hold up its writer by dying (docs/nfs.md).
    """

    def __init__(self, run_dir: RunDir) -> None:
        self._run_dir = run_dir
        self._look: Look | None = None
        self._status: Status | None = None

    def moved(self) -> bool:
        """Whether the status has been written since it was last read here; it always has at first."""
        return self._look is None or self._run_dir.heartbeat() != self._look

    def status(self) -> Status | None:
        """The status as it is now."""
        found = self._run_dir.heartbeat()
        if found is None or found != self._look:
            self._status, self._look = self._run_dir.read_status(), found
        return self._status


class Liveness:
    """Whether a run without a final state may still reach one: those who watch it ask again and again."""

    def __init__(self, run_dir: RunDir) -> None:
        self._run_dir = run_dir
        self._asked = -_ASK_SLURM_S
        self._beat: object = None
        self._changed = time.monotonic()

    def lost(self, status: Status | None) -> str | None:
        """How the run has died without a word, or None while it lives as far as is known from here."""
        if status is None or status.is_terminal:
            return None
        now, job_id = time.monotonic(), status.job_id
        if is_job_id(job_id) and shutil.which("scontrol"):
            if now - self._asked < _ASK_SLURM_S:
                return None
            self._asked = now
            try:
                state = job_state(job_id)
            except UserError:
                return None  # Slurm is busy: that says nothing about the run
            if state is not None and is_active_state(state[0]):
                return None
            lost = f"job {job_id} is no longer active ({' '.join(state) if state else 'unknown to Slurm'})"
        else:
            # By our own clock, from when we first saw it: those of hosts differ. The lock beats where a step is long.
            beat = (status.heartbeat, self._run_dir.lock_beat())
            if beat != self._beat:
                self._beat, self._changed = beat, now
            if now - self._changed < _NO_HEARTBEAT_S:
                return None
            lost = f"no heartbeat for {_NO_HEARTBEAT_S:.0f} s"
        last = self._run_dir.read_status()  # it may have ended, or come back, since
        if last is None or last.is_terminal or last.job_id != job_id:
            return None
        return f"{self._run_dir} has died: {lost}, and its state is still {last.state}"


def follow_run(run_dir: RunDir, job_id: str | None = None) -> int:
    """Show what a job prints until its run ends: 0 if it completed, else 1. Ctrl-C leaves the run alone.

    A requeued job is followed through its restarts.
    """
    status = run_dir.read_status()
    job_id = job_id or (status.job_id if status else None)
    on_slurm = is_job_id(job_id)
    output = run_dir.logs / f"slurm-{job_id}.out"
    asked, shown, file, seen = time.monotonic(), "", None, StatusReader(run_dir)
    try:
        while True:
            # What was seen before the last lines are read decides: nothing printed before the end is missed.
            status = seen.status()
            over = status is not None and status.is_terminal
            if on_slurm and status is not None and status.job_id not in (None, job_id):  # a successor goes on
                job_id, output, file = status.job_id, run_dir.logs / f"slurm-{status.job_id}.out", None
            if on_slurm and not over and time.monotonic() - asked > _ASK_SLURM_S:
                asked, over = time.monotonic(), not is_active(str(job_id))
            if file is None and is_there(output):
                file = output.open(errors="replace")
            if file is not None:
                copy_new(file)
            state = f"{status.state}  {status.message}".strip() if status else "no status yet"
            if state != shown and not over:
                print(f"[{state}]", file=sys.stderr, flush=True)
                shown = state
            if over:
                break
            time.sleep(_POLL_S)
    except KeyboardInterrupt:
        print(f"\nThe run goes on: {run_dir}", file=sys.stderr)
        return 0
    finally:
        if file is not None:
            file.close()
    status = run_dir.read_status()
    state = status.state if status else "unknown"
    print(f"[{state}{'  ' + status.message if status and status.message else ''}]", file=sys.stderr)
    if on_slurm and state not in ("completed", "failed", "cancelled"):
        ended = job_state(str(job_id))
        print(
            f"error: job {job_id} has left the queue ({' '.join(ended) if ended else 'unknown to Slurm'})",
            file=sys.stderr,
        )
    return 0 if state == "completed" else 1


def copy_new(file: TextIO) -> None:
    """Print what has been added to the file."""
    look(file.fileno())  # NFS would believe for up to a minute that nothing was appended
    while chunk := file.read(1 << 16):
        sys.stdout.write(chunk)
    sys.stdout.flush()
