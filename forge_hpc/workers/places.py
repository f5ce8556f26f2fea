"""Where worker processes run: on the controller's node, and on the other nodes of the run."""

from __future__ import annotations

from typing import Protocol

from forge_hpc.cluster.processes import num_cpus
from forge_hpc.workers.link import Link, Pipes


class Place(Protocol):
    """A node, seen from the controller."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def num_cpus(self) -> int:
        """CPU cores that worker processes may use."""

    @property
    def is_lost(self) -> bool:
        """No process can be started there any more, and those that ran there are gone."""

    async def open(self, module: str, venv: str | None = None) -> Link:
        """Start ``python -m module`` there. Raises OSError."""

    async def answers(self) -> bool:
        """Whether the node still lives; asked where a process of it is silent. One that does not is lost."""


class ThisNode:
    """The controller's own, which is lost with it alone."""

    name = "this node"
    is_lost = False

    @property
    def num_cpus(self) -> int:
        """CPU cores that this process may use."""
        return num_cpus()

    async def open(self, module: str, venv: str | None = None) -> Link:
        """As ``Place``."""
        return await Pipes.open(module, venv)

    async def answers(self) -> bool:
        """It does."""
        return True


THIS_NODE = ThisNode()
