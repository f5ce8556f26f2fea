"""The training mesh as the recipes see it."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from forge_hpc.config.needs import POLICY, REFERENCE
from forge_hpc.controller.ranks import Ranks, Standstill
from forge_hpc.data.types import Document
from forge_hpc.observability.performance import over_ranks

if TYPE_CHECKING:
    import numpy as np

    from forge_hpc.checkpoint import FileRecord
    from forge_hpc.weights import Offer, StoreSpec


class ModelsApart(Protocol):
    """Frozen models that have processes of their own (``controller.frozen``), as they are asked."""

    models: frozenset[str]

    async def logprobs(self, documents: Sequence[Document], model: str) -> list[np.ndarray]: ...

    async def values(self, documents: Sequence[Document], model: str) -> list[np.ndarray]: ...


class Trainers:
    """The training mesh as one: calls go to all ranks, results are those of rank 0 unless all are asked for. What is
    asked of a frozen model that has processes of its own goes there.

    ``model`` is the name of one of the models that the recipe needs (``ModelNeed``).

    Raises:
        ActorLost: from every call: a rank has died, is stuck, or its device or network failed.
        Exception: from every call: a rank's error; see ``Ranks.ask``.
    """

    def __init__(
        self,
        mesh: Any,
        timeout_s: float,
        lost: asyncio.Future[str],
        turn: Callable[[], contextlib.AbstractAsyncContextManager[None]] = contextlib.nullcontext,
        frozen: ModelsApart | None = None,
        alone: asyncio.Lock | None = None,
        standstill: Standstill | None = None,
    ) -> None:
        from forge_hpc.weights import Known

        self._places = Known()  # of the weights, by the keys of all ranks
        self._ranks = Ranks(mesh, "the trainers", lost, standstill)
        self._frozen = frozen
        self._apart = frozen.models if frozen is not None else frozenset[str]()
        self._turn = turn  # entered around what computes: ``Turns.training`` where the GPUs are shared
        self._alone = alone  # held by each call, where other sessions call the same processes
        self.timeout_s = timeout_s

    @property
    def is_stuck(self) -> bool:
        """As ``Ranks.is_stuck``."""
        return self._ranks.is_stuck

    # ---- what recipes ask for

    async def with_reference(self, documents: Sequence[Document]) -> Sequence[Document]:
        """The policy's documents with the log-probabilities of a reference that has processes of its own; one beside
        the policy is asked there."""
        if REFERENCE not in self._apart:
            return documents
        logprobs = await self.logprobs(documents, REFERENCE)
        return [replace(own, ref_logprobs=ref) for own, ref in zip(documents, logprobs, strict=True)]

    async def train_step(
        self,
        documents: Sequence[Document],
        update: bool = True,
        max_mismatch: float = math.inf,
        *,
        model: str = POLICY,
    ) -> dict[str, float]:
        """One optimizer step of a trained model, as ``TrainEngine.train_step``; its metrics."""
        async with self._turn():
            return over_ranks(await self._call_all("train_step", documents, update, max_mismatch, model))

    async def logprobs(self, documents: Sequence[Document], model: str = POLICY) -> list[np.ndarray]:
        """Log-probabilities of the documents' tokens under a model, trained or frozen, at the training temperature:
        [L] float32 each, at the tokens of the loss mask, 0 elsewhere."""
        if self._frozen is not None and model in self._apart:
            return await self._frozen.logprobs(documents, model)
        async with self._turn():
            return await self._call("logprobs", documents, model)

    async def values(self, documents: Sequence[Document], model: str = "critic") -> list[np.ndarray]:
        """What a model with a value head says: [L] float32 for each document, at a token of the loss mask the value of
        what stands before it, 0 elsewhere."""
        if self._frozen is not None and model in self._apart:
            return await self._frozen.values(documents, model)
        async with self._turn():
            return await self._call("values", documents, model)

    async def eval_loss(self, documents: Sequence[Document]) -> float:
        """Mean negative log-likelihood of the documents' trained tokens under the policy, nats."""
        async with self._turn():
            return await self._call("eval_loss", documents)

    # ---- what the session does with them

    async def start(
        self,
        model_dirs: Mapping[str, Path],
        file_store: Path,
        checkpoint: Path | None,
        timeout_s: float,
        *,
        warms_up: bool = False,
    ) -> str:
        """As ``actors.trainer.Trainer.start``."""
        async with self._turn():
            return await self._call("start", model_dirs, file_store, checkpoint, warms_up, timeout_s=timeout_s)

    async def release(self) -> str:
        """Give back the GPU memory that no step needs after the last one; the first rank's line about it."""
        return await self._call("release")

    async def publish(
        self,
        store: StoreSpec | None,
        version: int,
        in_use: Collection[int] = (),
        *,
        stores: bool = False,
        with_checksum: bool = False,
    ) -> Offer | None:
        """Copy the policy's weights to where generators can read them, and begin to publish them into the store where
        ``stores`` says so or a rank has no memory for the copy: then there is no offer (and, without a ``store``,
        nothing has been published yet). No step of the policy begins before they are copied or in the store."""
        from forge_hpc.weights import Offer, Places

        parts = await self._call_all("publish", store, version, frozenset(in_use), stores, with_checksum)
        if None in parts:
            return None
        keys = tuple(part.key for part in parts)
        if (places := self._places.get(keys)) is None:
            found = await asyncio.to_thread(Places.of, await self._call_all("place", version))
            places = self._places.put(keys, found)
        return Offer(version, places, tuple(parts[rank].checksums[0] for rank in places.ranks))

    async def store(self, store: StoreSpec, version: int) -> None:
        """Return when all ranks have put a version into the store: what ``publish`` began, or what it offered.

        Raises:
            VersionNotFoundError: it is in their memory no more.
        """
        await self._call("store", store, version)

    async def save(self, directory: Path) -> None:
        """Begin to save all trained models into a directory; returns once they are staged in memory."""
        await self._call("save", directory)

    async def saved(self) -> dict[str, FileRecord]:
        """Wait until what ``save`` began is on disk: the files of all ranks, as ``CheckpointStore.commit`` wants them.

        Raises:
            CheckpointError: it failed.
        """
        written = await self._call_all("saved")  # each rank names the files that are its own
        return {name: file for rank in written for name, file in rank.items()}

    async def export(self, directory: Path) -> None:
        """Write the policy in Hugging Face format."""
        async with self._turn():  # ranks gather one tensor after the other on their GPUs
            await self._call("export", directory)

    async def rest(self, timeout_s: float) -> None:
        """As ``actors.trainer.Trainer.rest``: the last call of a run whose trainers are kept."""
        await self._call("rest", timeout_s=timeout_s)

    async def leave(self, timeout_s: float) -> None:
        """Leave the process group: the last call."""
        await self._call("leave", timeout_s=timeout_s)

    async def _call(self, endpoint: str, *args: Any, timeout_s: float | None = None) -> Any:
        return (await self._call_all(endpoint, *args, timeout_s=timeout_s))[0]

    async def _call_all(self, endpoint: str, *args: Any, timeout_s: float | None = None) -> list[Any]:
        # Ranks get the calls of all sessions in one order. What is waited for beside the training needs none.
        async with self._alone if self._alone and endpoint not in ("saved", "store") else contextlib.nullcontext():
            return await self._ranks.ask(endpoint, *args, timeout_s=timeout_s or self.timeout_s)
