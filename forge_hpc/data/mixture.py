"""The sources of a run's data: those of the run by their shares, those of one data section by weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from forge_hpc.config.errors import UserError
from forge_hpc.config.schema import Config
from forge_hpc.config.sources import data_sources, run_sources
from forge_hpc.data.order import LoadedSource, Source, StreamedSource
from forge_hpc.data.readers import open_reader
from forge_hpc.data.shares import Turns
from forge_hpc.data.source import BUILTIN_PREFIX, load_examples

_MIXTURE = 0x6D69_7874  # sets the draws between sources apart from the orders within them


def open_sources(config: Config) -> list[tuple[Source, float]]:
    """The sources that ``config.data`` names, or those of ``config.sources`` one after the other, each with its weight.
    Raises UserError."""
    sources: list[tuple[Source, float]] = []
    found = [(run.key, *source) for run in run_sources(config) for source in data_sources(run.config.data)]
    for number, (of, key, data, weight) in enumerate(found):
        if weight <= 0:
            raise UserError(f"{of}{key}.weight is {weight} ({data.path})", "leave the source out, or give it a weight")
        seed = [config.seed, number]
        if data.streaming and not data.path.startswith(BUILTIN_PREFIX):
            sources.append((StreamedSource(open_reader(data), data, seed), weight))
        else:
            sources.append((LoadedSource(load_examples(data, data.split, config.seed), data, seed), weight))
    return sources


class Mixture:
    """Takes the run's sources in turn by their shares, and draws between the data of one by weight. The draw at
    ``cursor`` is a function of the seed and the cursor alone.

    Args:
        sources: as ``open_sources`` gives them, each with its weight.
        shares: of each source of the run its share, and how many of ``sources`` are its own.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Source, float]],
        seed: int,
        shares: Sequence[tuple[Fraction, int]] = (),
    ) -> None:
        self.sources = [source for source, _ in sources]
        shares = shares or [(Fraction(1), len(sources))]
        self._turns = Turns([share for share, _ in shares])
        self._first = [0, *accumulate(num for _, num in shares)]
        weights = [weight for _, weight in sources]
        self._bounds = [np.cumsum(weights[begin:end]) for begin, end in pairwise(self._first)]
        self._seed = seed
        self._cursor = 0

    def __next__(self) -> int:
        """The number of the source that the next prompt comes from."""
        self._cursor += 1
        turn = next(self._turns)
        bounds = self._bounds[turn]
        if len(bounds) == 1:
            return self._first[turn]
        draw = np.random.default_rng([self._seed, self._cursor, _MIXTURE]).random() * bounds[-1]
        return self._first[turn] + int(np.searchsorted(bounds, draw, side="right"))

    def state_dict(self) -> dict[str, Any]:
        """Where all sources stand. JSON can hold it."""
        return {
            "seed": self._seed,
            "cursor": self._cursor,
            "turns": list(self._turns.counts),
            "sources": [source.state_dict() for source in self.sources],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on there. Raises UserError where the data or the seed is not the one saved."""
        mine, saved = self.state_dict(), state
        pairs = [("seed", saved["seed"], mine["seed"]), ("sources", len(saved["sources"]), len(mine["sources"]))]
        for old, new in zip(saved["sources"], mine["sources"], strict=False):
            pairs += [(key, old.get(key), new.get(key)) for key in ("num_examples", "path")]
        for key, old, new in pairs:
            if old != new:
                raise UserError(
                    f"the saved position in the data has {key} {old}, this run {new}",
                    "resume with the data and the seed of the saved run, or start a new run directory",
                )
        self._cursor = state["cursor"]
        self._turns.counts = list(state.get("turns", [self._cursor]))
        for source, old in zip(self.sources, state["sources"], strict=True):
            source.load_state_dict(old)
