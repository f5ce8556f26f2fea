"""The supervisor of a lent node: it serves one start of the run after another, until the job or the run is over.

    the run's door ─► ask ─► certificate ─► Monarch worker ─► the start is over ─► wait for the next one
                                                  └─ told to leave ─► requests go back ─► the job ends

What it waits for has a deadline: a run that is away ``AWAY_S``, everything else that of the other nodes. Its nodes know
nothing of each other: each may go at any moment.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import time
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

from forge_hpc.cluster.allocation import Allocation, host_address
from forge_hpc.cluster.identity import keep_identity, new_request
from forge_hpc.cluster.processes import become_subreaper, end_descendants
from forge_hpc.cluster.rendezvous import Rendezvous
from forge_hpc.cluster.worker import visible_gpus
from forge_hpc.config import Config, UserError, read_config
from forge_hpc.joining import coming_back, door
from forge_hpc.joining.door import Answer, Ask, Door, Over, open_door
from forge_hpc.joining.lifeline import LIFELINE, hold
from forge_hpc.run_dir import RunDir
from forge_hpc.supervisor import deadlines
from forge_hpc.supervisor.ending import Exit
from forge_hpc.supervisor.heartbeat import HeartbeatMonitor
from forge_hpc.supervisor.node import Node
from forge_hpc.supervisor.robust import how_it_ended
from forge_hpc.wire.tls import Certificates

AWAY_S = 900.0
"""A run that has been preempted, or starts, is waited for so long: a node that waits does nothing, and the run may be
waiting for just such nodes."""
ANSWER_S = 60.0
"""The first node looks every two seconds; what has not answered by then is a start that has died."""
LEAVE_S = 8.0
"""So long the controller has to take a node's requests back. It looks every second, and Slurm kills after KillWait,
which is 30 s unless the site says otherwise."""


class _Leave(Exception):
    """Slurm, or somebody, wants the node back."""


class _Over(Exception):
    """The run needs no node any more: its message says why."""


class _StartOver(Exception):
    """This start of the run takes nothing from us any more; another may."""


class LentNode:
    """One node of a job that lends."""

    def __init__(self, run_dir: RunDir, allocation: Allocation) -> None:
        self.run_dir = run_dir
        self.allocation = allocation
        self._signals: list[int] = []
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2):
            signal.signal(signum, lambda signum, _: self._signals.append(signum))

    def run(self) -> int:
        """The exit code: 0 where the node was lent in good order, 1 where the run could not use it."""
        become_subreaper()
        try:
            config = read_config(self.run_dir.config)
            if config.cluster.gpus_per_node:  # of the run's own nodes: of this one all are used
                config.cluster.gpus_per_node = None
            while True:
                try:
                    rendezvous, found = self._next_start()
                    self._serve(rendezvous, found, config)
                except _StartOver as over:
                    self._say(f"{over}; waiting for the run to take it again")
        except _Over as over:
            self._say(str(over))
            return Exit.DONE
        except _Leave:
            self._say(f"leaving: {signal.Signals(self._signals[0]).name}")
            if self.allocation.node_id == 0:
                coming_back.come_back(self.allocation, self._signals[0])
            return Exit.DONE
        except (UserError, OSError) as error:
            self._say(f"error: {error}")
            return Exit.FAILED
        finally:
            end_descendants(grace_s=0)

    def _say(self, text: str) -> None:
        print(f"node {self.allocation.node_id} of job {self.allocation.job_id}: {text}", file=sys.stderr, flush=True)

    def _pause(self, seconds: float = deadlines.LOOK_S) -> None:
        """Raises _Leave as soon as somebody wants the node back."""
        until = time.monotonic() + seconds
        while not self._signals and time.monotonic() < until:
            time.sleep(deadlines.POLL_S)
        if self._signals:
            raise _Leave

    # ---- a start of the run

    def _next_start(self) -> tuple[Rendezvous, Door]:
        """Wait for the run to take nodes."""
        until, told = time.monotonic() + AWAY_S, False
        while True:
            with contextlib.suppress(OSError):  # a pause of the file server
                status = self.run_dir.read_status()
                if status is None or status.is_terminal:
                    raise _Over(f"the run is over: {'it is gone' if status is None else status.state}")
                if (found := open_door(self.run_dir)) is not None:
                    return found
                if not told:
                    self._say(f"the run is {status.state}; it is waited for, for {AWAY_S / 60:.0f} min at most")
                    told = True
            if time.monotonic() > until:
                raise _Over(f"the run has not come back within {AWAY_S / 60:.0f} min")
            self._pause()

    def _serve(self, rendezvous: Rendezvous, found: Door, config: Config) -> None:
        """Lend the node to a start of the run. Raises what ends that."""
        node = Node(self.run_dir, self.allocation, takes_lent=True)
        tls = node.scratch_folder() / "tls"
        try:
            address = host_address(2)
            number = self._ask(node, rendezvous, config, address, tls)
            node.allocation = replace(self.allocation, node_id=number, num_nodes=number + 1)
            self._say(f"lent to {self.run_dir} as its node {number}")
            log_dir = Path(found.log_dir)
            worker = node.start_worker(rendezvous, address, tls, log_dir)
            try:
                silent_s = deadlines.heartbeat_timeout_s(config)
                self._look_after(node, rendezvous, worker, tls, log_dir, silent_s)
            except _Leave:
                self._give_back(rendezvous, number)
                raise
            finally:
                with contextlib.suppress(OSError):
                    rendezvous.withdraw(*door.records_of(number))
        except FileNotFoundError as error:  # a newer start has removed the rendezvous, or Slurm our temporary folder
            self._pause()
            raise _StartOver(f"{error.filename} is gone") from error
        finally:
            node.close()

    def _ask(self, node: Node, rendezvous: Rendezvous, config: Config, address: str, tls: Path) -> int:
        """Ask to be let in, and keep the certificate; this node's number in the run."""
        key, request = new_request()
        name = f"{self.allocation.job_id}.{self.allocation.node_id}.{uuid.uuid4().hex[:8]}"
        names = [address, socket.gethostname(), "localhost"]
        about = len(visible_gpus()), node.report(rendezvous, config)
        ask = Ask(self.allocation.job_id, node.slurm_name, address, names, request.decode(), *about)
        rendezvous.publish(door.ask_name(name), ask.as_record())
        until = time.monotonic() + ANSWER_S
        while (record := rendezvous.look(door.answer_name(name))) is None:
            self._check(rendezvous)
            if time.monotonic() > until:
                rendezvous.withdraw(door.ask_name(name))
                raise _StartOver(f"the run has not answered within {ANSWER_S:.0f} s")
            self._pause()
        rendezvous.withdraw(door.answer_name(name))
        answer = Answer.of(record)
        if answer.refused:
            raise UserError(f"the run does not take this node: {answer.refused}")
        keep_identity(tls, ca=answer.ca.encode(), cert=answer.cert.encode(), key=key)
        return answer.node

    def _check(self, rendezvous: Rendezvous) -> None:
        """Raise _StartOver where the start has ended."""
        if (outcome := rendezvous.look("outcome")) is not None:
            raise _StartOver(outcome.get("message") or "the run has ended")

    def _look_after(
        self,
        node: Node,
        rendezvous: Rendezvous,
        worker: subprocess.Popen[bytes],
        tls: Path,
        log_dir: Path,
        silent_s: float,
    ) -> None:
        """Return never; raise what ends it."""
        number, line = node.allocation.node_id, None
        stacks, heartbeat = node.stack_writer(rendezvous, log_dir), HeartbeatMonitor(self.run_dir)
        stacks.begin_now()
        while True:
            self._pause()
            over: Any = None
            try:
                self._check(rendezvous)
                over = rendezvous.look(door.over_name(number))
                if line is None and (record := rendezvous.look(LIFELINE)) is not None:
                    line = hold(record, number, Certificates(*(tls / f"{kind}.pem" for kind in ("ca", "cert", "key"))))
            except FileNotFoundError:
                raise
            except OSError:  # a pause of the file server, or of the network: it counts as silence
                pass
            if over is not None:
                told = Over.of(over)
                if told.failed:
                    raise UserError(f"the run has no use for the node: {told.message}")
                raise _StartOver(told.message)
            if worker.poll() is not None:
                if worker.returncode == 0:  # shut down by the controller, which then says why
                    raise _StartOver("the run has let the node go")
                node.report_worker_ended(rendezvous, worker)
                raise OSError(f"the node's Monarch worker {how_it_ended(worker.returncode)}")
            stacks.look_in_time()
            if heartbeat.silent_s() > silent_s + deadlines.OTHERS_S:
                raise _StartOver("the run gives no sign of life")

    def _give_back(self, rendezvous: Rendezvous, number: int) -> None:
        """Have the run go on without the node: its requests go to the others at once."""
        with contextlib.suppress(OSError):
            rendezvous.publish(door.leaving_name(number), {"why": signal.Signals(self._signals[0]).name})
            until = time.monotonic() + LEAVE_S
            while time.monotonic() < until and rendezvous.look(door.over_name(number)) is None:
                time.sleep(deadlines.POLL_S)
