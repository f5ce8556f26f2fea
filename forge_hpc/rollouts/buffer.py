"""Between rollouts and training: groups wait here until an optimizer step takes them.

A step takes the first P groups that count, in the order of their prompts, and those between them that do not. All count
by default; DAPO's dynamic sampling counts those with a signal, and more prompts are drawn in place of the others.

With ``window`` 1 the order is strict: whoever finishes first, step s takes the positions [(s - 1) P, s P) where all
count. With window w a group that is late lets later ones go first, (w - 1) P of them at most.

Generation may run ahead of training by ``max_staleness`` steps K, which bounds the buffer to (K + 1) P groups that
count and holds generation back when it is full. With K = 0 generation for step s begins when the weights after step
s - 1 are in the generators: the synchronous algorithm is this loop, not another.

No group becomes too old for its step, and none is waited for in vain. A group begun on version v is due at step
v + 1 + K. What is kept true before each step s: for every d, at most (d - s + 1) P groups are due at step d or before,
as many as the steps until then take.
  - A group is begun only where (v + K + 2 - s) P are not there yet; it is due last of all.
  - A step takes the oldest that are finished if that keeps it true, else those that are due first, else it waits for
    one that is late. Once all are finished, those that are due first always keep it true.
The oldest weights among the generators count as v, so an episode can only be younger; ``take`` checks it all the same.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from forge_hpc.config import Config
from forge_hpc.data.types import Group, Prompt
from forge_hpc.rollouts.groups import has_signal


class EpisodeBuffer:
    """Lives in the controller's event loop. Steps count from 1; before step s the policy version is s - 1.

    Args:
        prompts_per_step: P.
        max_staleness: K, steps by which the policy that began an episode may be older than the one that trains on it.
        policy_version: of the generators, and the steps done so far.
        position: of the first prompt that no step has taken.
        last_step: no prompt is drawn for later ones.
        counts: whether a group is one of its step's P.
        max_uncounted: a step that is not complete with so many groups that do not count is given up.
        window: w.
        ahead: positions after ``position`` that steps have taken.
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
        window: int = 1,
        ahead: Iterable[int] = (),
    ) -> None:
        self._prompts_per_step = prompts_per_step
        self._max_staleness = max_staleness
        self._version = policy_version
        self._step = policy_version + 1  # the next to be taken
        self._last_step = last_step
        self._counts = counts
        self._max_uncounted = max_uncounted
        self._max_overtaken = (window - 1) * prompts_per_step
        self._end = position  # of what was drawn
        self._ahead = set(ahead)
        self._waiting: dict[int, int] = {}  # drawn and not taken, in order: the oldest policy version of each position
        self._groups: dict[int, Group] = {}  # the finished ones by position, those restored before they are drawn too
        self._uncounted: set[int] = set()  # positions of those that do not count
        self._begun = policy_version * prompts_per_step  # prompts drawn for all steps, without those
        self._num_in_flight = 0
        self._changed = asyncio.Condition()
        self._failure: BaseException | None = None
        self._chosen: list[int] = []
        self.num_overtaken = 0
        """Groups that were late when the last step was taken: it has taken later ones."""
        self.num_stale = 0
        """Episodes left out because they were older than the bound, of the whole run: 0 unless something is wrong."""
        self.waited_s = 0.0
        """So long the last ``take`` had to wait."""

    @property
    def step(self) -> int:
        """The next to be taken."""
        return self._step

    @property
    def position(self) -> int:
        """Of the first prompt that no step has taken; those before it are done with."""
        return next(iter(self._waiting), self._end)

    @property
    def ahead(self) -> list[int]:
        """Positions after it that steps have taken."""
        return sorted(self._ahead)

    @property
    def num_to_draw_again(self) -> int:
        """Prompts that had been drawn when what was restored was saved, and have not been since."""
        return max(0, max(self._groups, default=-1) + 1 - self._end)

    def finished(self) -> list[Group]:
        """All groups that wait, in the order of their positions: what a checkpoint keeps of work done ahead."""
        return [self._groups[position] for position in sorted(self._groups)]

    def metrics(self) -> dict[str, float]:
        """The figures of the last step that was taken."""
        return {
            "time/wait_generator_s": self.waited_s,
            "episodes/stale": self.num_stale,
            "groups/overtaken": self.num_overtaken,
        }

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
        for position in (prompt.position for prompt in prompts):
            self._waiting[position] = self._oldest_version(position)
            self._end = position + 1
        self._num_in_flight += len(missing)
        self._begun += sum(prompt.position not in self._uncounted for prompt in prompts)
        return missing

    def _oldest_version(self, position: int) -> int:
        """Of a group's episodes; of one that begins now, or has none, the generators'."""
        group = self._groups.get(position)
        return min((e.policy_version for e in group.episodes), default=self._version) if group else self._version

    async def put(self, group: Group) -> None:
        """Hand over a finished group of a prompt that was begun."""
        async with self._changed:
            self._add(group)
            self._num_in_flight -= 1
            self._begun -= group.prompt.position in self._uncounted
            self._changed.notify_all()

    def _add(self, group: Group) -> None:
        position = group.prompt.position
        self._groups[position] = group
        if position in self._waiting:  # its first token may have come later than its turn
            self._waiting[position] = max(self._waiting[position], self._oldest_version(position))
        if not self._counts(group):
            self._uncounted.add(position)

    async def take(self) -> list[Group]:
        """Wait for the groups of the next step and take them, in the order of their positions.

        Raises RuntimeError where ``max_uncounted`` do not count and the step is not complete.
        """
        started = time.perf_counter()
        async with self._changed:
            await self._wait_for(self._is_complete)
            self.waited_s = time.perf_counter() - started
            chosen, step = self._chosen, self._step
            groups = [self._groups.pop(position) for position in chosen]
            for position in chosen:
                del self._waiting[position]
            self._uncounted.difference_update(chosen)
            self.num_overtaken = sum(p not in self._groups for p in self._waiting if p < chosen[-1])
            self._ahead = {taken for taken in (*self._ahead, *chosen) if taken > self.position}
            self._step += 1
        for group in groups:
            fresh = [e for e in group.episodes if step - 1 - e.policy_version <= self._max_staleness]
            self.num_stale += len(group.episodes) - len(fresh)
            group.episodes = fresh
        return groups

    def _is_complete(self) -> bool:
        """Whether there are groups that the next step may take: then they are ``_chosen``."""
        num_counted, num_uncounted = len(self._groups) - len(self._uncounted), len(self._uncounted)
        may_give_up = self._max_uncounted is not None and num_uncounted >= self._max_uncounted
        if num_counted < self._prompts_per_step and not may_give_up:
            return False
        for order in (list(self._waiting), sorted(self._waiting, key=lambda p: (self._waiting[p], p))):
            chosen, num_uncounted = self._first_finished(order)
            if len(chosen) - num_uncounted == self._prompts_per_step:
                self._chosen = sorted(chosen)
                if self._keeps_bound(set(chosen)):
                    return True
            elif self._max_uncounted is not None and num_uncounted >= self._max_uncounted:
                raise RuntimeError(
                    f"no learning signal: for step {self._step} {len(chosen)} prompts were drawn, and in the groups "
                    f"of {num_uncounted} all rewards were equal. Is the task too hard or too easy for the model, "
                    "or the reward blind to what differs?"
                )
            else:
                return False
        return False

    def _first_finished(self, order: Sequence[int]) -> tuple[list[int], int]:
        """Positions of finished groups in this order until P count, and how many do not; the one that is late and has
        the first prompt is overtaken by ``_max_overtaken`` in all."""
        late = next((position for position in self._waiting if position not in self._groups), None)
        num_overtaking = 0 if late is None else sum(position > late for position in self._ahead)
        chosen: list[int] = []
        num_uncounted = 0
        for position in order:
            if len(chosen) - num_uncounted == self._prompts_per_step:
                break
            if position not in self._groups:
                continue
            counts = position not in self._uncounted
            if late is not None and position > late:
                if num_overtaking == self._max_overtaken:
                    continue
                num_overtaking += counts
            chosen.append(position)
            num_uncounted += not counts
        return chosen, num_uncounted

    def _keeps_bound(self, chosen: Collection[int]) -> bool:
        """Whether all others can still be taken in time once the next step has taken these."""
        rest = sorted(v for p, v in self._waiting.items() if p not in chosen and p not in self._uncounted)
        # due one after the other, P a step: the i-th at step `step + 1 + i // P`
        return all(
            version + 1 + self._max_staleness >= self._step + 1 + index // self._prompts_per_step
            for index, version in enumerate(rest)
        )

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


def episode_buffer(config: Config, steps_done: int, position: int, ahead: Iterable[int] = ()) -> EpisodeBuffer:
    """The buffer of a run whose ``steps_done`` steps took all prompts before ``position``, and those ``ahead``."""
    a, rollout, last_step = config.algorithm, config.rollout, config.trainer.training.steps
    size, window = rollout.prompts_per_step, rollout.window
    make = partial(EpisodeBuffer, size, rollout.max_staleness, steps_done, position, last_step)
    if not a.dynamic_sampling:
        return make(window=window, ahead=ahead)
    limit = a.max_steps_without_signal * size
    return make(has_signal, limit, window, ahead)
