"""Processes of an earlier start of this run that nobody owns any more: they hold memory and GPUs.

Everything that a supervisor starts knows its start by the certificates in its environment, and dies with its parent.
What is left all the same (its parent was killed while it asked the kernel for that) is ended by the next start, if it
belongs to an earlier start of this run, whose lock is ours now, and no supervisor is above it.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

_MARK = b"HYPERACTOR_TLS_KEY="
"""See ``cluster.identity``: RUN_DIR/tls/START/key.pem."""


def end_orphans(tls: Path, start: str) -> list[str]:
    """End the orphans of earlier starts on this node; what they were, such as ``pid 71 (python -m ...)``.

    Args:
        tls: the run's folder of certificates.
        start: names this start in it.
    """
    ended = []
    for pid in _of_earlier_starts(tls, start):
        with contextlib.suppress(OSError):  # it ends by itself
            fd = os.pidfd_open(pid)  # from here on the number is no other process's
            try:
                if not _is_of_earlier_start(pid, tls, start) or _is_supervised(pid):
                    continue
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                signal.pidfd_send_signal(fd, signal.SIGKILL)
                ended.append(f"pid {pid} ({command.strip()[:80]})")
            finally:
                os.close(fd)
    return ended


def _of_earlier_starts(tls: Path, start: str) -> Iterator[int]:
    processes = Path("/proc")
    for path in processes.iterdir() if processes.is_dir() else ():
        if path.name.isdecimal() and _is_of_earlier_start(int(path.name), tls, start):
            yield int(path.name)


def _is_of_earlier_start(pid: int, tls: Path, start: str) -> bool:
    if pid == os.getpid():
        return False
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # another user's, or gone
        return False
    marks = [Path(os.fsdecode(text.removeprefix(_MARK))) for text in variables if text.startswith(_MARK)]
    return any(mark.parent.parent == tls and mark.parent.name != start for mark in marks)


def _is_supervised(pid: int) -> bool:
    """Whether a supervisor of a run is above it: that one will end it, or is about to find out that it must."""
    while pid > 1:
        stat = Path(f"/proc/{pid}/stat").read_text()
        pid = int(stat.rpartition(")")[2].split()[1])
        with contextlib.suppress(OSError):
            if b"forge_hpc.run\0" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return True
    return False
