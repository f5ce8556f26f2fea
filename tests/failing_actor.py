"""An actor whose process fails as it is asked to; light to import, since its process does."""

from __future__ import annotations

import os

from monarch.actor import Actor, endpoint


class Failing(Actor):
    """Fails in the way that it is asked to."""

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
