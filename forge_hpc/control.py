"""What can be done with a run that has been submitted: find it, follow it, read its logs, cancel it."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TextIO

from forge_hpc.config import UserError
from forge_hpc.files import Look, is_there, look
from forge_hpc.run_dir import RunDir, Status
from forge_hpc.slurm.job import ACTIVE, cancel_job, is_active, is_job_id, job_state
from forge_hpc.supervisor.deadlines import SILENT_S

_POLL_S = 0.5
_ASK_SLURM_S = 10.0
_CANCEL_TIMEOUT_S = 60.0
_SAVE_TIMEOUT_S = SILENT_S + 30.0
"""A run on this machine saves first."""
_NO_HEARTBEAT_S = 60.0


def find_run(path: Path | None) -> RunDir:
    """The run in `path`, else the newest under ``runs/``.

    Raises:
        UserError: there is no run.
    """
    if path is None:
        folders = Path("runs").iterdir() if is_there(Path("runs")) else ()
        found = {folder: status.mtime_ns for folder in folders if (status := look(folder / "status.json"))}
        if not found:
            raise UserError("no run directory given, and no run in runs/", "name one: forge-hpc status RUN_DIR")
        path = max(found, key=lambda folder: found[folder])
    run_dir = RunDir(path)
    if not run_dir.has_config and run_dir.read_status() is None:
        raise UserError(f"no run in {run_dir}", "a run directory holds config.yaml and status.json")
    return run_dir


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
            if state is not None and state[0] in ACTIVE:
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
                _copy(file)
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


def show_log(run_dir: RunDir, role: str, num_lines: int, follow: bool) -> int:
    """Print the end of a role's log of the newest start, and with `follow` what is added until the run ends.

    The exit code: 1 if it died without a final state, else 0.
    """
    path, liveness, seen = _log_file(run_dir, role), Liveness(run_dir), StatusReader(run_dir)
    print(f"==> {path} <==", file=sys.stderr)
    with path.open(errors="replace") as file:
        sys.stdout.writelines(deque(file, num_lines))
        sys.stdout.flush()
        while follow:
            status = seen.status()
            over, lost = status is None or status.is_terminal, liveness.lost(status)
            _copy(file)
            if lost:
                print(f"error: {lost}", file=sys.stderr)
                return 1
            if over:
                break
            try:
                time.sleep(_POLL_S)
            except KeyboardInterrupt:
                break
    return 0


def cancel_run(run_dir: RunDir) -> int:
    """End the run's job, or its process on this machine, and wait until it has ended.

    Raises:
        UserError: nothing runs that could be cancelled from here, or it does not end.
    """
    status, holder = run_dir.read_status(), run_dir.lock_holder()
    if status is not None and status.is_terminal:
        print(f"{run_dir} is {status.state} already")
        return 0
    job_id = (holder or {}).get("job_id") or (status.job_id if status else None)
    if is_job_id(job_id) and is_active(job_id):
        cancel_job(job_id)
        _wait(lambda: not is_active(job_id), f"job {job_id} is still in the queue")
        _mark_cancelled(run_dir, f"job {job_id} was cancelled")
    elif holder and run_dir.is_locked():
        if holder["host"] != os.uname().nodename:
            raise UserError(
                f"the run's process is on {holder['host']}", f"forge-hpc cancel there, or kill -INT {holder['pid']}"
            )
        try:
            os.kill(holder["pid"], signal.SIGINT)
        except ProcessLookupError:
            pass
        except PermissionError:
            raise UserError(f"process {holder['pid']} of the run belongs to another user") from None
        print(f"{run_dir} saves and ends; forge-hpc cancel again ends it at once", file=sys.stderr)
        gone = partial(_is_gone, holder["pid"])
        _wait(gone, f"process {holder['pid']} has not ended", _SAVE_TIMEOUT_S)
        _mark_cancelled(run_dir, "cancelled")
    else:
        _mark_cancelled(run_dir, "cancelled; nothing was running")
    print(f"{run_dir}: {(final := run_dir.read_status()) and final.state}")
    return 0


def _mark_cancelled(run_dir: RunDir, message: str) -> None:
    """Nothing of the run lives any more: what it said last stands, if it was an end."""
    status = run_dir.read_status()
    if status is None or not status.is_terminal:
        run_dir.write_status(state="cancelled", message=message)


def _is_gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def _wait(over: Callable[[], bool], otherwise: str, timeout_s: float = _CANCEL_TIMEOUT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not over():
        if time.monotonic() > deadline:
            raise UserError(f"{otherwise} after {timeout_s:.0f} s", "look at the logs: forge-hpc logs")
        time.sleep(_POLL_S)


def _log_file(run_dir: RunDir, role: str) -> Path:
    found = {path.stem: path for path in _log_files(run_dir)}
    if role in found:
        return found[role]
    if role == "controller" and found:  # the run ended before there was a controller: what the job printed
        return max(found.values(), key=lambda path: path.stat().st_mtime)
    names = ", ".join(sorted(found))
    raise UserError(f"no log {role} in {run_dir.logs}", f"there are: {names}" if names else "the run has not begun yet")


def _log_files(run_dir: RunDir) -> Iterator[Path]:
    if is_there(run_dir.logs):
        yield from run_dir.logs.glob("slurm-*.out")
    if newest := run_dir.latest_log_dir():
        yield from newest.glob("*.log")


def _copy(file: TextIO) -> None:
    look(file.fileno())  # NFS would believe for up to a minute that nothing was appended
    while chunk := file.read(1 << 16):
        sys.stdout.write(chunk)
    sys.stdout.flush()
