"""The process outside a container does what the run inside asks for: it runs Slurm's commands, and hands signals in.

    python -m forge_hpc.container.relay COMMAND …    (the job script, with pyxis)

runs a command, such as srun, and serves what it starts on this host. The socket lies in a folder of the user's alone,
and nothing but Slurm's commands is run, as the user that the run is anyway.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from forge_hpc.slurm.client import SlurmAbsent, SlurmRefused, SlurmSilent, ask_both
from forge_hpc.slurm.outside import OF_SLURM, RELAY, short_name

PARENT = "/tmp"
"""Where pyxis finds the socket: what $TMPDIR is in the job is not known when its mounts are written down."""
COMMANDS = ("sacctmgr", "sbatch", "scancel", "scontrol", "sinfo", "squeue")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)


class Relay:
    """Serves until it is closed, in a folder of its own in ``parent``, by default the temporary directory.

    Example:
        with Relay() as relay:
            subprocess.run([...], env={**os.environ, **relay.variables})
    """

    def __init__(self, parent: str | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="forge-hpc-", dir=parent))
        self.has_run = threading.Event()
        """Set when something inside has come."""
        self._signals: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._socket = socket.socket(socket.AF_UNIX)
        with short_name(self.folder) as name:
            self._socket.bind(name)
        self._socket.listen()
        threading.Thread(target=self._accept, name="relay", daemon=True).start()

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._socket.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def variables(self) -> dict[str, str]:
        """For the environment of what runs inside."""
        return {RELAY: str(self.folder)}

    def signal(self, signum: int) -> None:
        """Hand a signal in, now or as soon as somebody there listens. May be called by a signal handler."""
        self._signals.put(signum)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rw", encoding="utf-8") as lines, suppress(OSError, ValueError):
            request = json.loads(lines.readline())
            self.has_run.set()
            if "signals" in request:
                self._hand_in(lines)
            else:
                lines.write(json.dumps(answer(request)) + "\n")
                lines.flush()

    def _hand_in(self, lines: IO[str]) -> None:
        while True:
            lines.write(f"{self._signals.get()}\n")
            lines.flush()


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Run the command of Slurm that is asked for; see `slurm.outside.ask_outside`."""
    command = request["ask"]
    if command[0] not in COMMANDS:
        return {"refused": f"{command[0]} is no command of Slurm", "kind": "SlurmRefused"}
    env = None
    if request["env"] is not None:
        env = {name: value for name, value in os.environ.items() if not name.startswith(OF_SLURM)} | request["env"]
    try:
        out, err = ask_both(*command, timeout_s=request["timeout_s"], env=env, cwd=request["cwd"])
    except SlurmRefused as refused:
        kinds = (SlurmAbsent, SlurmSilent)
        kind = next((kind for kind in kinds if isinstance(refused, kind)), SlurmRefused)
        return {"refused": str(refused), "kind": kind.__name__}
    return {"out": out, "err": err}


def main(command: Sequence[str]) -> int:
    """Run the command with a relay; its exit code. Signals are the command's own business."""
    with Relay(PARENT) as relay:
        for signum in SIGNALS:
            signal.signal(signum, lambda *_: None)
        code = subprocess.run(command, env={**os.environ, **relay.variables}, check=False).returncode
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
