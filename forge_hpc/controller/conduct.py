"""Conducting a run: its processes on the nodes, one attempt after the other, from what its directory says.

lost generators ─► replaced beside the training (GeneratorPool)
lent generators ─► come and go (LentGenerators)
lost served ones ► replaced likewise (ServedModels)
lost trainers ───► a new attempt from the newest checkpoint; the generators stay
a lost node ─────► save where that can be done, and leave
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from forge_hpc.cluster.faults import Faults
from forge_hpc.cluster.hangs import joined
from forge_hpc.cluster.meshes import Cluster, attach
from forge_hpc.cluster.rendezvous import Rendezvous
from forge_hpc.config import Config, UserError
from forge_hpc.config.split import place
from forge_hpc.controller.recovery import Departure, GivenUp, Leave, Recoveries
from forge_hpc.controller.service import ActorLost, cause_of, is_loss, told
from forge_hpc.observability.environment import write_environment
from forge_hpc.observability.logs import Terminal
from forge_hpc.observability.phases import StartPhases
from forge_hpc.run_dir import RunDir
from forge_hpc.status_writer import StatusWriter
from forge_hpc.supervisor.ending import Cause
from forge_hpc.supervisor.starts import StartLog
from forge_hpc.user_files import check_files, keep_files
from forge_hpc.wire.tls import Certificates
from forge_hpc.workers.remote import Caller, OtherNode

if TYPE_CHECKING:  # they load torch: only once the nodes have been joined
    from monarch.actor import HostMesh

    from forge_hpc.controller.adapters import AdapterSessions
    from forge_hpc.controller.frozen import FrozenProcesses
    from forge_hpc.controller.generators import GeneratorPool
    from forge_hpc.controller.kept import KeptMeshes
    from forge_hpc.controller.served import ServedModels
    from forge_hpc.controller.session import Session

    AnySession: TypeAlias = Session | AdapterSessions

logger = logging.getLogger("forge_hpc.controller")
HEARTBEAT_S = 5.0
REPORT_S = 3.0
"""An error may be the echo of a dead process: its report comes within this time."""


@contextlib.asynccontextmanager
async def reporting(config: Config, run_dir: RunDir, log_dir: Path) -> AsyncIterator[StatusWriter]:
    """A run that shows that it lives, with the user's files that it has learned with."""
    from forge_hpc.controller.session import background

    await asyncio.to_thread(take_user_files, config, run_dir)
    await asyncio.to_thread(write_environment, log_dir)
    status = StatusWriter(run_dir)
    async with background(heartbeat(status)):
        yield status


class Crew:
    """The processes of one run, as far as they have been started."""

    def __init__(self) -> None:
        self.pool: GeneratorPool | None = None
        self.frozen: FrozenProcesses | None = None
        self.served: ServedModels | None = None
        self.session: AnySession | None = None

    async def close(self) -> None:
        """End them in good order, at once but for those that one needs to end: environments may ask served models."""
        from forge_hpc.controller.session import all_of

        async def in_turn(*parts: AnySession | ServedModels | GeneratorPool | FrozenProcesses | None) -> None:
            for part in parts:
                if part is not None:
                    await part.close()

        await all_of(in_turn(self.session, self.served), in_turn(self.pool), in_turn(self.frozen))

    async def hand_over(self, kept: KeptMeshes) -> None:
        """Leave for the next run what it may use, and end all else."""
        if self.session is not None:
            await self.session.hand_over()
        if self.pool is not None:
            await self.pool.hand_over(kept)
        if self.frozen is not None:
            await self.frozen.end()
        if self.served is not None:
            await self.served.end()


@dataclass(frozen=True)
class Lending:
    """Where nodes that other jobs lend make themselves known."""

    rendezvous: Rendezvous
    address: str
    """Of this host, by which others reach it."""


async def conduct(
    crew: Crew,
    config: Config,
    run_dir: RunDir,
    log_dir: Path,
    cluster: Cluster,
    phases: StartPhases,
    terminal: Terminal,
    leave: Leave,
    status: StatusWriter,
    kept: KeptMeshes | None = None,
    lending: Lending | None = None,
) -> bool:
    """Run the recipe to its end (True) or until the run is to leave; lost trainers cost an attempt."""
    from forge_hpc.controller.adapters import AdapterSessions
    from forge_hpc.controller.frozen import FrozenProcesses
    from forge_hpc.controller.generators import GeneratorPool, NodeLost
    from forge_hpc.controller.session import Session, background

    if config.trainer.lora.sweep and kept is not None:
        raise UserError("trainer.lora.sweep has processes of its own", "submit it without --keep-engines")
    recoveries, faults = Recoveries(config.cluster.max_restarts), cluster.faults

    def node_lost(node: int, reason: str) -> None:
        silent = () if node in faults.ended_nodes else (node,)
        leave.request(Departure(Cause.NODE_LOST, f"node {node} is lost: {reason}", silent))

    pool = crew.pool = GeneratorPool(config, cluster, log_dir, recoveries, node_lost, kept)
    if cluster.placement.frozen_nodes:
        crew.frozen = FrozenProcesses(config, cluster, log_dir, recoveries, node_lost)
    if config.served:
        from forge_hpc.controller.served import ServedModels

        suffix = "" if kept is None else kept.suffix
        crew.served = ServedModels(config, cluster, log_dir, recoveries, node_lost, pool.failed, suffix)
    lent: list[Awaitable[None]] = []
    if lending is not None:
        from forge_hpc.controller.lent import LentGenerators

        door = lending.rendezvous, lending.address, log_dir
        lent.append(LentGenerators(config, cluster, pool, *door, lambda num: status.update(lent=num)).run())
    done, number = False, 0
    async with background(*lent):
        while not done and not leave.requested.is_set():
            where = config, run_dir, log_dir, cluster, pool, recoveries, leave, number, status
            session: AnySession
            session = (
                AdapterSessions(*where)
                if config.trainer.lora.sweep
                else Session(*where, crew.frozen, kept, crew.served)
            )
            crew.session = session
            session.phases = phases if number == 0 else None
            faults.begin()
            faults.watch_nodes(partial(on_ended_node, session, pool, crew.frozen, crew.served, node_lost))
            try:
                done = await attempt(session, pool, terminal, leave, status)
            except NodeLost as error:
                node_lost(error.node, str(error))
            except GivenUp:  # other trainers would not help
                raise
            except ActorLost as error:
                session.lose(str(error))
                await session.abandon()
                if not leave.requested.is_set():
                    recoveries.use_retry("trainers", "trainers", str(error))
                    status.update(message=f"recovering: {error}")
            number += 1
    return done


async def attempt(
    session: AnySession, pool: GeneratorPool, terminal: Terminal, leave: Leave, status: StatusWriter
) -> bool:
    """Run the recipe from the newest checkpoint: True when it is done, False when the run has saved to leave.

    Raises:
        ActorLost: trainers, or what they cannot be without, are lost. GivenUp: generators or frozen models, for good.
        NodeLost: nothing can be started on a trainer node.
    """
    from forge_hpc.controller.generators import NodeLost

    leave.is_attended = True
    work = asyncio.create_task(run_on(session, terminal, status))
    asked = asyncio.create_task(leave.requested.wait())
    trainer_losses: tuple[asyncio.Future[Any], ...] = (session.lost, session.cluster.faults.unexpected)
    losses = (*trainer_losses, pool.failed)
    try:
        await asyncio.wait({asked, work, *losses}, return_when=asyncio.FIRST_COMPLETED)
        if leave.departure is not None:
            status.update(state="saving", message=leave.departure.message)
        if leave.departure is not None or pool.failed.done():
            boundary = asyncio.create_task(session.between_steps())
            await asyncio.wait({boundary, work, *trainer_losses}, return_when=asyncio.FIRST_COMPLETED)
            boundary.cancel()
        if work.done():
            if (error := work.exception()) is None:
                return True
            if isinstance(cause := cause_of(error), NodeLost | GivenUp):
                if session.is_between_steps:  # of frozen models: the trainers can still save
                    with contextlib.suppress(ActorLost):
                        await session.save_to_leave()
                raise cause
            await asyncio.wait(losses, timeout=REPORT_S, return_when=asyncio.FIRST_COMPLETED)
            if not any(loss.done() for loss in losses):
                if is_loss(error):
                    raise ActorLost(await told(error)) from error
                raise error
    finally:
        asked.cancel()
        work.cancel()
        await asyncio.wait({work})
    lost = [loss.result() for loss in trainer_losses if loss.done()]
    if lost and not pool.failed.done():
        raise ActorLost(lost[0])
    with contextlib.suppress(ActorLost) if pool.failed.done() else contextlib.nullcontext():
        if lost or not session.is_between_steps or not await session.save_to_leave():
            logger.error("leaving without the last steps: the newest checkpoint stands")
    if pool.failed.done():
        raise pool.failed.result()
    return False


async def run_on(session: AnySession, terminal: Terminal, status: StatusWriter) -> None:
    """The recipe, on the state that the session finds."""
    from forge_hpc.controller.adapters import AdapterSessions
    from forge_hpc.controller.recipe_run import run_recipe

    if isinstance(session, AdapterSessions):
        await session.run(terminal)
        return
    await session.prepare()
    with await asyncio.to_thread(session.open_records, terminal.stdout):
        total = session.config.trainer.training.steps if session.needs.trains else 0
        status.update(state="running", step=session.step, policy_version=session.step, total_steps=total, message="")
        await run_recipe(session)


def on_ended_node(
    session: AnySession,
    pool: GeneratorPool,
    frozen: FrozenProcesses | None,
    served: ServedModels | None,
    node_lost: Callable[[int, str], None],
    node: int,
    reason: str,
) -> None:
    """A node's Monarch worker has ended, and with it all that ran there."""
    placement = session.cluster.placement
    if node in placement.trainer_nodes:
        session.lose(f"node {node}: {reason}")
        node_lost(node, reason)
    if node in placement.rollout_nodes or node >= placement.nodes:  # or a lent one
        pool.lose_node(node, reason)
    if frozen is not None:
        frozen.lose_node(node, reason)
    if served is not None:
        served.lose_node(node, reason)


def take_user_files(config: Config, run_dir: RunDir) -> None:
    """See that the user's files are those that the run has learned with, and keep those of a run that is new.

    Raises:
        UserError: they are others.
    """
    if changes := check_files(config, run_dir):
        logger.info("changed since the last start: %s", "; ".join(changes))
        StartLog(run_dir).changed(changes)
    keep_files(config, run_dir)


@dataclass(frozen=True)
class Nodes:
    """The nodes of a start, which the controller is attached to."""

    hosts: HostMesh
    workers: Sequence[Mapping[str, Any]]
    """What the worker of each has published."""
    num_left_out: int
    address: str
    """Of the first."""
    remarks: Sequence[str] = ()
    """What the gate has said of them."""


async def start_phases(config: Config, rendezvous: Rendezvous) -> StartPhases:
    """The phases that the supervisor has begun to count."""
    [record] = await asyncio.to_thread(rendezvous.wait, ["phases"], config.cluster.start_timeout_s)
    return StartPhases.resume(record)


async def join_nodes(config: Config, rendezvous: Rendezvous, phases: StartPhases) -> Nodes:
    """Wait for the workers of all nodes, and attach to them."""
    timeout_s = config.cluster.start_timeout_s
    [start] = await asyncio.to_thread(rendezvous.wait, ["start"], timeout_s)  # published before it started us
    joined(start["num_nodes"])
    names = [f"worker-{node}" for node in range(start["num_nodes"])]
    workers = await asyncio.to_thread(rendezvous.wait, names, timeout_s)
    phases.end("environment")
    hosts = await attach([worker["address"] for worker in workers], start["address"], timeout_s)
    phases.end("attach")
    return Nodes(hosts, workers, start["left_out"], start["address"], start["remarks"])


def arrange(config: Config, nodes: Nodes, log_dir: Path, faults: Faults) -> Cluster:
    """Decide what runs where. Raises UserError where it does not fit the nodes."""
    workers = nodes.workers
    for remark in nodes.remarks:  # they stand on the terminal already
        logger.warning("%s", remark)
    placement = place(config, [len(worker["gpus"]) for worker in workers], nodes.num_left_out)
    logger.info("attached to %d nodes\n%s", len(workers), placement.describe())
    cpus = min(worker["cpus"] for worker in workers)
    gpu_names = [worker["gpus"] for worker in workers]
    others = other_nodes(config, workers)
    alike = config.model.batch_invariant
    return Cluster(nodes.hosts, placement, cpus, gpu_names, log_dir, faults, others, nodes.address, alike)


def other_nodes(config: Config, workers: Sequence[Mapping[str, Any]]) -> list[OtherNode]:
    """Those that run rewards and environments, beside this one."""
    certificates = Certificates.from_environment()
    if config.cluster.workers_on == "first" or certificates is None:
        return []
    caller = Caller(certificates)
    return [
        OtherNode(f"node {node} ({worker['host']})", tuple(worker["processes"]), worker["cpus"], caller)
        for node, worker in enumerate(workers)
        if worker["processes"] is not None
    ]


async def heartbeat(status: StatusWriter) -> None:
    """Show in status.json that the controller's loop lives."""
    while True:
        status.update()
        await asyncio.sleep(HEARTBEAT_S)
