"""A process that ends a worker and everything the worker started, however it ends.

    pool ──stdin, SIGTERM──► keeper ──fork──► worker ──► whatever its code starts

The keeper is the subreaper of all below it, so that nothing the worker starts gets away from it: not by a session of
its own, nor by outliving the worker. It ends them all and itself when the worker ends, when it gets SIGTERM, and when
the pool is gone (its end of the keeper's standard input is closed).
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
from pathlib import Path

from forge_hpc.cluster.processes import become_subreaper, die_with_parent, end_descendants

_SIGNALS = (signal.SIGCHLD, signal.SIGTERM)


def keep() -> None:
    """Fork: return in the child, which is the worker. The parent stays behind as its keeper and does not return.

    It exits with the worker's exit status, or 128 + the number of the signal that ended it.
    """
    become_subreaper()
    woken, wake = socket.socketpair()
    wake.setblocking(False)
    for number in _SIGNALS:
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    keeper = os.getpid()
    worker = os.fork()
    if worker == 0:
        signal.set_wakeup_fd(-1)
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        woken.close()
        wake.close()
        os.setsid()  # a signal to its own group does not reach the keeper
        die_with_parent(keeper)
        with contextlib.suppress(OSError):  # short of memory, the kernel's choice shall fall on it
            Path("/proc/self/oom_score_adj").write_text("500")
        return
    status = _watch(worker, woken)
    end_descendants(grace_s=0)
    os._exit(status)


def _watch(worker: int, woken: socket.socket) -> int:
    poll = select.poll()
    poll.register(woken, select.POLLIN)
    poll.register(0, 0)  # no event but the hang-up of the other end
    while True:
        events = dict(poll.poll())
        if 0 in events or signal.SIGTERM in (woken.recv(4096) if woken.fileno() in events else b""):
            return 128 + signal.SIGTERM
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == worker:
                    code = os.waitstatus_to_exitcode(ended[1])
                    return code if code >= 0 else 128 - code
