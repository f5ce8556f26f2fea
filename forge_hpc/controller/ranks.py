"""What is asked of all ranks of a mesh, which wait for each other."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from forge_hpc.cluster.hangs import write_stacks
from forge_hpc.controller.service import ActorLost, answer, is_loss, reason_of

logger = logging.getLogger(__name__)
OTHERS_S = 30.0
"""So long may the others take to raise as well, or to answer, after one rank has raised."""


class Standstill:
    """Of the processes of a mesh: why they answer no call any more, and the error that led to it."""

    def __init__(self) -> None:
        self.reason = ""
        self.error: Exception | None = None


class Ranks:
    """Actors of one mesh, whose endpoints are ``actors.errors.collective``.

    Args:
        who: what messages call them.
        lost: has a reason once one of them is lost.
        standstill: that of their processes, where those have several such actors each.
    """

    def __init__(self, mesh: Any, who: str, lost: asyncio.Future[str], standstill: Standstill | None = None) -> None:
        self._mesh = mesh
        self._who = who
        self._lost = lost
        self._standstill = standstill or Standstill()

    @property
    def is_stuck(self) -> bool:
        """Whether ranks wait for one that has failed."""
        return bool(self._standstill.reason)

    async def ask(self, endpoint: str, *args: Any, timeout_s: float) -> list[Any]:
        """What each rank answers, by rank.

        Raises:
            ActorLost: a rank is lost, they do not answer in time, or an earlier call has left some of them waiting.
            Exception: a rank's error. Where the others have not answered some time later, they are taken to wait for
                that rank: the stacks of all processes are written, and they are asked nothing more.
        """
        from monarch.actor import Channel

        who = f"{self._who}, {endpoint}()"
        if self.is_stuck:
            raise ActorLost(f"{who}: {self._standstill.reason}")
        port, receiver = Channel[Any].open()
        told = asyncio.ensure_future(_received(receiver))
        answered: asyncio.Future[Any] | None = None
        try:
            call = getattr(self._mesh, endpoint).call(port, *args)
            answered = asyncio.ensure_future(answer(call, self._lost, timeout_s, who))
            await asyncio.wait({answered, told}, return_when=asyncio.FIRST_COMPLETED)
            if not answered.done():
                await asyncio.wait({answered}, timeout=OTHERS_S)
            if answered.done():
                return [value for _, value in answered.result()]
            said = told.result()
            assert said is not None
            failed, error = said
            reason = f"{failed} has failed, and others wait for it: {reason_of(error)}"
            logger.error("%s: %s", who, reason)
            stacks = await write_stacks(f"{who}: {reason}")  # whoever learns of the standstill may end them
            logger.error("%s: they are asked nothing more%s", who, stacks)
            self._standstill.reason, self._standstill.error = reason, error
            if is_loss(error):
                raise ActorLost(f"{who}: {reason}{stacks}") from error
            raise error
        finally:
            if answered is not None:
                answered.cancel()
            port.send(None)  # Monarch receives until something comes, whoever waits for it


async def _received(receiver: Any) -> tuple[str, Exception] | None:
    """Which rank has failed, and its error, or what reading that has raised; None where none has."""
    try:
        said = await receiver.recv()
    except Exception as unreadable:
        return "a rank", unreadable
    return None if said is None else (f"rank {said[0]}", said[1])
