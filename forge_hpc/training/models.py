"""All models of a run on this rank, by name: the policy, and what its recipe needs beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from forge_hpc.checkpoint import FileRecord
from forge_hpc.config.errors import UserError
from forge_hpc.config.needs import POLICY, REFERENCE, ModelNeed, check_models
from forge_hpc.config.schema import Config
from forge_hpc.data.types import Document
from forge_hpc.training.build import Shape
from forge_hpc.training.engine import TrainEngine, sampling_of
from forge_hpc.training.frozen import FrozenModel, PolicyWithoutAdapters
from forge_hpc.training.shard import ModelShard

M = TypeVar("M")


class Models:
    """The models that ``needs`` names. Every method is a collective call of all ranks.

    Args:
        needs: by name; there is a ``policy`` among them.
        directories: where the weights of each are, in Hugging Face format; where a name is missing, those of the
            policy.
        base: those of another adapter, on whose base these train one of their own (``TrainEngine``).

    Raises:
        UserError: as ``check_models``; a model that cannot be trained here.
    """

    def __init__(
        self,
        cfg: Config,
        needs: Mapping[str, ModelNeed],
        directories: Mapping[str, Path],
        base: Models | None = None,
    ) -> None:
        check_models(needs)
        places = {name: directories.get(name, directories[POLICY]) for name in needs}
        shares = {
            name
            for name, need in needs.items()
            if cfg.trainer.lora.enable and not need.trained and places[name] == places[POLICY]
        }
        own = {name: (places[name], need) for name, need in needs.items() if name not in shares}
        self.sharing = Shape.of(cfg).share_gpu(own) if base is None else ""
        """How the GPU is shared with a generator, in a line; empty where it is not."""
        available = Shape.of(cfg).activation_bytes(own) if len(own) > 1 else None
        self.trained = {
            name: TrainEngine(cfg, place, need, available, base.policy if base is not None else None)
            for name, (place, need) in own.items()
            if need.trained
        }
        """Those that have an optimizer and stand in checkpoints."""
        sampling = sampling_of(cfg, needs[POLICY])
        self.frozen: dict[str, FrozenModel | PolicyWithoutAdapters] = {
            name: FrozenModel(cfg, place, need, sampling, available)
            for name, (place, need) in own.items()
            if not need.trained
        }
        self.frozen |= {name: PolicyWithoutAdapters(self.policy) for name in shares}
        self._saved_in = ""

    @property
    def policy(self) -> TrainEngine:
        """The model that is published and exported."""
        return self.trained[POLICY]

    def take_turn(self) -> None:
        """As ``TrainEngine.take_turn``, before whatever else is asked."""
        self.policy.take_turn()

    def warm_up(self) -> None:
        """As ``ModelShard.warm_up``, of all of them."""
        for model in (*self.trained.values(), *self.frozen.values()):
            if isinstance(model, ModelShard):
                model.warm_up()

    def train_step(
        self, name: str, documents: Sequence[Document], *, update: bool, max_mismatch: float
    ) -> dict[str, float]:
        """As ``TrainEngine.train_step``; before one of the policy the reference, where there is one, is asked, and an
        error of another model names it."""
        engine = _find(self.trained, name, "trained")
        if name == POLICY and (reference := self.frozen.get(REFERENCE)) is not None:
            for document, logprobs in zip(documents, reference.logprobs(documents), strict=True):
                document.ref_logprobs = logprobs
        try:
            return engine.train_step(documents, update=update, max_mismatch=max_mismatch)
        except RuntimeError as error:
            if name == POLICY or type(error) is not RuntimeError:  # a device's failure keeps its class
                raise
            raise RuntimeError(f"the model {name!r} has diverged or cannot be trained: {error}") from error

    def logprobs(self, name: str, documents: Sequence[Document]) -> list[np.ndarray]:
        """As ``ModelShard.logprobs``, of any model with a language-model head."""
        return _find({**self.trained, **self.frozen}, name, "in the trainers").logprobs(documents)

    def values(self, name: str, documents: Sequence[Document]) -> list[np.ndarray]:
        """As ``ModelShard.values``, of a model with a value head."""
        shards = {n: m for n, m in {**self.trained, **self.frozen}.items() if isinstance(m, ModelShard)}
        return _find(shards, name, "in the trainers").values(documents)

    def release(self) -> str:
        """Give back the memory that outlives a step for nothing: gradients, and what is cached. What that came to."""
        for engine in self.trained.values():
            engine.optimizers.zero_grad()
        if not torch.cuda.is_available():
            return "no GPU"
        torch.cuda.empty_cache()
        kept, (free, _) = torch.cuda.memory_reserved(), torch.cuda.mem_get_info()
        return f"trainer 0 keeps {kept / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"

    # ---- checkpoints

    def save(self, directory: Path) -> None:
        """Save all trained models: the policy into ``directory``, others into ``directory/NAME``.

        Raises:
            CheckpointError: as ``TrainEngine.save``.
        """
        self._saved_in = directory.name
        for name, engine in self.trained.items():
            engine.save(_place(directory, name))

    def wait_for_save(self) -> dict[str, FileRecord]:
        """As ``TrainEngine.wait_for_save``, of all trained models."""
        files: dict[str, FileRecord] = {}
        errors = []
        for name, engine in self.trained.items():
            try:
                written = engine.wait_for_save()
            except Exception as error:  # the others' saves are waited for before it is told
                errors.append(error)
                continue
            files |= written if name == POLICY else {f"{self._saved_in}/{path}": file for path, file in written.items()}
        if errors:
            raise errors[0]
        return files

    def load(self, directory: Path) -> None:
        """Continue from a save of these models.

        Raises:
            UserError: it holds others.
            FileNotFoundError, CheckpointError: as ``TrainEngine.load``.
        """
        held = {POLICY, *(path.name for path in directory.iterdir() if path.is_dir())}
        if held != self.trained.keys():
            raise UserError(
                f"the checkpoint {directory.parent} holds the models {', '.join(sorted(held))}, and the recipe trains "
                f"{', '.join(sorted(self.trained))}",
                "resume it with the recipe that saved it, or begin another run",
            )
        for name, engine in self.trained.items():
            engine.load(_place(directory, name))


def _find(models: Mapping[str, M], name: str, what: str) -> M:
    if name not in models:
        raise UserError(f"no model {name!r} is {what}", f"there are {', '.join(models)}; a recipe names what it needs")
    return models[name]


def _place(directory: Path, name: str) -> Path:
    return directory if name == POLICY else directory / name
