"""Submitit's local executor: a run as a child of this process, in the foreground or behind it.

Submitit's own controller (1.5.4) hides the output in files, ends a job after 2 minutes unless told otherwise, and kills
one second after the interrupt; a run needs longer to save and to end its processes.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import subprocess
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import IO, Any

from submitit import LocalExecutor
from submitit.local.local import LocalJob

from forge_hpc.config import Config, UserError
from forge_hpc.files import open_private
from forge_hpc.run_dir import RunDir
from forge_hpc.supervisor.ending import Exit
from launchers.command import Start, start_here

_PR_SET_PDEATHSIG = 1


class ChildExecutor(LocalExecutor):
    """Starts a command at once, as a child with this terminal's output, or that of a file."""

    process: subprocess.Popen[bytes]

    def __init__(self, folder: Path, environ: dict[str, str], output: IO[bytes] | None = None) -> None:
        super().__init__(folder=folder)
        self._environ = environ
        self._output = output

    def _submit_command(self, command: str) -> LocalJob[Any]:
        parent, libc = os.getpid(), ctypes.CDLL(None)

        def die_with_parent() -> None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:
                os._exit(1)

        # A process group of its own: the terminal's Ctrl-C comes once, from us, and not twice.
        self.process = subprocess.Popen(
            shlex.split(command),
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._output,
            process_group=0,
            preexec_fn=die_with_parent,
            env=self._environ,
        )
        return LocalJob(folder=self.folder, job_id=str(self.process.pid), process=self.process)


def run_here(cfg: Config, run_dir: Path, start: Start | None = None) -> int:
    """Run until the end and return the exit code; SIGINT, SIGTERM, SIGHUP and SIGUSR2 are passed on.

    Args:
        start: what starts it; by default, on this machine.
    """
    start = start or start_here(cfg, run_dir)
    executor = ChildExecutor(run_dir / "logs", start.environ)
    job: LocalJob[Any] | None = None
    early: list[int] = []

    def pass_on(signum: int, frame: object) -> None:
        if job is None:
            early.append(signum)  # the child is being started
        elif executor.process.poll() is None:
            executor.process.send_signal(signum)

    before = {s: signal.signal(s, pass_on) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)}
    try:
        job = executor._submit_command(shlex.join(start.command))
        for signum in early:
            executor.process.send_signal(signum)
        return _end_of(executor.process, start, run_dir)
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def run_behind(run_dir: Path, start: Start) -> subprocess.Popen[bytes]:
    """Start the run behind this process, which goes on, and return its own; the output is in ``logs/here.out``.

    A run that is left when this process ends gets SIGTERM: it saves and leaves.
    """
    process: Future[subprocess.Popen[bytes]] = Future()

    def watch() -> None:
        # The kernel tells the child when the thread that has started it ends: this one lasts as long as the child.
        try:
            with os.fdopen(open_private(run_dir / "logs" / "here.out", os.O_WRONLY | os.O_APPEND), "ab") as output:
                executor = ChildExecutor(run_dir / "logs", start.environ, output)
                executor._submit_command(shlex.join(start.command))
        except BaseException as error:
            process.set_exception(error)
            return
        process.set_result(executor.process)
        _end_of(executor.process, start, run_dir)

    RunDir(run_dir).logs.mkdir(mode=0o700, exist_ok=True)
    threading.Thread(target=watch, name=f"run {run_dir}", daemon=True).start()
    return process.result()


def _end_of(process: subprocess.Popen[bytes], start: Start, run_dir: Path) -> int:
    code = process.wait()
    code = code if code >= 0 else 128 - code
    if code and start.after is not None:
        code = subprocess.run([*start.after, str(code)], stdin=subprocess.DEVNULL, env=start.environ).returncode
    return code if _has_final_state(RunDir(run_dir), code) else code or 1


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
