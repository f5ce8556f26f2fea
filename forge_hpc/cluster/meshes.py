"""The controller's side of the cluster: attach to the workers of all nodes and spawn processes on them by role.

hosts = await attach(addresses, own_address, timeout_s)
cluster = Cluster(hosts, placement, cpus, log_dir)
trainers = cluster.spawn_trainers("trainer")        # one mesh over all trainer nodes; spawn_frozen likewise
replica = cluster.spawn_generator("generator0", 0)  # one mesh a replica, so that one can fail alone
cluster.end_at_once("trainer")                      # what is left of a mesh that is lost, before ``trainers.stop()``
lent = await attach_lent(address, timeout_s)        # a node that another job lends, at any time later

Meshes are named by the caller: what Monarch reports of one is told to who watches that name (``faults``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forge_hpc.cluster.faults import Faults
from forge_hpc.config.schema import Config
from forge_hpc.config.split import Placement

if TYPE_CHECKING:
    from monarch.actor import BootstrapCommand, HostMesh, Point, ProcMesh

    from forge_hpc.workers.places import Place


async def attach(worker_addresses: Sequence[str], own_address: str, timeout_s: float) -> HostMesh:
    """Connect to the Monarch workers at ``worker_addresses`` (``tls://host:port``, in node order).

    Must be the first use of Monarch in this process. Raises TimeoutError.
    """
    from monarch.actor import attach_to_workers, enable_transport

    enable_transport(f"tls://{own_address}:0")
    hosts = attach_to_workers(ca="trust_all_connections", workers=list(worker_addresses))
    try:
        await asyncio.wait_for(hosts.initialized, timeout_s)
    except TimeoutError:
        raise TimeoutError(
            f"the {len(worker_addresses)} Monarch workers did not answer within {timeout_s:.0f} s"
        ) from None
    return hosts


async def attach_lent(worker_address: str, timeout_s: float) -> HostMesh:
    """Connect to the Monarch worker of one more node, after ``attach``. Raises TimeoutError."""
    from monarch.actor import attach_to_workers

    hosts = attach_to_workers(ca="trust_all_connections", workers=[worker_address])
    try:
        await asyncio.wait_for(hosts.initialized, timeout_s)
    except TimeoutError:
        raise TimeoutError(f"its Monarch worker, {worker_address}, did not answer within {timeout_s:.0f} s") from None
    return hosts


@dataclass
class LentHost:
    """A node that another job lends, with the generators that it can hold."""

    hosts: HostMesh
    cpus: int
    gpu_names: Sequence[str]
    replica_gpus: Sequence[Sequence[int]]
    """GPUs of each of its generators; () is one on the CPU."""

    def spawn_generator(self, name: str, slot: int) -> ProcMesh:
        """A mesh of the one process of a generator."""
        gpus = [self.gpu_names[gpu] for gpu in self.replica_gpus[slot]]
        command = bootstrap_command(max(1, self.cpus // len(self.replica_gpus)), gpus)
        return self.hosts.spawn_procs(per_host={"procs": 1}, name=name, bootstrap_command=command)


def bootstrap_command(threads: int, gpu_names: Sequence[str]) -> BootstrapCommand:
    """How a process is started: threads and GPUs are fixed before any library counts them."""
    from monarch.actor import default_bootstrap_cmd

    env = {
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": ",".join(gpu_names),
    }
    return default_bootstrap_cmd().with_env(env)


@dataclass
class Cluster:
    """The hosts of the allocation, with what is to run where."""

    hosts: HostMesh
    placement: Placement
    cpus: int
    """CPU cores of a node."""
    gpu_names: Sequence[Sequence[str]]
    """By node: what CUDA_VISIBLE_DEVICES calls its GPUs there."""
    log_dir: Path
    faults: Faults
    other_nodes: Sequence[Place] = ()
    """Where worker processes run, beside this one."""
    address: str = "127.0.0.1"
    """Of this node, by which the others reach it."""
    batch_invariant: bool = False
    """``model.batch_invariant``: what a process sets for it, it cannot take back."""

    def spawn_trainers(self, name: str) -> ProcMesh:
        """One process a trainer rank, as one mesh with dimensions ``hosts`` and ``procs``."""
        return self._spawn_ranks(name, self.placement.trainer_nodes, self.placement.trainer_gpus)

    def spawn_frozen(self, name: str) -> ProcMesh:
        """The same for the frozen models that have processes of their own."""
        return self._spawn_ranks(name, self.placement.frozen_nodes, self.placement.frozen_gpus)

    def _spawn_ranks(self, name: str, nodes: range, gpus: Sequence[Sequence[int]]) -> ProcMesh:
        hosts = self.hosts.slice(hosts=slice(nodes.start, nodes.stop))

        def command(point: Point) -> BootstrapCommand:
            return self._command(nodes.start + point["hosts"], [gpu for process in gpus for gpu in process])

        procs = hosts.spawn_procs(per_host={"procs": len(gpus)}, name=name, bootstrap_command=command)
        return self.faults.enders.beside(name, procs)

    def spawn_volumes(self, name: str) -> ProcMesh:
        """One process a trainer node that does nothing but hold published weights."""
        nodes = self.placement.trainer_nodes
        hosts = self.hosts.slice(hosts=slice(nodes.start, nodes.stop))
        return hosts.spawn_procs(
            per_host={"procs": 1}, name=name, bootstrap_command=self._command(nodes.start, [], threads=1)
        )

    def spawn_generator(self, name: str, replica: int, node: int | None = None) -> ProcMesh:
        """A mesh of the one process of a replica, on its own node or, in place of a lost one, on ``node``."""
        home, slot = divmod(replica, self.placement.replicas_per_node)
        node = self.placement.rollout_nodes[home] if node is None else node
        hosts = self.hosts.slice(hosts=slice(node, node + 1))
        command = self._command(node, self.placement.replica_gpus[slot])
        return self.faults.enders.beside(
            name, hosts.spawn_procs(per_host={"procs": 1}, name=name, bootstrap_command=command)
        )

    def end_at_once(self, name: str) -> None:
        """As ``Enders.end_at_once``: before ``stop()`` of a mesh that is lost."""
        self.faults.enders.end_at_once(name)

    def layout(self, role: str) -> Any:
        """Where a role's processes run and on what, and what they are set to for good: ``trainer``, ``volume`` or
        ``generatorN``. None where there are none."""
        place = self.placement
        if role in ("trainer", "volume"):
            nodes, gpus = place.trainer_nodes, place.trainer_gpus if role == "trainer" else ()
            threads = place.threads_per_process(self.cpus, nodes.start) if role == "trainer" and nodes else 1
            is_set = role == "trainer" and self.batch_invariant
            return (nodes, [[*map(str, names)] for names in gpus], threads, is_set) if nodes else None
        replica = int(role.removeprefix("generator"))
        if replica >= place.replicas:
            return None
        home, slot = divmod(replica, place.replicas_per_node)
        node = place.rollout_nodes[home]
        threads = place.threads_per_process(self.cpus, node)
        return node, [*place.replica_gpus[slot]], threads, self.batch_invariant

    def told(self, config: Config) -> Config:
        """The configuration for processes that see no GPU but their own, and go by how many a node has."""
        return replace(config, cluster=replace(config.cluster, gpus_per_node=self.placement.gpus_per_node))

    async def can_spawn(self, node: int, timeout_s: float) -> bool:
        """Whether a process can be started on a node."""
        name = f"probe{node}"
        self.faults.forget(name)
        try:
            hosts = self.hosts.slice(hosts=slice(node, node + 1))
            procs = hosts.spawn_procs(per_host={"procs": 1}, name=name, bootstrap_command=self._command(node, [], 1))
            await asyncio.wait_for(procs.initialized, timeout_s)
            await asyncio.wait_for(procs.stop(), timeout_s)
        except Exception:  # whatever it is that Monarch says of a node which is gone
            return False
        return True

    def _command(self, node: int, gpus: Sequence[int], threads: int | None = None) -> BootstrapCommand:
        """How processes of a node are started."""
        threads = threads or self.placement.threads_per_process(self.cpus, node)
        return bootstrap_command(threads, [self.gpu_names[node][gpu] for gpu in gpus])
