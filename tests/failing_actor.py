"""An actor whose process fails as it is asked to; light to import, since its process does."""

from __future__ import annotations

import asyncio
import os
import time

from monarch.actor import Actor, endpoint


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
