"""The trainer: one rank of the TorchTitan training mesh. All ranks get the same calls in the same order (SPMD)."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from monarch.actor import Actor, current_rank, endpoint
from monarch.actor.concurrent import concurrent_endpoint

from forge_hpc.actors.publishing import Publishing
from forge_hpc.config import Config
from forge_hpc.config.needs import POLICY, ModelNeed
from forge_hpc.config.recipes import needs_of
from forge_hpc.data.types import Document
from forge_hpc.observability.logs import setup_logging

if TYPE_CHECKING:
    import numpy as np
    import torch

    from forge_hpc.checkpoint import FileRecord
    from forge_hpc.weights import StoreSpec

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Trainer(Actor):
    """Holds this rank's shards of the policy and of the models beside it: a critic, say, or a frozen reference."""

    def __init__(self, config: Config, log_dir: Path, models: Mapping[str, ModelNeed] | None = None) -> None:
        point = current_rank()
        self._rank, self._world_size = point.rank, point.extent.nelements
        self._local_rank = self._rank % point.extent["procs"]
        setup_logging(log_dir / f"trainer-{self._rank}.log", f"trainer-{self._rank}")
        self._config = config
        self._needs = needs_of(config).models if models is None else models
        self._publishing = Publishing()
        # One thread for all of torch: OpenMP's pool and the current CUDA device belong to a thread.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="torch")

    async def _in_thread(self, function: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    @endpoint
    async def start(self, model_dirs: Mapping[str, Path], file_store: Path, checkpoint: Path | None) -> None:
        """Join the process group through ``file_store``, build the models, load their weights or the checkpoint.

        ``model_dirs`` are by name; a model without one has the policy's.
        """
        await self._in_thread(self._start, model_dirs, file_store, checkpoint)

    def _start(self, model_dirs: Mapping[str, Path], file_store: Path, checkpoint: Path | None) -> None:
        from forge_hpc.losses.build import check_loss_fits
        from forge_hpc.training.distributed import init_distributed
        from forge_hpc.training.models import Models

        if self._needs[POLICY].loss is None:
            logger.info("loss %s, advantage %s", self._config.algorithm.loss, check_loss_fits(self._config))
        init_distributed(file_store, self._rank, self._world_size, self._local_rank)
        self._models = Models(self._config, self._needs, model_dirs)
        if checkpoint is not None:
            self._models.load(checkpoint)

    @concurrent_endpoint
    async def train_step(
        self, documents: Sequence[Document], update: bool, max_mismatch: float, model: str = POLICY
    ) -> dict[str, float]:
        """One optimizer step on the documents, as ``TrainEngine.train_step``; metrics, equal on all ranks. Raises on a
        NaN, or a mismatch above the largest."""
        if model == POLICY:
            await self._publishing.has_read()
        return await self._in_thread(self._train_step, documents, update, max_mismatch, model)

    def _train_step(
        self, documents: Sequence[Document], update: bool, max_mismatch: float, model: str
    ) -> dict[str, float]:
        start = time.perf_counter()
        metrics = self._models.train_step(model, documents, update=update, max_mismatch=max_mismatch)
        return metrics | {"time/train_s": time.perf_counter() - start}

    @concurrent_endpoint
    async def logprobs(self, documents: Sequence[Document], model: str) -> list[np.ndarray]:
        """As ``Models.logprobs``, on every rank."""
        return await self._in_thread(self._models.logprobs, model, documents)

    @concurrent_endpoint
    async def values(self, documents: Sequence[Document], model: str) -> list[np.ndarray]:
        """As ``Models.values``, on every rank."""
        return await self._in_thread(self._models.values, model, documents)

    @concurrent_endpoint
    async def eval_loss(self, documents: Sequence[Document]) -> float:
        """Mean loss of the policy on held-out documents in nats, equal on all ranks; no step is taken."""
        return await self._in_thread(self._models.policy.eval_loss, documents)

    @concurrent_endpoint
    async def publish(self, store: StoreSpec, version: int) -> float:
        """Take a snapshot of the policy's weights and begin to publish it. Returns the seconds of the snapshot, which
        is all that training waits for; ``published`` waits for the rest."""
        from forge_hpc.weights import publish

        await self._publishing.done()
        start = time.perf_counter()
        copies = self._config.rollout.max_staleness > 0
        snapshot = await self._in_thread(self._snapshot, copies)
        self._publishing.begin(publish(store, version, snapshot, rank=self._rank), reads_weights=not copies)
        return time.perf_counter() - start

    def _snapshot(self, copies: bool) -> dict[str, torch.Tensor]:
        """The weights by name; copies where training goes on while they are published."""
        state = self._models.policy.hf_state_dict()
        return {name: tensor.clone() for name, tensor in state.items()} if copies else state

    @concurrent_endpoint
    async def published(self) -> None:
        """Wait until what ``publish`` began is in the store."""
        await self._publishing.done()

    @endpoint
    async def save(self, directory: Path) -> None:
        """Write this rank's part of a checkpoint into ``directory``; returns once it is staged in memory."""
        await self._in_thread(self._models.save, directory)

    @concurrent_endpoint
    async def saved(self) -> dict[str, FileRecord]:
        """Wait until what ``save`` began is on disk. The files that this rank wrote: those of all ranks together are
        what ``CheckpointStore.commit`` wants. Raises CheckpointError on every rank where one could not write."""
        return await asyncio.to_thread(self._models.wait_for_save)  # beside the training

    @endpoint
    async def export(self, directory: Path) -> None:
        """Write the policy in Hugging Face format, and where generators are to stop."""
        await self._in_thread(self._export, directory)

    def _export(self, directory: Path) -> None:
        from forge_hpc.data.hub import load_tokenizer
        from forge_hpc.data.render import learned_ends

        policy = self._models.policy
        ends = learned_ends(load_tokenizer(policy.model_dir), self._config) if policy.need.loss == "sft" else []
        policy.export(directory, ends)

    @endpoint
    async def leave(self) -> None:
        """Leave the process group."""
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()
