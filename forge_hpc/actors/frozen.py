"""Frozen models in processes of their own: one rank of them. All ranks get the same calls in the same order (SPMD)."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from monarch.actor import Actor, current_rank, endpoint
from monarch.actor.concurrent import concurrent_endpoint

from forge_hpc.actors.errors import collective
from forge_hpc.config import Config
from forge_hpc.config.schema import ParallelismConfig
from forge_hpc.data.types import Document
from forge_hpc.imports import importing
from forge_hpc.observability.logs import setup_logging

if TYPE_CHECKING:
    import numpy as np

T = TypeVar("T")


class Frozen(Actor):
    """Holds this rank's shards of the models, which all ranks of this mesh share whatever the trainers' degrees are."""

    def __init__(self, config: Config, log_dir: Path) -> None:
        point = current_rank()
        self._rank, self._world_size = point.rank, point.extent.nelements
        self._local_rank = self._rank % point.extent["procs"]
        setup_logging(log_dir / f"frozen-{self._rank}.log", f"frozen-{self._rank}")
        self._config = copy.deepcopy(config)
        self._config.trainer.parallelism = ParallelismConfig()
        # One thread for all of torch: OpenMP's pool and the current CUDA device belong to a thread.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="torch")

    async def _in_thread(self, function: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    @endpoint
    @collective
    async def start(self, model_dirs: Mapping[str, Path], file_store: Path) -> None:
        """Join the process group through ``file_store`` and load the models; one without a directory of its own is what
        the policy starts from."""
        await self._in_thread(self._start, model_dirs, file_store)

    def _start(self, model_dirs: Mapping[str, Path], file_store: Path) -> None:
        with importing():
            from forge_hpc.models.device import check_gpus

            check_gpus(f"frozen-{self._rank}")
            from forge_hpc.training.distributed import init_distributed
            from forge_hpc.training.frozen import FrozenModels

        init_distributed(file_store, self._rank, self._world_size, self._local_rank)
        self._models = FrozenModels(self._config, model_dirs)

    @concurrent_endpoint
    @collective
    async def logprobs(self, documents: Sequence[Document], model: str) -> list[np.ndarray]:
        """As ``ModelShard.logprobs``, from rank 0; the others give none, since all of them have the same."""
        found = await self._in_thread(self._models.logprobs, model, documents)
        return found if self._rank == 0 else []

    @concurrent_endpoint
    @collective
    async def values(self, documents: Sequence[Document], model: str) -> list[np.ndarray]:
        """As ``ModelShard.values``, from rank 0."""
        found = await self._in_thread(self._models.values, model, documents)
        return found if self._rank == 0 else []

    @endpoint
    @collective
    async def leave(self) -> None:
        """Leave the process group."""
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()
