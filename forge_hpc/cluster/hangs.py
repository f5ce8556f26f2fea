"""Where the controller, or a pool of its, sees that something hangs: stacks are written before it is ended."""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path

from forge_hpc.cluster import stacks
from forge_hpc.cluster.rendezvous import Rendezvous

logger = logging.getLogger(__name__)
AGAIN_S = 30.0
"""What is seen to hang so soon after something else hangs for the same reason."""


class _Stacks:
    """Of one start of a run."""

    def __init__(self, rendezvous: Rendezvous, log_dir: Path, num_nodes: int) -> None:
        self.num_nodes = num_nodes
        self._rendezvous, self._log_dir = rendezvous, log_dir
        self._asked = -AGAIN_S
        self._asking: asyncio.Future[str] | None = None

    async def write(self, why: str) -> str:
        if self._asking is None or time.monotonic() - self._asked > AGAIN_S:
            self._asked = time.monotonic()
            ask = asyncio.to_thread(stacks.ask, self._rendezvous, why, self.num_nodes, self._log_dir)
            self._asking = asyncio.ensure_future(ask)
        return await asyncio.shield(self._asking)


_stacks: _Stacks | None = None


def prepare_stacks(rendezvous: Rendezvous, log_dir: Path) -> None:
    """Stacks of this start go to ``log_dir``, from the nodes that look in ``rendezvous``: where they have served a run
    before, as many as then."""
    global _stacks
    _stacks = _Stacks(rendezvous, log_dir, 1 if _stacks is None else _stacks.num_nodes)


def joined(num_nodes: int) -> None:
    """So many supervisors are to answer."""
    if _stacks is not None:
        _stacks.num_nodes = num_nodes


async def write_stacks(why: str) -> str:
    """Have them written; where they are, to follow a message that says what hangs. Empty where that did not work."""
    if _stacks is None:
        return ""
    try:
        return await _stacks.write(why)
    except OSError as error:  # the hang matters more
        logger.warning("the stacks of the processes cannot be asked for: %s", error)
        return ""
