"""Who is told when processes of the run die.

    Monarch (a process is dead, a host is silent) ──► by the mesh's name ──► whoever watches it
    a node's supervisor (its Monarch worker ended) ─► by the node ─────────► whoever watches it

Monarch polls every process each second. A host has ``SILENT_HOST_S`` to answer, a process ``SILENT_PROCESS_S``. A node
whose worker was killed says so through the shared directory, which is looked at once a second: one listing, whatever
the number of nodes.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
from collections.abc import Callable
from typing import Any

from forge_hpc.cluster.deadlines import GIVEN_UP_S
from forge_hpc.cluster.rendezvous import Rendezvous

logger = logging.getLogger(__name__)
LOOK_S = 1.0
SILENT_HOST_S = 20
"""A host that does not say for so long how its processes are is cut off."""
SILENT_PROCESS_S = 3
"""The same for a process: a dead one is known after a second, but where it was just being asked, only after this time.
Monarch's part of a process answers beside whatever Python and the device do there."""


class Faults:
    """Reports of dead processes. Make it in the event loop, before the first use of Monarch.

    ``unexpected`` gets the report of a mesh that nobody watches.
    """

    def __init__(self, rendezvous: Rendezvous) -> None:
        import monarch.actor
        from monarch.config import configure

        from forge_hpc.cluster.ender import Enders

        configure(
            get_proc_state_max_idle=f"{SILENT_HOST_S}s",
            get_actor_state_max_idle=f"{SILENT_PROCESS_S}s",
            mesh_proc_spawn_max_idle=f"{GIVEN_UP_S}s",
        )
        self.unexpected: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.ended_nodes: set[int] = set()
        """Nodes whose worker has ended: nothing can be started there any more, but the node lives."""
        self.enders = Enders()
        self._rendezvous = rendezvous
        self._watched: dict[str, Callable[[str], None]] = {}
        self._forgotten: set[str] = set()
        self._on_node: Callable[[int, str], None] | None = None
        loop, ours = asyncio.get_running_loop(), contextvars.copy_context()

        def hand_over(failure: Any) -> None:
            """Monarch's own hook ends the controller, and so does an error in this one. It is called in another actor's
            context, from which nothing can be spawned: what is done about the fault happens in ours."""
            with contextlib.suppress(RuntimeError):  # the loop is closed: what dies after the end is no news
                loop.call_soon_threadsafe(self._report, failure, context=ours)

        monarch.actor.unhandled_fault_hook = hand_over

    def watch(self, mesh: str, on_loss: Callable[[str], None]) -> None:
        """Call ``on_loss`` with the reason when a process or an actor of the mesh named ``mesh`` fails."""
        self._watched[mesh] = on_loss
        self._forgotten.discard(mesh)

    def forget(self, mesh: str) -> None:
        """The mesh is being ended, or known to be lost: what is still reported of it is no news."""
        self._watched.pop(mesh, None)
        self._forgotten.add(mesh)

    def begin(self) -> None:
        """Another attempt begins: what was unexpected before is over."""
        if self.unexpected.done():
            self.unexpected = asyncio.get_running_loop().create_future()

    def watch_nodes(self, on_loss: Callable[[int, str], None]) -> None:
        """Call ``on_loss`` with the node and the reason when a node's worker ends."""
        self._on_node = on_loss

    async def look_for_ended_nodes(self) -> None:
        """Runs for as long as the controller does."""
        while True:
            try:
                for name in await asyncio.to_thread(self._rendezvous.names, "ended-"):
                    node = int(name.removeprefix("ended-"))
                    if node in self.ended_nodes:
                        continue
                    if (record := await asyncio.to_thread(self._rendezvous.look, name)) is not None:
                        self.ended_nodes.add(node)
                        logger.error("node %d: %s", node, record["message"])
                        if self._on_node is not None:
                            self._on_node(node, record["message"])
            except OSError as error:  # a shared file system stumbles; Monarch's own reports still come
                logger.warning("%s cannot be read: %s", self._rendezvous.directory, error)
            await asyncio.sleep(LOOK_S)

    def _report(self, failure: Any) -> None:
        mesh = failure.mesh_name.rpartition("-")[0]  # Monarch appends an id of its own
        lines = failure.report().strip().splitlines()
        reason = lines[-1].strip() if lines else "failed"
        logger.error("Monarch reports of %s: %s", mesh, reason)
        # What a dead process takes with it is reported as well.
        if mesh in ("logger", self.enders.NAME) or mesh in self._forgotten:
            return
        if mesh in self._watched:
            self._watched[mesh](reason)
        elif not self.unexpected.done():
            self.unexpected.set_result(f"{mesh} failed: {reason}")
