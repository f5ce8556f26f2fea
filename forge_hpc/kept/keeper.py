"""The keeper of engines: ``python -m forge_hpc.kept.keeper --engines D`` on every node.

    submit ──► mailbox: request ──► keeper (node 0) ──► KeptRun ──► answer ──► … until the deadline ──► all ends

It is what the supervisor of a node is for one run (``supervisor.supervisor``): the owner of all processes below it. It
holds the lock of ``D``, serves one request after the other, and ends with all else when nothing has been asked for so
long as the last request has said, when somebody wants it to, and when what it keeps is broken.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from forge_hpc.cluster.allocation import Allocation
from forge_hpc.cluster.processes import become_subreaper
from forge_hpc.cluster.rendezvous import RendezvousTimeout
from forge_hpc.config import UserError, print_error
from forge_hpc.files import open_private
from forge_hpc.kept.directory import EnginesDir
from forge_hpc.kept.run import Engines, KeptRun, RelayedRequests
from forge_hpc.run_dir import RunDir
from forge_hpc.supervisor import deadlines
from forge_hpc.supervisor.ending import Exit
from forge_hpc.supervisor.job import OwnJob
from forge_hpc.supervisor.node import Node
from forge_hpc.supervisor.other_node import serve_node
from forge_hpc.supervisor.signals import SIGNALS, Stopped, StopRequests

FIRST_S = 60.0
"""Whoever has started the keeper asks for a run within this time."""
SILENT_S = 60.0
"""A run whose submit shows no sign of life for so long is asked to leave, as if its terminal had been closed."""
POLL_S = 0.25
"""A look at the mailbox is one listing of a directory, perhaps on a file server, for as long as engines are kept."""


class Keeper:
    """The first node's."""

    def __init__(self, directory: EnginesDir, allocation: Allocation) -> None:
        self.directory = directory
        self._allocation = allocation
        self._mailbox = directory.mailbox
        self._job_id = allocation.job_id if allocation.in_slurm else None
        self._asked_to_end = False
        self._since, self._looked = time.time(), time.monotonic()
        self._said: dict[str, Any] = {}
        run_dir = directory.run_dir
        node = Node(run_dir, allocation)
        rendezvous = node.rendezvous(None if self._job_id else f"local.{os.getpid()}")
        log_dir = run_dir.create_log_dir(self._job_id, run_dir.next_restart(self._job_id))
        self._engines = Engines(node, rendezvous, log_dir)

    def run(self) -> int:
        """Serve until the end; the exit code."""
        ends, what = time.time() + FIRST_S, ""
        self._listen()
        beat = threading.Thread(target=self._beat, daemon=True)
        beat.start()
        try:
            while self._engines.is_alive and not self._asked_to_end and time.time() < ends:
                self._say(None, ends, what)
                self._look_for_hangs()
                request = self._next_request()
                if request is None:
                    continue
                what = RunDir(request["run_dir"]).name
                self._say(request["run_dir"], None, what)
                code = self._serve(request)
                ends = time.time() + request["keep_s"]
                self._say(None, ends, what)  # before the answer: whoever has it may ask for the next
                self._listen()
                self._mailbox.publish(f"answer-{request['id']}", {"code": code})
        finally:
            self.close()
        return Exit.DONE

    def close(self) -> None:
        """End all that is kept, on all nodes."""
        engines = self._engines
        self.directory.forget()
        with contextlib.suppress(OSError):
            engines.rendezvous.publish("outcome", {"code": 0, "message": "the engines are kept no longer"})
        engines.node.close()
        if self._allocation.num_nodes > 1:
            time.sleep(2 * deadlines.LOOK_S)  # the other nodes look for the outcome
        for folder in (engines.rendezvous.directory, self.directory.run_dir.tls, self._mailbox.directory):
            shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.directory.run_dir.write_status(state="completed")

    def _listen(self) -> None:
        """Signals end it, where no run is there to take them."""

        def end(*_: object) -> None:
            self._asked_to_end = True

        for signum in SIGNALS:
            signal.signal(signum, end)

    def _beat(self) -> None:
        while True:
            with contextlib.suppress(OSError, UserError):
                self.directory.run_dir.write_status(state="running")
            time.sleep(deadlines.BEAT_S)

    def _say(self, run: str | None, ends: float | None, what: str) -> None:
        said = {"pid": os.getpid(), "host": os.uname().nodename, "since": self._since, "run": run, "ends": ends}
        said |= {"what": what, "nodes": self._allocation.num_nodes}
        if said != self._said:
            with contextlib.suppress(OSError):
                self.directory.write("state", said)
                self._said = said

    def _look_for_hangs(self) -> None:
        """The controller may still be handing over what the last run has left."""
        if time.monotonic() - self._looked > deadlines.LOOK_S:
            self._engines.stacks.look_in_time()
            self._looked = time.monotonic()

    def _next_request(self) -> dict[str, Any] | None:
        time.sleep(POLL_S)
        with contextlib.suppress(OSError):
            names = self._mailbox.names("")
            if any(name.startswith("end-") for name in names):
                self._asked_to_end = True
                return None
            for name in names:
                if name.startswith("request-") and (request := self._mailbox.look(name)) is not None:
                    self._mailbox.publish(f"taken-{request['id']}", {})
                    (self._mailbox.directory / f"{name}.json").unlink(missing_ok=True)
                    return request
        return None

    def _serve(self, request: dict[str, Any]) -> int:
        run_dir, job = RunDir(request["run_dir"]), OwnJob(self._allocation)
        requests = RelayedRequests(run_dir, job, _Signals(self, request["id"]).new)
        run = KeptRun(self._engines, Node(run_dir, self._allocation), job, requests, request)
        with _output(Path(request["out"]), Path(request["err"])):
            try:
                return run.run()
            except UserError as error:
                print_error(error)
                return Exit.FAILED if self._allocation.in_slurm else Exit.USAGE
            except (Stopped, RendezvousTimeout, OSError) as error:
                print(f"error: {error}", file=sys.stderr)
                return Exit.FAILED


class _Signals:
    """Signals that whoever waits for a run sends on; one that shows no sign of life has gone."""

    def __init__(self, keeper: Keeper, request_id: str) -> None:
        self._mailbox, self._id, self._num = keeper.directory.mailbox, request_id, 0
        self._alive, self._silent_s, self._looked = None, 0.0, time.monotonic()
        self._told = False

    def new(self) -> list[int]:
        """Those since the last look."""
        signals = []
        with contextlib.suppress(OSError):
            while (record := self._mailbox.look(f"signal-{self._id}-{self._num}")) is not None:
                self._num += 1
                signals.append(int(record["signal"]))
            if (now := time.monotonic()) - self._looked > deadlines.LOOK_S:
                alive = self._mailbox.look(f"alive-{self._id}")
                # Time in which this process stood still counts as one look.
                waited = min(now - self._looked, 2 * deadlines.LOOK_S)
                self._silent_s = 0.0 if alive != self._alive else self._silent_s + waited
                self._alive, self._looked = alive, now
        if self._silent_s > SILENT_S and not self._told:
            self._told = True
            signals.append(signal.SIGTERM)
        return signals


@contextmanager
def _output(out: Path, err: Path) -> Iterator[None]:
    """What this process, and what it starts, prints goes to these files."""
    sys.stdout.flush()
    sys.stderr.flush()
    before = [os.dup(1), os.dup(2)]
    for fd, path in ((1, out), (2, err)):
        file = open_private(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, fd)
        os.close(file)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for fd, old in ((1, before[0]), (2, before[1])):
            os.dup2(old, fd)
            os.close(old)


def main() -> int:
    """Door of ``python -m forge_hpc.kept.keeper``."""
    parser = argparse.ArgumentParser(description="Keep engines on this node; started by forge-hpc submit.")
    parser.add_argument("--engines", type=Path, required=True)
    args = parser.parse_args()
    os.umask(0o077)
    become_subreaper()
    directory, allocation = EnginesDir(args.engines), Allocation.from_environment()
    if allocation.node_id > 0:
        node, run_dir = Node(directory.run_dir, allocation), directory.run_dir
        try:
            return serve_node(node, StopRequests(run_dir, OwnJob(allocation)))
        except (Stopped, RendezvousTimeout, OSError) as error:
            print(f"node {allocation.node_id}: {error}", file=sys.stderr)
            return Exit.FAILED
        finally:
            node.close()
    job_id = allocation.job_id if allocation.in_slurm else None
    try:
        with directory.run_dir.lock(job_id, requeues=allocation.requeues):
            return Keeper(directory, allocation).run()
    except UserError as error:
        return print_error(error)


if __name__ == "__main__":
    sys.exit(main())
