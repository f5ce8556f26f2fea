"""The trainer: one rank of the TorchTitan training mesh. All ranks get the same calls in the same order (SPMD)."""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from monarch.actor import Actor, current_rank, endpoint
from monarch.actor.concurrent import concurrent_endpoint

from forge_hpc.actors.errors import collective, portable_errors
from forge_hpc.actors.publishing import Publishing
from forge_hpc.config import Config
from forge_hpc.config.needs import POLICY, ModelNeed
from forge_hpc.config.recipes import needs_of
from forge_hpc.config.user_code import forget_user_code
from forge_hpc.data.types import Document
from forge_hpc.imports import importing
from forge_hpc.observability.logs import setup_logging
from forge_hpc.observability.traces import trace_dir, traced
from forge_hpc.user_files import named_files

if TYPE_CHECKING:
    import numpy as np
    import torch

    from forge_hpc.checkpoint import FileRecord
    from forge_hpc.training.engine import TrainEngine
    from forge_hpc.training.models import Models
    from forge_hpc.weights import Brief, Part, Place, Snapshots, StoreSpec
    from forge_hpc.wire.server import Server

logger = logging.getLogger(__name__)
T = TypeVar("T")


class OneBase:
    """What the trainers of several adapters have in common in a process of theirs: a thread, and the frozen weights."""

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="torch")
        self.models: Models | None = None
        """Of the adapter that was started first."""


_one_base: OneBase | None = None


class Trainer(Actor):
    """Holds this rank's shards of the policy and of the models beside it: a critic, say, or a frozen reference.

    Args:
        adapter: the number of the policy among several on one base (``trainer.lora.sweep``), whose trainers are actors
            of the same processes, called one at a time; None: it has the processes to itself.
    """

    def __init__(
        self,
        config: Config,
        log_dir: Path,
        models: Mapping[str, ModelNeed] | None = None,
        adapter: int | None = None,
    ) -> None:
        global _one_base
        if adapter is not None and _one_base is None:
            _one_base = OneBase()
        self._one_base = _one_base if adapter is not None else None
        point = current_rank()
        self._rank, self._world_size = point.rank, point.extent.nelements
        self._local_rank = self._rank % point.extent["procs"]
        # One thread for all of torch: OpenMP's pool and the current CUDA device belong to a thread.
        self._thread = self._one_base.thread if self._one_base else ThreadPoolExecutor(1, thread_name_prefix="torch")
        self._begin(config, log_dir, models)

    def _begin(self, config: Config, log_dir: Path, models: Mapping[str, ModelNeed] | None) -> None:
        setup_logging(log_dir / f"trainer-{self._rank}.log", f"trainer-{self._rank}")
        self._config = config
        self._log_dir = log_dir
        self._needs = needs_of(config).models if models is None else models
        self._publishing = Publishing()
        self._snapshots: Snapshots | None = None
        self._part: Part | None = None  # of the version that was copied last
        self._server: Server | None = None  # where generators have hosts of their own
        self._stored: int | None = None  # the version that was put into the store last

    async def _in_thread(self, function: Callable[..., T], *args: Any) -> T:
        def work() -> T:
            if self._one_base is not None and hasattr(self, "_models"):
                self._models.take_turn()
            return function(*args)

        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    @endpoint
    @collective
    async def start(
        self, model_dirs: Mapping[str, Path], file_store: Path, checkpoint: Path | None, warms_up: bool = False
    ) -> str:
        """Join the process group through ``file_store``, build the models, load their weights or the checkpoint; and
        with ``warms_up`` compile what the first steps need.

        ``model_dirs`` are by name; a model without one has the policy's. How the GPU is shared with a generator, in a
        line; empty where it is not.
        """
        return await self._in_thread(self._start, model_dirs, file_store, checkpoint, warms_up)

    def _start(self, model_dirs: Mapping[str, Path], file_store: Path, checkpoint: Path | None, warms_up: bool) -> str:
        with importing():
            import torch.distributed as dist

            from forge_hpc.models.device import check_gpus

            check_gpus(f"trainer-{self._rank}")
            from forge_hpc.losses.build import check_loss_fits
            from forge_hpc.training.distributed import init_distributed
            from forge_hpc.training.models import Models

        if self._needs[POLICY].loss is None:
            logger.info("loss %s, advantage %s", self._config.algorithm.loss, check_loss_fits(self._config))
        if not dist.is_initialized():
            init_distributed(file_store, self._rank, self._world_size, self._local_rank)
        base = self._one_base.models if self._one_base is not None else None
        self._models = Models(self._config, self._needs, model_dirs, base)
        if self._one_base is not None and base is None:
            self._one_base.models = self._models
        self._watch_gpu()
        if checkpoint is not None:
            self._models.load(checkpoint)
        if warms_up:
            start = time.perf_counter()
            self._models.warm_up()
            logger.info("warmed up in %.1f s", time.perf_counter() - start)
        if self._one_base is None:  # while generators start, or write the first answers
            for engine in self._models.trained.values():
                engine.prepare_to_save()
        return self._models.sharing

    def _watch_gpu(self) -> None:
        import torch

        from forge_hpc.cluster.worker import visible_gpus
        from forge_hpc.models.device import local_device
        from forge_hpc.observability.gpu import GpuMonitor

        device = local_device()
        self._gpu_name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self._gpu = GpuMonitor([visible_gpus()[device.index or 0]] if device.type == "cuda" else [])

    @concurrent_endpoint
    @collective
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
        with traced(self._trace_of(model)):
            metrics = self._models.train_step(model, documents, update=update, max_mismatch=max_mismatch)
        seconds = time.perf_counter() - start
        if self._one_base is not None:
            self._models.trained[model].prepare_to_save()
        return metrics | {"time/train_s": seconds} | self._performance(self._models.trained[model], seconds)

    def _trace_of(self, model: str) -> Path | None:
        """The file for a trace of the model's next step; None where ``profile.steps`` does not name it."""
        step = self._models.trained[model].step + 1 if model in self._models.trained else 0
        if step not in self._config.profile.steps:
            return None
        suffix = "" if model == POLICY else f"-{model}"
        return trace_dir(self._log_dir, step) / f"trainer-{self._rank}{suffix}.json.gz"

    def _performance(self, engine: TrainEngine, seconds: float) -> dict[str, float]:
        """Figures of a step's speed, of this rank. The gradient's norm has been read by now, so that the device is at
        the optimizer's last kernels; it is not waited for."""
        from forge_hpc.observability.gpu import memory_figures
        from forge_hpc.sizing.gpus import peak_flops

        work, num_ranks = engine.work, self._world_size
        figures = {"perf/trainer_tokens_per_s": work.num_tokens / seconds / num_ranks} | memory_figures()
        is_16_bit = engine.shape.param_dtype.itemsize == 2
        if self._gpu_name and is_16_bit and (peak := peak_flops(self._gpu_name)) is not None:
            figures["perf/mfu"] = work.flops / seconds / (peak * num_ranks)
        if (utilization := self._gpu.utilization()) is not None:
            figures["perf/trainer_gpu_utilization"] = utilization
        return figures

    @concurrent_endpoint
    @collective
    async def logprobs(self, documents: Sequence[Document], model: str) -> list[np.ndarray]:
        """As ``Models.logprobs``, from rank 0; the others give none, since all of them have the same."""
        found = await self._in_thread(self._models.logprobs, model, documents)
        return found if self._rank == 0 else []

    @concurrent_endpoint
    @collective
    async def values(self, documents: Sequence[Document], model: str) -> list[np.ndarray]:
        """As ``Models.values``, from rank 0."""
        found = await self._in_thread(self._models.values, model, documents)
        return found if self._rank == 0 else []

    @concurrent_endpoint
    @collective
    async def eval_loss(self, documents: Sequence[Document]) -> float:
        """Mean loss of the policy on held-out documents in nats, equal on all ranks; no step is taken."""
        return await self._in_thread(self._models.policy.eval_loss, documents)

    @concurrent_endpoint
    @collective
    async def release(self) -> str:
        """As ``Models.release``."""
        return await self._in_thread(self._models.release)

    @concurrent_endpoint
    @collective
    async def publish(
        self,
        store: StoreSpec | None,
        version: int,
        in_use: Collection[int] = (),
        stores: bool = False,
        with_checksum: bool = False,
    ) -> Brief | None:
        """Copy the policy's weights to where generators of this host read them: this rank's part of the offer, whose
        ``place`` is for who does not know it yet.

        The copy is all that training waits for. Where there is no memory for it the part is None; then, or where the
        controller knows that a generator is out of reach (``stores``), publishing into the store has begun when this
        returns, and ``store`` waits for it.

        Args:
            store: None where it has not been started: without memory for a copy nothing is published then.
            in_use: versions that a generator may still be reading.
            with_checksum: generators verify what they have got.
        """
        from forge_hpc.weights import publish

        await self._publishing.done()
        part = self._part = await self._in_thread(self._snapshot, version, in_use, with_checksum)
        if part is None and store is not None:
            # The parameters stay what they are only where nobody trains on: neither this policy nor another adapter,
            # whose turn writes its own over them.
            copies = self._config.rollout.max_staleness > 0 or self._one_base is not None
            weights = await self._in_thread(self._weights, copies)
            storing = publish(store, version, weights, rank=self._rank, with_checksum=with_checksum)
            self._publishing.begin(storing, reads_weights=not copies)
            self._stored = version
        elif part is not None and store is not None and stores:
            await self._store(store, version)
        return None if part is None else part.brief

    @concurrent_endpoint
    @collective
    async def place(self, version: int) -> Place:
        """Where this rank's part of a version lies that is offered. Raises VersionNotFoundError."""
        from forge_hpc.weights import VersionNotFoundError

        if self._part is None or self._part.version != version:
            raise VersionNotFoundError(f"policy version {version} is no longer in the trainers' memory")
        return self._part.place

    @concurrent_endpoint
    @collective
    async def store(self, store: StoreSpec, version: int) -> None:
        """See that a version is in the store which generators were offered: one of them could not read it, or one of
        the ranks had no memory for it.

        Raises VersionNotFoundError where a newer one has taken its place.
        """
        await self._publishing.done()
        if self._stored != version:
            await self._store(store, version)
            await self._publishing.done()

    async def _store(self, store: StoreSpec, version: int) -> None:
        from forge_hpc.weights import VersionNotFoundError, publish_buckets

        found = self._snapshots.find(version) if self._snapshots is not None else None
        if found is None:
            raise VersionNotFoundError(f"policy version {version} is no longer in the trainers' memory")
        manifest, data = found
        checksum = self._part.checksum if self._part is not None and self._part.version == version else None
        storing = publish_buckets(store, replace(manifest, checksum=checksum), data)
        self._publishing.begin(storing, reads_weights=False)
        self._stored = version

    def _snapshot(self, version: int, in_use: Collection[int], with_checksum: bool) -> Part | None:
        from torchtitan.config import TORCH_DTYPE_MAP

        from forge_hpc.models.device import local_device
        from forge_hpc.weights import MESSAGE_BYTES, Snapshots

        policy = self._models.policy
        if self._snapshots is None:
            dtype = TORCH_DTYPE_MAP[self._config.model.dtype]
            changes = self._config.generator.send_changes
            self._snapshots = Snapshots(self._rank, dtype, local_device(), MESSAGE_BYTES, keeps_previous=changes)
            self._server = self._serve(self._snapshots)
            self._snapshots.address = self._server.address if self._server is not None else None
        parameters, weights = policy.model.parameters(), partial(policy.published, cast=False)
        return self._snapshots.take(version, weights, parameters, in_use=in_use, with_checksum=with_checksum)

    def _serve(self, snapshots: Snapshots) -> Server | None:
        """Let other hosts have the snapshots, where the run has several, or other jobs may lend it some: on the address
        that Monarch listens on."""
        from forge_hpc.cluster.allocation import Allocation, run_address
        from forge_hpc.config.lending import takes_lent
        from forge_hpc.weights import Served, links_dir
        from forge_hpc.wire.server import Server
        from forge_hpc.wire.tls import Certificates

        certificates, num_nodes = Certificates.from_environment(), self._config.cluster.nodes
        lent = Allocation.from_environment().in_slurm and takes_lent(self._config)
        if (num_nodes == 1 and not lent) or certificates is None:
            return None
        links = links_dir(self._log_dir) if self._config.generator.weight_transport == "nccl" else None
        served = Served(snapshots, self._config.generator.send_changes, links)
        try:
            return Server(served, run_address(num_nodes, lent), certificates)
        except OSError as error:
            logger.warning("no streams to other hosts, the store serves them: %s", error)
            return None

    def _weights(self, copies: bool) -> dict[str, torch.Tensor]:
        """The weights by name; copies where training goes on while they are published."""
        state = self._models.policy.published()
        if not copies:
            return state
        cloned = {id(tensor): tensor.clone() for tensor in state.values()}
        return {name: cloned[id(tensor)] for name, tensor in state.items()}

    @endpoint
    @collective
    async def save(self, directory: Path) -> None:
        """Write this rank's part of a checkpoint into ``directory``; returns once it is staged in memory."""
        await self._in_thread(self._models.save, directory)

    @concurrent_endpoint
    @collective
    async def saved(self) -> dict[str, FileRecord]:
        """Wait until what ``save`` began is on disk. The files that this rank wrote: those of all ranks together are
        what ``CheckpointStore.commit`` wants. Raises CheckpointError on every rank where one could not write."""
        return await asyncio.to_thread(self._models.wait_for_save)  # beside the training

    @endpoint
    @collective
    async def export(self, directory: Path) -> None:
        """Write the policy in Hugging Face format, and where generators are to stop."""
        await self._in_thread(self._export, directory)

    def _export(self, directory: Path) -> None:
        from forge_hpc.data.hub import load_tokenizer
        from forge_hpc.data.render import learned_ends

        policy = self._models.policy
        learns_examples = needs_of(self._config).learns_from == "examples"
        ends = learned_ends(load_tokenizer(policy.model_dir), self._config) if learns_examples else []
        policy.export(directory, ends)

    @endpoint
    @collective
    async def leave(self) -> None:
        """Leave the process group."""
        self._leave()

    def _leave(self) -> None:
        import torch.distributed as dist

        if self._server is not None:
            self._server.close()
        if dist.is_initialized():
            dist.destroy_process_group()

    # ---- from one run to the next (``controller.kept``)

    @endpoint
    @collective
    async def rest(self) -> None:
        """The run is over: ``leave``, and give up the models, for a process that is kept for the next one."""
        self._leave()
        await self._in_thread(self._forget_models)

    def _forget_models(self) -> None:
        import torch

        self._snapshots = self._server = None
        if hasattr(self, "_models"):
            del self._models
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @endpoint
    @portable_errors
    async def renew(self, config: Config, log_dir: Path, models: Mapping[str, ModelNeed]) -> None:
        """Begin another run, as a new process would: only what was imported is still there. ``start`` comes next."""
        forget_user_code(Path(file.path) for file in (*named_files(self._config), *named_files(config)))
        self._begin(config, log_dir, models)
        await self._in_thread(_forget_compiled)


def _forget_compiled() -> None:
    """Compile for the shapes that come first, as a new process does. Random numbers need nothing: each step is seeded
    (``TrainEngine._seed_step``)."""
    import torch

    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
