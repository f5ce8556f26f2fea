"""TorchTitan's CheckpointManager, saving to and loading from the directory that it is given."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torchtitan.components.checkpointer import MODEL, CheckpointManager, ModelWrapper
from torchtitan.components.checkpointer.utils import canonical_fqn
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer


@contextmanager
def _ordinary_errors() -> Iterator[None]:
    """torch 2.13's CheckpointException is no Exception, so that ``except Exception`` and futures' users miss it."""
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise RuntimeError(f"checkpoint, rank {rank}: {type(cause).__name__}: {cause}") from error


class _TrainedWeights(ModelWrapper):
    """The model without its frozen weights, which are those of the model that training started from."""

    def _get_state_dict(self) -> dict[str, Any]:
        named = [item for model in self.model for item in model.named_parameters(remove_duplicate=False)]
        frozen = {canonical_fqn(name) for name, parameter in named if not parameter.requires_grad}
        return {name: value for name, value in super()._get_state_dict().items() if name not in frozen}


class TrainerCheckpointer(CheckpointManager):
    """Writes straight into a directory, not into ``folder/step-N``: the run's checkpoints have their own layout, which
    also says when one is complete and how long it is kept."""

    save_future: Future | None

    def _create_checkpoint_id(self, step: int, folder: str = "") -> str:
        return folder or self.folder

    def _wait_for_saving(self) -> None:
        # torchtitan 0.3.0 keeps the future of a failed save, so that every later save would raise its error again.
        future, self.save_future = self.save_future, None
        if future is not None:
            with _ordinary_errors():
                future.result()

    def save_to(self, directory: Path) -> None:
        """Save all state; where saving is asynchronous, return once it is staged in memory. Waits for the save before.

        Raises:
            RuntimeError: this save failed or, where saving is asynchronous, the one before; told once.
        """
        self.maybe_wait_for_saving()
        self.folder = str(directory)
        with _ordinary_errors():
            self.save(1)

    def load_from(self, directory: Path) -> None:
        """Load all state, whatever the sharding it was saved under.

        Raises:
            FileNotFoundError: no such directory.
            RuntimeError: it cannot be read or belongs to another model.
        """
        self.folder = str(directory)
        with _ordinary_errors():
            self.load(1)  # any step but 0, which means weights alone, and -1, which means the newest


def build_checkpointer(
    model: nn.Module,
    optimizers: OptimizersContainer,
    lr_schedulers: LRSchedulersContainer,
    states: dict[str, Any],
    *,
    async_save: bool,
) -> TrainerCheckpointer:
    """A collective call where saving is asynchronous: it makes a process group of its own."""
    config = CheckpointManager.Config(
        enable=True, interval=1, keep_latest_k=0, async_mode="async" if async_save else "disabled"
    )
    checkpointer = TrainerCheckpointer(
        config,
        dataloader=None,
        model_parts=[model],
        optimizers=optimizers,
        lr_schedulers=lr_schedulers,
        states=states,
        sd_adapter=None,
    )
    checkpointer.states[MODEL] = _TrainedWeights(model)
    del checkpointer.states["dataloader"]  # the controller draws the prompts
    return checkpointer
