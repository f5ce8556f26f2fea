"""The first node: it holds the run's lock, runs the controller, and leaves the truth in the run directory.

lock ─ gate ─ certificates ─ worker ─ (warm start) ─ controller ─► Ending ─► starts.jsonl, status.json ─► coming back
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from forge_hpc.cluster.identity import Authority, make_job_identity
from forge_hpc.cluster.processes import end_descendants
from forge_hpc.cluster.rendezvous import Rendezvous, RendezvousTimeout
from forge_hpc.config import Config, UserError, read_config
from forge_hpc.config.lending import takes_lent
from forge_hpc.evaluation.early_stop import why_stopped
from forge_hpc.files import in_thread
from forge_hpc.gate.deadlines import OWN_S
from forge_hpc.hub.offline import offline_environ
from forge_hpc.joining.desk import Desk
from forge_hpc.observability.jsonl import read_jsonl
from forge_hpc.observability.phases import StartPhases
from forge_hpc.observability.summary import final_summary
from forge_hpc.run_lock import RunDirLock
from forge_hpc.slurm import outside
from forge_hpc.status_writer import StatusWriter
from forge_hpc.supervisor import deadlines
from forge_hpc.supervisor.coming_back import come_back, is_to_come_back
from forge_hpc.supervisor.controller_process import ControllerProcess, cancelled, way_on
from forge_hpc.supervisor.ending import EXITS, FAILURES, RULES, Cause, ControllerExit, Ending, Exit
from forge_hpc.supervisor.fit import sizes_of
from forge_hpc.supervisor.gate import Verdict, open_gate
from forge_hpc.supervisor.job import OwnJob
from forge_hpc.supervisor.lead import lead_s
from forge_hpc.supervisor.node import Node
from forge_hpc.supervisor.robust import best_effort, how_it_ended, retrying
from forge_hpc.supervisor.signals import Stopped, StopRequest, StopRequests
from forge_hpc.supervisor.starts import StartLog
from forge_hpc.supervisor.warm_start import warm_start

INSIDE = "inside"
"""The record by which a supervisor in a container says that it runs there."""


@dataclass(frozen=True)
class Together:
    """The nodes of a start, once they are fit and have been told of each other."""

    worker: subprocess.Popen[bytes]
    """This node's."""
    slurm_names: list[str]
    start: dict[str, Any]
    """What they were told."""
    authority: Authority
    verdict: Verdict
    """Of the gate."""

    @property
    def report(self) -> dict[str, Any]:
        """What the gate has found on this node."""
        return self.verdict.introductions[0]["report"]


class FirstNode:
    """One start of a run, from its lock to its end."""

    def __init__(self, node: Node, job: OwnJob, requests: StopRequests, *, summary: bool) -> None:
        self.run_dir = node.run_dir
        self.allocation = node.allocation
        self.status = StatusWriter(node.run_dir)
        self.lock: RunDirLock
        self._node = node
        self._job = job
        self._requests = requests
        self._summary = summary
        self._started = time.monotonic()

    @property
    def job_id(self) -> str | None:
        """None outside Slurm."""
        return self.allocation.job_id if self.allocation.in_slurm else None

    def run(self) -> int:
        """The exit code.

        Raises:
            Stopped: the run is to end while another start holds the lock.
            UserError: a live job holds it.
        """
        self._say_that_it_is_inside()
        config = self._requests.config = read_config(self.run_dir.config)
        with self.run_dir.lock(self.job_id, requeues=self.allocation.requeues, stop=self._requests.check) as self.lock:
            if self.job_id:
                self._job.remember_arguments()
            return self.run_locked(config)

    def _say_that_it_is_inside(self) -> None:
        """Else the job script takes what ends before it has begun for a container that does not start."""
        if self.job_id and outside.is_inside():
            with best_effort():
                in_thread(lambda: self._node.rendezvous().publish(INSIDE, {}), within_s=deadlines.WRITE_S)

    def run_locked(self, config: Config) -> int:
        """The same when the run is ours."""
        run_dir, job_id = self.run_dir, self.job_id
        status = run_dir.read_status()
        if status is not None and status.state == "completed" and status.step >= config.trainer.training.steps:
            print(f"{run_dir} is complete: nothing to do")
            self._node.rendezvous().publish("outcome", {"code": ControllerExit.DONE, "message": ""})
            return Exit.DONE
        self._node.takes_lent = self.allocation.in_slurm and _takes_lent(config)
        starts, log_dir, began = StartLog(run_dir), run_dir.logs, False
        rendezvous: Rendezvous | None = None
        try:
            restart = run_dir.next_restart(job_id)
            log_dir = run_dir.create_log_dir(job_id, restart)
            self.status.update(state="starting", restarts=restart, job_id=job_id, message="", lent=0)
            in_thread(partial(self.status.flush, deadlines.SILENT_S), self._requests.check)
            nodes, requeues = self.allocation.num_nodes, self.allocation.requeues
            begin = partial(starts.begin, job_id=job_id, restart=restart, nodes=nodes, requeues=requeues)
            in_thread(begin, self._requests.check)
            began = True
            rendezvous = self._node.rendezvous(self.rendezvous_key(restart))
            self._clean(keep=rendezvous.directory.name)
            self._node.hub_environ = offline_environ(config, run_dir.path)
            if job_id:
                self._job.follow_walltime(partial(lead_s, config, run_dir))
            ending = self.start(config, rendezvous, run_dir.tls / rendezvous.directory.name, log_dir)
        except Stopped as stopped:
            ending = Ending(stopped.request.cause, stopped.request.message)
        except UserError as error:
            ending = Ending(Cause.FAILED, error.message, error.hint)
        except RendezvousTimeout as error:
            ending = Ending(Cause.CRASH, str(error))
        except OSError as error:  # a full disk, a pause of the file server: worth another start
            traceback.print_exc()
            ending = Ending(Cause.CRASH, f"{type(error).__name__}: {error}")
        except Exception as error:  # whatever it is, the run has failed and its status says so
            traceback.print_exc()
            ending = Ending(Cause.FAILED, f"{type(error).__name__}: {error}")
        finally:
            self.end_processes()
            if rendezvous is not None:
                shutil.rmtree(run_dir.tls / rendezvous.directory.name, ignore_errors=True)
        if rendezvous is not None:
            with contextlib.suppress(OSError):
                if rendezvous.look("outcome") is None:
                    rendezvous.publish("outcome", {"code": ControllerExit.FAILED, "message": ending.message})
        return self.finish(config, ending, starts, log_dir, began=began)

    def rendezvous_key(self, restart: int) -> str | None:
        """What names this start on all nodes; None where Slurm does."""
        return None if self.job_id else f"local.{restart}.{os.getpid()}"

    def end_processes(self) -> None:
        """The start is over: end what it has started."""
        end_descendants(grace_s=0)

    def _clean(self, keep: str) -> None:
        """Remove what starts that were killed have left: keys, and records of who was where."""
        for directory in (self.run_dir.tls, self.run_dir.rendezvous):
            for path in directory.iterdir() if directory.is_dir() else ():
                if path.name != keep:
                    shutil.rmtree(path, ignore_errors=True)

    # ---- the start

    def start(self, config: Config, rendezvous: Rendezvous, tls: Path, log_dir: Path) -> Ending:
        """Bring the nodes that are fit together, make the warm start, and run the controller to its end."""
        requests, phases = self._requests, self._begin_phases()
        started = self._bring_together(self._node, config, rendezvous, tls, log_dir, phases)
        if isinstance(started, Ending):
            return started
        worker, slurm_names = started.worker, started.slurm_names
        if (ending := self._warm_start(config, phases)) is not None:
            return ending
        rendezvous.publish("phases", phases.as_record())
        desk = None
        if self._node.takes_lent:
            who = started.authority, started.report, len(slurm_names)
            desk = Desk(config, rendezvous, *who, log_dir, sizes_of(config, self.run_dir))
        controller = ControllerProcess.start(self._node, requests, self.lock, rendezvous, tls, log_dir)
        stacks = self._node.stack_writer(rendezvous, log_dir)
        request = controller.wait(worker, rendezvous, deadlines.heartbeat_timeout_s(config), stacks, desk)
        return self._ending_of(config, controller, request, rendezvous, slurm_names)

    def _bring_together(
        self, node: Node, config: Config, rendezvous: Rendezvous, tls: Path, log_dir: Path, phases: StartPhases
    ) -> Ending | Together:
        """Through the gate; or how the start has ended."""
        address, verdict = open_gate(node, config, rendezvous, self._requests.check)
        phases.end("gate")
        if (ending := verdict.ending(config.cluster.spare_nodes)) is not None:
            return ending
        if verdict.unfit:
            with best_effort():
                StartLog(self.run_dir).left_out({verdict.named(node): why for node, why in verdict.unfit.items()})
            print(f"{verdict.describe()}; the start goes on without", file=sys.stderr, flush=True)
        for remark in verdict.remarks:
            print(f"warning: {remark}", file=sys.stderr, flush=True)
        nodes = list(verdict.introductions.values())
        authority = make_job_identity(tls, [name for record in nodes for name in record["names"]])
        start = {
            "members": verdict.members,
            "left_out": len(verdict.unfit),
            "remarks": verdict.remarks,
            "num_nodes": len(nodes),
            "address": address,
            "tls": str(tls),
            "log_dir": str(log_dir),
            "rendezvous": str(rendezvous.directory),
        }
        rendezvous.publish("start", start)
        node.join(verdict.members)
        worker = node.start_worker(rendezvous, address, tls, log_dir)
        return Together(worker, [record["slurm_name"] for record in nodes], start, authority, verdict)

    def _begin_phases(self) -> StartPhases:
        ago_s = time.monotonic() - self._started
        return StartPhases(self._job.waited_s(ago_s), time.time() - ago_s)

    def _warm_start(self, config: Config, phases: StartPhases) -> Ending | None:
        """Make it, where there is one; how it has ended where it is not done."""
        if config.model.path != "warmstart":
            return None
        ending = warm_start(self.run_dir, config, self._requests, self.status)
        phases.end("warm start")
        return ending

    def _ending_of(
        self,
        config: Config,
        controller: ControllerProcess,
        request: StopRequest | None,
        rendezvous: Rendezvous,
        slurm_names: list[str],
    ) -> Ending:
        """How the start has ended, by what the controller has left behind and what was asked of it."""
        if request is not None and self.lock.lost.is_set():
            return Ending(request.cause, request.message)
        outcome, code = None, controller.process.returncode
        with contextlib.suppress(OSError):
            outcome = retrying(lambda: rendezvous.look("outcome"), deadlines.REQUEUE_S)
        ended = (ControllerExit.DONE, ControllerExit.FAILED)
        if request is not None and request.cancels and (outcome is None or outcome["code"] not in ended):
            return cancelled(self.run_dir, config, request)
        if outcome is None and code in (ControllerExit.DONE, ControllerExit.LEFT):  # it could not be written
            cause = Cause.NODE_LOST if request is None else Cause.ASKED
            message = RULES[cause].meaning if request is None else request.message
            outcome = {"code": code, "cause": cause, "message": message, "lost_nodes": []}
        if outcome is None:
            if request is not None:
                lost = "there was no time to save, the newest checkpoint stands"
                return Ending(request.cause, f"{request.message}; {lost}")
            return Ending(Cause.CRASH, controller.hung or f"the controller {how_it_ended(code)} and left no reason")
        if outcome["code"] == ControllerExit.DONE:
            return Ending(Cause.COMPLETED)
        if outcome["code"] == ControllerExit.LEFT:
            cause = Cause(outcome["cause"])
            if request is not None and cause is Cause.ASKED:
                cause = request.cause
            return Ending(cause, outcome["message"], None, tuple(slurm_names[n] for n in outcome["lost_nodes"]))
        if outcome["code"] == ControllerExit.STOPPED:  # by a cancellation that came from below, and not from us
            return Ending(Cause.CRASH, "the controller has stopped without being asked to; controller.log says where")
        if outcome.get("is_loss"):
            return Ending(Cause.CRASH, outcome["message"])
        return Ending(Cause.FAILED, outcome["message"], outcome.get("hint"), exit=outcome.get("exit"))

    # ---- the way out

    def end_before_it_began(self, config: Config, ending: Ending, starts: StartLog) -> int:
        """Record a start that no supervisor has begun, and `finish` it."""
        run_dir, job_id = self.run_dir, self.job_id
        restart = run_dir.next_restart(job_id)
        log_dir = run_dir.create_log_dir(job_id, restart)
        self.status.update(state="starting", restarts=restart, job_id=job_id, message="")
        starts.begin(job_id=job_id, restart=restart, nodes=self.allocation.num_nodes, requeues=self.allocation.requeues)
        self._clean(keep="")
        return self.finish(config, ending, starts, log_dir, began=True)

    def finish(self, config: Config, ending: Ending, starts: StartLog, log_dir: Path, *, began: bool) -> int:
        """Leave the true state behind, come back where that is wanted, and say how it ended.

        ``began`` says that the log of starts has the beginning of this one.
        """
        # Else the run, its status and its log of starts are another's now.
        if ending.cause is Cause.TAKEN_OVER or not self.lock.confirm(deadlines.WRITE_S):
            print(f"error: {ending.message}", file=sys.stderr)
            return Exit.FAILED
        if ending.cause is Cause.COMPLETED:
            return self._complete(config, starts)
        state, message = self._state_after(config, ending, starts)
        if state == "preempted" and self._job.is_cancelled():  # while the run was saved
            state, message = "cancelled", f"{message}; then cancelled"
        recorded = False
        with best_effort():
            end = partial(starts.end, state=state, cause=ending.cause, message=message)
            in_thread(end, within_s=deadlines.WRITE_S)
            recorded = True
        if state == "preempted" and ending.cause in FAILURES and not (began or recorded):
            # nothing would end such a row of starts
            state, message = "failed", f"{message}; not started again, since starts cannot be counted"
        self.status.update(state=state, message=message)
        if state == "preempted" and self.allocation.in_slurm:
            state, message = self._come_back(config, ending, message)
        if state != "preempted":
            self._job.stay_ended()
        with best_effort():
            self.status.flush(deadlines.LEASE_S)
        print(f"logs: {log_dir}", file=sys.stderr)
        print(f"{state if state != 'failed' else 'error'}: {message}", file=sys.stderr)
        hint = ending.hint
        if hint is None and not self.allocation.in_slurm and (state == "preempted" or ending.cause in FAILURES):
            with best_effort():
                hint = in_thread(partial(way_on, self.run_dir), within_s=deadlines.WRITE_S)
        if hint:
            print(f"hint: {hint}", file=sys.stderr)
        sys.stderr.flush()
        return EXITS[state] if state != "failed" or ending.exit is None else ending.exit

    def _complete(self, config: Config, starts: StartLog) -> int:
        self.status.update(state="completed")
        with best_effort():
            status = self.run_dir.read_status()
            if status is not None and status.step < config.trainer.training.steps:
                self.status.update(message=why_stopped(config, read_jsonl(self.run_dir.evaluations)) or "")
        with best_effort():
            self.status.flush(deadlines.LEASE_S)
        with best_effort():
            end = partial(starts.end, state="completed", cause=Cause.COMPLETED, message="")
            in_thread(end, within_s=deadlines.LEASE_S)
        if self._summary:
            with best_effort():
                print("\n" + final_summary(self.run_dir, time.monotonic() - self._started), flush=True)
        return Exit.DONE

    def _state_after(self, config: Config, ending: Ending, starts: StartLog) -> tuple[str, str]:
        """State and message that follow from how the start has ended."""
        comes_back = self.allocation.in_slurm and not self._job.is_interactive and is_to_come_back(config)
        state, message = RULES[ending.cause].state_left(comes_back=comes_back), ending.message
        if state == "preempted" and ending.cause in FAILURES:
            failures = 1
            with best_effort():
                failures += starts.failures_without_progress()
            if failures > config.cluster.max_restarts:
                return "failed", f"{message} ({failures} failures without progress)"
        return state, message

    def _come_back(self, config: Config, ending: Ending, message: str) -> tuple[str, str]:
        """Have the run started again; state and message after that."""
        with contextlib.suppress(OSError, UserError):  # the requeue does not wait for the file server
            self.status.flush(deadlines.WRITE_S)
        try:
            how, successor = come_back(self.run_dir, config, ending, self._job, self._requests)
        except Stopped as stopped:
            state, message = RULES[stopped.request.cause].state, f"{message}; then {stopped.request.message}"
            self.status.update(state=state, message=message)
            return state, message
        self.status.update(message=f"{message}; {how}", job_id=successor)
        return "preempted", f"{message}; {how}"


def _takes_lent(config: Config) -> bool:
    try:
        return in_thread(partial(takes_lent, config), within_s=OWN_S)
    except TimeoutError:  # of a recipe whose module hangs: the gate says so
        return False
