"""Submitit's local executor, in the foreground: the run writes to this terminal, Ctrl-C reaches it.

Submitit's own controller (1.5.4) hides the output in files, ends a job after 2 minutes unless told otherwise, and kills
one second after the interrupt; a run needs longer to save and to end its processes.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import subprocess
from pathlib import Path
from typing import Any

from submitit import LocalExecutor
from submitit.local.local import LocalJob

from forge_hpc.config import Config, UserError
from forge_hpc.run_dir import RunDir
from forge_hpc.supervisor.ending import Exit
from launchers.command import run_command, with_setup

_PR_SET_PDEATHSIG = 1


class ForegroundExecutor(LocalExecutor):
    """Starts a command at once, as a child with this terminal's output."""

    process: subprocess.Popen[bytes]

    def _submit_command(self, command: str) -> LocalJob[Any]:
        parent, libc = os.getpid(), ctypes.CDLL(None)

        def die_with_parent() -> None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:
                os._exit(1)

        # Inside an allocation this is still a run of one node: it must not take itself for one task of several.
        environ = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
        # A process group of its own: the terminal's Ctrl-C comes once, from us, and not twice.
        self.process = subprocess.Popen(
            shlex.split(command), stdin=subprocess.DEVNULL, process_group=0, preexec_fn=die_with_parent, env=environ
        )
        return LocalJob(folder=self.folder, job_id=str(self.process.pid), process=self.process)


def run_here(cfg: Config, run_dir: Path) -> int:
    """Run on this machine until the end and return the exit code; SIGINT, SIGTERM, SIGHUP and SIGUSR2 are passed on."""
    executor = ForegroundExecutor(folder=run_dir / "logs")
    command = shlex.join(with_setup(run_command(run_dir), cfg.slurm.setup))
    job: LocalJob[Any] | None = None
    early: list[int] = []

    def pass_on(signum: int, frame: object) -> None:
        if job is None:
            early.append(signum)  # the child is being started
        elif executor.process.poll() is None:
            executor.process.send_signal(signum)

    before = {s: signal.signal(s, pass_on) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)}
    try:
        job = executor._submit_command(command)
        for signum in early:
            executor.process.send_signal(signum)
        code = executor.process.wait()
        code = code if code >= 0 else 128 - code
        return code if _has_final_state(RunDir(run_dir), code) else code or 1
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _has_final_state(run_dir: RunDir, code: int) -> bool:
    """Whether the process left a final state. Where it did not, the status becomes `failed` in its place."""

    def final() -> bool:
        status = run_dir.read_status()
        return status is not None and (status.is_terminal or (status.state == "preempted" and code == Exit.LEFT))

    if final():
        return True
    try:
        with run_dir.lock():  # else it ended because another run has the directory, and the status is that one's
            if final():
                return True
            how = f"by {signal.Signals(code - 128).name}" if code - 128 in set(signal.Signals) else f"with {code}"
            run_dir.write_status(state="failed", message=f"the run's process ended {how}, without a final state")
    except UserError:
        pass
    return False
