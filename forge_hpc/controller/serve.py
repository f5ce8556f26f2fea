"""One run after the other on the same nodes, for ``forge_hpc.kept``: the controller stays, and what it has started.

    run JSON on the standard input ──► a run ──► outcome in its rendezvous ──► what it leaves (``kept``) ──► …

Where the nodes themselves are in doubt (a lost one, a loss that could not be mended) nothing is kept: the controller
ends, and with it, by its supervisor, all else.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from forge_hpc.cluster.faults import Faults
from forge_hpc.cluster.hangs import prepare_stacks, write_stacks
from forge_hpc.cluster.rendezvous import Rendezvous
from forge_hpc.config import UserError, read_config
from forge_hpc.config.user_code import forget_user_code
from forge_hpc.controller.conduct import Crew, Nodes, arrange, conduct, join_nodes, reporting, start_phases
from forge_hpc.controller.kept import KeptMeshes
from forge_hpc.controller.orders import Orders
from forge_hpc.controller.outcome import outcome_of, tell
from forge_hpc.controller.recovery import Leave
from forge_hpc.files import open_private
from forge_hpc.observability.logs import Terminal, setup_logging
from forge_hpc.observability.remote import finish_runs
from forge_hpc.run_dir import RunDir
from forge_hpc.supervisor.ending import Cause, ControllerExit
from forge_hpc.user_files import named_files

logger = logging.getLogger("forge_hpc.controller")
FLUSH_S = 2.0
HAND_OVER_S = 120.0
"""A run's processes have given up what is not kept within this time."""


async def serve(orders: Orders, rendezvous: Rendezvous) -> int:
    """Serve runs on the nodes of ``rendezvous`` until one ends in a way that leaves nothing to keep; the exit code."""
    from forge_hpc.controller.session import background

    server = _Server(rendezvous)
    async with background(server.faults.look_for_ended_nodes()):
        while True:
            order = await orders.runs.get()
            run_dir, log_dir = RunDir(order["run_dir"]), Path(order["log_dir"])
            prepare_stacks(rendezvous, log_dir)
            setup_logging(log_dir / "controller.log", "controller")
            leave, crew = Leave(), Crew()
            with _terminal(Path(order["out"]), Path(order["err"])) as terminal:
                work = asyncio.create_task(
                    server.run(crew, run_dir, Rendezvous(Path(order["rendezvous"])), log_dir, terminal, leave)
                )
                orders.follow(work, leave)
                outcome = await outcome_of(work, leave)
                orders.follow(None, Leave())
            tell(Rendezvous(Path(order["rendezvous"])), outcome)
            if outcome.get("is_loss") or outcome.get("cause") == Cause.NODE_LOST or server.faults.ended_nodes:
                finish_runs()
                return ControllerExit.FAILED
            try:
                await _hand_over(crew, server.kept)
            except Exception:  # whatever it is, what would be kept is not in order
                logger.exception("nothing is kept")
                return ControllerExit.FAILED
            finish_runs()
            del crew, work
            gc.collect()


async def _hand_over(crew: Crew, kept: KeptMeshes) -> None:
    """Raises TimeoutError where that takes too long: then the stacks of all processes have been written."""
    handing = asyncio.create_task(crew.hand_over(kept))
    if not (await asyncio.wait({handing}, timeout=HAND_OVER_S))[0]:
        silence = f"the run's processes have not given up what is not kept within {HAND_OVER_S:.0f} s"
        silence += await write_stacks(silence)
        handing.cancel()
        raise TimeoutError(silence)
    await handing


class _Server:
    def __init__(self, rendezvous: Rendezvous) -> None:
        self.faults = Faults(rendezvous)
        self.kept = KeptMeshes(self.faults)
        self._rendezvous = rendezvous
        self._nodes: Nodes | None = None
        self._files: set[Path] = set()

    async def run(
        self, crew: Crew, run_dir: RunDir, rendezvous: Rendezvous, log_dir: Path, terminal: Terminal, leave: Leave
    ) -> bool:
        """As ``controller.__main__.control``."""
        config = read_config(run_dir.config)
        # The files of the runs before may be imported by this one's, too.
        self._files |= {Path(file.path) for file in named_files(config)}
        forget_user_code(self._files)
        self.kept.num_runs += 1
        async with reporting(config, run_dir, log_dir) as status:
            phases = await start_phases(config, rendezvous)
            if self._nodes is None:
                self._nodes = await join_nodes(config, self._rendezvous, phases)
            cluster = arrange(config, self._nodes, log_dir, self.faults)
            if others := await self.kept.end_others(cluster.layout):
                logger.info("not kept, since this run has another layout: %s", ", ".join(others))
            phases.end("attach")
            done = await conduct(crew, config, run_dir, log_dir, cluster, phases, terminal, leave, status, self.kept)
        with suppress(OSError, UserError):  # the supervisor writes the last one
            await asyncio.to_thread(status.flush, FLUSH_S)
        return done


@contextmanager
def _terminal(out: Path, err: Path) -> Iterator[Terminal]:
    """The files that stand for a terminal, which whoever waits for the run shows."""

    def stream(path: Path) -> Any:
        return os.fdopen(open_private(path, os.O_WRONLY | os.O_APPEND), "w", buffering=1, encoding="utf-8")

    with stream(out) as stdout, stream(err) as stderr:
        yield Terminal(stdout, stderr)
