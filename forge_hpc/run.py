"""What every node of an allocation starts: ``python -m forge_hpc.run --run-dir D``.

This process is the node's supervisor. It imports nothing heavy, starts the node's Monarch worker and, on the first
node, the controller, and is the owner of all that these start: whatever the way out, it ends every process below it,
and on the first node it leaves the true state in ``status.json``.

    node 0   lock ─ certificates ─ worker ─ (warm start) ─ controller ─► outcome ─► status.json ─► requeue
    node n              certificates ─ worker ─────────────────────────► outcome

It finds everything in the run directory, so the first start, a restart and a new job on the same directory are one.

Signals only set a flag, and only the first node acts on it: it asks Slurm what the signal means. A ``scancel`` ends the
run; preemption, the walltime and what nobody explains let it save and leave, and the job is requeued. The walltime is
also seen coming by our own clock.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge_hpc.cluster import slurm
from forge_hpc.cluster.allocation import Allocation, host_address, interface_of
from forge_hpc.cluster.identity import make_job_identity, tls_environment
from forge_hpc.cluster.processes import become_subreaper, die_with_parent, end_descendants
from forge_hpc.cluster.rendezvous import Rendezvous, RendezvousTimeout
from forge_hpc.cluster.starts import FAILURES, StartLog
from forge_hpc.cluster.walltime import Walltime
from forge_hpc.config import Config, UserError, load_config, print_error, read_config, save_config, signal_lead_s
from forge_hpc.observability.summary import final_summary
from forge_hpc.run_dir import RunDir

STOP_S = 9.0
"""Seconds that the controller gets to end in good order when the run is cancelled; with the rest it stays below 15."""
KILL_WAIT_S = 15.0
"""Seconds in which the run must have saved where Slurm kills without a deadline that it tells (KillWait, often 30)."""
REQUEUE_S = 4.0
"""What is left for the requeue before Slurm kills."""
POLL_S = 0.2
BEAT_S = 5.0
LOOK_S = 2.0
"""How often the other nodes look at the shared directory for the end."""
SILENT_S = 300.0
"""A first node whose status has not changed for this long is dead for the others."""
LEFT_CODE = 75
"""Exit code of a run that has saved and left (EX_TEMPFAIL): neither done nor failed."""


@dataclass(frozen=True)
class Wish:
    """What a signal, or the clock, wants of the run."""

    cause: str
    """``cancelled``: end at once. Anything else: save, leave, and come back."""
    message: str
    within_s: float | None
    """Then Slurm kills; None where nobody does."""

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
        self._signals: list[int] = []
        self._leaving: Wish | None = None
        self._walltime: Walltime | None = None
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2):
            signal.signal(signum, self._on_signal)

    def _on_signal(self, signum: int, frame: Any) -> None:
        self._signals.append(signum)  # the handler only sets a flag

    # ---- what is wanted of us

    def _wish(self) -> Wish | None:
        """What signals and the clock want, when it is new."""
        wish = None
        while self._signals and (wish is None or not wish.cancels):
            signum = self._signals.pop(0)
            if signum == signal.SIGUSR2 and self._walltime is not None and self._walltime.is_announced():
                continue  # Slurm's warning, which may come much too early: our own clock decides
            wish = self._meaning(signum)
        if wish is None and self._leaving is None and self._walltime is not None and self._walltime.is_near():
            wish = Wish("walltime", "the walltime is near", self._walltime.remaining_s())
        return wish

    def _meaning(self, signum: int) -> Wish:
        name = signal.Signals(signum).name
        if signum in (signal.SIGINT, signal.SIGHUP):
            return Wish("cancelled", f"stopped by {name}", None)
        if not self.allocation.in_slurm:
            return Wish("asked", f"asked to leave by {name}", None)
        facts = slurm.job_facts(self.allocation.job_id)
        cause = slurm.cause_of(facts, signum, self.allocation.requeues)
        left_s = None if facts is None or facts.end_time is None else facts.end_time - time.time()
        if left_s is not None and left_s > 0 and cause in (slurm.Cause.PREEMPTED, slurm.Cause.WALLTIME):
            within_s = left_s
        else:  # the kill follows SIGTERM, and nothing follows SIGUSR2
            within_s = SILENT_S if signum == signal.SIGUSR2 else KILL_WAIT_S
        return Wish(cause.value, f"{MEANINGS[cause]} ({name})", within_s)

    def _check_wish(self) -> None:
        """Raise Stopped where there is nothing to save yet, and somebody wants the run to end."""
        if (wish := self._wish()) is not None:
            raise Stopped(wish)

    def _check_interrupt(self) -> None:
        """On the other nodes: the first one decides; only who sits at a terminal is obeyed."""
        if signal.SIGINT in self._signals or signal.SIGHUP in self._signals:
            raise Stopped(Wish("cancelled", "stopped by hand", None))

    def _child_env(self, tls: Path) -> dict[str, str]:
        """Environment of the node's processes."""
        address = host_address(self.allocation.num_nodes)
        # Where the host's name resolves to loopback, gloo would listen where no other host reaches it.
        interface = {"GLOO_SOCKET_IFNAME": interface_of(address)} if self.allocation.num_nodes > 1 else {}
        supervision = {"HYPERACTOR_MESH_SUPERVISION_POLL_FREQUENCY": "1s"}  # how soon a dead process is noticed
        return {**interface, **os.environ, **supervision, **tls_environment(tls)}

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
                with contextlib.suppress(slurm.SlurmRefused):  # it was still waiting for the run's lock
                    slurm.requeue(self.allocation.job_id)
            return 1
        finally:
            end_descendants(grace_s=0)

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
        timeout_s = read_config(self.run_dir.config).cluster.start_timeout_s
        start = rendezvous.wait_for_any(["start", "outcome"], timeout_s, self._check_interrupt)
        if "code" in start:
            return start["code"]
        worker = self._start_worker(rendezvous, address, Path(start["tls"]), Path(start["log_dir"]))
        heartbeat, changed, told = None, time.monotonic(), False
        while True:
            self._check_interrupt()
            try:
                outcome = rendezvous.look("outcome")
            except FileNotFoundError:  # a newer start has begun, and removed what ours left
                print(f"node {self.allocation.node_id}: this start is over", file=sys.stderr)
                return 1
            if outcome is not None:
                return 1 if outcome["code"] else 0
            if worker.poll() is not None and not told:
                told = True
                if worker.returncode == 0:
                    return 0
                self._tell_worker_ended(rendezvous, worker)
            status = self.run_dir.read_status()
            if status is not None and status.heartbeat != heartbeat:
                heartbeat, changed = status.heartbeat, time.monotonic()
            if time.monotonic() - changed > SILENT_S:
                print(f"node {self.allocation.node_id}: the first node fell silent", file=sys.stderr)
                return 1
            time.sleep(POLL_S if self._signals else LOOK_S)

    # ---- the first node

    def _first_node(self) -> int:
        allocation, run_dir = self.allocation, self.run_dir
        job_id = allocation.job_id if allocation.in_slurm else None
        config = read_config(run_dir.config)
        with run_dir.lock(job_id, requeues=allocation.requeues, stop=self._check_wish) as lock:
            self._lock = lock
            return self._locked(config, job_id)

    def _locked(self, config: Config, job_id: str | None) -> int:
        run_dir = self.run_dir
        status = run_dir.read_status()
        if status is not None and status.state == "completed" and status.step >= config.trainer.training.steps:
            print(f"{run_dir} is complete: nothing to do")
            self._rendezvous(self._key()).publish("outcome", {"code": 0, "message": ""})
            return 0
        restart = run_dir.next_restart(job_id)
        log_dir = run_dir.create_log_dir(job_id, restart)
        run_dir.write_status(state="starting", restarts=restart, job_id=job_id, message="")
        starts = StartLog(run_dir)
        starts.begin(job_id=job_id, restart=restart, nodes=self.allocation.num_nodes)
        rendezvous = self._rendezvous(self._key() if job_id else f"local.{restart}.{os.getpid()}")
        self._clean(keep=rendezvous.directory.name)
        tls = run_dir.tls / rendezvous.directory.name
        if job_id:
            self._walltime = Walltime(job_id, lambda: signal_lead_s(config, measured_lead_s(run_dir)))
        try:
            ended = self._start(config, rendezvous, tls, log_dir)
        except Stopped as stopped:
            ended = Ended(stopped.wish.cause, stopped.wish.message)
        except UserError as error:
            ended = Ended("failed", error.message, error.hint)
        except RendezvousTimeout as error:
            ended = Ended("crash", str(error))
        except Exception as error:  # whatever it is, the run has failed and its status says so
            traceback.print_exc()
            ended = Ended("failed", f"{type(error).__name__}: {error}")
        finally:
            end_descendants(grace_s=0)
            shutil.rmtree(tls, ignore_errors=True)
        if rendezvous.look("outcome") is None:
            with contextlib.suppress(OSError):
                rendezvous.publish("outcome", {"code": 1, "message": ended.message})
        return self._finish(config, ended, starts, log_dir)

    def _finish(self, config: Config, ended: Ended, starts: StartLog, log_dir: Path) -> int:
        """Leave the true state behind, come back where that is wanted, and say how it ended."""
        run_dir, message = self.run_dir, ended.message
        if self._lock.lost.is_set():  # the run, its status and its log of starts are another's now
            print(f"error: {message}", file=sys.stderr)
            return 1
        if ended.cause == "completed":
            run_dir.write_status(state="completed")
            starts.end(state="completed", cause=ended.cause, message="")
            if self._summary:
                print("\n" + final_summary(run_dir, time.monotonic() - self._started), flush=True)
            return 0
        state, code = {"cancelled": ("cancelled", 130), "failed": ("failed", 1)}.get(
            ended.cause, ("preempted", LEFT_CODE)
        )
        if ended.cause in FAILURES:
            failures = starts.failures_without_progress() + 1
            if not self.allocation.in_slurm or (not config.slurm.requeue and ended.cause != "walltime"):
                state, code = "failed", 1
            elif failures > config.cluster.max_restarts:
                state, code, message = "failed", 1, f"{message} ({failures} failures without progress)"
        if state == "preempted" and self.allocation.in_slurm:  # a scancel may have come while the run was saved
            facts = slurm.job_facts(self.allocation.job_id)
            if slurm.cause_of(facts, signal.SIGTERM, self.allocation.requeues) is slurm.Cause.CANCELLED:
                state, code, message = "cancelled", 130, f"{message}; then cancelled"
        run_dir.write_status(state=state, message=message)
        starts.end(state=state, cause=ended.cause, message=message)
        if state == "preempted" and self.allocation.in_slurm:
            message = f"{message}; {self._come_back(config, ended)}"
            run_dir.write_status(message=message)
        print(f"logs: {log_dir}", file=sys.stderr)
        print(f"{state if state != 'failed' else 'error'}: {message}", file=sys.stderr)
        if ended.hint:
            print(f"hint: {ended.hint}", file=sys.stderr)
        sys.stderr.flush()
        return code

    def _come_back(self, config: Config, ended: Ended) -> str:
        """See that the run is started again; returns how."""
        job_id = self.allocation.job_id
        if ended.cause == slurm.Cause.REQUEUED:
            return "Slurm starts it again"
        if not config.slurm.requeue:
            return f"slurm.requeue=false: go on with forge-hpc resume {self.run_dir}"
        facts = slurm.job_facts(job_id)
        try:
            slurm.requeue(job_id, ended.lost_nodes)
            return "requeued"
        except slurm.SlurmRefused as refusal:
            print(f"no requeue: {refusal}", file=sys.stderr)
        try:
            if facts is None:
                raise slurm.SlurmRefused("it does not know the job any more")
            successor = slurm.submit_successor(facts, self.run_dir.path, ended.lost_nodes)
        except slurm.SlurmRefused as refusal:
            return f"Slurm takes no successor ({refusal}): go on with forge-hpc resume {self.run_dir}"
        self.run_dir.write_status(job_id=successor)
        return f"job {successor} goes on"

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
        command = [sys.executable, "-m", "forge_hpc.recipes", "--run-dir", str(self.run_dir.path)]
        command += ["--rendezvous", str(rendezvous.directory), "--log-dir", str(log_dir), "--parent", str(os.getpid())]
        controller = subprocess.Popen(
            undisturbed(command), stdin=subprocess.PIPE, start_new_session=True, env=self._child_env(tls)
        )
        wish = self._watch(controller, worker, rendezvous)
        if wish is not None and self._lock.lost.is_set():
            return Ended(wish.cause, wish.message)
        outcome = rendezvous.look("outcome")
        if wish is not None and wish.cancels and (outcome is None or outcome["code"] != 1):
            return Ended("cancelled", wish.message)
        if outcome is None:
            if wish is not None:
                return Ended(wish.cause, f"{wish.message}; there was no time to save, the newest checkpoint stands")
            return Ended("crash", f"the controller {how_it_ended(controller.returncode)} and left no reason")
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
        self, controller: subprocess.Popen[bytes], worker: subprocess.Popen[bytes], rendezvous: Rendezvous
    ) -> Wish | None:
        """Wait for the controller's end, and pass on to it what is wanted of the run; returns the last wish."""
        deadline, told = None, False
        while controller.poll() is None:
            if (wish := self._wish()) is not None:
                within_s = STOP_S if wish.cancels else wish.within_s
                if within_s is not None:
                    until = time.monotonic() + max(1.0, within_s - REQUEUE_S)
                    deadline = until if deadline is None else min(deadline, until)
                if wish.cancels or self._leaving is None:
                    tell(controller, "stop" if wish.cancels else f"leave {wish.message}")
                self._leaving = wish
            if deadline is not None and time.monotonic() > deadline:
                controller.kill()
            if self._lock.lost.is_set():
                controller.kill()
                return Wish("taken over", f"another start has taken {self.run_dir} over", None)
            if not told and worker.poll() not in (None, 0):
                told = True
                self._tell_worker_ended(rendezvous, worker)
                deadline = deadline or time.monotonic() + SILENT_S  # the controller saves what it can, and leaves
            time.sleep(POLL_S)
        return self._leaving

    def _warm_start(self, config: Config) -> Ended | None:
        """Make the model that the run starts from, once: a run of its own, on this node alone. None when it is done."""
        run_dir = RunDir(self.run_dir.warmstart)
        status = run_dir.read_status()
        if status is not None and status.state == "completed":
            return None
        if not run_dir.config.exists():
            warm = load_config(config.warmstart.config, config.warmstart.overrides)
            save_config(warm, run_dir.create().config)
        print(f"warm start in {run_dir}", flush=True)
        environ = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
        command = [sys.executable, "-m", "forge_hpc.run", "--run-dir", str(run_dir.path), "--no-summary"]
        command += ["--parent", str(os.getpid())]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, env=environ)
        beat = 0.0
        while process.poll() is None:
            if (wish := self._wish()) is not None:
                process.send_signal(signal.SIGINT if wish.cancels else signal.SIGTERM)
                wait_or_kill(process, STOP_S + 2 if wish.cancels else (wish.within_s or SILENT_S) - REQUEUE_S)
                return Ended(wish.cause, f"{wish.message}, in the warm start")
            if time.monotonic() - beat > BEAT_S:
                self.run_dir.write_status()
                beat = time.monotonic()
            time.sleep(POLL_S)
        if process.returncode == 0:
            return None
        status = run_dir.read_status()
        return Ended(
            "failed", f"the warm start in {run_dir} failed: {status.message if status else process.returncode}"
        )


def measured_lead_s(run_dir: RunDir) -> float:
    """What the run has measured that it needs to save and leave; 0 before it has."""
    status = run_dir.read_status()
    return status.lead_s if status is not None else 0.0


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


def wait_or_kill(process: subprocess.Popen[bytes], timeout_s: float) -> None:
    """Give a process time to end; then none."""
    try:
        process.wait(max(0.0, timeout_s))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def main() -> int:
    """Door of ``python -m forge_hpc.run``."""
    parser = argparse.ArgumentParser(description="Run a run directory on this node of its allocation.")
    parser.add_argument("--run-dir", type=Path, required=True, help="a directory with config.yaml, made by submit")
    parser.add_argument("--no-summary", action="store_true", help="print no figures at the end")
    parser.add_argument("--parent", type=int, help="end when this process, which started us, does")
    args = parser.parse_args()
    if args.parent is not None:
        die_with_parent(args.parent)
    os.umask(0o077)  # all that a run writes is its owner's alone
    return Supervisor(RunDir(args.run_dir), Allocation.from_environment(), summary=not args.no_summary).run()


if __name__ == "__main__":
    sys.exit(main())
