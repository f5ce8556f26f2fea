"""A run on kept engines, as the process that has submitted it sees it: it stands where the run's own process would.

    python -m forge_hpc.kept.client --engines D --run-dir R --keep SECONDS -- COMMAND…

It asks the keeper for the run, or starts one by COMMAND, shows what the run prints, passes signals on, and ends with
the run's exit code. The keeper outlives it.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from forge_hpc.config import UserError, print_error
from forge_hpc.files import make_private_dir, open_private
from forge_hpc.kept.directory import EnginesDir, origin_of, why_not
from forge_hpc.kept.ending import WAIT_S, end_engines
from forge_hpc.run_dir import RunDir
from forge_hpc.supervisor import deadlines
from forge_hpc.supervisor.ending import Exit
from forge_hpc.supervisor.heartbeat import HeartbeatMonitor

TAKEN_S = 10.0
"""A keeper that has not taken a request after this time is dead."""
START_S = 120.0
"""A keeper that was just started: srun may wait for its nodes."""
SILENT_S = 60.0
POLL_S = 0.1


class Client:
    """Asks for one run."""

    def __init__(self, directory: EnginesDir, run_dir: RunDir, keep_s: float, command: Sequence[str]) -> None:
        self._directory, self._run_dir, self._keep_s, self._command = directory, run_dir, keep_s, list(command)
        self._id = f"{time.time_ns()}-{uuid.uuid4().hex[:8]}"
        self._keeper: subprocess.Popen[bytes] | None = None
        self._signals: list[int] = []
        self._num_signals = 0
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2):
            signal.signal(signum, lambda number, _: self._signals.append(number))

    def run(self) -> int:
        """The run's exit code.

        Raises:
            UserError: it cannot be begun.
        """
        make_private_dir(self._run_dir.logs)
        self._outputs = [_Output(self._run_dir.logs / "kept.out", 1), _Output(self._run_dir.logs / "kept.err", 2)]
        self._directory.run_dir.create()
        with _alone(self._directory):
            if not self._is_taken_by_kept():
                self._start()
        return self._follow()

    def _is_taken_by_kept(self) -> bool:
        """Ask the engines that are there; False where there are none, or none that fit."""
        directory, origin = self._directory, self._directory.origin()
        if origin is None:
            return False
        if why := why_not(origin, self._command, os.environ):
            print(f"engines are started anew: {why}", file=sys.stderr, flush=True)
            end_engines(directory)
            return False
        state = directory.state()
        if state is not None and state["host"] == os.uname().nodename and not directory.run_dir.is_locked():
            return False
        self._ask()
        if self._wait_until_taken(TAKEN_S):
            return True
        self._withdraw()
        return False

    def _ask(self) -> None:
        out, err = (str(output.path) for output in self._outputs)
        self._alive()
        request = {"id": self._id, "run_dir": str(self._run_dir), "keep_s": self._keep_s, "out": out, "err": err}
        self._directory.mailbox.publish(f"request-{self._id}", request | {"time": time.time()})

    def _withdraw(self) -> None:
        (self._directory.mailbox.directory / f"request-{self._id}.json").unlink(missing_ok=True)

    def _wait_until_taken(self, within_s: float) -> bool:
        until = time.monotonic() + within_s
        while self._look(self._directory.mailbox, f"taken-{self._id}") is None:
            if time.monotonic() > until or (self._keeper is not None and self._keeper.poll() is not None):
                return False
            time.sleep(POLL_S)
        return True

    def _start(self) -> None:
        """Start a keeper.

        Raises:
            UserError: it does not begin.
        """
        directory = self._directory
        until = time.monotonic() + WAIT_S  # earlier ones may be ending
        while directory.run_dir.is_locked() and time.monotonic() < until:
            time.sleep(POLL_S)
        shutil.rmtree(directory.mailbox.directory, ignore_errors=True)
        directory.forget()
        shutil.copyfile(self._run_dir.config, directory.run_dir.config)
        directory.run_dir.write_status(state="starting")
        self._ask()
        directory.write("engines", origin_of(self._command, os.environ))
        with os.fdopen(open_private(directory.output, os.O_WRONLY | os.O_TRUNC), "wb") as output:
            self._keeper = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        if not self._wait_until_taken(START_S):
            self._keeper.terminate()
            directory.forget()
            raise UserError("the keeper of the engines has not begun", f"{directory.output} says why")

    def _follow(self) -> int:
        """Show what the run prints until it has ended; its exit code."""
        mailbox, heartbeat, beat = self._directory.mailbox, HeartbeatMonitor(self._directory.run_dir), 0.0
        while (answer := self._look(mailbox, f"answer-{self._id}")) is None:
            self._show()
            while self._signals:
                mailbox.publish(f"signal-{self._id}-{self._num_signals}", {"signal": self._signals.pop(0)})
                self._num_signals += 1
            if time.monotonic() - beat > deadlines.BEAT_S:
                beat = time.monotonic()
                self._alive()
                if self._is_lost(heartbeat) and self._look(mailbox, f"answer-{self._id}") is None:
                    self._show()
                    print(f"error: the keeper of the engines has died: {self._directory.output}", file=sys.stderr)
                    return Exit.FAILED
            time.sleep(POLL_S)
        self._show()
        for name in ("answer", "taken", "alive"):
            (mailbox.directory / f"{name}-{self._id}.json").unlink(missing_ok=True)
        return int(answer["code"])

    def _look(self, mailbox: Any, name: str) -> Any | None:
        with contextlib.suppress(OSError):
            return mailbox.look(name)
        return None

    def _alive(self) -> None:
        with contextlib.suppress(OSError):
            self._directory.mailbox.publish(f"alive-{self._id}", {"time": time.time()})

    def _is_lost(self, heartbeat: HeartbeatMonitor) -> bool:
        state = self._directory.state()
        if state is not None and state["host"] == os.uname().nodename:
            return not self._directory.run_dir.is_locked()
        return heartbeat.silent_s() > SILENT_S

    def _show(self) -> None:
        for output in self._outputs:
            output.show()


class _Output:
    """A file of the run's, shown on one of this process's streams from where it is now."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd = fd
        self._file: IO[bytes] = os.fdopen(open_private(path, os.O_RDWR), "rb")
        self._file.seek(0, os.SEEK_END)

    def show(self) -> None:
        while data := self._file.read(1 << 16):
            with contextlib.suppress(BrokenPipeError):  # the run goes on
                os.write(self._fd, data)


@contextmanager
def _alone(directory: EnginesDir) -> Iterator[None]:
    """Of several submits, one finds or starts the engines at a time."""
    with os.fdopen(open_private(directory.path / ".submit", os.O_RDWR), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> int:
    """Door of ``python -m forge_hpc.kept.client``."""
    parser = argparse.ArgumentParser(description="A run on kept engines; started by forge-hpc submit.")
    parser.add_argument("--engines", type=Path, required=True)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--keep", type=float, required=True)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    os.umask(0o077)
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    try:
        return Client(EnginesDir(args.engines), RunDir(args.run_dir), args.keep, command).run()
    except UserError as error:
        return print_error(error)


if __name__ == "__main__":
    sys.exit(main())
