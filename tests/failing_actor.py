"""An actor whose process fails as it is asked to; light to import, since its process does."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Collection

from monarch.actor import Actor, current_rank, endpoint

from forge_hpc.actors.errors import collective
from forge_hpc.cluster.stacks import stand_by


class TwoNumbers(Exception):
    """Cannot be made again from what it keeps of its arguments."""

    def __init__(self, one: int, other: int) -> None:
        super().__init__(f"{one} and {other}")


class LockedError(ValueError):
    """Cannot be pickled."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


class Failing(Actor):
    """Fails in the way that it is asked to."""

    @endpoint
    async def pid(self) -> int:
        return os.getpid()

    @endpoint
    async def wait_for_others(self) -> None:
        """As in a collective that a dead rank never comes to: a thread waits in C, and no other call is answered."""
        await asyncio.to_thread(time.sleep, 600)

    @endpoint
    async def fail(self, how: str) -> None:
        if how == "dies":
            os._exit(3)
        import torch
        import torch.distributed

        from forge_hpc.generation import GenerationError

        raise {
            "device": torch.AcceleratorError("CUDA error: an illegal memory access", 700),
            "network": torch.distributed.DistNetworkError("the peer has closed the connection"),
            "collective": torch.distributed.DistBackendError("NCCL error"),
            "engine": GenerationError("the generation engine failed"),
            "deadline": TimeoutError("no answer"),
            "connection": ConnectionResetError("by peer"),
            "bug": ValueError("a bug"),
            "bug in torch": torch.OutOfMemoryError("CUDA out of memory"),
        }[how]


class SpeechlessError(Exception):
    """Has no text."""

    def __str__(self) -> str:
        raise TypeError("not a string")


class Waiting(Actor):
    """Ranks that wait for each other."""

    def __init__(self) -> None:
        stand_by(f"waiting-{current_rank().rank}")

    @endpoint
    @collective
    async def step(self, failing: Collection[int], kind: str = "bug") -> int:
        """The rank; those that fail raise, and then the others wait for them for good."""
        rank = current_rank().rank
        if rank in failing:
            bug = ValueError(f"of {rank}")
            error = {"bug": bug, "user's": TwoNumbers(1, 2), "locked": LockedError("shut"), "exit": SystemExit(3)}[kind]
            raise error from LookupError("its cause")
        if failing:
            await asyncio.to_thread(wait_in_a_collective)
        return rank


def wait_in_a_collective() -> None:
    """In C, as one does."""
    time.sleep(600)
