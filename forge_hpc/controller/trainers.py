"""The training mesh as the recipes see it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any

from forge_hpc.controller.service import answer
from forge_hpc.data.types import Document


class Trainers:
    """The training mesh as one: calls go to all ranks, results are those of rank 0 unless all are asked for."""

    def __init__(self, mesh: Any, timeout_s: float, lost: asyncio.Future[str]) -> None:
        self._mesh = mesh
        self._lost = lost
        self.timeout_s = timeout_s

    async def call(self, endpoint: str, *args: Any, timeout_s: float | None = None) -> Any:
        """Call an endpoint on every rank; the result of rank 0.

        Raises:
            ActorLost: a rank has died, is stuck, or its device or network failed.
            Exception: the first rank's error.
        """
        return (await self.call_all(endpoint, *args, timeout_s=timeout_s))[0]

    async def call_all(self, endpoint: str, *args: Any, timeout_s: float | None = None) -> list[Any]:
        """As ``call``; the results of all ranks."""
        call = getattr(self._mesh, endpoint).call(*args)
        results = await answer(call, self._lost, timeout_s or self.timeout_s, f"the trainers, {endpoint}()")
        return [value for _, value in results]

    async def train_step(
        self, documents: Sequence[Document], update: bool = True, max_mismatch: float = math.inf
    ) -> dict[str, float]:
        """One optimizer step, as ``TrainEngine.train_step``; its metrics."""
        return await self.call("train_step", documents, update, max_mismatch)
