"""A guessing game: find a number, being told whether it is higher or lower."""

from __future__ import annotations

import random
import re

from forge_hpc.data.types import Prompt
from forge_hpc.environments.base import Step


class Guessing:
    """The number follows from the prompt's seed, so that all episodes of a group look for the same one.

    Args:
        low, high: the number lies between them, both included.

    The right guess earns 1 and ends the episode.
    """

    def __init__(self, low: int = 1, high: int = 100) -> None:
        if low > high:
            raise ValueError(f"low={low} is above high={high}")
        self._low, self._high = low, high

    async def reset(self, prompt: Prompt) -> str:
        self._number = random.Random(prompt.seed).randint(self._low, self._high)
        return f"Guess my number from {self._low} to {self._high}."

    async def step(self, response: str) -> Step:
        found = re.search(r"-?\d{1,18}", response)
        if found is None:
            return Step("Write a number.")
        guess = int(found[0])
        if guess == self._number:
            return Step("Right.", reward=1.0, done=True)
        return Step("It is higher." if guess < self._number else "It is lower.")

    async def close(self) -> None:
        pass
