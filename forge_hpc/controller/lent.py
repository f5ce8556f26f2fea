"""Generators that other jobs lend: they join the run's own, and may vanish at any time without harm.

    lent-N ─► attach to the node ─► start generators, give them the weights ─► the pool's service
    lent-N-leaving, its lifeline is cut ─► its calls go to the others ─► lent-N-over

A generator that is lost on a node that lives is started again there, ``MAX_LOSSES`` times; after that, and where the
node has gone, the run goes on without. None of that counts against ``cluster.max_restarts``. Nothing of the order of
prompts depends on who generates: seeds are those of the prompts.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forge_hpc.actors.generator import Generator
from forge_hpc.cluster.deadlines import SPAWN_S
from forge_hpc.cluster.meshes import Cluster, LentHost, attach_lent
from forge_hpc.cluster.rendezvous import Rendezvous
from forge_hpc.config import Config
from forge_hpc.config.lending import lent_replicas
from forge_hpc.controller.generators import END_S, PROBE_S, GeneratorPool
from forge_hpc.controller.service import reason_of, started, told
from forge_hpc.joining import door
from forge_hpc.joining.door import Lent, Over
from forge_hpc.joining.lifeline import LIFELINE, Lifelines
from forge_hpc.wire.tls import Certificates

logger = logging.getLogger(__name__)
LOOK_S = 1.0
WORKER_S = 60.0
"""A node that was let in has its Monarch worker within this time."""
MAX_LOSSES = 3
"""Of generators of a node, before the run does without it."""


@dataclass
class _Node:
    """A lent node."""

    number: int
    lent: Lent
    host: LentHost | None = None
    slots: dict[int, int] = field(default_factory=dict)
    """Of each of its generators, by the service's index."""
    meshes: dict[int, tuple[str, Any]] = field(default_factory=dict)
    """Name and processes of each."""
    num_losses: int = 0
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def __str__(self) -> str:
        return f"node {self.number} ({self.lent.slurm_name}, lent by job {self.lent.job_id})"


class LentGenerators:
    """All lent nodes of a start of a run.

    Args:
        address: of this host, by which others reach it.
        on_change: called with the number of lent generators that serve, when it has changed.
    """

    def __init__(
        self,
        config: Config,
        cluster: Cluster,
        pool: GeneratorPool,
        rendezvous: Rendezvous,
        address: str,
        log_dir: Path,
        on_change: Callable[[int], None],
    ) -> None:
        self._config = config
        self._cluster = cluster
        self._pool = pool
        self._rendezvous = rendezvous
        self._address = address
        self._log_dir = log_dir
        self._on_change = on_change
        self._nodes: dict[int, _Node] = {}
        self._known: set[int] = set()  # numbers are not given twice
        self._num_starts = 0
        self._tasks: set[asyncio.Task[None]] = set()
        pool.lent = self

    async def run(self) -> None:
        """See who comes and who leaves, for as long as the controller lives."""
        await self._open_lifelines()
        try:
            while True:
                try:
                    names = await asyncio.to_thread(self._rendezvous.names, "lent-")
                    await self._look(names)
                except OSError as error:  # a shared file system stumbles; Monarch's own reports still come
                    logger.warning("%s cannot be read: %s", self._rendezvous.directory, error)
                except Exception:  # whatever it is, it is of those who lend: the run does not end for it
                    logger.exception("lent nodes could not be looked at")
                await asyncio.sleep(LOOK_S)
        finally:
            for task in (*self._tasks, *(task for node in self._nodes.values() for task in node.tasks)):
                task.cancel()

    async def _open_lifelines(self) -> None:
        certificates = Certificates.from_environment()
        assert certificates is not None, "Monarch has them too"
        self._lifelines = Lifelines(self._address, certificates, self._on_cut)
        try:
            record = await self._lifelines.open()
            await asyncio.to_thread(self._rendezvous.publish, LIFELINE, record)
        except OSError as error:
            logger.warning("a lent node that dies is known of only when Monarch says so: %s", error)

    def _on_cut(self, number: int) -> None:
        self._known.add(number)  # also of one that has died before it was looked at
        if (node := self._nodes.get(number)) is not None:
            self._let_go(node, "its processes were killed, or its host is silent")

    async def _look(self, names: list[str]) -> None:
        numbers = {name: name.removeprefix("lent-").partition("-") for name in names}
        there = {int(number) for number, _, what in numbers.values() if not what}
        leaving = {int(number) for number, _, what in numbers.values() if what == "leaving"}
        for number in sorted(there - self._known - leaving):
            if (record := await asyncio.to_thread(self._rendezvous.look, door.lent_name(number))) is not None:
                self._known.add(number)
                node = self._nodes[number] = _Node(number, Lent.of(record))
                self._start(node, self._take_in(node))
        for number, node in list(self._nodes.items()):
            if number in leaving:
                self._let_go(node, "its job takes it back")
            elif number not in there:
                self._let_go(node, "its supervisor has ended")

    def _start(self, node: _Node, work: Any) -> None:
        task = asyncio.create_task(work)
        node.tasks.add(task)
        task.add_done_callback(node.tasks.discard)

    # ---- coming

    async def _take_in(self, node: _Node) -> None:
        try:
            while not self._pool.is_serving:  # the run's own come first: they are what it cannot be without
                await asyncio.sleep(LOOK_S)
            worker = await self._worker_of(node)
            run_gpus = self._cluster.placement.gpus_per_node or 0
            replicas = lent_replicas(self._config, run_gpus, len(worker["gpus"]))
            hosts = await attach_lent(worker["address"], SPAWN_S)
            node.host = LentHost(hosts, worker["cpus"], worker["gpus"], replicas)
            taken = {index for other in self._nodes.values() for index in other.slots}
            free = (index for index in itertools.count(self._pool.service.size) if index not in taken)
            node.slots = {next(free): slot for slot in range(len(replicas))}
            async with asyncio.TaskGroup() as tasks:
                for index in node.slots:
                    tasks.create_task(self._add(node, index))
            logger.info("%s: %s %s", node, _count(len(replicas)), "joins" if len(replicas) == 1 else "join")
        except Exception as error:
            why = await told(error)
            logger.warning("%s cannot be used: %s", node, why, exc_info=True)
            self._let_go(node, why, failed=True)

    async def _worker_of(self, node: _Node) -> dict[str, Any]:
        until = time.monotonic() + WORKER_S
        while (record := await asyncio.to_thread(self._rendezvous.look, f"worker-{node.number}")) is None:
            if time.monotonic() > until:
                raise TimeoutError(f"the Monarch worker of {node} did not begin within {WORKER_S:.0f} s")
            await asyncio.sleep(LOOK_S)
        return record

    async def _add(self, node: _Node, index: int, spawn_s: float = SPAWN_S) -> None:
        """Start a generator, and have it serve."""
        assert node.host is not None
        config, service = self._config, self._pool.service
        self._num_starts += 1
        name = f"lent{index}r{self._num_starts}"
        self._cluster.faults.watch(name, lambda reason: service.lose(index, reason))
        procs = self._cluster.faults.enders.beside(name, node.host.spawn_generator(name, node.slots[index]))
        node.meshes[index] = name, procs
        await started(procs, spawn_s, f"generator {index} of {node}")
        actor = procs.spawn(name, Generator, config, index, self._log_dir, "lent")
        start = actor.start.call_one(self._pool.model_dir)
        await self._pool.ask(index, start, config.cluster.start_timeout_s, "start()")
        await self._pool.bring_up_to_date(index, actor)
        await service.admit(index, actor)
        self._tell()

    # ---- going

    def lose_generator(self, index: int, reason: str) -> None:
        """The service has lost a lent generator."""
        node = next((node for node in self._nodes.values() if index in node.slots), None)
        if node is None:
            return
        node.num_losses += 1
        logger.warning("generator %d of %s is lost: %s", index, node, reason)
        self._tell()
        if node.num_losses > MAX_LOSSES:
            self._let_go(node, f"{reason} ({node.num_losses} losses)", failed=True)
        else:
            self._start(node, self._replace(node, index))

    async def _replace(self, node: _Node, index: int) -> None:
        name, procs = node.meshes.pop(index)
        self._cluster.faults.forget(name)
        self._cluster.end_at_once(name)
        stopping = asyncio.ensure_future(procs.stop())
        await asyncio.wait({stopping}, timeout=END_S)
        stopping.cancel()
        try:
            await self._add(node, index, PROBE_S)
            logger.info("generator %d of %s is replaced", index, node)
        except Exception as error:
            self._let_go(node, f"no generator starts there any more: {reason_of(error)}")

    def lose_node(self, number: int, reason: str) -> None:
        """The Monarch worker of a node has ended. Nothing happens where it is no lent one."""
        if (node := self._nodes.get(number)) is not None:
            self._let_go(node, reason)

    def _let_go(self, node: _Node, why: str, *, failed: bool = False) -> None:
        """Nothing of the node is used from now on: its calls go to the other generators in this turn of the loop."""
        if self._nodes.pop(node.number, None) is None:
            return
        for task in node.tasks - {asyncio.current_task()}:
            task.cancel()
        for name, _ in node.meshes.values():
            self._cluster.faults.forget(name)
        for index in node.slots:
            self._pool.service.lose(index, why)
        logger.warning("%s leaves the run: %s", node, why)
        self._tell()
        task = asyncio.create_task(self._tell_over(node, Over(why, failed)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _tell_over(self, node: _Node, over: Over) -> None:
        def write() -> None:
            self._rendezvous.publish(door.over_name(node.number), over.as_record())
            gone = [name for name in door.records_of(node.number) if name != door.over_name(node.number)]
            self._rendezvous.withdraw(*gone)

        try:
            await asyncio.to_thread(write)
        except OSError as error:  # it does not wait for that for long
            logger.warning("%s is not told: %s", node, error)

    # ---- what is known of them

    @property
    def num_serving(self) -> int:
        """Lent generators that serve now."""
        return self._pool.service.num_lent

    @property
    def num_devices(self) -> int:
        """Their GPUs, or on the CPU their processes."""
        serving = set(self._pool.service.serving)
        hosts = [(node.host, node.slots) for node in self._nodes.values() if node.host is not None]
        return sum(
            len(host.replica_gpus[slot]) or 1 for host, slots in hosts for i, slot in slots.items() if i in serving
        )

    def metrics(self) -> dict[str, float]:
        """Figures of a step."""
        service = self._pool.service
        return {
            "generators/serving": float(len(service.serving)),
            "generators/lent": float(service.num_lent),
            "generators/lent_share": service.take_lent_share(),
        }

    def _tell(self) -> None:
        self._on_change(self.num_serving)


def _count(num: int) -> str:
    return f"{num} generator{'s' * (num != 1)}"
