"""Between rollouts and training: groups wait here until the optimizer step that they belong to.

Prompts are trained on in the order of their positions: step s takes the prompts [(s - 1) P, s P) for P prompts a step,
whoever finishes first. Generation may run ahead of training by ``max_staleness`` steps, which bounds the buffer
to (max_staleness + 1) P groups and holds generation back when it is full. With ``max_staleness`` 0 generation of step
s begins when the weights after step s - 1 are in the generators: the synchronous algorithm is this loop, not another.

The window opens by the oldest weights among the generators, so an episode begun inside it cannot be too old when its
step comes; ``take`` checks it all the same.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from forge_hpc.data.types import Group, Prompt


class EpisodeBuffer:
    """Lives in the controller's event loop. Steps count from 1; before step s the policy version is s - 1."""

    def __init__(self, prompts_per_step: int, max_staleness: int, policy_version: int) -> None:
        self._prompts_per_step = prompts_per_step
        self._max_staleness = max_staleness
        self._version = policy_version
        self._groups: dict[int, list[Group]] = defaultdict(list)
        self._changed = asyncio.Condition()
        self._failure: BaseException | None = None
        self.num_stale = 0
        """Episodes left out because they were older than the bound: 0 unless something is wrong."""

    def __len__(self) -> int:
        """Finished groups that wait."""
        return sum(map(len, self._groups.values()))

    def finished(self) -> list[Group]:
        """All groups that wait, in the order of their positions: what a checkpoint keeps of work done ahead."""
        return sorted((g for groups in self._groups.values() for g in groups), key=lambda group: group.prompt.position)

    def restore(self, groups: Iterable[Group]) -> None:
        """Put back what ``finished`` gave when the run was saved."""
        for group in groups:
            self._groups[1 + group.prompt.position // self._prompts_per_step].append(group)

    def missing(self, step: int, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Those prompts of ``step`` whose groups are not there yet."""
        there = {group.prompt.position for group in self._groups[step]}
        return [prompt for prompt in prompts if prompt.position not in there]

    async def room(self, step: int) -> None:
        """Wait until generation for ``step`` may begin: the generators' weights are at most ``max_staleness`` older."""
        async with self._changed:
            await self._wait_for(lambda: self._version >= step - 1 - self._max_staleness)

    async def put(self, step: int, group: Group) -> None:
        """Hand over a finished group."""
        async with self._changed:
            self._groups[step].append(group)
            self._changed.notify_all()

    async def take(self, step: int) -> list[Group]:
        """Wait for all groups of ``step`` and take them, in the order of their positions."""
        async with self._changed:
            await self._wait_for(lambda: len(self._groups[step]) == self._prompts_per_step)
            groups = sorted(self._groups.pop(step), key=lambda group: group.prompt.position)
        for group in groups:
            fresh = [e for e in group.episodes if step - 1 - e.policy_version <= self._max_staleness]
            self.num_stale += len(group.episodes) - len(fresh)
            group.episodes = fresh
        return groups

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
