"""The controller process of a run, started by the supervisor of the first node (``forge_hpc.run``).

It reads the run directory, attaches to the workers of all nodes, runs the recipe (``conduct``), and leaves the reason
in ``outcome.json`` of the rendezvous. On its standard input the supervisor asks it to stop, or to save and leave, and
by closing it tells that the supervisor is dead (``orders``).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import time
from pathlib import Path

from forge_hpc.cluster.faults import Faults
from forge_hpc.cluster.hangs import prepare_stacks
from forge_hpc.cluster.processes import allow_open_files, die_with_parent
from forge_hpc.cluster.rendezvous import Rendezvous
from forge_hpc.config import UserError, read_config
from forge_hpc.controller.conduct import Crew, Lending, arrange, conduct, join_nodes, reporting, start_phases
from forge_hpc.controller.orders import Orders
from forge_hpc.controller.outcome import outcome_of, tell
from forge_hpc.controller.recovery import Leave
from forge_hpc.controller.service import reason_of
from forge_hpc.imports import importing
from forge_hpc.joining.door import DOOR
from forge_hpc.observability.logs import Terminal, setup_logging
from forge_hpc.observability.remote import finish_runs
from forge_hpc.run_dir import RunDir

logger = logging.getLogger("forge_hpc.controller")
FLUSH_S = 2.0
CLOSE_S = 8.0


async def control(run_dir: RunDir, rendezvous: Rendezvous, log_dir: Path, terminal: Terminal, leave: Leave) -> bool:
    """Attach, and run the recipe to its end (True) or until the run is to leave."""
    with importing():
        from forge_hpc.controller.session import background

    config = read_config(run_dir.config)
    faults, crew = Faults(rendezvous), Crew()
    async with background(faults.look_for_ended_nodes()), reporting(config, run_dir, log_dir) as status:
        phases = await start_phases(config, rendezvous)
        nodes = await join_nodes(config, rendezvous, phases)
        cluster = arrange(config, nodes, log_dir, faults)
        lending = Lending(rendezvous, nodes.address) if await asyncio.to_thread(rendezvous.look, DOOR) else None
        told = phases, terminal, leave, status
        done = await conduct(crew, config, run_dir, log_dir, cluster, *told, lending=lending)
    # In good order only where all went well: after a failure the supervisors end what is left, and faster.
    if done:
        start = time.perf_counter()
        try:
            async with asyncio.timeout(CLOSE_S):
                await crew.close()
        except Exception as error:  # of a node that was lost on the way, say: the run is done
            logger.warning("ending the actors: %s", reason_of(error))
        # Their processes the supervisors end, and faster than Monarch does: they have nothing to lose any more.
        logger.info("actors ended in %.1f s", time.perf_counter() - start)
    with contextlib.suppress(OSError, UserError):  # the supervisor writes the last one
        await asyncio.to_thread(status.flush, FLUSH_S)
    return done


async def main() -> int:
    """Exit code: a `ControllerExit`."""
    parser = argparse.ArgumentParser(description="Controller of a run; started by forge_hpc.run.")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--rendezvous", type=Path, required=True)
    parser.add_argument("--log-dir", type=Path, required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--keep", action="store_true", help="serve one run after the other (forge_hpc.kept)")
    args = parser.parse_args()
    die_with_parent(args.parent)
    allow_open_files()
    run_dir, rendezvous = RunDir(args.run_dir), Rendezvous(args.rendezvous)
    prepare_stacks(rendezvous, args.log_dir)
    terminal = setup_logging(args.log_dir / "controller.log", "controller")
    orders = Orders()
    if args.keep:
        from forge_hpc.controller.serve import serve

        orders.listen()
        return await serve(orders, rendezvous)
    leave = Leave()
    orders.follow(asyncio.current_task(), leave)
    orders.listen()
    outcome = await outcome_of(control(run_dir, rendezvous, args.log_dir, terminal, leave), leave)
    tell(rendezvous, outcome)
    finish_runs()  # last of all: whatever the run needs is saved and said
    return outcome["code"]


if __name__ == "__main__":
    code = asyncio.run(main())
    logging.shutdown()
    os._exit(code)  # Monarch's runtime threads would otherwise be waited for; all that matters is on disk
