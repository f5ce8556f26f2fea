"""``forge-hpc cancel``: the run saves and ends as cancelled, or with ``--now`` ends at once.

where it is                    saves first                          --now
a job that waits               scancel: there is nothing to save    the same
a job that runs                SIGINT to its steps (signals.py)     scancel
within salloc                  SIGINT, and the allocation stays     scancel, which ends the allocation
a process on this machine      SIGINT                               SIGINT until it has ended
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from forge_hpc.config.errors import UserError, print_error
from forge_hpc.run_dir import RunDir
from forge_hpc.slurm.job import (
    ask_to_cancel,
    cancel_job,
    is_active_state,
    is_job_id,
    is_waiting_state,
    job_facts,
    job_state,
)
from forge_hpc.slurm.partitions import slurm_is_here
from forge_hpc.supervisor.deadlines import SILENT_S

_POLL_S = 0.5
_ASK_SLURM_S = 2.0
_CANCEL_TIMEOUT_S = 60.0
_SAVE_TIMEOUT_S = SILENT_S + 30.0


def cancel_runs(run_dirs: Sequence[RunDir], *, now: bool) -> int:
    """End the runs' jobs, or their processes on this machine, and wait until all have ended.

    Raises:
        UserError: nothing runs that could be cancelled from here, or it does not end.
    """
    # All of them before one is waited for, and the last one first: of a sweep those that wait, for which one that ends
    # would make room.
    waits: list[tuple[RunDir, Callable[[], None]]] = []
    errors: list[UserError] = []
    for run_dir in reversed(run_dirs):
        try:
            if (wait := _ask(run_dir, now=now)) is not None:
                waits.append((run_dir, wait))
        except UserError as error:  # of one, which keeps no other from ending
            errors.append(error)
    for run_dir, wait in reversed(waits):
        try:
            wait()
        except UserError as error:
            errors.append(error)
            continue
        status = run_dir.read_status()
        print(f"{run_dir}: {status.state if status else 'cancelled'}  {status.message if status else ''}".rstrip())
    for each in errors[:-1]:
        print_error(each)
    if errors:
        raise errors[-1]
    return 0


def cancel_lending(run_dir: RunDir, job_id: str) -> int:
    """End a job that lends the run nodes: they leave in a second or two, and the run goes on.

    Raises:
        UserError: Slurm refuses.
    """
    cancel_job(job_id)
    print(f"job {job_id} is cancelled: {run_dir} goes on without its nodes")
    return 0


def _ask(run_dir: RunDir, *, now: bool) -> Callable[[], None] | None:
    """Have the run end; what waits for that, or None where it has ended already."""
    status, holder = run_dir.read_status(), run_dir.lock_holder()
    job_id = (holder or {}).get("job_id") or (status.job_id if status else None)
    state = job_state(job_id) if is_job_id(job_id) else None
    in_queue = state is not None and is_active_state(state[0])
    # Slurm may start a job again whose run has been cancelled: then it is the job that is to end.
    if status is not None and status.is_terminal and not (state is not None and is_waiting_state(state[0])):
        print(f"{run_dir} is {status.state} already")
        return None
    if is_job_id(job_id) and in_queue:
        begun = holder is not None and holder.get("job_id") == job_id
        return _ask_job(run_dir, job_id, saves=begun and not now)
    if holder and run_dir.is_locked():
        return _ask_process(run_dir, holder, now=now)
    if is_job_id(job_id) and not slurm_is_here():
        raise UserError(
            f"{run_dir} is job {job_id} of Slurm, and there is no Slurm here",
            "cancel it on a login node of its cluster",
        )
    if (one_base := run_dir.one_base) is not None and _is_under_way(one_base):
        raise UserError(
            f"{run_dir} is one of the adapters of {one_base}, which run as one",
            f"forge-hpc cancel {shlex.quote(str(one_base))} ends all of them",
        )
    return partial(_mark_cancelled, run_dir, "cancelled; nothing was running")


def _is_under_way(run_dir: RunDir) -> bool:
    """Whether a job in the queue, or a process, works on it."""
    status, holder = run_dir.read_status(), run_dir.lock_holder()
    job_id = (holder or {}).get("job_id") or (status.job_id if status else None)
    state = job_state(job_id) if is_job_id(job_id) else None
    return run_dir.is_locked() or (state is not None and is_active_state(state[0]))


def _ask_job(run_dir: RunDir, job_id: str, *, saves: bool) -> Callable[[], None]:
    facts = job_facts(job_id) if saves else None
    outlives_the_run = facts is not None and not facts.is_batch
    ask_to_cancel(job_id) if saves else cancel_job(job_id)
    if saves:
        _say_that_it_saves(run_dir)

    def has_left() -> bool:
        if outlives_the_run and not run_dir.is_locked():
            return True
        state = job_state(job_id)
        if state is None or not is_active_state(state[0]):
            return True
        if is_waiting_state(state[0]):  # it had not begun, or Slurm would start it again
            cancel_job(job_id)
        return False

    def wait() -> None:
        timeout_s = _SAVE_TIMEOUT_S if saves else _CANCEL_TIMEOUT_S
        _wait(has_left, f"job {job_id} is still in the queue", run_dir, timeout_s, _ASK_SLURM_S if saves else _POLL_S)
        _mark_cancelled(run_dir, f"job {job_id} was cancelled")

    return wait


def _ask_process(run_dir: RunDir, holder: dict[str, object], *, now: bool) -> Callable[[], None]:
    pid, host = int(str(holder["pid"])), holder["host"]
    if host != os.uname().nodename:
        raise UserError(f"the run's process is on {host}", f"forge-hpc cancel there, or kill -INT {pid}")
    _interrupt(pid)
    if not now:
        _say_that_it_saves(run_dir)

    def has_ended() -> bool:
        if not Path(f"/proc/{pid}").exists() or not run_dir.is_locked():  # a keeper of engines stays
            return True
        if now:
            _interrupt(pid)
        return False

    def wait() -> None:
        timeout_s = _CANCEL_TIMEOUT_S if now else _SAVE_TIMEOUT_S
        _wait(has_ended, f"process {pid} has not ended", run_dir, timeout_s, _POLL_S)
        _mark_cancelled(run_dir, "cancelled")

    return wait


def _interrupt(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGINT)
    except ProcessLookupError:
        pass
    except PermissionError:
        raise UserError(f"process {pid} of the run belongs to another user") from None


def _say_that_it_saves(run_dir: RunDir) -> None:
    again = f"forge-hpc cancel --now {shlex.quote(str(run_dir))}"
    print(f"{run_dir} finishes what is under way, saves and ends; at once: {again}", file=sys.stderr)


def _mark_cancelled(run_dir: RunDir, message: str) -> None:
    """Nothing of the run lives any more: what it said last stands, if it was an end."""
    status = run_dir.read_status()
    if status is None or not status.is_terminal:
        run_dir.write_status(state="cancelled", message=message)


def _wait(over: Callable[[], bool], otherwise: str, run_dir: RunDir, timeout_s: float, poll_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not over():
        if time.monotonic() > deadline:
            raise UserError(
                f"{otherwise} after {timeout_s:.0f} s", f"forge-hpc logs {run_dir}; forge-hpc cancel --now {run_dir}"
            )
        time.sleep(poll_s)
