"""In which order the examples of a source come: seeded, endless, and saved as a few numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from forge_hpc.config.errors import UserError
from forge_hpc.config.schema import DataConfig
from forge_hpc.data.bad import BadExample
from forge_hpc.data.examples import Example
from forge_hpc.data.readers import Reader


@dataclass(frozen=True, slots=True)
class Drawn:
    """An example, and where it came from."""

    example: Example | BadExample
    """Or what is bad about it."""
    index: int
    """Place of the example in its source."""
    epoch: int
    """Passes through the source before this one."""


class Source(Protocol):
    """One source of a mixture, in an endless order of its own that follows the seed."""

    data: DataConfig
    """The source as a configuration of its own."""

    @property
    def epoch(self) -> int:
        """Epoch of the next example, from 0."""
        ...

    def __next__(self) -> Drawn: ...

    def again(self) -> Drawn:
        """What was drawn last."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, and what it must find again. JSON can hold it."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on there."""
        ...


class LoadedSource:
    """Examples held in memory (or mapped from disk): a new permutation every epoch, the plain order unshuffled.

    The example at ``cursor`` is a function of the seed alone, so the cursor is all there is to save.
    """

    def __init__(self, examples: Sequence[Example | BadExample], data: DataConfig, seed: Sequence[int]) -> None:
        self.data = data
        self._examples = examples
        self._seed, self._number = seed
        self._cursor = 0
        self._permuted_epoch = -1
        self._permutation = np.arange(0)

    @property
    def epoch(self) -> int:
        return self._cursor // len(self._examples)

    def __next__(self) -> Drawn:
        epoch, index = divmod(self._cursor, len(self._examples))
        self._cursor += 1
        if self.data.shuffle:
            if epoch != self._permuted_epoch:
                rng = np.random.default_rng([self._seed, epoch, self._number])
                self._permutation, self._permuted_epoch = rng.permutation(len(self._examples)), epoch
            index = int(self._permutation[index])
        return Drawn(self._examples[index], index, epoch)

    def again(self) -> Drawn:
        self._cursor -= 1
        return next(self)

    def state_dict(self) -> dict[str, Any]:
        return {"num_examples": len(self._examples), "cursor": self._cursor}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._cursor = state["cursor"]


class StreamedSource:
    """Examples read block by block, shuffled within each block of ``data.shuffle_buffer``.

    Saved is where the block begins; restoring reads that block again, and with ``datasets`` what its file holds before.
    """

    def __init__(self, reader: Reader, data: DataConfig, seed: Sequence[int]) -> None:
        self.data = data
        self.epoch = 0
        self._reader = reader
        self._seed, self._number = seed
        self._block: list[Example | BadExample] = []
        self._block_start = reader.tell()
        self._first = 0  # index of the block's first example
        self._place = 0
        self._permutation = np.arange(0)

    def __next__(self) -> Drawn:
        if self._place == len(self._block):
            self._next_block()
        place = int(self._permutation[self._place])
        self._place += 1
        return Drawn(self._block[place], self._first + place, self.epoch)

    def again(self) -> Drawn:
        self._place -= 1
        return next(self)

    def _next_block(self) -> None:
        self._first += len(self._block)
        self._block_start = self._reader.tell()
        self._read_block()
        if not self._block:
            if self._first == 0:
                raise UserError(f"{self.data.path} has no examples in split {self.data.split}", "check data.split")
            self.epoch, self._first = self.epoch + 1, 0
            self._reader.rewind()
            self._next_block()

    def _read_block(self) -> None:
        self._block, self._place = self._reader.read(self.data.shuffle_buffer), 0
        self._permutation = np.arange(len(self._block))
        if self.data.shuffle:
            rng = np.random.default_rng([self._seed, self.epoch, self._number, self._first])
            self._permutation = rng.permutation(len(self._block))

    def state_dict(self) -> dict[str, Any]:
        start = {"epoch": self.epoch, "first": self._first, "reader": self._block_start}
        return {"path": self.data.path.partition("@")[0], **start, "place": self._place}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epoch, self._first, self._block_start = state["epoch"], state["first"], state["reader"]
        self._reader.seek(self._block_start)
        self._read_block()
        self._place = state["place"]
