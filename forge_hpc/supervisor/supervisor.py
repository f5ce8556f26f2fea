"""The supervisor of a node: what ``python -m forge_hpc.run --run-dir D`` is, on every node of an allocation.

This process is the node's supervisor. It imports nothing heavy, starts the node's Monarch worker and, on the first
node, the controller, and is the owner of all that these start: whatever the way out, it ends every process below it,
and on the first node it leaves the true state in ``status.json``.

    node 0   lock ─ certificates ─ worker ─ (warm start) ─ controller ─► outcome ─► status.json ─► requeue
    node n              certificates ─ worker ─────────────────────────► outcome
    job script, where srun fails      did the first node say how it ended? ──► status.json ─► requeue   (--after)

It finds everything in the run directory, so the first start, a restart and a new job on the same directory are one.

Signals only set a flag, and only the first node acts on it: it asks Slurm what the signal means. A ``scancel`` ends the
run; Ctrl-C lets it finish its step and save, and a second one ends it at once; preemption, the walltime and what nobody
explains let it save and leave, and the job is requeued. The walltime is also seen coming by our own clock.

A file system that fails keeps nobody from coming back: what cannot be written on the way out is said on stderr.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from forge_hpc import slurm
from forge_hpc.checkpoint.store import steps_in
from forge_hpc.cluster.allocation import Allocation, host_address, interface_of
from forge_hpc.cluster.identity import make_job_identity, tls_environment
from forge_hpc.cluster.processes import become_subreaper, end_descendants
from forge_hpc.cluster.rendezvous import Rendezvous, RendezvousTimeout
from forge_hpc.config import Config, UserError, load_config, print_error, read_config, save_config, signal_lead_s
from forge_hpc.files import in_thread
from forge_hpc.observability.summary import final_summary
from forge_hpc.run_dir import RunDir
from forge_hpc.status_writer import StatusWriter
from forge_hpc.supervisor.silence import LOOK_S, Silence
from forge_hpc.supervisor.starts import FAILURES, StartLog
from forge_hpc.supervisor.walltime import SlurmClock, Walltime

STOP_S = 9.0
"""Seconds that the controller gets to end in good order when the run is cancelled; with the rest it stays below 15."""
KILL_WAIT_S = 15.0
"""Seconds after the signal in which the run must have saved where Slurm kills without a deadline that it tells (after
KillWait, often 30): then there are as many to end the processes, to ask Slurm once more, and to requeue."""
ANSWER_S = 5.0
"""How long Slurm may take for an answer while it waits to kill."""
REQUEUE_S = 4.0
"""What is left for the requeue before Slurm kills."""
COME_BACK_S = 180.0
"""How long Slurm is asked to start the run again where nobody kills: a backup takes slurmctld over after two minutes,
unless the site says otherwise."""
RETRY_S = 2.0
POLL_S = 0.2
BEAT_S = 5.0
SILENT_S = 300.0
"""A controller without a sign of life for so long hangs; for ``cluster.start_timeout_s`` where that is more."""
OTHERS_S = 60.0
"""So much longer the other nodes wait: the first one is to end it, and to say why."""
WRITE_S = 3.0
"""How long what matters more, such as the requeue, waits for the file system."""
LEASE_S = 120.0
"""How long the last write may take: longer than a file server waits for a reader that has died."""
LEFT_CODE = 75
"""Exit code of a run that has saved and left (EX_TEMPFAIL): neither done nor failed."""


T = TypeVar("T")


@dataclass(frozen=True)
class Wish:
    """What a signal, or the clock, wants of the run."""

    cause: str
    """``cancelled``: end at once. Anything else: save, leave, and come back."""
    message: str
    within_s: float | None
    """Then Slurm kills; None where nobody does. Of a run that is cancelled: how long it may take to save; None where it
    is not to save at all."""

    @property
    def cancels(self) -> bool:
        return self.cause == "cancelled"


MEANINGS = {
    slurm.Cause.PREEMPTED: "preempted by another job",
    slurm.Cause.WALLTIME: "the walltime is near",
    slurm.Cause.REQUEUED: "requeued by Slurm",
    slurm.Cause.CANCELLED: "cancelled",
    slurm.Cause.NODE_FAIL: "a node is lost",
    slurm.Cause.UNKNOWN: "asked to leave",
}


class Stopped(Exception):
    """The run is to end before there is anything to save."""

    def __init__(self, wish: Wish) -> None:
        super().__init__(wish.message)
        self.wish = wish


@dataclass(frozen=True)
class Ended:
    """How a start has ended."""

    cause: str
    """completed, cancelled, failed, crash (worth another start), or why the run has left."""
    message: str = ""
    hint: str | None = None
    lost_nodes: tuple[str, ...] = ()
    """Slurm's names of nodes that the next start is to do without."""


class Supervisor:
    """One node's part of one start of a run."""

    def __init__(self, run_dir: RunDir, allocation: Allocation, *, summary: bool = True) -> None:
        self.run_dir = run_dir
        self.allocation = allocation
        self._summary = summary
        self._started = time.monotonic()
        self._signals: list[tuple[int, float]] = []
        self._leaving: Wish | None = None
        self._clock = SlurmClock()
        self._walltime: Walltime | None = None
        self._facts: slurm.JobFacts | None = None
        self._preemption: slurm.Preemption | None = None
        self._config: Config | None = None
        self._arguments: list[str] | None = None
        self._kill_at: float | None = None
        self._hung = ""
        self._scratch: Path | None = None
        self._status = StatusWriter(run_dir)
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2):
            signal.signal(signum, self._on_signal)

    def _on_signal(self, signum: int, frame: Any) -> None:
        self._signals.append((signum, time.monotonic()))  # the handler only sets a flag

    # ---- what is wanted of us

    def _wish(self) -> Wish | None:
        """What signals and the clock want, when it is new."""
        wish = None
        while self._signals and (wish is None or not wish.cancels):
            signum, came = self._signals.pop(0)
            if signum == signal.SIGUSR2 and self._walltime is not None and self._walltime.is_announced():
                continue  # Slurm's warning, which may come much too early: our own clock decides
            wish = self._meaning(signum, came)
        if wish is None and self._leaving is None and self._walltime is not None and self._walltime.is_near():
            wish = Wish("walltime", "the walltime is near", self._until(self._walltime.remaining_s()))
        return wish

    def _until(self, left_s: float | None) -> float | None:
        """Remember when Slurm kills, where it has told."""
        if left_s is not None:
            self._kill_at = time.monotonic() + left_s
        return left_s

    def _ask(self) -> slurm.JobFacts | None:
        """What Slurm says of the job now; what it said last is kept."""
        facts = slurm.job_facts(self.allocation.job_id, timeout_s=ANSWER_S)
        self._facts = facts or self._facts
        return facts

    def _is_cancelled(self) -> bool:
        in_slurm, requeues = self.allocation.in_slurm, self.allocation.requeues
        return in_slurm and slurm.cause_of(self._ask(), signal.SIGTERM, requeues) is slurm.Cause.CANCELLED

    def _meaning(self, signum: int, came: float) -> Wish:
        name = signal.Signals(signum).name
        if signum in (signal.SIGINT, signal.SIGHUP):
            return Wish("cancelled", f"stopped by {name}", self._patience_s(signum))
        if not self.allocation.in_slurm:
            return Wish("asked", f"asked to leave by {name}", None)
        facts = self._ask()
        cause = slurm.cause_of(facts, signum, self.allocation.requeues)
        within_s: float | None = None
        if facts is not None and facts.state == "RUNNING" and cause in (slurm.Cause.PREEMPTED, slurm.Cause.WALLTIME):
            self._clock.has_seen(facts.start_time)
            end_time = facts.end_time
            if cause is slurm.Cause.PREEMPTED and (how := self._how_preempted(facts)) is not None:
                end_time = how.end_of_grace(facts)
            if end_time is not None and (left_s := end_time - self._clock.now()) > 0:
                within_s = self._until(left_s)
        if within_s is None:  # the kill follows SIGTERM, and nothing follows SIGUSR2
            within_s = SILENT_S if signum == signal.SIGUSR2 else KILL_WAIT_S - (time.monotonic() - came)
        return Wish(cause.value, f"{MEANINGS[cause]} ({name})", within_s)

    def _patience_s(self, signum: int) -> float:
        """How long a run that somebody at its terminal stops may take to save: what step and save have taken before,
        and nothing when it is asked for a second time (a terminal that is closed may send SIGHUP twice)."""
        if signum == signal.SIGINT and self._leaving is not None and self._leaving.cancels:
            return 0.0
        if self._config is None:
            return STOP_S
        return max(STOP_S, min(SILENT_S, measured_lead_s(self.run_dir, self._config)))

    def _check_wish(self) -> None:
        """Raise Stopped where there is nothing to save yet, and somebody wants the run to end."""
        if (wish := self._wish()) is not None:
            raise Stopped(wish)

    def _check_interrupt(self) -> None:
        """On the other nodes: the first one decides; only who sits at a terminal is obeyed."""
        if {signal.SIGINT, signal.SIGHUP} & {signum for signum, _ in self._signals}:
            raise Stopped(Wish("cancelled", "stopped by hand", None))

    def _child_env(self, tls: Path) -> dict[str, str]:
        """Environment of the node's processes."""
        address = host_address(self.allocation.num_nodes)
        # Where the host's name resolves to loopback, gloo would listen where no other host reaches it.
        interface = {"GLOO_SOCKET_IFNAME": interface_of(address)} if self.allocation.num_nodes > 1 else {}
        supervision = {"HYPERACTOR_MESH_SUPERVISION_POLL_FREQUENCY": "1s"}  # how soon a dead process is noticed
        self._scratch = self._scratch or Path(tempfile.mkdtemp(prefix="forge-hpc-"))
        scratch = {"TMPDIR": str(self._scratch)}  # what dead processes leave there goes with us
        return {**interface, **os.environ, **supervision, **scratch, **tls_environment(tls)}

    # ---- both kinds of node

    def run(self) -> int:
        """Exit code of this node."""
        become_subreaper()
        try:
            return self._first_node() if self.allocation.node_id == 0 else self._other_node()
        except UserError as error:
            print_error(error)
            return 1 if self.allocation.in_slurm else 2
        except (Stopped, RendezvousTimeout, OSError) as error:
            print(f"node {self.allocation.node_id}: {error}", file=sys.stderr)
            if isinstance(error, Stopped) and not error.wish.cancels and self.allocation.in_slurm:
                with unhindered(), contextlib.suppress(Stopped):  # still without the lock: the status is another's
                    config = read_config(self.run_dir.config)
                    print(self._come_back(config, Ended(error.wish.cause))[0], file=sys.stderr)
            return 1
        finally:
            end_descendants(grace_s=0)
            if self._scratch is not None:
                shutil.rmtree(self._scratch, ignore_errors=True)

    def _rendezvous(self, key: str) -> Rendezvous:
        return Rendezvous(self.run_dir.rendezvous / key)

    def _key(self) -> str:
        """Names this start in the same way on all nodes of a Slurm step."""
        a = self.allocation
        return f"{a.job_id}.{a.requeues}.{os.environ.get('SLURM_STEP_ID', '0')}"

    def _introduce(self, rendezvous: Rendezvous) -> str:
        """Tell the first node by which names the others reach this one, and Slurm's name of it."""
        address = host_address(self.allocation.num_nodes)
        names = [address, socket.gethostname(), "localhost"]
        slurm_name = os.environ.get("SLURMD_NODENAME", socket.gethostname())
        record = {"address": address, "names": names, "slurm_name": slurm_name}
        rendezvous.publish(f"node-{self.allocation.node_id}", record)
        return address

    def _start_worker(self, rendezvous: Rendezvous, address: str, tls: Path, log_dir: Path) -> subprocess.Popen[bytes]:
        node = self.allocation.node_id
        command = [sys.executable, "-m", "forge_hpc.cluster.worker", "--rendezvous", str(rendezvous.directory)]
        command += ["--node", str(node), "--address", address, "--parent", str(os.getpid())]
        with (log_dir / f"worker-{node}.log").open("ab") as log:
            return subprocess.Popen(
                undisturbed(command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=self._child_env(tls),
            )

    def _tell_worker_ended(self, rendezvous: Rendezvous, worker: subprocess.Popen[bytes]) -> str:
        """Tell the controller, which would notice much later, that nothing runs on this node any more."""
        message = f"its Monarch worker {how_it_ended(worker.returncode)}"
        rendezvous.publish(f"ended-{self.allocation.node_id}", {"message": message})
        print(f"node {self.allocation.node_id}: {message}", file=sys.stderr)
        return message

    def _other_node(self) -> int:
        rendezvous = self._rendezvous(self._key())
        address = self._introduce(rendezvous)
        config = read_config(self.run_dir.config)
        timeout_s = config.cluster.start_timeout_s
        start = rendezvous.wait_for_any(["start", "outcome"], timeout_s, self._check_interrupt)
        if "code" in start:
            return start["code"]
        worker = self._start_worker(rendezvous, address, Path(start["tls"]), Path(start["log_dir"]))
        silence, told = Silence(self.run_dir), False
        while True:
            self._check_interrupt()
            outcome = None
            try:
                outcome = rendezvous.look("outcome")
            except FileNotFoundError:  # a newer start has begun, and removed what ours left
                print(f"node {self.allocation.node_id}: this start is over", file=sys.stderr)
                return 1
            except OSError:  # a pause of the file server: it counts as silence
                pass
            if outcome is not None:
                return 1 if outcome["code"] else 0
            if worker.poll() is not None and not told:
                if worker.returncode == 0:
                    return 0
                with contextlib.suppress(OSError):  # at the next look, then
                    self._tell_worker_ended(rendezvous, worker)
                    told = True
            if silence.look() > patience_s(config) + OTHERS_S:
                print(f"node {self.allocation.node_id}: the first node fell silent", file=sys.stderr)
                return 1
            time.sleep(POLL_S if self._signals else LOOK_S)

    # ---- the first node

    def _first_node(self) -> int:
        allocation, run_dir = self.allocation, self.run_dir
        job_id = allocation.job_id if allocation.in_slurm else None
        config = self._config = read_config(run_dir.config)
        with run_dir.lock(job_id, requeues=allocation.requeues, stop=self._check_wish) as lock:
            self._lock = lock
            self._arguments = slurm.script_arguments(os.environ["SLURM_JOB_ID"]) if job_id else None
            return self._locked(config, job_id)

    def _locked(self, config: Config, job_id: str | None) -> int:
        run_dir = self.run_dir
        status = run_dir.read_status()
        if status is not None and status.state == "completed" and status.step >= config.trainer.training.steps:
            print(f"{run_dir} is complete: nothing to do")
            self._rendezvous(self._key()).publish("outcome", {"code": 0, "message": ""})
            return 0
        starts, log_dir, began = StartLog(run_dir), run_dir.logs, False
        rendezvous: Rendezvous | None = None
        try:
            restart = run_dir.next_restart(job_id)
            log_dir = run_dir.create_log_dir(job_id, restart)
            self._status.tell(state="starting", restarts=restart, job_id=job_id, message="")
            in_thread(partial(self._status.flush, SILENT_S), self._check_wish)
            nodes, requeues = self.allocation.num_nodes, self.allocation.requeues
            begin = partial(starts.begin, job_id=job_id, restart=restart, nodes=nodes, requeues=requeues)
            in_thread(begin, self._check_wish)
            began = True
            rendezvous = self._rendezvous(self._key() if job_id else f"local.{restart}.{os.getpid()}")
            self._clean(keep=rendezvous.directory.name)
            if job_id:
                lead_s = partial(measured_lead_s, run_dir, config)
                self._walltime = Walltime(job_id, lead_s, self._clock)
                self._facts = self._walltime.facts
            ended = self._start(config, rendezvous, run_dir.tls / rendezvous.directory.name, log_dir)
        except Stopped as stopped:
            ended = Ended(stopped.wish.cause, stopped.wish.message)
        except UserError as error:
            ended = Ended("failed", error.message, error.hint)
        except RendezvousTimeout as error:
            ended = Ended("crash", str(error))
        except OSError as error:  # a full disk, a pause of the file server: worth another start
            traceback.print_exc()
            ended = Ended("crash", f"{type(error).__name__}: {error}")
        except Exception as error:  # whatever it is, the run has failed and its status says so
            traceback.print_exc()
            ended = Ended("failed", f"{type(error).__name__}: {error}")
        finally:
            end_descendants(grace_s=0)
            if rendezvous is not None:
                shutil.rmtree(run_dir.tls / rendezvous.directory.name, ignore_errors=True)
        if rendezvous is not None:
            with contextlib.suppress(OSError):
                if rendezvous.look("outcome") is None:
                    rendezvous.publish("outcome", {"code": 1, "message": ended.message})
        return self._finish(config, ended, starts, log_dir, began=began)

    def _finish(self, config: Config, ended: Ended, starts: StartLog, log_dir: Path, *, began: bool) -> int:
        """Leave the true state behind, come back where that is wanted, and say how it ended.

        ``began`` says that the log of starts has the beginning of this one.
        """
        run_dir, message = self.run_dir, ended.message
        if not self._lock.confirm(WRITE_S):  # the run, its status and its log of starts are another's now
            print(f"error: {message}", file=sys.stderr)
            return 1
        if ended.cause == "completed":
            self._status.tell(state="completed")
            with unhindered():
                self._status.flush(LEASE_S)
            with unhindered():
                in_thread(partial(starts.end, state="completed", cause=ended.cause, message=""), within_s=LEASE_S)
            if self._summary:
                with unhindered():
                    print("\n" + final_summary(run_dir, time.monotonic() - self._started), flush=True)
            return 0
        state, code = {"cancelled": ("cancelled", 130), "failed": ("failed", 1)}.get(
            ended.cause, ("preempted", LEFT_CODE)
        )
        is_failure = ended.cause in FAILURES
        if is_failure:
            failures = 1
            with unhindered():
                failures += starts.failures_without_progress()
            if not self.allocation.in_slurm or (not comes_back(config) and ended.cause != "walltime"):
                state, code = "failed", 1
            elif failures > config.cluster.max_restarts:
                state, code, message = "failed", 1, f"{message} ({failures} failures without progress)"
        if state == "preempted" and self._is_cancelled():  # while the run was saved
            state, code, message = "cancelled", 130, f"{message}; then cancelled"
        recorded = False
        with unhindered():
            in_thread(partial(starts.end, state=state, cause=ended.cause, message=message), within_s=WRITE_S)
            recorded = True
        if state == "preempted" and is_failure and not (began or recorded):  # nothing would end such a row of starts
            state, code, message = "failed", 1, f"{message}; not started again, since starts cannot be counted"
        self._status.tell(state=state, message=message)
        if state == "preempted" and self.allocation.in_slurm:
            with contextlib.suppress(OSError, UserError):  # the requeue does not wait for the file server
                self._status.flush(WRITE_S)
            try:
                how, successor = self._come_back(config, ended)
                message = f"{message}; {how}"
                self._status.tell(message=message, job_id=successor)
            except Stopped as stopped:
                state, code, message = stopped.wish.cause, 130, f"{message}; then {stopped.wish.message}"
                self._status.tell(state=state, message=message)
        if state != "preempted":
            self._stay_ended()
        with unhindered():
            self._status.flush(LEASE_S)
        print(f"logs: {log_dir}", file=sys.stderr)
        print(f"{state if state != 'failed' else 'error'}: {message}", file=sys.stderr)
        if ended.hint:
            print(f"hint: {ended.hint}", file=sys.stderr)
        sys.stderr.flush()
        return code

    def _come_back(self, config: Config, ended: Ended) -> tuple[str, str | None]:
        """See that the run is started again: how, and the id of the job that goes on where it is another.

        A Slurm that does not answer is asked again until it kills, or for ``COME_BACK_S``. Raises Stopped where the
        run is cancelled in the meantime.
        """
        by_hand = f"go on with forge-hpc resume {self.run_dir}"
        if ended.cause == slurm.Cause.REQUEUED:
            return "Slurm starts it again", None
        if not comes_back(config):
            return f"slurm.requeue={config.slurm.requeue}: {by_hand}", None
        facts, requeues = self._facts, config.slurm.requeue == "auto"
        if facts is not None and facts.preempted and (how := self._how_preempted(facts)) is not None:
            if how.starts_again(facts) and not ended.lost_nodes:
                return "Slurm starts it again", None
            requeues = requeues and not how.marks(facts)
        now = time.monotonic()
        until = (
            now + COME_BACK_S
            if self._kill_at is None
            else min(now + COME_BACK_S, max(self._kill_at, now + KILL_WAIT_S))
        )
        while True:
            try:
                if requeues:
                    try:
                        slurm.requeue(self.allocation.job_id, ended.lost_nodes)
                        return "requeued", None
                    except slurm.SlurmSilent:
                        raise
                    except slurm.SlurmRefused as refusal:
                        print(f"no requeue: {refusal}", file=sys.stderr)
                successor = self._submit_successor(config, ended)
                return f"job {successor} goes on", successor
            except (slurm.SlurmSilent, OSError) as silence:
                if time.monotonic() > until:
                    return f"Slurm has not been reached ({silence}): {by_hand}", None
                print(f"asking again: {silence}", file=sys.stderr, flush=True)
            except slurm.SlurmRefused as refusal:
                if config.slurm.requeue != "auto" or requeues:
                    return f"Slurm takes no successor ({refusal}): {by_hand}", None
                print(f"no successor: {refusal}", file=sys.stderr)
                requeues = True  # better a job that ends as PREEMPTED than none
                continue
            if (wish := self._wish()) is not None and wish.cancels:
                raise Stopped(wish)
            time.sleep(RETRY_S)

    def _how_preempted(self, facts: slurm.JobFacts) -> slurm.Preemption | None:
        """How the job is, or was, preempted: asked once, since there is little time later."""
        if self._preemption is None:
            self._preemption = slurm.preemption(facts, timeout_s=ANSWER_S)
        return self._preemption

    def _stay_ended(self) -> None:
        """Keep Slurm from starting a run again that has failed, or was stopped: it may still act on a preemption."""
        facts = self._ask() if self.allocation.in_slurm else None
        if facts is None or not (facts.preempted or facts.restarts):
            return
        if (how := self._how_preempted(facts)) is not None and how.may_start_again(facts):
            try:
                slurm.forbid_requeue(self.allocation.job_id)
            except slurm.SlurmRefused as refusal:
                print(f"Slurm may start the job again: {refusal}", file=sys.stderr)

    def _submit_successor(self, config: Config, ended: Ended) -> str:
        facts = self._facts or self._ask()
        if facts is None:
            raise slurm.SlurmSilent("it says nothing of the job")
        # A job that outlives its nodes has fewer now than it began with.
        facts = replace(facts, num_nodes=self.allocation.num_nodes)
        no_kill = config.cluster.spare_nodes > 0
        return slurm.submit_successor(
            facts, self.run_dir.path, ended.lost_nodes, no_kill=no_kill, arguments=self._arguments
        )

    # ---- the job script, when srun has ended

    def after(self, code: int) -> int:
        """See to a start whose supervisor has died without a word; returns what the job is to end with.

        Args:
            code: srun's. It stands, except where the run is complete and srun complains of a node that was lost.
        """
        config, starts = read_config(self.run_dir.config), StartLog(self.run_dir)
        job_id, requeues = self.allocation.job_id, self.allocation.requeues
        with self.run_dir.lock(job_id, requeues=requeues, stop=self._check_wish) as self._lock:
            begin, end = starts.newest()
            if begin is None or (begin["job_id"], begin.get("requeues")) != (job_id, requeues):
                return code
            if end is not None and end["state"] == "completed":
                print(f"the run is complete; srun's exit code {code} is that of a lost node", file=sys.stderr)
                return 0
            if end is not None or code == LEFT_CODE:  # it has seen to its return, even if it could not write that
                return code
            facts, until = self._ask(), time.monotonic() + COME_BACK_S
            while facts is None and time.monotonic() < until:
                self._check_wish()
                time.sleep(RETRY_S)
                facts = self._ask()
            cause = slurm.cause_of(facts, signal.SIGTERM, requeues)
            if cause is not slurm.Cause.REQUEUED:
                died = f"a supervisor has died without a word (srun: {code})"  # one that dies takes the others with it
                why = died if cause is slurm.Cause.UNKNOWN else f"{MEANINGS[cause]}; {died}"
                ended = Ended("crash" if cause is slurm.Cause.UNKNOWN else cause.value, why)
                self._finish(config, ended, starts, self.run_dir.log_dir(job_id, begin["restart"]), began=True)
        return code

    def _clean(self, keep: str) -> None:
        """Remove what starts that were killed have left: keys, and records of who was where."""
        for directory in (self.run_dir.tls, self.run_dir.rendezvous):
            for path in directory.iterdir() if directory.is_dir() else ():
                if path.name != keep:
                    shutil.rmtree(path, ignore_errors=True)

    def _start(self, config: Config, rendezvous: Rendezvous, tls: Path, log_dir: Path) -> Ended:
        allocation = self.allocation
        address = self._introduce(rendezvous)
        names = [f"node-{n}" for n in range(allocation.num_nodes)]
        nodes = rendezvous.wait(names, config.cluster.start_timeout_s, self._check_wish)
        make_job_identity(tls, [name for node in nodes for name in node["names"]])
        start = {"num_nodes": allocation.num_nodes, "address": address, "tls": str(tls), "log_dir": str(log_dir)}
        rendezvous.publish("start", start)
        worker = self._start_worker(rendezvous, address, tls, log_dir)
        if config.model.path == "warmstart" and (ended := self._warm_start(config)) is not None:
            return ended
        command = [sys.executable, "-m", "forge_hpc.controller", "--run-dir", str(self.run_dir.path)]
        command += ["--rendezvous", str(rendezvous.directory), "--log-dir", str(log_dir), "--parent", str(os.getpid())]
        controller = subprocess.Popen(
            undisturbed(command), stdin=subprocess.PIPE, start_new_session=True, env=self._child_env(tls)
        )
        wish = self._watch(controller, worker, rendezvous, patience_s(config))
        if wish is not None and self._lock.lost.is_set():
            return Ended(wish.cause, wish.message)
        outcome = None
        with contextlib.suppress(OSError):
            outcome = patiently(lambda: rendezvous.look("outcome"), REQUEUE_S)
        if wish is not None and wish.cancels and (outcome is None or outcome["code"] not in (0, 1)):
            return self._cancelled(config, wish)
        if outcome is None and controller.returncode in (0, 4):  # it could not be written
            outcome = {"code": controller.returncode, "cause": "node", "message": "a node is lost", "lost_nodes": []}
            if wish is not None:
                outcome |= {"cause": "asked", "message": wish.message}
        if outcome is None:
            if wish is not None:
                return Ended(wish.cause, f"{wish.message}; there was no time to save, the newest checkpoint stands")
            how = f"the controller {how_it_ended(controller.returncode)} and left no reason"
            return Ended("crash", self._hung or how)
        if outcome["code"] == 0:
            return Ended("completed")
        if outcome["code"] == 4:
            lost = tuple(nodes[node]["slurm_name"] for node in outcome["lost_nodes"])
            cause = wish.cause if wish is not None and outcome["cause"] == "asked" else outcome["cause"]
            return Ended(cause, outcome["message"], None, lost)
        if outcome.get("is_loss"):
            return Ended("crash", outcome["message"])
        return Ended("failed", outcome["message"], outcome.get("hint"))

    def _watch(
        self,
        controller: subprocess.Popen[bytes],
        worker: subprocess.Popen[bytes],
        rendezvous: Rendezvous,
        max_silence_s: float,
    ) -> Wish | None:
        """Wait for the controller's end, and pass on to it what is wanted of the run; returns the last wish."""
        deadline, told, silence, looked = None, False, Silence(self.run_dir), time.monotonic()
        while controller.poll() is None:
            if (wish := self._wish()) is not None:
                stops = wish.cancels and not wish.within_s
                within_s = STOP_S if wish.cancels and wish.within_s is None else wish.within_s
                if within_s is not None:
                    until = time.monotonic() + max(1.0, within_s - REQUEUE_S)
                    deadline = until if deadline is None else min(deadline, until)
                if wish.cancels and not stops:
                    self._promise(within_s)
                if wish.cancels or self._leaving is None:
                    tell(controller, "stop" if stops else f"leave {wish.message}")
                self._leaving = wish
            if deadline is not None and time.monotonic() > deadline:
                controller.kill()
            if time.monotonic() - looked > LOOK_S:
                looked = time.monotonic()
                if (silent_s := silence.look()) > max_silence_s and self._can_write():
                    self._hung = f"the controller gave no sign of life for {silent_s:.0f} s"
                    controller.kill()
            if self._lock.lost.is_set():
                controller.kill()
                return Wish("taken over", f"another start has taken {self.run_dir} over", None)
            if not told and worker.poll() not in (None, 0):
                with contextlib.suppress(OSError):  # at the next look, then
                    self._tell_worker_ended(rendezvous, worker)
                    told = True
                deadline = deadline or time.monotonic() + SILENT_S  # the controller saves what it can, and leaves
            time.sleep(POLL_S)
        return self._leaving

    def _promise(self, within_s: float | None) -> None:
        """Tell whoever pressed Ctrl-C what happens now, and what a second one costs."""
        step, saved = self._steps()
        what = f"stopping: what is under way is finished and saved, in at most {within_s or 0:.0f} s"
        cost = f"Ctrl-C again ends at once, and {_steps_again(step - saved)}"
        print(f"{what}; {cost}", file=sys.stderr, flush=True)

    def _steps(self) -> tuple[int, int]:
        """Optimizer steps done, and those that the newest checkpoint has."""
        status, saved = None, 0
        with contextlib.suppress(OSError, UserError):
            status = self.run_dir.read_status()
        with contextlib.suppress(OSError):
            saved = max(steps_in(self.run_dir.checkpoints), default=0)
        return max(saved, status.step if status is not None else 0), saved

    def _cancelled(self, config: Config, wish: Wish) -> Ended:
        """How a run has ended that was cancelled: what is lost, and how to go on."""
        resume = f"forge-hpc resume {shlex.quote(str(self.run_dir))}"
        if config.recipe == "eval":
            return Ended("cancelled", wish.message, f"{resume} begins the evaluation again")
        step, saved = self._steps()
        if not step:
            return Ended("cancelled", f"{wish.message}, before the first step", f"{resume} begins again")
        export = f"; forge-hpc export {shlex.quote(str(self.run_dir))} writes its model" if saved else ""
        if saved == step:
            return Ended("cancelled", f"{wish.message} after step {step}, which is saved", f"{resume} goes on{export}")
        stands = f"the newest checkpoint is of step {saved}" if saved else "there is no checkpoint"
        message = f"{wish.message} after step {step}; {stands}: {_steps_again(step - saved)}"
        return Ended("cancelled", message, f"{resume} goes on{export}")

    def _can_write(self) -> bool:
        """Whether it is not the file system that keeps signs of life from being written."""
        try:
            in_thread(lambda: os.utime(self.run_dir.path / ".lock"), within_s=WRITE_S)
        except OSError:
            return False
        return True

    def _warm_start(self, config: Config) -> Ended | None:
        """Make the model that the run starts from, once: a run of its own, on this node alone. None when it is done."""
        run_dir = RunDir(self.run_dir.warmstart)
        status = run_dir.read_status()
        if status is not None and status.state == "completed":
            return None
        if not run_dir.config.exists():
            warm = load_config(config.warmstart.config, config.warmstart.overrides)
            warm.data.template_date = warm.data.template_date or config.data.template_date
            save_config(warm, run_dir.create().config)
        print(f"warm start in {run_dir}", flush=True)
        environ = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
        command = [sys.executable, "-m", "forge_hpc.run", "--run-dir", str(run_dir.path), "--no-summary"]
        command += ["--parent", str(os.getpid())]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, env=environ)
        beat = -BEAT_S
        while process.poll() is None:
            if (wish := self._wish()) is not None:
                process.send_signal(signal.SIGINT if wish.cancels else signal.SIGTERM)
                patience_s = max(STOP_S, wish.within_s or 0.0) + 2 if wish.cancels else wish.within_s or SILENT_S
                self._leaving = wish
                self._end_warm_start(process, patience_s if wish.cancels else patience_s - REQUEUE_S)
                return Ended(wish.cause, f"{wish.message}, in the warm start")
            if time.monotonic() - beat > BEAT_S:
                self._status.tell()
                beat = time.monotonic()
            time.sleep(POLL_S)
        if process.returncode == 0:
            return None
        if (wish := self._wish()) is not None:  # Slurm signals every process of a step
            return Ended(wish.cause, f"{wish.message}, in the warm start")
        if process.returncode == LEFT_CODE:  # so it did, and the signal meant nothing to us
            return self._warm_start(config)
        _, end = StartLog(run_dir).newest()
        if end is None:
            return Ended("crash", f"the warm start in {run_dir} {how_it_ended(process.returncode)}")
        cause = "crash" if end["cause"] in FAILURES else "failed"
        return Ended(cause, f"the warm start in {run_dir} failed: {end['message']}")

    def _end_warm_start(self, process: subprocess.Popen[bytes], timeout_s: float) -> None:
        """Give it time to save and end; then none. A second Ctrl-C is handed on."""
        deadline = time.monotonic() + timeout_s
        while process.poll() is None:
            if (wish := self._wish()) is not None and wish.cancels:
                process.send_signal(signal.SIGINT)
                deadline = min(deadline, time.monotonic() + max(STOP_S, wish.within_s or 0.0) + 2)
            if time.monotonic() > deadline:
                process.kill()
            time.sleep(POLL_S)


def _steps_again(num: int) -> str:
    """What it costs that so many optimizer steps are not saved."""
    if num <= 0:
        return "no step is lost"
    return f"{num} optimizer step{'s' * (num > 1)} will be done again"


def patience_s(config: Config) -> float:
    """For how long a controller may give no sign of life: actors that start, and data that is read, take their time."""
    return max(SILENT_S, config.cluster.start_timeout_s)


def comes_back(config: Config) -> bool:
    """Whether the run is to be started again by itself."""
    return config.slurm.requeue in ("auto", "successor")


def measured_lead_s(run_dir: RunDir, config: Config) -> float:
    """Seconds before the walltime at which the run is to leave, by what it has measured."""
    status = None
    with contextlib.suppress(OSError, UserError):
        status = run_dir.read_status()
    return signal_lead_s(config, status.lead_s if status is not None else 0.0)


@contextlib.contextmanager
def unhindered() -> Iterator[None]:
    """Go on after what the file system fails, or what another has damaged there; stderr says what it was."""
    try:
        yield
    except (OSError, UserError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)


def patiently(look: Callable[[], T], within_s: float) -> T:
    """What ``look`` returns, as soon as the file system lets it. Raises its OSError after ``within_s`` seconds."""
    until = time.monotonic() + within_s
    while True:
        try:
            return look()
        except OSError:
            if time.monotonic() > until:
                raise
        time.sleep(POLL_S)


def how_it_ended(code: int) -> str:
    """An exit code as subprocess gives it, in words."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"


def tell(controller: subprocess.Popen[bytes], line: str) -> None:
    """Write a line to the controller's standard input."""
    assert controller.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it ends already
        controller.stdin.write(f"{line}\n".encode())
        controller.stdin.flush()


def undisturbed(command: Sequence[str]) -> list[str]:
    """``command``, deaf to signals that ask to stop, as are all processes that it starts.

    Slurm signals every process of a step, and a terminal all of its job; only the supervisor is to answer.
    """
    return ["sh", "-c", "trap '' TERM INT USR1 USR2; exec \"$@\"", "sh", *command]
