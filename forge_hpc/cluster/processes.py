"""Every process that a run starts has an owner that ends it.

The supervisor on a node is a subreaper: whatever its children leave behind becomes its own child, so it can end the
whole tree, also after a crash in the middle of it. The other way round, children ask the kernel to be killed when
their parent dies, so that a killed supervisor takes its node's processes with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
TRACKERS_S = 1.0
MAX_OPEN_FILES = 1 << 16
"""Some programs close each file that they might have open, one by one: a limit of a thousand million holds them up."""


def _prctl(option: int, value: int) -> None:
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def become_subreaper() -> None:
    """Orphans below this process become its children."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(parent_pid: int | None = None) -> None:
    """Ask the kernel for SIGKILL when the parent ends. ``parent_pid`` closes the race where it has ended already."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent_pid is not None and os.getppid() != parent_pid:
        os._exit(1)


def allow_open_files() -> None:
    """Let this process, and what it starts, open as many files as the system lets it, ``MAX_OPEN_FILES`` at most.

    A shell's own limit is often 1024, which Slurm takes along to the nodes; a connection to each process of a hundred
    nodes is more.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # another kernel may have a bound of its own
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def num_cpus() -> int:
    """CPU cores that this process may use: of a node that jobs share, those of this job."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _is_alive(process: psutil.Process) -> bool:
    import psutil

    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _is_resource_tracker(process: psutil.Process) -> bool:
    """Whether it is one of ``multiprocessing``, of another process than this one, which would never end by itself."""
    import psutil

    mine = getattr(sys.modules.get("multiprocessing.resource_tracker"), "_resource_tracker", None)
    try:
        is_one = any(part.startswith("from multiprocessing.resource_tracker import main") for part in process.cmdline())
    except psutil.Error:
        return False
    return is_one and process.pid != getattr(mine, "_pid", None)


def end_descendants(grace_s: float = 3.0) -> int:
    """End all processes below this one: SIGTERM, after the grace SIGKILL, until none is left. Returns their number.

    Python's resource trackers end by themselves when those whose semaphores and shared memory they track are dead, and
    remove what these have left in /dev/shm: they get ``TRACKERS_S`` for it.
    """
    import psutil

    me = psutil.Process()
    ended: set[int] = set()
    killed_at = time.monotonic() + grace_s
    for attempt in range(20):  # a process may fork while it is being ended, so look again
        alive = [process for process in me.children(recursive=True) if _is_alive(process)]
        if not alive:
            break
        ended.update(p.pid for p in alive)
        force = attempt > 0 or grace_s <= 0
        if not (targets := [process for process in alive if not _is_resource_tracker(process)]):
            _, targets = psutil.wait_procs(alive, timeout=TRACKERS_S)
            force = True
        for process in targets:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL if force else signal.SIGTERM)
        psutil.wait_procs(targets, timeout=max(0.1, killed_at - time.monotonic()) if not force else 2.0)
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    return len(ended)
