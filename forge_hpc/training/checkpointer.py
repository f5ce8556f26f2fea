"""Saving and loading a trainer's state through torch.distributed.checkpoint (DCP), beside the training.

``save_to`` copies the state into buffers in host memory that every save uses again, and returns; a thread of its own
writes them over a process group of its own. TorchTitan's two asynchronous modes do more, and worse here: ``async``
allocates new buffers and collects garbage at every save, and starts a thread which takes the interpreter's lock from
the training at once; ``async_with_pinned_mem`` needs a GPU and opens a TCPStore, a port that asks no one for a
certificate.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.stateful import Stateful
from torchtitan.components.checkpointer import CheckpointManager, ModelWrapper
from torchtitan.components.checkpointer.base import DATALOADER, MODEL, OPTIMIZER
from torchtitan.components.checkpointer.utils import canonical_fqn
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer

from forge_hpc.checkpoint import CheckpointError, FileRecord
from forge_hpc.checkpoint.manifest import NO_OPTIMIZER
from forge_hpc.training.checkpoint_writer import CheckpointWriter, threads_for
from forge_hpc.training.staging import Staging, tensors_of

logger = logging.getLogger(__name__)
_numbers = itertools.count()


@contextmanager
def ordinary_errors(what: str) -> Iterator[None]:
    """torch 2.13's CheckpointException is no Exception, so that ``except Exception`` and futures' users miss it."""
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise CheckpointError(f"{what}: rank {rank}: {type(cause).__name__}: {cause}") from error


class _OptimizerState(Stateful):
    """The optimizers' tensors. Their hyperparameters are the configuration's and the schedule's: saved with each of the
    parameters, as torchtitan does, they are most of a small checkpoint's entries."""

    def __init__(self, optimizers: OptimizersContainer) -> None:
        self._optimizers = optimizers

    def state_dict(self) -> dict[str, Any]:
        return {key: value for key, value in self._optimizers.state_dict().items() if key.startswith("state.")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._optimizers.load_state_dict(self._optimizers.state_dict() | state_dict)


class TrainedWeights(ModelWrapper):
    """The model without its frozen weights, which are those of the model that training started from."""

    def _get_state_dict(self) -> dict[str, Any]:
        named = [item for model in self.model for item in model.named_parameters(remove_duplicate=False)]
        frozen = {canonical_fqn(name) for name, parameter in named if not parameter.requires_grad}
        return {name: value for name, value in super()._get_state_dict().items() if name not in frozen}


class TrainerCheckpointer(CheckpointManager):
    """Writes straight into a directory, not into ``folder/step-N``: the run's checkpoints have their own layout, which
    also says when one is complete and how long it is kept. The files are the same.

    Making one is a collective call where saving is asynchronous: it makes the process group that saves go over.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: OptimizersContainer,
        lr_schedulers: LRSchedulersContainer,
        states: dict[str, Any],
        *,
        async_save: bool,
    ) -> None:
        mode: Any = "async" if async_save else "disabled"
        super().__init__(
            CheckpointManager.Config(enable=True, interval=1, keep_latest_k=0, async_mode=mode),
            dataloader=None,
            model_parts=[model],
            optimizers=optimizers,
            lr_schedulers=lr_schedulers,
            states=states,
            sd_adapter=None,
        )
        del self.states[DATALOADER]  # the controller draws the prompts
        self.states[MODEL] = TrainedWeights(model)
        self.states[OPTIMIZER] = _OptimizerState(optimizers)
        self._staging = Staging() if async_save else None
        self._saving: Future[dict[str, FileRecord]] | None = None
        # Rank 0 plans for all ranks, in seconds of Python where they are many, and once while their states are alike:
        # DCP keeps plans by the name of the planner's class.
        self._planner = type(f"SavePlanner{next(_numbers)}", (DefaultSavePlanner,), {})
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        if async_save:
            self._writer.submit(int).result()  # starts the thread, which takes milliseconds

    def save_to(self, directory: Path) -> None:
        """Save all state; where saving is asynchronous, return once it is staged in memory. Waits for the save before.

        Raises:
            CheckpointError: this save failed or, where saving is asynchronous, the one before; told once.
        """
        self.saved()
        state = self._state()
        if self._staging is None:
            self._saving = Future()
            self._saving.set_result(self._write(state, directory))
            return
        failure = None
        try:
            state = self._staging.copy(state)
        except Exception as error:  # of memory
            state, failure = {}, error
        self._saving = self._writer.submit(self._write, state, directory, failure)

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = dict(self.states[MODEL].state_dict())
        return state | {key: value.state_dict() for key, value in self.states.items() if key != MODEL}

    def reserve(self) -> None:
        """Begin to take the host memory that saves are staged in. The optimizer has its state."""
        if self._staging is not None and not self._staging.is_reserved and self.stages:
            try:
                self._staging.reserve(self._state())
            except RuntimeError as error:  # a save will ask again, and fail by itself
                logger.warning("no host memory yet for the copy that a save writes: %s", error)

    @property
    def stages(self) -> bool:
        """Whether saves are copied from a GPU to host memory that is kept for it."""
        return self._staging is not None and torch.cuda.is_available()

    def saved(self) -> dict[str, FileRecord]:
        """Wait until the last save is on disk.

        Returns:
            The files that this rank wrote, by path below the directory's parent; empty before the first save.

        Raises:
            CheckpointError: it failed, on whichever rank; told once, and the next save may work.
        """
        try:
            return self._saving.result() if self._saving is not None else {}
        except BaseException:
            self._saving = None
            raise

    @torch.no_grad()
    def _write(self, state: dict[str, Any], directory: Path, failure: Exception | None = None) -> dict[str, FileRecord]:
        # A staged state is in host memory already: nothing to copy ahead, and no CUDA context of this thread's own.
        copy_ahead = 0 if self._staging is not None else 10_000_000
        num_threads = threads_for(sum(tensor.nbytes for tensor in tensors_of(state)))
        writer = CheckpointWriter(directory, failure, num_threads, per_thread_copy_ahead=copy_ahead)
        with ordinary_errors(f"cannot save {directory}"):
            planner = self._planner(enable_plan_caching=True)
            dcp.save(state, storage_writer=writer, planner=planner, process_group=self.pg)
        return {f"{directory.name}/{path.name}": record for path, record in sorted(writer.records.items())}

    def load_from(self, directory: Path) -> None:
        """Load all state, whatever the sharding it was saved under; where ``NO_OPTIMIZER`` says so, without the
        optimizer's.

        Raises:
            FileNotFoundError: no such directory.
            CheckpointError: it cannot be read or belongs to another model.
        """
        self.folder = str(directory)
        self.exclude_from_loading = [OPTIMIZER] if (directory.parent / NO_OPTIMIZER).exists() else []
        with ordinary_errors(f"cannot load {directory}"):
            self.load(1)  # any step but 0, which means weights alone, and -1, which means the newest

    def _create_checkpoint_id(self, step: int, folder: str = "") -> str:
        return folder or self.folder

    def _close(self) -> None:
        if hasattr(self, "_writer"):  # also called on one that was never finished
            self._writer.shutdown(wait=False)
            for name in ("save_plan", "all_plans", "global_plan", "metadata", "final_save_plan"):
                getattr(SavePlanner, f"_cached_{name}").pop(self._planner.__name__, None)
