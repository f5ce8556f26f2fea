"""The controller process of a run, started by the supervisor of the first node (``forge_hpc.run``).

It reads the run directory, attaches to the workers of all nodes, runs the recipe, and leaves the reason in
``outcome.json`` of the rendezvous. On its standard input the supervisor asks it to stop, and by closing it tells that
the supervisor is dead.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import logging
import os
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from forge_hpc.cluster.meshes import Cluster, attach
from forge_hpc.cluster.processes import die_with_parent
from forge_hpc.cluster.rendezvous import Rendezvous
from forge_hpc.config import Config, UserError, plan, read_config
from forge_hpc.observability.logs import Terminal, setup_logging
from forge_hpc.run_dir import RunDir

logger = logging.getLogger("forge_hpc.controller")
HEARTBEAT_S = 5.0
CLOSE_S = 8.0
FAULTS_S = 0.5
"""A dead process is reported once for each actor on it, within milliseconds."""
MAX_MESSAGE = 1000


class Fault(RuntimeError):
    """Monarch reported that an actor or its process failed."""


async def control(run_dir: RunDir, rendezvous: Rendezvous, log_dir: Path, terminal: Terminal) -> None:
    """Attach, build the session, run the recipe to its end."""
    faults = watch_faults()
    async with asyncio.TaskGroup() as tasks:
        helpers = [tasks.create_task(heartbeat(run_dir)), tasks.create_task(raise_fault(faults))]
        config = read_config(run_dir.config)
        cluster = await join_nodes(config, rendezvous, log_dir)

        from forge_hpc.recipes.session import Session

        session = Session(config, run_dir, log_dir, cluster)
        await session.prepare()
        with session.open_records(terminal.stdout):
            recipe = getattr(importlib.import_module(f"forge_hpc.recipes.{config.recipe}"), config.recipe)
            run_dir.write_status(state="running", step=session.step, policy_version=session.step)
            await recipe(session)
        for helper in helpers:
            helper.cancel()
    # In good order only where all went well: after a failure the supervisors end what is left, and faster.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(CLOSE_S):
            await session.close()
            await cluster.hosts.shutdown()


async def join_nodes(config: Config, rendezvous: Rendezvous, log_dir: Path) -> Cluster:
    """Wait for the workers of all nodes, attach to them, and decide what runs where."""
    timeout_s = config.cluster.start_timeout_s
    [start] = rendezvous.wait(["start"], timeout_s)  # the supervisor has published it before it started us
    names = [f"worker-{node}" for node in range(start["num_nodes"])]
    workers = await asyncio.to_thread(rendezvous.wait, names, timeout_s)
    hosts = await attach([worker["address"] for worker in workers], start["address"], timeout_s)
    config.cluster.nodes = len(workers)  # a run may come back on another number of nodes
    gpus, found = config.cluster.gpus_per_node, min(len(worker["gpus"]) for worker in workers)
    if gpus is not None and gpus > found:
        raise UserError(f"cluster.gpus_per_node is {gpus}, a node has {found}", "lower it, or leave it out")
    placement = plan(config, found if gpus is None else gpus)
    logger.info("attached to %d nodes\n%s", len(workers), placement.describe())
    cpus = min(worker["cpus"] for worker in workers)
    return Cluster(hosts, placement, cpus, [worker["gpus"] for worker in workers], log_dir)


async def heartbeat(run_dir: RunDir) -> None:
    """Show in status.json that the controller lives."""
    while True:
        run_dir.write_status()
        await asyncio.sleep(HEARTBEAT_S)


def watch_faults() -> asyncio.Queue[Any]:
    """Monarch's default is to end the controller at a fault; here it becomes an error of the run."""
    import monarch.actor

    loop, faults = asyncio.get_running_loop(), asyncio.Queue[Any]()

    def hook(failure: Any) -> None:
        logger.error("Monarch reports %s", failure)
        loop.call_soon_threadsafe(faults.put_nowait, failure)

    monarch.actor.unhandled_fault_hook = hook
    return faults


async def raise_fault(faults: asyncio.Queue[Any]) -> None:
    """Raise Fault when Monarch reports one, naming our actor where that is among what a dead process takes with it."""
    failures = [await faults.get()]
    await asyncio.sleep(FAULTS_S)
    while not faults.empty():
        failures.append(faults.get_nowait())
    ours = [failure for failure in failures if not failure.mesh_name.startswith("logger-")] or failures
    name, ranks = ours[0].mesh_name.rpartition("-")[0], ", ".join(map(str, ours[0].crashed_ranks))
    reason = str(ours[0].event).strip().splitlines()[-1].strip()
    raise Fault(f"{name} (rank {ranks}) failed: {reason}")


def obey_supervisor(task: asyncio.Task[None], loop: asyncio.AbstractEventLoop) -> None:
    """Cancel ``task`` when the supervisor says so. Ends the process when the supervisor has died."""
    for line in sys.stdin:
        logger.info("the supervisor asks to stop: %s", line.strip())
        loop.call_soon_threadsafe(task.cancel)
    os._exit(1)


def first_cause(error: BaseException) -> BaseException:
    """The error that started it: the first of a group, and in Monarch's wrapper the one of the actor."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    while (cause := getattr(error, "exception", None)) is not None and isinstance(cause, BaseException):
        error = cause
    return error


async def main() -> int:
    """Exit code: 0 done, 1 failed, 2 the user's to mend, 3 stopped by the supervisor."""
    parser = argparse.ArgumentParser(description="Controller of a run; started by forge_hpc.run.")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--rendezvous", type=Path, required=True)
    parser.add_argument("--log-dir", type=Path, required=True)
    parser.add_argument("--parent", type=int, required=True)
    args = parser.parse_args()
    die_with_parent(args.parent)
    run_dir, rendezvous = RunDir(args.run_dir), Rendezvous(args.rendezvous)
    terminal = setup_logging(args.log_dir / "controller.log", "controller")

    task = asyncio.current_task()
    assert task is not None
    threading.Thread(target=obey_supervisor, args=(task, asyncio.get_running_loop()), daemon=True).start()
    outcome: dict[str, Any] = {"code": 0, "message": ""}
    try:
        await control(run_dir, rendezvous, args.log_dir, terminal)
    except asyncio.CancelledError:
        outcome = {"code": 3, "message": "stopped"}
    except BaseException as error:
        cause = first_cause(error)
        logger.error("the run failed:\n%s", "".join(traceback.format_exception(error)))
        if isinstance(cause, UserError):
            outcome = {"code": 1, "message": cause.message, "hint": cause.hint}
        else:
            message = " ".join(f"{type(cause).__name__}: {cause}".split())
            outcome = {"code": 1, "message": message[:MAX_MESSAGE]}
    rendezvous.publish("outcome", outcome)
    return outcome["code"]


if __name__ == "__main__":
    code = asyncio.run(main())
    logging.shutdown()
    os._exit(code)  # Monarch's runtime threads would otherwise be waited for; all that matters is on disk
