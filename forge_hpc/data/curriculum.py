"""Curriculum by reward: a prompt whose last group was too hard or too easy rests for some epochs; with buckets of
difficulty for as many as its bucket says.

What counts when the prompts of step s are drawn are the rewards of the steps up to s - max_staleness - window (1 where
steps take their prompts in order): those are in before generation for s may begin, and later ones may not be. So the
draw is a function of the saved state, whether generation runs ahead or not, and a resumed run draws what the one before
it would have drawn.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from typing import Any

from forge_hpc.config.schema import Config


class Curriculum:
    """Which prompts rest. Step s trains on the positions [(s - 1) P, s P) for P prompts a step."""

    def __init__(self, config: Config) -> None:
        self.config = own = config.data.curriculum
        self._bounds = own.bounds or [own.low, own.high]
        self._rests = own.rests or [own.rest_epochs, 0, own.rest_epochs]
        self._prompts_per_step = config.rollout.prompts_per_step
        self._num_unknown = config.rollout.max_staleness + config.rollout.window - 1  # steps
        self._origins: dict[int, tuple[int, int, int]] = {}  # by position: source, index, epoch; reward not yet counted
        self._rewards: dict[int, float] = {}  # by position
        self._wakes: dict[tuple[int, int], int] = {}  # by source and index: the epoch in which it is drawn again
        self._means: dict[tuple[int, int], float] = {}  # likewise, where there are buckets: the mean of its groups

    @property
    def longest_rest(self) -> int:
        """Epochs that a prompt rests at the most."""
        return max(self._rests) if self.config.enable else 0

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
            if self.config.bounds:
                reward = self._means[source, index] = (self._means.get((source, index), reward) + reward) / 2
            if rest := self._rests[self._bucket(reward)]:
                self._wakes[source, index] = epoch + 1 + rest
        # A checkpoint of a step that is still being trained needs the rewards that its prompts were drawn without.
        forgotten = known - (self._num_unknown + 2) * self._prompts_per_step
        for old in [p for p in self._rewards if p < forgotten]:
            del self._rewards[old]

    def _bucket(self, reward: float) -> int:
        """A bucket has its lower bound, and the last but one its upper bound too: what is hardest and what is easiest
        lies beyond all bounds."""
        return bisect_right(self._bounds, reward) - (reward == self._bounds[-1])

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
        } | ({"means": [[*key, mean] for key, mean in self._means.items()]} if self._means else {})

    def with_rewards(self, state: Mapping[str, Any], ahead: Iterable[int] = ()) -> dict[str, Any]:
        """A state saved when prompts were drawn, with the rewards that have been reported since for them, and for those
        at the positions ``ahead``."""
        return {**state, "rewards": self._rewards_of([*(origin[0] for origin in state["origins"]), *ahead])}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self._origins = {position: (source, index, epoch) for position, source, index, epoch in state["origins"]}
        self._rewards = dict(map(tuple, state["rewards"]))
        self._wakes = {(source, index): epoch for source, index, epoch in state["wakes"]}
        self._means = {(source, index): mean for source, index, mean in state.get("means", [])}

    def _rewards_of(self, positions: Any) -> list[list[Any]]:
        return [[position, self._rewards[position]] for position in positions if position in self._rewards]
