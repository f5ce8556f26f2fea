"""Curriculum by reward: a prompt whose last group was too hard or too easy rests for some epochs.

What counts when the prompts of step s are drawn are the rewards of the steps up to s - max_staleness - window (1 where
steps take their prompts in order): those are in before generation for s may begin, and later ones may not be. So the
draw is a function of the saved state, whether generation runs ahead or not, and a resumed run draws what the one before
it would have drawn.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from forge_hpc.config.schema import Config


class Curriculum:
    """Which prompts rest. Step s trains on the positions [(s - 1) P, s P) for P prompts a step."""

    def __init__(self, config: Config) -> None:
        self.config = config.data.curriculum
        self._prompts_per_step = config.rollout.prompts_per_step
        self._num_unknown = config.rollout.max_staleness + config.rollout.window - 1  # steps
        self._origins: dict[int, tuple[int, int, int]] = {}  # by position: source, index, epoch; reward not yet counted
        self._rewards: dict[int, float] = {}  # by position
        self._wakes: dict[tuple[int, int], int] = {}  # by source and index: the epoch in which it is drawn again

    def count_rewards(self, position: int) -> None:
        """Before the prompt at ``position`` is drawn: take into account the rewards that count for it."""
        if not self.config.enable:
            return
        known = (position // self._prompts_per_step - self._num_unknown) * self._prompts_per_step
        for old in [p for p in self._origins if p < known]:
            source, index, epoch = self._origins.pop(old)
            reward = self._rewards.get(old)
            if reward is None:
                continue
            self._wakes.pop((source, index), None)
            if not self.config.low <= reward <= self.config.high:
                self._wakes[source, index] = epoch + 1 + self.config.rest_epochs
        # A checkpoint of a step that is still being trained needs the rewards that its prompts were drawn without.
        forgotten = known - (self._num_unknown + 2) * self._prompts_per_step
        for old in [p for p in self._rewards if p < forgotten]:
            del self._rewards[old]

    def is_resting(self, source: int, index: int, epoch: int) -> bool:
        """Whether the prompt is left out in this epoch."""
        return epoch < self._wakes.get((source, index), 0)

    def drawn(self, position: int, source: int, index: int, epoch: int) -> None:
        """The prompt was drawn: its reward will be reported under its position."""
        if self.config.enable:
            self._origins[position] = source, index, epoch

    def report(self, position: int, reward: float) -> None:
        """The mean reward of the group of the prompt at ``position``."""
        if self.config.enable:
            self._rewards[position] = reward

    def state_dict(self) -> dict[str, Any]:
        """JSON can hold it."""
        return {
            "origins": [[position, *origin] for position, origin in self._origins.items()],
            "rewards": self._rewards_of(self._origins),
            "wakes": [[*key, epoch] for key, epoch in self._wakes.items()],
        }

    def with_rewards(self, state: Mapping[str, Any], ahead: Iterable[int] = ()) -> dict[str, Any]:
        """A state saved when prompts were drawn, with the rewards that have been reported since for them, and for those
        at the positions ``ahead``."""
        return {**state, "rewards": self._rewards_of([*(origin[0] for origin in state["origins"]), *ahead])}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self._origins = {position: (source, index, epoch) for position, source, index, epoch in state["origins"]}
        self._rewards = dict(map(tuple, state["rewards"]))
        self._wakes = {(source, index): epoch for source, index, epoch in state["wakes"]}

    def _rewards_of(self, positions: Any) -> list[list[Any]]:
        return [[position, self._rewards[position]] for position in positions if position in self._rewards]
