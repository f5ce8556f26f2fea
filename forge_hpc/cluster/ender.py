"""Ends processes of a role that nothing else ends soon.

Ranks that wait in a collective for one that is dead answer no call, and to end them in good order Monarch takes up to
twenty seconds. So an actor of its own stands beside each role's actor, with a queue of its own.
"""

from __future__ import annotations

import itertools
import os
from typing import TYPE_CHECKING, Any

from monarch.actor import Actor, endpoint

from forge_hpc.cluster.stacks import stand_by

if TYPE_CHECKING:
    from monarch.actor import ProcMesh


class Ender(Actor):
    """Lives in a process of a role; light to import, as each of them does. It comes first, so that one which hangs in
    the imports of the role's own actor shows its stacks, too.

    Args:
        mesh: its name, for as long as the process has no other.
    """

    def __init__(self, mesh: str) -> None:
        stand_by(mesh, for_want_of_another=True)

    @endpoint
    async def end(self) -> None:
        """End the process at once, with what it has begun. Nothing is answered."""
        os._exit(1)


class Enders:
    """Those beside the meshes that this controller has spawned, by the mesh's name."""

    NAME = "ender"
    """Of the actors."""

    def __init__(self) -> None:
        self._of: dict[str, Any] = {}

    def beside(self, name: str, procs: ProcMesh) -> ProcMesh:
        """The same mesh. It has to be new: what is spawned on one in which a process has died reaches nobody."""
        self._of[name] = procs.spawn(self.NAME, Ender, name)
        return procs

    def end_at_once(self, name: str) -> None:
        """Kill what is left of a mesh that is lost, whatever it is doing: ``stop()`` then has nothing to wait for.

        Each process is told by itself, in 0.6 ms: what is told to a whole mesh goes through some of its processes to
        the others.
        """
        if (ender := self._of.pop(name, None)) is None:
            return
        for index in itertools.product(*map(range, ender.extent.sizes)):
            ender.slice(**dict(zip(ender.extent.labels, index, strict=True))).end.broadcast()
