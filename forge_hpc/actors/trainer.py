"""The trainer: one rank of the TorchTitan training mesh. All ranks get the same calls in the same order (SPMD)."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from monarch.actor import Actor, current_rank, endpoint
from monarch.actor.concurrent import concurrent_endpoint

from forge_hpc.config import Config
from forge_hpc.config.recipes import load_recipe
from forge_hpc.data.types import Document
from forge_hpc.observability.logs import setup_logging

if TYPE_CHECKING:
    import torch

    from forge_hpc.checkpoint import FileRecord
    from forge_hpc.weights import StoreSpec

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Trainer(Actor):
    """Holds this rank's shard of the policy, its optimizer and, for a KL penalty, the frozen reference."""

    def __init__(self, config: Config, log_dir: Path) -> None:
        point = current_rank()
        self._rank, self._world_size = point.rank, point.extent.nelements
        self._local_rank = self._rank % point.extent["procs"]
        setup_logging(log_dir / f"trainer-{self._rank}.log", f"trainer-{self._rank}")
        self._config = config
        self._publishing: asyncio.Task[int] | None = None
        # One thread for all of torch: OpenMP's pool and the current CUDA device belong to a thread.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="torch")

    async def _in_thread(self, function: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    @endpoint
    async def start(self, model_dir: Path, file_store: Path, checkpoint: Path | None) -> None:
        """Join the process group through ``file_store``, build the model, load the weights or the checkpoint."""
        await self._in_thread(self._start, model_dir, file_store, checkpoint)

    def _start(self, model_dir: Path, file_store: Path, checkpoint: Path | None) -> None:
        from forge_hpc.losses.registry import check_loss_fits
        from forge_hpc.training.distributed import init_distributed
        from forge_hpc.training.engine import TrainEngine

        if load_recipe(self._config).needs(self._config).has_algorithm:
            logger.info("loss %s, advantage %s", self._config.algorithm.loss, check_loss_fits(self._config))
        init_distributed(file_store, self._rank, self._world_size, self._local_rank)
        self._engine = TrainEngine(self._config, model_dir)
        self._reference = TrainEngine(self._config, model_dir) if self._config.reference.enable else None
        if checkpoint is not None:
            self._engine.load(checkpoint)

    @concurrent_endpoint
    async def train_step(self, documents: Sequence[Document], update: bool, max_mismatch: float) -> dict[str, float]:
        """One optimizer step on the documents, as ``TrainEngine.train_step``; metrics, equal on all ranks. Raises on a
        NaN, or a mismatch above the largest."""
        return await self._in_thread(self._train_step, documents, update, max_mismatch)

    def _train_step(self, documents: Sequence[Document], update: bool, max_mismatch: float) -> dict[str, float]:
        start = time.perf_counter()
        if self._reference is not None:
            for document, logprobs in zip(documents, self._reference.logprobs(documents), strict=True):
                document.ref_logprobs = logprobs
        metrics = self._engine.train_step(documents, update=update, max_mismatch=max_mismatch)
        return metrics | {"time/train_s": time.perf_counter() - start}

    @concurrent_endpoint
    async def eval_loss(self, documents: Sequence[Document]) -> float:
        """Mean loss on held-out documents in nats, equal on all ranks; no step is taken."""
        return await self._in_thread(self._engine.eval_loss, documents)

    @concurrent_endpoint
    async def publish(self, store: StoreSpec, version: int) -> float:
        """Take a snapshot of the weights and begin to publish it. Returns the seconds of the snapshot, which is all
        that training waits for; ``published`` waits for the rest."""
        from forge_hpc.weights import publish

        await self._published()
        start = time.perf_counter()
        snapshot = await self._in_thread(self._snapshot)
        self._publishing = asyncio.create_task(publish(store, version, snapshot, rank=self._rank))
        return time.perf_counter() - start

    def _snapshot(self) -> dict[str, torch.Tensor]:
        """The weights by name; copies where training goes on while they are published."""
        state = self._engine.hf_state_dict()
        if self._config.rollout.max_staleness == 0:
            return state
        return {name: tensor.clone() for name, tensor in state.items()}

    @concurrent_endpoint
    async def published(self) -> None:
        """Wait until what ``publish`` began is in the store."""
        await self._published()

    async def _published(self) -> None:
        if self._publishing is not None:
            task, self._publishing = self._publishing, None
            await task

    @endpoint
    async def save(self, directory: Path) -> None:
        """Write this rank's part of a checkpoint into ``directory``; returns once it is staged in memory."""
        await self._in_thread(self._engine.save, directory)

    @concurrent_endpoint
    async def saved(self) -> dict[str, FileRecord]:
        """Wait until what ``save`` began is on disk. The files that this rank wrote: those of all ranks together are
        what ``CheckpointStore.commit`` wants. Raises CheckpointError on every rank where one could not write."""
        return await asyncio.to_thread(self._engine.wait_for_save)  # beside the training

    @endpoint
    async def export(self, directory: Path) -> None:
        """Write the weights in Hugging Face format, and where generators are to stop."""
        await self._in_thread(self._export, directory)

    def _export(self, directory: Path) -> None:
        from forge_hpc.data.hub import load_tokenizer
        from forge_hpc.data.render import learned_ends

        examples = load_recipe(self._config).needs(self._config).learns_from == "examples"
        ends = learned_ends(load_tokenizer(self._engine.model_dir), self._config) if examples else []
        self._engine.export(directory, ends)

    @endpoint
    async def leave(self) -> None:
        """Leave the process group."""
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()
