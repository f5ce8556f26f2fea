"""What a run in a container has of the outside: Slurm's commands, and the signals of its job.

An image has no client of Slurm, no munge and no key to it. So `ask_outside` has a command run outside, by the process
that has started the container (`container.relay`), over a socket in a folder that both see. Nothing here imports more
than the standard library.

Signals come that way where the container's own parent would pass on a second time what Slurm has sent already
(Apptainer's does), or where Slurm signals that parent alone (proctrack/cgroup).
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RELAY = "FORGE_HPC_OUTSIDE"
"""In the environment of what runs inside: the folder with the socket."""
SIGNALS = "FORGE_HPC_OUTSIDE_SIGNALS"
"""There too, where signals come over the socket and are to be taken from nowhere else."""
OF_SLURM = ("SLURM_", "SLURMD_", "SBATCH_", "SRUN_", "PMI_", "PMIX_")
"""How variables begin that sbatch and srun take for options, or that belong to one job."""
_LATE_S = 2.0
"""By how much an answer may come later than the command's own timeout."""


def is_inside() -> bool:
    """Whether this process is in a container, with somebody outside."""
    return RELAY in os.environ


def ask_outside(
    command: Sequence[str], timeout_s: float, env: Mapping[str, str] | None, cwd: str | None
) -> dict[str, Any]:
    """Have a command of Slurm run outside, with the environment that is there.

    Args:
        env: of what differs from this process's own environment the command gets that; of Slurm's variables it has
            these and no others. None: as they are outside.

    Returns:
        ``out`` and ``err``, or ``refused`` with ``kind``, as `client.ask` raises it.

    Raises:
        OSError: nobody answers.
    """
    request: dict[str, Any] = {"ask": list(command), "timeout_s": timeout_s, "cwd": cwd, "env": None}
    if env is not None:
        request["env"] = {
            name: value for name, value in env.items() if name.startswith(OF_SLURM) or os.environ.get(name) != value
        }
    with _connected(timeout_s + _LATE_S) as lines:
        lines.write(json.dumps(request) + "\n")
        lines.flush()
        if not (answer := lines.readline()):
            raise ConnectionError("the process outside the container has ended")
    found: dict[str, Any] = json.loads(answer)
    return found


def follow_signals(on_signal: Callable[[int], None]) -> None:
    """Call ``on_signal`` with the number of each signal that has come outside, also before now; from a thread."""

    def follow() -> None:
        with _connected(None) as lines:
            lines.write('{"signals": true}\n')
            lines.flush()
            ready.set()
            for line in lines:
                on_signal(int(line))

    ready = threading.Event()
    threading.Thread(target=follow, name="signals from outside", daemon=True).start()
    ready.wait(_LATE_S)


@contextmanager
def _connected(timeout_s: float | None) -> Iterator[Any]:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(timeout_s)
        with short_name(Path(os.environ[RELAY])) as name:
            connection.connect(name)
        with connection.makefile("rw", encoding="utf-8") as lines:
            yield lines


@contextmanager
def short_name(folder: Path) -> Iterator[str]:
    """The socket's path, however long the folder's is: the kernel takes 107 bytes."""
    descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}/socket"
    finally:
        os.close(descriptor)
