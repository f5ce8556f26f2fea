"""Between rollouts and training: groups wait here until an optimizer step takes them.

Groups are trained on in the order of their prompts, whoever finishes first: a step takes the next P groups that count,
and those between them that do not. All count by default, so that step s takes the positions [(s - 1) P, s P); DAPO's
dynamic sampling counts those with a signal, and more prompts are drawn in place of the others.

Generation may run ahead of training by ``max_staleness`` steps, which bounds the buffer to (max_staleness + 1) P groups
that count and holds generation back when it is full. With ``max_staleness`` 0 generation for step s begins when the
weights after step s - 1 are in the generators: the synchronous algorithm is this loop, not another.

The window opens by the oldest weights among the generators, so an episode begun inside it cannot be too old when its
step comes; ``take`` checks it all the same.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from forge_hpc.config import Config
from forge_hpc.data.types import Group, Prompt
from forge_hpc.rollouts.groups import has_signal


class EpisodeBuffer:
    """Lives in the controller's event loop. Steps count from 1; before step s the policy version is s - 1.

    Args:
        prompts_per_step: P.
        max_staleness: steps by which the policy that began an episode may be older than the one that trains on it.
        policy_version: of the generators, and the steps done so far.
        position: of the first prompt that no step has taken.
        last_step: no prompt is drawn for later ones.
        counts: whether a group is one of its step's P.
        max_uncounted: a step that is not complete with so many groups that do not count is given up.
    """

    def __init__(
        self,
        prompts_per_step: int,
        max_staleness: int,
        policy_version: int,
        position: int,
        last_step: int,
        counts: Callable[[Group], bool] = lambda group: True,
        max_uncounted: int | None = None,
    ) -> None:
        self._prompts_per_step = prompts_per_step
        self._max_staleness = max_staleness
        self._version = policy_version
        self._step = policy_version + 1  # the next to be taken: positions from _next, known to be complete up to _end
        self._next = self._end = position
        self._num_counted = 0  # of [_next, _end)
        self._last_step = last_step
        self._counts = counts
        self._max_uncounted = max_uncounted
        self._groups: dict[int, Group] = {}  # by position
        self._uncounted: set[int] = set()  # positions of those that do not count
        self._begun = policy_version * prompts_per_step  # prompts drawn for all steps, without those
        self._num_in_flight = 0
        self._changed = asyncio.Condition()
        self._failure: BaseException | None = None
        self.num_stale = 0
        """Episodes left out because they were older than the bound, of the whole run: 0 unless something is wrong."""
        self.waited_s = 0.0
        """So long the last ``take`` had to wait."""

    @property
    def step(self) -> int:
        """The next to be taken."""
        return self._step

    def finished(self) -> list[Group]:
        """All groups that wait, in the order of their positions: what a checkpoint keeps of work done ahead."""
        return [self._groups[position] for position in sorted(self._groups)]

    def metrics(self) -> dict[str, float]:
        """The figures of the last step that was taken."""
        return {"time/wait_generator_s": self.waited_s, "episodes/stale": self.num_stale}

    def state_dict(self) -> dict[str, Any]:
        """What it has counted, for the recipe's state; the groups are saved by themselves."""
        return {"stale_episodes": self.num_stale}

    def restore(self, groups: Iterable[Group], state: Mapping[str, Any]) -> None:
        """Put back what ``finished`` gave when the run was saved, and the counts of the recipe's state."""
        self.num_stale = state.get("stale_episodes", 0)
        for group in groups:
            self._add(group)

    async def room(self) -> int:
        """Wait until the generation of prompts may begin, and return of how many: the generators' weights are then at
        most ``max_staleness`` older than those that will train on them. With 0, none is under way before."""
        async with self._changed:
            await self._wait_for(lambda: self._room() > 0 and (self._max_staleness > 0 or self._num_in_flight == 0))
            return self._room()

    def _room(self) -> int:
        step = min(self._version + 1 + self._max_staleness, self._last_step)
        return step * self._prompts_per_step - self._begun

    def begin(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """These were drawn, in order. Returns those that are to be generated: whose groups are not there yet."""
        missing = [prompt for prompt in prompts if prompt.position not in self._groups]
        self._num_in_flight += len(missing)
        self._begun += sum(prompt.position not in self._uncounted for prompt in prompts)
        return missing

    async def put(self, group: Group) -> None:
        """Hand over a finished group of a prompt that was begun."""
        async with self._changed:
            self._add(group)
            self._num_in_flight -= 1
            self._begun -= group.prompt.position in self._uncounted
            self._changed.notify_all()

    def _add(self, group: Group) -> None:
        self._groups[group.prompt.position] = group
        if not self._counts(group):
            self._uncounted.add(group.prompt.position)

    async def take(self) -> list[Group]:
        """Wait for all groups of the next step and take them, in the order of their positions.

        Raises RuntimeError where ``max_uncounted`` do not count and the step is not complete.
        """
        started = time.perf_counter()
        async with self._changed:
            await self._wait_for(self._is_complete)
            self.waited_s = time.perf_counter() - started
            groups = [self._groups.pop(position) for position in range(self._next, self._end)]
            self._uncounted.difference_update(range(self._next, self._end))
            step, self._step = self._step, self._step + 1
            self._next, self._num_counted = self._end, 0
        for group in groups:
            fresh = [e for e in group.episodes if step - 1 - e.policy_version <= self._max_staleness]
            self.num_stale += len(group.episodes) - len(fresh)
            group.episodes = fresh
        return groups

    def _is_complete(self) -> bool:
        while self._num_counted < self._prompts_per_step and self._end in self._groups:
            self._num_counted += self._end not in self._uncounted
            self._end += 1
        if self._num_counted == self._prompts_per_step:
            return True
        num_uncounted = self._end - self._next - self._num_counted
        if self._max_uncounted is not None and num_uncounted >= self._max_uncounted:
            raise RuntimeError(
                f"no learning signal: for step {self._step} {self._end - self._next} prompts were drawn, and in the "
                f"groups of {num_uncounted} all rewards were equal. Is the task too hard or too easy for the model, "
                "or the reward blind to what differs?"
            )
        return False

    async def weights_loaded(self, policy_version: int) -> None:
        """All generators hold at least this version: the window moves on."""
        async with self._changed:
            self._version = policy_version
            self._changed.notify_all()

    async def fail(self, error: BaseException) -> None:
        """What would move the window on has failed: whoever waits, and whoever comes, gets ``error``."""
        async with self._changed:
            self._failure = error
            self._changed.notify_all()

    async def _wait_for(self, condition: Callable[[], bool]) -> None:
        await self._changed.wait_for(lambda: self._failure is not None or condition())
        if self._failure is not None:
            raise self._failure


def episode_buffer(config: Config, steps_done: int, position: int) -> EpisodeBuffer:
    """The buffer of a run in which ``position`` is that of the first prompt after ``steps_done`` steps."""
    a, rollout, last_step = config.algorithm, config.rollout, config.trainer.training.steps
    size = rollout.prompts_per_step
    if not a.dynamic_sampling:
        return EpisodeBuffer(size, rollout.max_staleness, steps_done, position, last_step)
    limit = a.max_steps_without_signal * size
    return EpisodeBuffer(size, rollout.max_staleness, steps_done, position, last_step, has_signal, limit)
