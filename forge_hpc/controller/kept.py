"""What a run leaves for the next one where engines are kept (``forge_hpc.kept``): processes that wait.

    run ends ──► Trainer.rest, GeneratorPool.hand_over ──► KeptMeshes ──► Trainer.renew, Generator.renew ──► next run

A kept generator has its engine, and takes the weights that the next run starts from. A kept trainer is a process with
its imports done, in which the next run builds its models anew. Whoever does not fit ends, and another takes its place.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from forge_hpc.cluster.faults import Faults

logger = logging.getLogger(__name__)
STOP_S = 60.0


@dataclass(frozen=True)
class KeptMesh:
    """Processes without work."""

    name: str
    procs: Any
    """The ``ProcMesh``."""
    actor: Any
    """The actors in it; None where the processes are all that is kept."""
    layout: Any
    """Where it runs and on what (``Cluster.layout``): the next run takes it for the same alone."""
    kv_cache_bytes: int | None = None
    """Of a generator's engine."""


class KeptMeshes:
    """Meshes by role (``trainer``, ``volume``, ``generator0``, …), from one run of a controller to the next."""

    def __init__(self, faults: Faults) -> None:
        self.num_runs = 0
        """Begun so far; it tells their meshes apart."""
        self._faults = faults
        self._meshes: dict[str, KeptMesh] = {}

    @property
    def suffix(self) -> str:
        """Of the names of this run's meshes."""
        return f"k{self.num_runs}" if self.num_runs > 1 else ""

    def put(self, role: str, mesh: KeptMesh) -> None:
        """Keep a mesh; one that dies meanwhile is forgotten."""
        self._meshes[role] = mesh
        self._faults.watch(mesh.name, lambda reason: self._lose(role, mesh, reason))

    def take(self, role: str) -> KeptMesh | None:
        """The mesh of a role, which is the caller's from now on, to watch and to end."""
        return self._meshes.pop(role, None)

    async def end_others(self, layout: Callable[[str], Any]) -> list[str]:
        """A run begins: end the meshes that it has no use for, so that their memory is free. Their roles."""
        others = [role for role, mesh in self._meshes.items() if layout(role) != mesh.layout]
        await asyncio.gather(*(stop_mesh(self._faults, self._meshes.pop(role)) for role in others))
        return others

    def _lose(self, role: str, mesh: KeptMesh, reason: str) -> None:
        if self._meshes.get(role) is mesh:
            logger.warning("%s has died while it was kept: %s", mesh.name, reason)
            del self._meshes[role]


async def stop_mesh(faults: Faults, mesh: KeptMesh) -> None:
    """End its processes; what does not end so is ended by its owner, the node's supervisor."""
    faults.forget(mesh.name)
    try:
        await asyncio.wait_for(mesh.procs.stop(), STOP_S)
    except Exception as error:
        logger.warning("ending %s: %s", mesh.name, error)
