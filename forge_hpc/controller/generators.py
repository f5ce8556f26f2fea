"""The rollout service of a run: its replicas, their replacement when they die, and the weights that they hold."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from forge_hpc.actors.generator import Generator
from forge_hpc.cluster.deadlines import SPAWN_S
from forge_hpc.cluster.meshes import Cluster
from forge_hpc.config import Config
from forge_hpc.controller.kept import KeptMesh, KeptMeshes, stop_mesh
from forge_hpc.controller.recovery import Recoveries
from forge_hpc.controller.service import ActorLost, Service, answer, cause_of, reason_of, started
from forge_hpc.controller.store_at_need import StoreAtNeed
from forge_hpc.controller.trainers import Trainers
from forge_hpc.controller.turns import Turns
from forge_hpc.rollouts.buffer import EpisodeBuffer
from forge_hpc.weights import UNKNOWN, Offer, VersionNotFoundError

logger = logging.getLogger(__name__)
STOP_S = 60.0
"""Monarch's host agent ends a process that does not stop by itself after 20 s."""
END_S, PROBE_S = 5.0, 20.0
"""A replica that has not ended after END_S on a node that starts no process within PROBE_S went with its node."""
START_S = 90.0
"""An engine that is still starting when its run ends is kept where it is there within this time."""
LEAVE_S = 10.0
"""Engines end within this time, or with their processes."""
STORE_S = 120.0
"""A replacement waits so long for the weight store of restarted trainers."""


class NodeLost(RuntimeError):
    """No process can be started on a node."""

    def __init__(self, node: int, reason: str) -> None:
        super().__init__(f"node {node} is lost: {reason}")
        self.node = node


async def why_not_spawned(cluster: Cluster, nodes: Sequence[int], who: str, error: Exception) -> Exception:
    """Why processes of ``nodes`` cannot be spawned: NodeLost where a node starts none, else ActorLost."""
    answers = await asyncio.gather(*(cluster.can_spawn(node, SPAWN_S) for node in nodes))
    silent = [node for node, answer in zip(nodes, answers, strict=True) if not answer]
    return NodeLost(silent[0], reason_of(error)) if silent else ActorLost(f"{who}: {reason_of(error)}")


class Lending(Protocol):
    """What the pool's service has beyond its own replicas (``lent.LentGenerators``)."""

    @property
    def num_devices(self) -> int: ...

    def metrics(self) -> dict[str, float]: ...

    def lose_generator(self, index: int, reason: str) -> None: ...

    def lose_node(self, number: int, reason: str) -> None: ...


@dataclass
class _ReplicaSlot:
    """Where a replica lives."""

    node: int | None = None
    """None: its own."""
    mesh: str = ""
    procs: Any = None
    starts: int = 0
    kv_cache_bytes: int | None = None
    """Of its engine. Where trainers are on the same GPU, another in its place has as much: what is free changes."""


class GeneratorPool:
    """All generator replicas of a start of a run; they outlive the trainers that they serve.

    Args:
        on_node_lost: called with a node on which a replica cannot be replaced, nor on a spare one, and the reason.
        kept: what the run before has left, and where this one leaves its own.
        role: what the replicas are called in messages, logs and names of processes, which end in ``suffix``.
    """

    def __init__(
        self,
        config: Config,
        cluster: Cluster,
        log_dir: Path,
        recoveries: Recoveries,
        on_node_lost: Callable[[int, str], None],
        kept: KeptMeshes | None = None,
        role: str = "generator",
        suffix: str = "",
    ) -> None:
        self._config = config
        self._cluster = cluster
        self._log_dir = log_dir
        self._role, self._suffix = role, suffix if kept is None else kept.suffix
        self._kind = "generators" if role == "generator" else "served"
        self._kept = kept
        self.said: list[str] = []
        """What became of each kept engine, once it has been asked."""
        self._recoveries = recoveries
        self._on_node_lost = on_node_lost
        self._tasks: set[asyncio.Task[None]] = set()
        self._spares = list(cluster.placement.spare_nodes)
        self._replaced: dict[int, int] = {}  # lost nodes, each with the one that has taken its place
        self.weights: dict[int, WeightSync] = {}
        """Where replacements get the weights that the others hold: of each policy, by its adapter's number."""
        self.failed: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
        """Resolved when a replica cannot be replaced."""
        placement = cluster.placement
        self.service = Service(
            role, placement.replicas, config.generator.timeout_s, self._on_loss, recoveries.call_retried
        )
        self.turns = Turns() if placement.takes_turns else None
        """Where trainers use the same GPUs."""
        self._turn: Callable[[], contextlib.AbstractAsyncContextManager[None]] = contextlib.nullcontext
        if self.turns is not None:
            self._turn = self.service.turn = self.turns.generating
            self.turns.sleep = self._sleep
        self._slots = {index: _ReplicaSlot() for index in range(placement.replicas)}
        self._starting: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[None] | None = None  # of engines, once they are retired
        self._retiring: asyncio.Task[None] | None = None  # and of their processes
        self.model_dir = Path()
        """What replicas start on."""
        self.lent: Lending | None = None
        """Those of other jobs, where the run takes them."""

    @property
    def is_serving(self) -> bool:
        """Whether all replicas have been started."""
        started = self._starting
        return started is not None and started.done() and not started.cancelled() and started.exception() is None

    def begin(self, model_dir: Path) -> None:
        """Begin to start all replicas on the weights of ``model_dir``, where that has not been begun. The start goes on
        when the attempt that began it is over, and serves the next one."""
        if self._starting is None:
            self.model_dir = model_dir
            self._starting = asyncio.create_task(self._start())

    async def start(self, model_dir: Path) -> Service:
        """Wait until all replicas serve. Raises what kept one from starting; then the next call begins anew."""
        self.begin(model_dir)
        assert self._starting is not None
        await asyncio.shield(self._starting)
        return self.service

    async def _start(self) -> None:
        if self._retiring is not None:  # lost trainers have brought the run back
            await asyncio.wait({self._retiring})
            self._ending = self._retiring = None
        async with self._turn():  # vLLM plans with the memory that is free while it starts
            try:
                async with asyncio.TaskGroup() as tasks:
                    spawning = [tasks.create_task(self._spawn(index)) for index in self._slots]
            except ExceptionGroup as errors:
                # A node that is silent takes its time, and the others need not wait for it.
                ends = await asyncio.gather(*map(self._end, self._slots), return_exceptions=True)
                self._starting = None
                for error in ends:  # why they did not start is what the run ends with
                    if error is not None and not isinstance(error, NodeLost):
                        logger.warning("a %s whose start failed could not be ended: %s", self._role, reason_of(error))
                raise cause_of(errors) from None
            for index, actor in enumerate(spawning):
                await self.service.admit(index, actor.result())

    async def _sleep(self) -> None:
        for index, said in zip(self.service.serving, await self.service.sleep.fanout(), strict=False):
            logger.info("%s %d: %s", self._role, index, said)

    def lose_node(self, node: int, reason: str) -> None:
        """The node's worker has ended: what ran there is gone, and nothing can be started there."""
        for index, slot in self._slots.items():
            if self._home(index, slot) == node:
                self.service.lose(index, reason)
        if self.lent is not None:
            self.lent.lose_node(node, reason)

    def retire(self) -> None:
        """Nobody asks the generators any more: begin to end engines and processes, beside what the run has still to do.
        Calls raise from now on, until ``begin`` has started new ones."""
        if self._retiring is not None or self._kept is not None or self.lent is not None:
            return
        for weights in self.weights.values():
            weights.cancel()
        self._ending = self._end_engines()
        self._retiring = asyncio.create_task(self._end_processes(self._ending))
        self.service.retire()
        self._starting = None

    def _end_engines(self) -> asyncio.Task[None]:
        """Begin to end starts and replacements under way, and the engines that serve now."""
        under_way = [*self._tasks, *([self._starting] if self._starting is not None else [])]
        actors = [self.service.actor(index) for index in self.service.serving]
        return asyncio.create_task(self._leave(under_way, actors))

    async def _leave(self, under_way: Sequence[asyncio.Task[None]], actors: Sequence[Any]) -> None:
        for task in under_way:
            task.cancel()
        calls = [asyncio.ensure_future(actor.leave.call_one()) for actor in actors]
        if waits := [*under_way, *calls]:
            await asyncio.wait(waits, timeout=LEAVE_S)
        for call in calls:
            if not call.done() or call.exception() is not None:  # its process ends all the same
                why = reason_of(error) if call.done() and (error := call.exception()) else f"not within {LEAVE_S:.0f} s"
                logger.warning("ending an engine of %s: %s", self._role, why)
                call.cancel()

    async def _end_processes(self, ending: asyncio.Task[None]) -> None:
        await asyncio.wait({ending})
        there = [(index, slot) for index, slot in self._slots.items() if slot.procs is not None]
        gone = self._cluster.faults.ended_nodes
        meshes = [
            KeptMesh(slot.mesh, slot.procs, None, None) for index, slot in there if self._home(index, slot) not in gone
        ]
        for _, slot in there:
            slot.procs = None
        await asyncio.gather(*(stop_mesh(self._cluster.faults, mesh) for mesh in meshes))

    async def close(self) -> None:
        """End starts and replacements under way, and the engines."""
        await (self._ending or self._end_engines())

    def _home(self, index: int, slot: _ReplicaSlot) -> int:
        placement = self._cluster.placement
        return placement.rollout_nodes[index // placement.replicas_per_node] if slot.node is None else slot.node

    async def _spawn(self, index: int) -> Any:
        """Start replica ``index``. Raises NodeLost, ActorLost, or what the engine raises."""
        slot, config = self._slots[index], self._config
        node = self._home(index, slot)
        if node in self._replaced:  # another replica has found it out
            raise NodeLost(node, "no process starts there")
        if node in self._cluster.faults.ended_nodes:
            raise NodeLost(node, "its Monarch worker has ended")
        if self._kept is not None and (actor := await self._take_kept(index, slot, self._kept)) is not None:
            return actor
        mesh = f"{self._role.replace('-', '')}{index}{self._suffix}"
        slot.mesh = mesh + (f"r{slot.starts}" if slot.starts else "")
        slot.starts += 1
        self._cluster.faults.watch(slot.mesh, lambda reason: self.service.lose(index, reason))
        slot.procs = self._cluster.spawn_generator(slot.mesh, index, slot.node)
        try:
            await started(slot.procs, SPAWN_S, f"{self._role} {index}")
        except Exception as error:
            raise NodeLost(node, f"no process starts there: {reason_of(error)}") from error
        actor = slot.procs.spawn(slot.mesh, Generator, config, index, self._log_dir, self._role)
        given = slot.kv_cache_bytes if self._cluster.placement.shared_gpus else None
        call = actor.start.call_one(self.model_dir, given)
        slot.kv_cache_bytes = await self.ask(index, call, config.cluster.start_timeout_s, "start()")
        return actor

    async def _take_kept(self, index: int, slot: _ReplicaSlot, kept: KeptMeshes) -> Any | None:
        """The kept replica of this place, once it serves this run; None where there is none, or it cannot."""
        if (mesh := kept.take(f"generator{index}")) is None:
            return None
        slot.mesh, slot.procs, slot.kv_cache_bytes = mesh.name, mesh.procs, mesh.kv_cache_bytes
        self._cluster.faults.watch(mesh.name, lambda reason: self.service.lose(index, reason))
        call = mesh.actor.renew.call_one(self._config, self._log_dir, self.model_dir)
        try:
            why = await self.ask(index, call, self._config.cluster.start_timeout_s, "renew()")
        except ActorLost as error:
            why = reason_of(error)
        self.said.append(f"generator {index}: {f'a new engine, {why}' if why else 'its engine was kept'}")
        if not why:
            return mesh.actor
        slot.kv_cache_bytes = None
        await self._end(index)
        return None

    async def hand_over(self, kept: KeptMeshes | None) -> None:
        """The run is over: leave the engines for the next, where they are kept, and end what cannot be left."""
        if self._starting is not None:
            if kept is not None:  # the next run needs them as much as this one, which failed early
                await asyncio.wait({self._starting}, timeout=START_S)
            self._starting.cancel()
        for task in self._tasks:
            task.cancel()
        serving = set(self.service.serving) if self.turns is None else set()  # one that sleeps is not asked
        for index, slot in self._slots.items():
            if slot.procs is None:
                continue
            mesh = KeptMesh(slot.mesh, slot.procs, None, None)
            role = f"generator{index}"
            if kept is not None and index in serving and slot.node is None:
                actor = self.service.actor(index)
                layout, kv_cache_bytes = self._cluster.layout(role), slot.kv_cache_bytes
                kept.put(role, replace(mesh, actor=actor, layout=layout, kv_cache_bytes=kv_cache_bytes))
            else:
                await stop_mesh(self._cluster.faults, mesh)

    async def ask(self, index: int, call: Any, timeout_s: float, what: str) -> Any:
        """The answer of a generator that does not serve yet. Raises ActorLost, or what it raises."""
        nothing: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        return await answer(call, nothing, timeout_s, f"{self._role} {index}, {what}")

    # ---- replacement

    def _on_loss(self, index: int, reason: str) -> None:
        if self.lent is not None and index >= self.service.size:
            self.lent.lose_generator(index, reason)
            return
        who = f"{self._role} {index}"
        logger.error("%s is lost: %s", who, reason)
        told = reason if reason.startswith(f"{who},") else f"{who}: {reason}"
        task = asyncio.create_task(self._replace(index, told))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _replace(self, index: int, reason: str) -> None:
        """Put another replica in the place of a lost one: on its node, or on a spare one where the node is lost."""
        start, who = time.monotonic(), f"{self._role} {index}"
        try:
            self._recoveries.use_retry(self._kind, who, reason)
            while True:
                try:
                    await self._end(index)
                    async with self._turn():
                        actor = await self._spawn(index)
                        await self.bring_up_to_date(index, actor)
                        await self.service.admit(index, actor)
                    break
                except NodeLost as error:
                    if (spare := self._spare_for(error.node)) is None:
                        self._on_node_lost(error.node, str(error))
                        return
                    logger.warning("%s; node %d takes its place", error, spare)
                    self._slots[index].node = spare
                except Exception as error:  # also of an engine that does not start: memory may be free a moment later
                    logger.warning("%s did not come back", who, exc_info=not isinstance(error, ActorLost))
                    self._recoveries.use_retry(self._kind, who, reason_of(error))
            logger.info("%s is replaced after %.1f s", who, time.monotonic() - start)
        except Exception as error:
            logger.exception("%s cannot be replaced", who)
            if not self.failed.done():
                self.failed.set_result(error)

    def _spare_for(self, node: int) -> int | None:
        """The spare node that takes the place of a lost one, for all its replicas; None where there is none left."""
        if node not in self._replaced and self._spares:
            self._replaced[node] = self._spares.pop(0)
        return self._replaced.get(node)

    async def _end(self, index: int) -> None:
        """End what is left of a replica, so that its memory is free for the next. Raises NodeLost."""
        slot = self._slots[index]
        node = self._home(index, slot)
        self._cluster.faults.forget(slot.mesh)
        if slot.procs is None or node in self._cluster.faults.ended_nodes or node in self._replaced:
            return
        self._cluster.end_at_once(slot.mesh)
        stopping, slot.procs = asyncio.ensure_future(slot.procs.stop()), None
        await asyncio.wait({stopping}, timeout=END_S)
        if not stopping.done() and not await self._cluster.can_spawn(node, PROBE_S):
            stopping.cancel()
            raise NodeLost(node, "no process ends or starts there")
        try:
            await asyncio.wait_for(stopping, STOP_S)
        except Exception as error:  # what matters is whether another can be started
            logger.warning("ending %s: %s", slot.mesh, reason_of(error))

    async def bring_up_to_date(self, index: int, actor: Any) -> None:
        """Give a new replica the weights that the others hold; it returns in the same turn of the event loop in which
        that was found true, so that no delivery falls in between."""
        held: dict[int, tuple[WeightSync, int | None]] = {}
        labels: dict[int, int | None] = {}

        def is_held(adapter: int, weights: WeightSync) -> bool:
            return weights.version is None or held.get(adapter) == (weights, weights.version)

        def is_behind(adapter: int, weights: WeightSync) -> bool:
            return not is_held(adapter, weights) or weights.label not in (None, labels.get(adapter))

        while behind := [adapter for adapter, weights in self.weights.items() if is_behind(adapter, weights)]:
            weights = self.weights[adapter := behind[0]]
            options = {"adapter": adapter} if adapter else {}
            wanted = (weights, weights.version)
            if is_held(adapter, weights):  # the weights are there; their newest name is not
                labels[adapter] = label = weights.label
                call = actor.relabel.call_one(label, **options)
                await self.ask(index, call, self._config.generator.timeout_s, "relabel()")
                continue
            try:

                async def load(*args: Any, options: Mapping[str, int] = options) -> Any:
                    call = actor.load.call_one(*args, **options)
                    return [await self.ask(index, call, self._config.generator.timeout_s, "load()")]

                await weights.give(load, tells=False)
                held[adapter], labels[adapter] = wanted, wanted[1]
            except ActorLost:
                raise
            except Exception as error:  # dropped for a newer version meanwhile, or the trainers' store is gone
                logger.warning("generator %d: version %d: %s", index, wanted[1], reason_of(error))
                if self.turns is not None and weights.is_over:  # the next trainers start once it sleeps, and bring them
                    await self.ask(index, actor.sleep.call_one(), self._config.generator.timeout_s, "sleep()")
                    return
                async with asyncio.timeout(STORE_S):
                    while (self.weights[adapter], self.weights[adapter].version) == wanted:
                        await asyncio.sleep(0.2)


class WeightSync:
    """Brings each policy version from the trainers to all generators, beside the training where staleness allows.

    Generators read the version where the trainers have copied it, those of other hosts over streams; where neither
    works, the trainers put it into the store too. Who reads is known here, so the trainers are told which copy must
    stay.

    Args:
        tell: called with a line that says how the weights travel, when that is known and when it changes.
        verify: compare checksums of every version, not of the first alone.
        turns: where trainers and generators take turns on the same GPUs. Generators that have slept come without
            weights: each change of turns brings them the newest version.
    """

    def __init__(
        self,
        trainers: Trainers,
        store: StoreAtNeed,
        generators: Service,
        buffer: EpisodeBuffer | None,
        tell: Callable[[str], None] = logger.info,
        verify: bool = False,
        turns: Turns | None = None,
    ) -> None:
        self._turns = turns
        self._awake: int | None = None  # the version that woke the generators last, where there are turns
        self.is_over = False
        """The trainers serve no more."""
        self._trainers = trainers
        self._store = store
        self._generators = generators
        self._buffer = buffer
        self._tell = tell
        self._verify = verify
        self._delivery: asyncio.Task[None] | None = None
        self._offer: Offer | None = None  # of `version`, as long as it may be read
        self._in_store: int | None = None  # newest version there
        self._stores = False  # a generator needs the store
        self._storing = asyncio.Lock()
        self._readers: Counter[int] = Counter()  # of versions in the trainers' memory
        self._ways = ""
        self.version: int | None = None
        """The version that generators are to hold; None before the first."""
        self.label: int | None = None
        """What the generators are to call it: higher where steps without a signal left the weights as they were."""
        self.is_changed = False
        """Whether a step has changed the trainers' weights since they were published last."""
        self.seconds = 0.0
        """Duration of the last delivery that has finished, from the snapshot to the last generator."""

    async def publish(self, version: int) -> None:
        """Snapshot the trainers' weights and begin to deliver them. Training may go on when this returns.

        Where no step has changed them nothing is moved: the generators give the weights that they hold the new version.
        """
        await self.delivered()
        start = time.perf_counter()
        if self.is_changed or self._turns is not None:
            self._offer = None  # what is offered now may be overwritten once nobody reads it
            in_use = [held for held, num in self._readers.items() if num]
            verify = self._verify or self.version is None
            async with self._turns.training() if self._turns is not None else contextlib.nullcontext():
                offer = await self._offered(version, in_use, verify)
            self.is_changed = False
            self._delivery = asyncio.create_task(self._deliver(version, start, offer))
        else:
            self._delivery = asyncio.create_task(self._relabel(version, start))

    async def _offered(self, version: int, in_use: Sequence[int], verify: bool) -> Offer | None:
        """What the trainers have copied; None where one of them has no memory for that: then it goes into the store."""
        options = {"stores": self._stores, "with_checksum": verify}
        store = self._store.spec  # a generator that takes the version before may have it started meanwhile
        offer = await self._trainers.publish(store, version, in_use, **options)
        if offer is None and store is None:  # nothing has been published
            offer = await self._trainers.publish(await self._store.open(), version, in_use, **options)
        return offer

    async def delivered(self) -> None:
        """Wait until all generators hold the version published last. Raises what went wrong on the way."""
        if self._delivery is not None:
            await self._delivery

    def cancel(self) -> None:
        """Nothing is delivered any more."""
        self.is_over = True
        if self._delivery is not None:
            self._delivery.cancel()

    async def give(self, load: Callable[..., Awaitable[list[str | None]]], *, tells: bool = True) -> None:
        """Have generators take the version; ``load`` calls ``Generator.load`` and returns what each said. It is told
        how the weights came, unless that is said of one alone.

        Raises VersionNotFoundError where the next version is about to take its place.
        """
        version, offer = self.version, self._offer
        assert version is not None
        if offer is None and self._in_store != version:
            raise VersionNotFoundError(f"policy version {version} is being replaced by the next")
        self._readers[version] += 1
        try:
            ways = said = await load(self._store.spec, version, offer and offer.brief)
            if UNKNOWN in said:
                said = await load(self._store.spec, version, offer, True)
                ways = ways + said
            if None in said:
                self._stores = True
                await self._put_in_store(version)
                ways = ways + await load(self._store.spec, version, None, True)
        finally:
            self._readers[version] -= 1
        if tells:
            self._tell_ways({way for way in ways if way and way != UNKNOWN})

    def _tell_ways(self, ways: set[str]) -> None:
        told = f"weights: {', '.join(sorted(ways))}"
        if ways and told != self._ways:
            self._ways = told
            self._tell(told)

    async def _put_in_store(self, version: int) -> None:
        async with self._storing:
            if self._in_store == version:
                return
            await self._trainers.store(await self._store.open(), version)
            async with asyncio.timeout(self._trainers.timeout_s):
                await self._store.commit(version)
            self._in_store = version

    async def _deliver(self, version: int, start: float, offer: Offer | None) -> None:
        async with self._arrival(version, start):
            if offer is None or self._stores:
                await self._put_in_store(version)
            self._offer = offer
            self.version = self.label = version  # from here on a replacement takes this one; the others get it now
            if self._turns is None:
                await self.give(self._generators.load.fanout)
                return
            async with self._turns.generating():
                if self._awake != version:  # the change of turns has not brought it
                    await self.wake()

    async def wake(self) -> None:
        """The generators' turn: the trainers release what they need not, and the generators take the newest version and
        then the memory of their KV cache. Nothing happens where there are no trainers any more, or no version yet."""
        if self.is_over or (version := self.version) is None:
            return
        start = time.perf_counter()
        said = await self._trainers.release()
        released = time.perf_counter()
        try:
            await self.give(self._generators.load.fanout)
        except VersionNotFoundError:  # the next one is on its way, and wakes them
            return
        loaded = time.perf_counter()
        awake = await self._generators.wake.fanout()
        self._awake = version
        times = (released - start, loaded - released, time.perf_counter() - loaded)
        logger.info("trainers release in %.2f s, weights in %.2f s, KV cache in %.2f s; %s; %s", *times, said, awake)

    async def _relabel(self, version: int, start: float) -> None:
        async with self._arrival(version, start):
            self.label = version
            await self._generators.relabel.fanout(version)

    @contextlib.asynccontextmanager
    async def _arrival(self, version: int, start: float) -> AsyncIterator[None]:
        """The body brings ``version`` to all generators; the buffer is told, also of a failure."""
        try:
            yield
        except Exception as error:  # the loops may be waiting for these weights and for nothing else
            if self._buffer is not None:
                await self._buffer.fail(error)
            raise
        self.seconds = time.perf_counter() - start
        if self._buffer is not None:
            await self._buffer.weights_loaded(version)
