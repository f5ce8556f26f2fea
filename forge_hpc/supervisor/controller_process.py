"""The controller as the supervisor of the first node sees it: a process that is asked, waited for, and ended."""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Self

from forge_hpc.cluster.rendezvous import Rendezvous
from forge_hpc.cluster.stacks import LAST_S, StackWriter
from forge_hpc.config import Config, UserError
from forge_hpc.config.recipes import needs_of
from forge_hpc.files import in_thread, is_there
from forge_hpc.joining.desk import Desk
from forge_hpc.run_dir import RunDir
from forge_hpc.run_lock import RunDirLock
from forge_hpc.supervisor import deadlines
from forge_hpc.supervisor.ending import Cause, Ending
from forge_hpc.supervisor.heartbeat import HeartbeatMonitor
from forge_hpc.supervisor.node import Node
from forge_hpc.supervisor.signals import StopRequest, StopRequests, ignoring_signals
from forge_hpc.supervisor.starts import newest_step


class ControllerProcess:
    """Runs in a session of its own, and is asked on its standard input: ``leave REASON``, ``stop``."""

    def __init__(self, process: subprocess.Popen[bytes], node: Node, requests: StopRequests, lock: RunDirLock) -> None:
        self.process = process
        self.hung = ""
        """Why it was killed, where it gave no heartbeat."""
        self._node = node
        self._run_dir = node.run_dir
        self._requests = requests
        self._lock = lock
        self._deadline = math.inf
        """Then it is killed."""
        self._stacks_at = math.inf
        """Then stacks are begun, so that the kill does not wait for them: what comes after it has a deadline too."""

    @classmethod
    def start(
        cls,
        node: Node,
        requests: StopRequests,
        lock: RunDirLock,
        rendezvous: Rendezvous,
        tls: Path,
        log_dir: Path,
        *options: str,
    ) -> Self:
        """Start it, with more ``options`` of its command line."""
        command = [sys.executable, "-m", "forge_hpc.controller", "--run-dir", str(node.run_dir.path)]
        command += ["--rendezvous", str(rendezvous.directory), "--log-dir", str(log_dir), "--parent", str(os.getpid())]
        command += options
        process = subprocess.Popen(
            ignoring_signals(command), stdin=subprocess.PIPE, start_new_session=True, env=node.environment(tls)
        )
        return cls(process, node, requests, lock)

    def wait(
        self,
        worker: subprocess.Popen[bytes],
        rendezvous: Rendezvous,
        heartbeat_timeout_s: float,
        stacks: StackWriter | None = None,
        desk: Desk | None = None,
    ) -> StopRequest | None:
        """Wait for its end, and pass on to it what is wanted of the run; returns the last request.

        It is killed when the time that a request gives it is over, when it gives no heartbeat, and when another start
        has taken the run over. Where it, or one of its actors, hangs, or is about to be late, ``stacks`` are written
        before. Meanwhile nodes that other jobs lend are answered at the ``desk``.
        """
        reported, heartbeat, looked, is_late = False, HeartbeatMonitor(self._run_dir), time.monotonic(), False
        while not self.is_over():
            if (request := self._requests.next()) is not None:
                self._pass_on(request)
            if time.monotonic() > self._stacks_at:
                self._begin_stacks(stacks)
            if time.monotonic() > self._deadline:
                self.process.kill()
                is_late = True
            if time.monotonic() - looked > deadlines.LOOK_S:
                looked = time.monotonic()
                if (silent_s := heartbeat.silent_s()) > heartbeat_timeout_s and self._can_write():
                    self.hung = f"the controller gave no sign of life for {silent_s:.0f} s"
                    if stacks is not None:
                        left_s = max(0.0, self._deadline - time.monotonic())
                        self.hung += stacks.write_all(self.hung, self._node.allocation.num_nodes, left_s)
                    self.process.kill()
                elif stacks is not None:
                    stacks.look_in_time(max(0.0, min(self._stacks_at, self._deadline) - time.monotonic()))
                if desk is not None:
                    desk.look_in_time()
            if self._lock.lost.is_set():
                self.process.kill()
                return StopRequest(Cause.TAKEN_OVER, f"another start has taken {self._run_dir} over", None)
            if not reported and worker.poll() not in (None, 0):
                with contextlib.suppress(OSError):  # at the next look, then
                    self._node.report_worker_ended(rendezvous, worker)
                    reported = True
                # the controller saves what it can, and leaves
                if self._deadline == math.inf:
                    self._give(deadlines.SILENT_S)
            time.sleep(deadlines.POLL_S)
        if is_late and stacks is not None and stacks.told:
            print(f"the controller has not ended in time{stacks.told}", file=sys.stderr, flush=True)
        return self._requests.current

    def is_over(self) -> bool:
        """Whether there is nothing more to wait for."""
        return self.process.poll() is not None

    def _pass_on(self, request: StopRequest) -> None:
        ends_now = request.cancels and not request.within_s
        within_s = deadlines.STOP_S if request.cancels and request.within_s is None else request.within_s
        if within_s is not None:
            self._give(max(1.0, within_s - deadlines.REQUEUE_S))
        if request.cancels and not ends_now:
            self._announce(within_s)
        if request.cancels or self._requests.current is None:
            self.send("stop" if ends_now else f"leave {request.message}")
        # Whoever has cancelled a run that is then preempted does not want it back; there is only less time.
        if request.cancels or self._requests.current is None or not self._requests.current.cancels:
            self._requests.current = request

    def _give(self, seconds: float) -> None:
        """Let it live for so long, unless it has less already."""
        if (until := time.monotonic() + seconds) < self._deadline:
            self._deadline, self._stacks_at = until, until - min(LAST_S, seconds / 2)

    def _begin_stacks(self, stacks: StackWriter | None) -> None:
        """Have them written in what is left of its time. It may still end in good order meanwhile."""
        self._stacks_at, left_s = math.inf, self._deadline - time.monotonic()
        if stacks is None or left_s <= 0:
            return
        request, num_nodes = self._requests.current, self._node.allocation.num_nodes
        asked = request.message if request is not None else "this node's Monarch worker has ended"
        why = f"{asked}; the controller has not ended yet, and is killed in {left_s:.1f} s"
        threading.Thread(target=stacks.write_all, args=(why, num_nodes, left_s), name="stacks", daemon=True).start()

    def _announce(self, within_s: float | None) -> None:
        """Tell whoever cancels the run what happens now, and what it costs to ask again."""
        step, saved = steps_done(self._run_dir)
        what = f"stopping: what is under way is finished and saved, in at most {within_s or 0:.0f} s"
        again = "forge-hpc cancel --now" if self._node.allocation.in_slurm else "Ctrl-C again"
        cost = f"{again} ends at once, and {_steps_again(step - saved)}"
        print(f"{what}; {cost}", file=sys.stderr, flush=True)

    def send(self, line: str) -> None:
        """Tell it a line (``controller.orders``)."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ends already
            self.process.stdin.write(f"{line}\n".encode())
            self.process.stdin.flush()

    def _can_write(self) -> bool:
        """Whether it is not the file system that keeps heartbeats from being written."""
        try:
            in_thread(lambda: os.utime(self._run_dir.path / ".lock"), within_s=deadlines.WRITE_S)
        except OSError:
            return False
        return True


def cancelled(run_dir: RunDir, config: Config, request: StopRequest) -> Ending:
    """How a run has ended that was cancelled: what is lost, and how to go on."""
    resume = f"forge-hpc resume {shlex.quote(str(run_dir))}"
    if not needs_of(config).trains:
        return Ending(Cause.CANCELLED, request.message, f"{resume} begins the evaluation again")
    step, saved = steps_done(run_dir)
    if not step:
        return Ending(Cause.CANCELLED, f"{request.message}, before the first step", f"{resume} begins again")
    export = f"; forge-hpc export {shlex.quote(str(run_dir))} writes its model" if saved else ""
    hint = f"{resume} goes on{export}"
    if saved == step:
        return Ending(Cause.CANCELLED, f"{request.message} after step {step}, which is saved", hint)
    stands = f"the newest checkpoint is of step {saved}" if saved else "there is no checkpoint"
    message = f"{request.message} after step {step}; {stands}: {_steps_again(step - saved)}"
    return Ending(Cause.CANCELLED, message, hint)


def way_on(run_dir: RunDir) -> str:
    """How a run goes on that nobody starts again."""
    step, saved = steps_done(run_dir)
    resume = f"forge-hpc resume {shlex.quote(str(run_dir))}"
    if not saved:
        return f"{resume} begins again"
    if is_there(run_dir.adapters):  # each saves for itself
        return f"{resume} goes on"
    return f"{resume} goes on after step {saved}" + (f": {_steps_again(step - saved)}" if step > saved else "")


def steps_done(run_dir: RunDir) -> tuple[int, int]:
    """Optimizer steps done, and those that the newest checkpoint has."""
    status, saved = None, 0
    with contextlib.suppress(OSError, UserError):
        status = run_dir.read_status()
    with contextlib.suppress(OSError):
        saved = newest_step(run_dir)
    return max(saved, status.step if status is not None else 0), saved


def _steps_again(num: int) -> str:
    """What it costs that so many optimizer steps are not saved."""
    if num <= 0:
        return "no step is lost"
    return f"{num} optimizer step{'s' * (num > 1)} will be done again"
