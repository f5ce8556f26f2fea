"""The controller process of a run, started by the supervisor of the first node (``forge_hpc.run``).

It reads the run directory, attaches to the workers of all nodes, runs the recipe, and leaves the reason in
``outcome.json`` of the rendezvous. On its standard input the supervisor asks it to stop, or to save and leave, and by
closing it tells that the supervisor is dead.

    lost generators ─► replaced beside the training (GeneratorPool)
    lent generators ─► come and go (LentGenerators)
    lost trainers ───► a new attempt from the newest checkpoint; the generators stay
    a lost node ─────► save where that can be done, and leave
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forge_hpc.cluster.faults import Faults
from forge_hpc.cluster.meshes import Cluster, attach
from forge_hpc.cluster.processes import die_with_parent
from forge_hpc.cluster.rendezvous import Rendezvous
from forge_hpc.config import Config, UserError, plan, read_config
from forge_hpc.controller.recovery import Departure, Leave, Recoveries
from forge_hpc.controller.service import ActorLost, cause_of, is_loss, reason_of
from forge_hpc.controller.stacks import joined, prepare_stacks, write_stacks
from forge_hpc.joining.door import DOOR
from forge_hpc.observability.environment import write_environment
from forge_hpc.observability.logs import Terminal, setup_logging
from forge_hpc.observability.phases import StartPhases
from forge_hpc.observability.remote import finish_runs
from forge_hpc.run_dir import RunDir
from forge_hpc.status_writer import StatusWriter
from forge_hpc.supervisor.ending import Cause, ControllerExit
from forge_hpc.supervisor.starts import StartLog
from forge_hpc.user_files import check_files, keep_files

if TYPE_CHECKING:  # they load torch: only once the nodes have been joined
    from forge_hpc.controller.frozen import FrozenProcesses
    from forge_hpc.controller.generators import GeneratorPool
    from forge_hpc.controller.session import Session

logger = logging.getLogger("forge_hpc.controller")
HEARTBEAT_S = 5.0
FLUSH_S = 2.0
CLOSE_S = 8.0
REPORT_S = 3.0
"""An error may be the echo of a dead process: its report comes within this time."""
MAX_MESSAGE = 1000


async def control(run_dir: RunDir, rendezvous: Rendezvous, log_dir: Path, terminal: Terminal, leave: Leave) -> bool:
    """Attach, and run the recipe to its end (True) or until the run is to leave; lost trainers cost an attempt."""
    from forge_hpc.controller.frozen import FrozenProcesses
    from forge_hpc.controller.generators import GeneratorPool, NodeLost
    from forge_hpc.controller.lent import LentGenerators
    from forge_hpc.controller.session import Session, background

    config = read_config(run_dir.config)
    await asyncio.to_thread(take_user_files, config, run_dir)
    await asyncio.to_thread(write_environment, log_dir)
    faults, status = Faults(rendezvous), StatusWriter(run_dir)
    async with background(heartbeat(status), faults.look_for_ended_nodes()) as tasks:
        cluster, phases = await join_nodes(config, rendezvous, log_dir, faults)
        recoveries = Recoveries(config.cluster.max_restarts)

        def node_lost(node: int, reason: str) -> None:
            silent = () if node in faults.ended_nodes else (node,)
            leave.request(Departure(Cause.NODE_LOST, f"node {node} is lost: {reason}", silent))

        pool = GeneratorPool(config, cluster, log_dir, recoveries, node_lost)
        lending = None
        if await asyncio.to_thread(rendezvous.look, DOOR) is not None:
            [start] = await asyncio.to_thread(rendezvous.wait, ["start"], config.cluster.start_timeout_s)
            where = rendezvous, start["address"], log_dir
            lent = LentGenerators(config, cluster, pool, *where, lambda num: status.update(lent=num))
            lending = tasks.create_task(lent.run())
        frozen = None
        if cluster.placement.frozen_nodes:
            frozen = FrozenProcesses(config, cluster, log_dir, recoveries, node_lost)
        done, number = False, 0
        while not done and not leave.requested.is_set():
            session = Session(config, run_dir, log_dir, cluster, pool, recoveries, leave, number, status, frozen)
            session.phases = phases if number == 0 else None
            faults.begin()
            faults.watch_nodes(partial(on_ended_node, session, pool, frozen, node_lost))
            try:
                done = await attempt(session, pool, terminal, leave, status)
            except NodeLost as error:
                node_lost(error.node, str(error))
            except ActorLost as error:
                session.lose(str(error))
                await session.abandon()
                if not leave.requested.is_set():
                    recoveries.use_retry("trainers", "trainers", str(error))
                    status.update(message=f"recovering: {error}")
            number += 1
        if lending is not None:
            lending.cancel()
    # In good order only where all went well: after a failure the supervisors end what is left, and faster.
    if done:
        try:
            async with asyncio.timeout(CLOSE_S):
                await session.close()
                await pool.close()
                if frozen is not None:
                    await frozen.close()
                await cluster.hosts.shutdown()
        except Exception as error:  # of a node that was lost on the way, say: the run is done
            logger.warning("ending the nodes: %s", reason_of(error))
    with contextlib.suppress(OSError, UserError):  # the supervisor writes the last one
        await asyncio.to_thread(status.flush, FLUSH_S)
    return done


async def attempt(
    session: Session, pool: GeneratorPool, terminal: Terminal, leave: Leave, status: StatusWriter
) -> bool:
    """Run the recipe from the newest checkpoint: True when it is done, False when the run has saved to leave.

    Raises:
        ActorLost: trainers, or what they cannot be without, are lost.
        NodeLost: nothing can be started on a trainer node.
    """
    from forge_hpc.controller.generators import NodeLost

    leave.is_attended = True
    work = asyncio.create_task(run_recipe(session, terminal, status))
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
            if isinstance(cause := cause_of(error), NodeLost):
                if session.is_between_steps:  # of frozen models: the trainers can still save
                    with contextlib.suppress(ActorLost):
                        await session.save_to_leave()
                raise cause
            await asyncio.wait(losses, timeout=REPORT_S, return_when=asyncio.FIRST_COMPLETED)
            if not any(loss.done() for loss in losses):
                if is_loss(error):
                    raise ActorLost(reason_of(error)) from error
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


async def run_recipe(session: Session, terminal: Terminal, status: StatusWriter) -> None:
    """The recipe, on the state that the session finds."""
    await session.prepare()
    with await asyncio.to_thread(session.open_records, terminal.stdout):
        total = session.config.trainer.training.steps if session.needs.trains else 0
        status.update(state="running", step=session.step, policy_version=session.step, total_steps=total, message="")
        await session.recipe.run(session)


def on_ended_node(
    session: Session,
    pool: GeneratorPool,
    frozen: FrozenProcesses | None,
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


def take_user_files(config: Config, run_dir: RunDir) -> None:
    """See that the user's files are those that the run has learned with, and keep those of a run that is new.

    Raises:
        UserError: they are others.
    """
    if changes := check_files(config, run_dir):
        logger.info("changed since the last start: %s", "; ".join(changes))
        StartLog(run_dir).changed(changes)
    keep_files(config, run_dir)


async def join_nodes(
    config: Config, rendezvous: Rendezvous, log_dir: Path, faults: Faults
) -> tuple[Cluster, StartPhases]:
    """Wait for the workers of all nodes, attach to them, and decide what runs where; the time until then."""
    timeout_s = config.cluster.start_timeout_s
    [start] = await asyncio.to_thread(rendezvous.wait, ["start"], timeout_s)  # published before it started us
    [record] = await asyncio.to_thread(rendezvous.wait, ["phases"], timeout_s)
    phases = StartPhases.resume(record)
    joined(start["num_nodes"])
    names = [f"worker-{node}" for node in range(start["num_nodes"])]
    workers = await asyncio.to_thread(rendezvous.wait, names, timeout_s)
    phases.end("environment")
    hosts = await attach([worker["address"] for worker in workers], start["address"], timeout_s)
    phases.end("attach")
    config.cluster.nodes = len(workers)  # a run may come back on another number of nodes
    config.cluster.spare_nodes = max(0, config.cluster.spare_nodes - start["left_out"])
    gpus, found = config.cluster.gpus_per_node, min(len(worker["gpus"]) for worker in workers)
    if gpus is not None and gpus > found:
        raise UserError(f"cluster.gpus_per_node is {gpus}, a node has {found}", "lower it, or leave it out")
    placement = plan(config, found if gpus is None else gpus)
    logger.info("attached to %d nodes\n%s", len(workers), placement.describe())
    cpus = min(worker["cpus"] for worker in workers)
    return Cluster(hosts, placement, cpus, [worker["gpus"] for worker in workers], log_dir, faults), phases


async def heartbeat(status: StatusWriter) -> None:
    """Show in status.json that the controller's loop lives."""
    while True:
        status.update()
        await asyncio.sleep(HEARTBEAT_S)


def obey_supervisor(task: asyncio.Task[None], loop: asyncio.AbstractEventLoop, leave: Leave) -> None:
    """``stop`` cancels the task, ``leave REASON`` asks to save and leave. The supervisor's death ends the process."""
    for line in sys.stdin:
        word, _, reason = line.strip().partition(" ")
        logger.info("the supervisor asks to %s %s", word, reason)
        if word == "leave":
            loop.call_soon_threadsafe(leave.request, Departure(Cause.ASKED, reason))
            if not leave.is_attended:  # nothing to save yet
                loop.call_soon_threadsafe(task.cancel)
        else:
            loop.call_soon_threadsafe(task.cancel)
    os._exit(1)


def is_disk_trouble(error: BaseException) -> bool:
    """Whether a file system failed in a way that another start may not meet: full, gone, or read-only."""
    codes = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EROFS, errno.ETIMEDOUT, errno.EREMOTEIO}
    return isinstance(error, OSError) and error.errno in codes


async def main() -> int:
    """Exit code: a `ControllerExit`."""
    parser = argparse.ArgumentParser(description="Controller of a run; started by forge_hpc.run.")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--rendezvous", type=Path, required=True)
    parser.add_argument("--log-dir", type=Path, required=True)
    parser.add_argument("--parent", type=int, required=True)
    args = parser.parse_args()
    die_with_parent(args.parent)
    run_dir, rendezvous = RunDir(args.run_dir), Rendezvous(args.rendezvous)
    prepare_stacks(rendezvous, args.log_dir)
    terminal = setup_logging(args.log_dir / "controller.log", "controller")

    task, leave = asyncio.current_task(), Leave()
    assert task is not None
    threading.Thread(target=obey_supervisor, args=(task, asyncio.get_running_loop(), leave), daemon=True).start()
    done, outcome = False, dict[str, Any](code=ControllerExit.DONE, message="")
    try:
        done = await control(run_dir, rendezvous, args.log_dir, terminal, leave)
    except asyncio.CancelledError as error:
        logger.info("stopped:\n%s", "".join(traceback.format_exception(error)))
        outcome = {"code": ControllerExit.STOPPED, "message": "stopped"}
    except BaseException as error:
        cause = cause_of(error)
        logger.error("the run failed:\n%s", "".join(traceback.format_exception(error)))
        if isinstance(cause, UserError):
            outcome = {"code": ControllerExit.FAILED, "message": cause.message, "hint": cause.hint}
        else:
            message = str(cause) if isinstance(cause, ActorLost) else f"{type(cause).__name__}: {cause}"
            if isinstance(cause, TimeoutError):
                message += await write_stacks(message)
            outcome = {
                "code": ControllerExit.FAILED,
                "message": " ".join(message.split())[:MAX_MESSAGE],
                "is_loss": is_loss(error) or is_disk_trouble(cause),
            }
    if (departure := leave.departure) is not None and not done:
        outcome = {"code": ControllerExit.LEFT, "message": departure.message, "cause": departure.cause}
        outcome["lost_nodes"] = list(departure.lost_nodes)
    try:
        rendezvous.publish("outcome", outcome)
    except OSError as error:  # the supervisor knows our exit code, and that it was asked to see that we leave
        logger.error("outcome %s cannot be told: %s", outcome, error)
    finish_runs()  # last of all: whatever the run needs is saved and said
    return outcome["code"]


if __name__ == "__main__":
    code = asyncio.run(main())
    logging.shutdown()
    os._exit(code)  # Monarch's runtime threads would otherwise be waited for; all that matters is on disk
