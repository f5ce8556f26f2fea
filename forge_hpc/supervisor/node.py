"""What every node of an allocation has: its place in the rendezvous, its Monarch worker, and folders for scratch."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from forge_hpc.cluster import folders, stacks
from forge_hpc.cluster.allocation import Allocation, host_address, interface_of, run_address
from forge_hpc.cluster.deadlines import GIVEN_UP_S
from forge_hpc.cluster.identity import tls_environment
from forge_hpc.cluster.processes import end_descendants
from forge_hpc.cluster.rendezvous import Rendezvous
from forge_hpc.cluster.worker import gpu_order, visible_gpus
from forge_hpc.config import Config
from forge_hpc.files import POLL_S, in_thread
from forge_hpc.gate.deadlines import OWN_S
from forge_hpc.gate.own import look_at_node
from forge_hpc.gate.sandboxes import look_at_sandboxes
from forge_hpc.run_dir import RunDir
from forge_hpc.supervisor.compile_cache import compile_cache
from forge_hpc.supervisor.robust import how_it_ended
from forge_hpc.supervisor.signals import ignoring_signals

T = TypeVar("T")
NO_LEAK = "ignore::UserWarning:multiprocessing.resource_tracker"
"""Processes end by being killed; that what they shared is left to Python's trackers is no leak."""


class Node:
    """One node of one start of a run."""

    def __init__(self, run_dir: RunDir, allocation: Allocation, takes_lent: bool = False) -> None:
        self.run_dir = run_dir
        self.allocation = allocation
        self.takes_lent = takes_lent
        """Other jobs may lend the run nodes: it is to be reached from elsewhere, also where it has one node alone."""
        self.hub_environ: dict[str, str] = {}
        """Variables that say whether its processes ask the hub."""
        self._scratch: folders.Folder | None = None
        self._memory: folders.Folder | None = None
        self._comparing: subprocess.Popen[bytes] | None = None

    def close(self) -> None:
        """End all processes below this one, and remove what dead ones have left in the folders for scratch."""
        end_descendants(grace_s=0)
        for folder in (self._scratch, self._memory):
            if folder is not None:
                folder.remove()

    @property
    def key(self) -> str:
        """Names this start in the same way on all nodes of a Slurm step."""
        a = self.allocation
        return f"{a.job_id}.{a.requeues}.{os.environ.get('SLURM_STEP_ID', '0')}"

    def rendezvous(self, key: str | None = None) -> Rendezvous:
        """Where the nodes of this start find each other."""
        return Rendezvous(self.run_dir.rendezvous / (key or self.key))

    @property
    def slurm_name(self) -> str:
        """What Slurm calls this node."""
        return os.environ.get("SLURMD_NODENAME", socket.gethostname())

    def introduce(self, rendezvous: Rendezvous, config: Config) -> str:
        """Tell the first node by which names the others reach this one, Slurm's name of it, and whether it is fit; then
        look at it beside the others, who come within ``cluster.start_timeout_s``."""
        address = run_address(self.allocation.num_nodes, self.takes_lent)
        names = [address, socket.gethostname(), "localhost"]
        report = self.report(rendezvous, config) | {"sandbox": self._look_at_sandboxes(config)}
        record = {"address": address, "names": names, "slurm_name": self.slurm_name, "report": report}
        rendezvous.publish(f"node-{self.allocation.node_id}", record)
        if self.allocation.num_nodes > 1:
            self._start_comparing(rendezvous, address, config.cluster.start_timeout_s)
        return address

    def report(self, rendezvous: Rendezvous, config: Config) -> dict[str, Any]:
        """What is found of this node by itself; ``gate.own.look_at_node``."""
        start, alone = rendezvous.directory.name, self.allocation.num_nodes == 1 and not self.takes_lent

        def look() -> dict[str, Any]:
            return look_at_node(rendezvous.directory, self.run_dir.tls, start, visible_gpus(), config, alone)

        try:
            return _in_time(look)
        except TimeoutError as late:
            slow = "its disks, its GPUs' driver or the recipe's module"
            return {"problems": [f"{slow} have not answered for {OWN_S:.0f} s: {late}"]}

    def _look_at_sandboxes(self, config: Config) -> dict[str, Any] | None:
        try:
            return _in_time(lambda: look_at_sandboxes(config, self.allocation.node_id))
        except TimeoutError:
            return {"late": f"it has not started and ended within {OWN_S:.0f} s"}

    def _start_comparing(self, rendezvous: Rendezvous, address: str, patience_s: float) -> None:
        command = [sys.executable, "-m", "forge_hpc.gate.neighbours", "--rendezvous", str(rendezvous.directory)]
        command += ["--node", str(self.allocation.node_id), "--num-nodes", str(self.allocation.num_nodes)]
        command += ["--address", address, "--patience", str(patience_s), "--parent", str(os.getpid())]
        command += ["--began", str(time.time())]
        self._comparing = subprocess.Popen(ignoring_signals(command), stdin=subprocess.DEVNULL, start_new_session=True)

    def join(self, members: Sequence[int]) -> bool:
        """The gate is over: of its members, in the order of the allocation, this node is one from now on. False where
        it is not."""
        if self._comparing is not None:
            self._comparing.kill()
            self._comparing.wait()
        if self.allocation.node_id not in members:
            return False
        place = members.index(self.allocation.node_id)
        self.allocation = replace(self.allocation, node_id=place, num_nodes=len(members))
        return True

    def environment(self, tls: Path) -> dict[str, str]:
        """Environment of the node's processes. Raises OSError where no temporary directory can be written."""
        address = host_address(self.allocation.num_nodes)
        # Where the host's name resolves to loopback, gloo would listen where no other host reaches it.
        interface = {"GLOO_SOCKET_IFNAME": interface_of(address)} if self.allocation.num_nodes > 1 else {}
        # How soon a dead process is noticed; looking takes the controller 4.5 ms of CPU time for each generator.
        supervision = {"HYPERACTOR_MESH_SUPERVISION_POLL_FREQUENCY": f"{max(1, self.allocation.num_nodes // 32)}s"}
        supervision |= {"HYPERACTOR_HOST_SPAWN_READY_TIMEOUT": f"{GIVEN_UP_S}s"}  # the controller decides before
        folder = self.scratch_folder()  # what dead processes leave there goes with us
        scratch = {"TMPDIR": str(folder), stacks.FOLDER: str(stacks.folder_in(folder))}
        self._memory = self._memory or folders.make_folder()
        scratch |= {folders.VARIABLE: str(self._memory.path)} if self._memory is not None else {}
        gpus = gpu_order() | (compile_cache() if visible_gpus() else {})  # on CPUs nothing is compiled
        quiet = {"PYTHONWARNINGS": ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), NO_LEAK]))}
        mine = {**supervision, **gpus, **self.hub_environ, **scratch, **quiet, **tls_environment(tls)}
        return {**interface, **os.environ, **mine}

    def start_worker(self, rendezvous: Rendezvous, address: str, tls: Path, log_dir: Path) -> subprocess.Popen[bytes]:
        """Start the node's Monarch worker."""
        node = self.allocation.node_id
        command = [sys.executable, "-m", "forge_hpc.cluster.worker", "--rendezvous", str(rendezvous.directory)]
        command += ["--node", str(node), "--address", address, "--parent", str(os.getpid())]
        command += ["--processes"] if node > 0 else []
        with (log_dir / f"worker-{node}.log").open("ab") as log:
            return subprocess.Popen(
                ignoring_signals(command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=self.environment(tls),
            )

    def stack_writer(self, rendezvous: Rendezvous, log_dir: Path) -> stacks.StackWriter:
        """Writes the stacks of what this node has started."""
        return stacks.StackWriter(rendezvous, self.allocation.node_id, self.scratch_folder(), log_dir)

    def scratch_folder(self) -> Path:
        """Goes with the node's processes."""
        self._scratch = self._scratch or folders.Folder()
        return self._scratch.path

    def report_worker_ended(self, rendezvous: Rendezvous, worker: subprocess.Popen[bytes]) -> None:
        """Tell the controller, which would notice much later, that nothing runs on this node any more."""
        message = f"its Monarch worker {how_it_ended(worker.returncode)}"
        rendezvous.publish(f"ended-{self.allocation.node_id}", {"message": message})
        print(f"node {self.allocation.node_id}: {message}", file=sys.stderr)


def _in_time(look: Callable[[], T]) -> T:
    """What a look at the node finds. Raises TimeoutError after ``OWN_S``: it says where the look stands, and the whole
    stack is on stderr."""
    waits = iter(range(round(OWN_S / POLL_S)))  # counted, since on a crowded machine each one is longer
    threads: list[int] = []

    def looked() -> T:
        threads.append(threading.get_ident())
        return look()

    def wait_on() -> None:
        if next(waits, None) is None:
            raise TimeoutError(_where(threads))

    return in_thread(looked, wait_on)


def _where(threads: Sequence[int]) -> str:
    frames = sys._current_frames()
    stacks = [traceback.extract_stack(frames[thread]) for thread in threads if thread in frames]
    if not stacks:
        return "it has not begun"
    print("".join(["a look at this node hangs:\n", *stacks[0].format()]), file=sys.stderr, flush=True)
    return f"it stands in {stacks[0][-1].name} ({stacks[0][-1].filename}:{stacks[0][-1].lineno})"
