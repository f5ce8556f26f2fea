"""What every node of an allocation starts: ``python -m forge_hpc.run --run-dir D``.

This process is the node's supervisor. It imports nothing heavy, starts the node's Monarch worker and, on the first
node, the controller, and is the owner of all that these start: whatever the way out, it ends every process below it,
and on the first node it leaves the true state in ``status.json``.

    node 0   lock ─ certificates ─ worker ─ (warm start) ─ controller ─► outcome ─► status.json
    node n              certificates ─ worker ─────────────────────────► outcome

It finds everything in the run directory, so the first start, a restart and a new job on the same directory are one.
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
from pathlib import Path
from typing import Any

from forge_hpc.cluster.allocation import Allocation, host_address, interface_of
from forge_hpc.cluster.identity import make_job_identity, tls_environment
from forge_hpc.cluster.processes import become_subreaper, die_with_parent, end_descendants
from forge_hpc.cluster.rendezvous import Rendezvous, RendezvousTimeout
from forge_hpc.config import Config, UserError, load_config, print_error, read_config, save_config
from forge_hpc.observability.summary import final_summary
from forge_hpc.run_dir import RunDir

STOP_S = 9.0
"""Seconds that the controller gets to end in good order after a signal; with the rest it stays below 15."""
POLL_S = 0.2
BEAT_S = 5.0
LOOK_S = 2.0
"""How often the other nodes look at the shared directory for the end."""
SILENT_S = 300.0
"""A first node whose status has not changed for this long is dead for the others."""


class Stopped(Exception):
    """A signal asks the run to stop."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Supervisor:
    """One node's part of one start of a run."""

    def __init__(self, run_dir: RunDir, allocation: Allocation, *, summary: bool = True) -> None:
        self.run_dir = run_dir
        self.allocation = allocation
        self._summary = summary
        self._started = time.monotonic()
        self._signal: int | None = None
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(signum, self._on_signal)
        # Slurm's warning before the walltime would end the process; the newest checkpoint stands when time is up.
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)

    def _on_signal(self, signum: int, frame: Any) -> None:
        self._signal = self._signal or signum  # the handler only sets a flag

    def _check_signal(self) -> None:
        if self._signal is not None:
            raise Stopped(self._signal)

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
            return 128 + error.signum if isinstance(error, Stopped) else 1
        finally:
            end_descendants(grace_s=0)

    def _rendezvous(self, key: str) -> Rendezvous:
        return Rendezvous(self.run_dir.rendezvous / key)

    def _key(self) -> str:
        """Names this start in the same way on all nodes of a Slurm step."""
        a = self.allocation
        return f"{a.job_id}.{a.requeues}.{os.environ.get('SLURM_STEP_ID', '0')}"

    def _introduce(self, rendezvous: Rendezvous) -> str:
        """Tell the first node by which names the others reach this one."""
        address = host_address(self.allocation.num_nodes)
        names = [address, socket.gethostname(), "localhost"]
        rendezvous.publish(f"node-{self.allocation.node_id}", {"address": address, "names": names})
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

    def _other_node(self) -> int:
        rendezvous = self._rendezvous(self._key())
        address = self._introduce(rendezvous)
        timeout_s = read_config(self.run_dir.config).cluster.start_timeout_s
        start = rendezvous.wait_for_any(["start", "outcome"], timeout_s, self._check_signal)
        if "code" in start:
            return start["code"]
        worker = self._start_worker(rendezvous, address, Path(start["tls"]), Path(start["log_dir"]))
        heartbeat, changed = None, time.monotonic()
        while worker.poll() is None:
            self._check_signal()
            if (outcome := rendezvous.look("outcome")) is not None:
                return 1 if outcome["code"] else 0
            status = self.run_dir.read_status()
            if status is not None and status.heartbeat != heartbeat:
                heartbeat, changed = status.heartbeat, time.monotonic()
            if time.monotonic() - changed > SILENT_S:
                print(f"node {self.allocation.node_id}: the first node fell silent", file=sys.stderr)
                return 1
            time.sleep(LOOK_S)
        if worker.returncode:
            # Slurm ends all nodes when one fails: give the first one time to see, and to say, what happened.
            print(f"node {self.allocation.node_id}: the Monarch worker ended with {worker.returncode}", file=sys.stderr)
            rendezvous.wait_for_any(["outcome"], STOP_S, self._check_signal)
        return 1 if worker.returncode else 0

    # ---- the first node

    def _first_node(self) -> int:
        allocation, run_dir = self.allocation, self.run_dir
        job_id = allocation.job_id if allocation.in_slurm else None
        config = read_config(run_dir.config)
        with run_dir.lock(job_id) as lock:
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
        rendezvous = self._rendezvous(self._key() if job_id else f"local.{restart}.{os.getpid()}")
        self._clean(keep=rendezvous.directory.name)
        tls = run_dir.tls / rendezvous.directory.name
        try:
            code, message, hint = self._start(config, rendezvous, tls, log_dir)
        except Stopped as stopped:
            code, message, hint = 128 + stopped.signum, f"stopped by {stopped}", None
            if (outcome := rendezvous.look("outcome")) is not None and outcome["code"] == 1:
                code, message = 1, outcome["message"]  # it had failed, and the signal is what followed
        except UserError as error:
            code, message, hint = 1, error.message, error.hint
        except Exception as error:  # whatever it is, the run has failed and its status says so
            traceback.print_exc()
            code, message, hint = 1, f"{type(error).__name__}: {error}", None
        finally:
            end_descendants(grace_s=0)
            shutil.rmtree(tls, ignore_errors=True)
        if code == 0:
            run_dir.write_status(state="completed")
            if self._summary:
                print("\n" + final_summary(run_dir, time.monotonic() - self._started), flush=True)
        elif code > 128:
            run_dir.write_status(state="cancelled", message=message)
        else:
            run_dir.write_status(state="failed", message=message)
        if code:
            print(f"logs: {log_dir}", file=sys.stderr)
            print(f"error: {message}", file=sys.stderr)
            if hint:
                print(f"hint: {hint}", file=sys.stderr)
        return code

    def _clean(self, keep: str) -> None:
        """Remove what starts that were killed have left: keys, and records of who was where."""
        for directory in (self.run_dir.tls, self.run_dir.rendezvous):
            for path in directory.iterdir() if directory.is_dir() else ():
                if path.name != keep:
                    shutil.rmtree(path, ignore_errors=True)

    def _start(self, config: Config, rendezvous: Rendezvous, tls: Path, log_dir: Path) -> tuple[int, str, str | None]:
        allocation = self.allocation
        address = self._introduce(rendezvous)
        names = [f"node-{n}" for n in range(allocation.num_nodes)]
        nodes = rendezvous.wait(names, config.cluster.start_timeout_s, self._check_signal)
        make_job_identity(tls, [name for node in nodes for name in node["names"]])
        start = {"num_nodes": allocation.num_nodes, "address": address, "tls": str(tls), "log_dir": str(log_dir)}
        rendezvous.publish("start", start)
        worker = self._start_worker(rendezvous, address, tls, log_dir)
        if config.model.path == "warmstart" and (failure := self._warm_start(config)):
            return 1, failure, None
        command = [sys.executable, "-m", "forge_hpc.recipes", "--run-dir", str(self.run_dir.path)]
        command += ["--rendezvous", str(rendezvous.directory), "--log-dir", str(log_dir), "--parent", str(os.getpid())]
        controller = subprocess.Popen(
            undisturbed(command), stdin=subprocess.PIPE, start_new_session=True, env=self._child_env(tls)
        )
        assert controller.stdin is not None
        while controller.poll() is None:
            if self._signal is not None:
                with contextlib.suppress(BrokenPipeError):  # it ends already
                    controller.stdin.write(b"stop\n")
                    controller.stdin.flush()
                wait_or_kill(controller, STOP_S)
                raise Stopped(self._signal)
            if self._lock.lost.is_set():
                controller.kill()
                raise UserError(f"another job has taken {self.run_dir} over while this one stood still", None)
            if worker.poll() not in (None, 0):
                wait_or_kill(controller, STOP_S)  # it notices, and knows more
                if rendezvous.look("outcome") is None:
                    return 1, f"the Monarch worker of the first node ended with {worker.returncode}", None
            time.sleep(POLL_S)
        outcome = rendezvous.look("outcome")
        if outcome is None:
            return 1, f"the controller ended with {controller.returncode} and left no reason", None
        return outcome["code"], outcome["message"], outcome.get("hint")

    def _warm_start(self, config: Config) -> str | None:
        """Make the model that the run starts from, once: a run of its own, on this node alone. None, or what failed."""
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
            if self._signal is not None:
                process.send_signal(self._signal)
                wait_or_kill(process, STOP_S + 2)
                raise Stopped(self._signal)
            if time.monotonic() - beat > BEAT_S:
                self.run_dir.write_status()
                beat = time.monotonic()
            time.sleep(POLL_S)
        if process.returncode == 0:
            return None
        status = run_dir.read_status()
        return f"the warm start in {run_dir} failed: {status.message if status else process.returncode}"


def undisturbed(command: Sequence[str]) -> list[str]:
    """``command``, deaf to signals that ask to stop, as are all processes that it starts.

    Slurm signals every process of a step, and a terminal all of its job; only the supervisor is to answer.
    """
    return ["sh", "-c", "trap '' TERM INT USR1 USR2; exec \"$@\"", "sh", *command]


def wait_or_kill(process: subprocess.Popen[bytes], timeout_s: float) -> None:
    """Give a process time to end; then none."""
    try:
        process.wait(timeout_s)
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
