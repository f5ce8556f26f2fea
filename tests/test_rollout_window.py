"""Steps that take finished groups before late ones: what must hold whatever finishes when, and whenever a run stops."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import pytest

from forge_hpc.config import Config, UserError, load_config, validate
from forge_hpc.data.builtin import char_tokenizer
from forge_hpc.data.order import LoadedSource
from forge_hpc.data.prompts import PromptStream
from forge_hpc.data.source import load_examples
from forge_hpc.data.types import Completion, Episode, Group, Prompt
from forge_hpc.rollouts.buffer import EpisodeBuffer, episode_buffer
from forge_hpc.rollouts.stream import RolloutStream

P, STEPS = 4, 12
TOKENIZER = char_tokenizer()


def configuration(max_staleness: int, window: int, **options: bool) -> Config:
    config = Config()
    config.data.path, config.data.chat_template = "builtin:addition", False
    config.rollout.prompts_per_step, config.rollout.group_size = P, 2
    config.rollout.max_staleness, config.rollout.window = max_staleness, window
    config.trainer.training.steps = STEPS
    config.algorithm.dynamic_sampling = options.get("dynamic", False)
    config.data.curriculum.enable = options.get("curriculum", False)
    config.data.curriculum.rest_epochs = 3
    return config


DATA = configuration(1, 1).data
SOURCES = [(LoadedSource(load_examples(DATA, DATA.split, 0)[:10], DATA, [0, 0]), 1.0)]
START = [source.state_dict() for source, _ in SOURCES]


def made(prompt: Prompt, version: int) -> Group:
    """Of a third of the prompts all rewards are equal."""
    low = float(prompt.position % 3 == 0)
    completions = [Completion(i, "2", [3], [-0.1], "stop", (version, version)) for i in range(2)]
    return Group(prompt, [Episode(prompt, c, reward) for c, reward in zip(completions, (low, 1.0), strict=True)])


def passes(waiter: Any) -> Any:
    """What a wait gives that is over at once; None where it would go on."""
    try:
        waiter.send(None)
    except StopIteration as end:
        return end.value
    waiter.close()
    return None


@dataclass
class Run:
    """A run whose groups finish, whose weights arrive and whose steps are taken in the order of a die."""

    config: Config
    rng: random.Random
    taken: list[list[Group]] = field(default_factory=list)
    drawn: dict[int, str] = field(default_factory=dict)
    num_stops: int = 0

    def start(self, saved: str | None) -> None:
        state = json.loads(saved) if saved else {}
        for (source, _), start in zip(SOURCES, START, strict=True):
            source.load_state_dict(start)
        self.prompts = PromptStream(SOURCES, TOKENIZER, self.config)
        if state:
            self.prompts.load_state_dict(state["prompts"])
        self.buffer = episode_buffer(self.config, len(self.taken), self.prompts.position, self.prompts.ahead)
        self.buffer.restore(self.finished if saved else [], state)
        self.version = len(self.taken)
        self.in_flight: list[tuple[Prompt, int]] = []
        self.num_together = self.rng.choice([2, 5, 100])  # so many prompts are generated at once

    def stop(self) -> None:
        """Save after the last step, and come back with what is saved."""
        prompts = self.prompts.state_after(self.buffer.position - 1, self.buffer.ahead)
        saved = json.dumps({"prompts": prompts} | self.buffer.state_dict())
        self.finished = self.buffer.finished()
        self.num_stops += 1
        self.start(saved)

    async def play(self, share_of_stops: float) -> None:
        self.start(None)
        moves = (self.begin, self.finish, self.take, self.load)
        while len(self.taken) < STEPS:
            moved = [await move() for move in moves if self.rng.random() < 0.7]
            assert any(moved) or any([await move() for move in moves]), "it stands still"
            if self.taken and self.rng.random() < share_of_stops:
                self.stop()

    async def begin(self) -> bool:
        if (room := passes(self.buffer.room())) is None:
            return False
        room = min(room, self.buffer.num_to_draw_again or max(0, self.num_together - len(self.in_flight)))
        prompts = self.prompts.draw(room)
        for prompt in prompts:
            assert self.drawn.setdefault(prompt.position, prompt.text) == prompt.text, "another prompt at this position"
        self.in_flight += [(prompt, self.version) for prompt in self.buffer.begin(prompts)]
        return room > 0

    async def finish(self) -> bool:
        if not self.in_flight:
            return False
        prompt, version = self.in_flight.pop(self.rng.randrange(len(self.in_flight)))
        await self.buffer.put(made(prompt, version))
        return True

    async def take(self) -> bool:
        groups = passes(self.buffer.take())
        if groups is None:
            return False
        self.prompts.report(groups)
        self.taken.append(groups)
        return True

    async def load(self) -> bool:
        if self.version == len(self.taken):
            return False
        self.version = self.rng.randint(self.version + 1, len(self.taken))
        await self.buffer.weights_loaded(self.version)
        return True

    @property
    def positions(self) -> list[list[int]]:
        return [[group.prompt.position for group in groups] for groups in self.taken]


def runs(max_staleness: int, window: int, num: int, share_of_stops: float, **options: bool) -> Iterator[Run]:
    for seed in range(num):
        run = Run(configuration(max_staleness, window, **options), random.Random(f"{max_staleness} {window} {seed}"))
        asyncio.run(run.play(share_of_stops))
        yield run


BOUNDS = [(1, 1), (1, 2), (2, 2), (2, 3), (4, 5)]


@pytest.mark.parametrize("share_of_stops", [0.0, 0.1])
@pytest.mark.parametrize(("max_staleness", "window"), BOUNDS)
def test_whatever_finishes_when_no_episode_is_too_old_and_each_prompt_is_trained_on_once(
    max_staleness: int, window: int, share_of_stops: float
) -> None:
    overtaking = num_stops = 0
    for run in runs(max_staleness, window, 30, share_of_stops):
        assert all(len(groups) == P for groups in run.taken)
        assert sorted(chain(*run.positions)) == list(range(STEPS * P))
        assert run.buffer.num_stale == 0
        for step, groups in enumerate(run.taken, 1):
            assert all(step - 1 - e.policy_version <= max_staleness for group in groups for e in group.episodes)
        order = list(chain(*run.positions))
        for place, position in enumerate(order):
            overtakers = sum(other > position for other in order[: place - place % P])
            assert overtakers <= (window - 1) * P
            overtaking += overtakers
        num_stops += run.num_stops
    assert (overtaking > 0) == (window > 1)
    assert (num_stops > 0) == (share_of_stops > 0)


@pytest.mark.parametrize(("max_staleness", "window"), [(2, 1), (2, 3)])
def test_a_curriculum_draws_the_same_prompts_whatever_finishes_when_and_whenever_the_run_stops(
    max_staleness: int, window: int
) -> None:
    drawn = [run.drawn for run in runs(max_staleness, window, 12, 0.1, curriculum=True)]
    texts = [[run[position] for position in range(STEPS * P)] for run in drawn]
    assert all(other == texts[0] for other in texts)
    without = next(runs(max_staleness, window, 1, 0.0)).drawn
    assert texts[0] != [without[position] for position in range(STEPS * P)]


@pytest.mark.parametrize(("max_staleness", "window"), [(1, 1), (2, 3)])
def test_dynamic_sampling_takes_as_many_groups_with_a_signal_as_ever(max_staleness: int, window: int) -> None:
    for run in runs(max_staleness, window, 20, 0.05, dynamic=True):
        taken = list(chain(*run.positions))
        assert len(set(taken)) == len(taken)
        assert run.buffer.num_stale == 0
        for positions in run.positions:
            assert sum(position % 3 != 0 for position in positions) == P


def strict_order(counts: Callable[[int], bool]) -> list[list[int]]:
    """The next P that count, and those between them."""
    steps, position = [], 0
    for _ in range(STEPS):
        step: list[int] = []
        while sum(map(counts, step)) < P:
            step.append(position)
            position += 1
        steps.append(step)
    return steps


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("max_staleness", [0, 1, 3])
def test_a_window_of_one_step_is_the_strict_order(max_staleness: int, dynamic: bool) -> None:
    expected = strict_order((lambda position: position % 3 != 0) if dynamic else (lambda position: True))
    for run in runs(max_staleness, 1, 20, 0.05, dynamic=dynamic):
        assert run.positions == expected


def test_a_late_group_is_overtaken_until_the_window_or_its_age_stops_that() -> None:
    async def scenario(window: int, max_staleness: int) -> list[int]:
        buffer = EpisodeBuffer(2, max_staleness, 0, 0, last_step=20, window=window)
        late, end, overtaken = 0, 0, []
        for version in range(20):
            begun = [Prompt(p, "1+1=", [1], "2") for p in range(end, end + 2 + (version == 0))]
            end = begun[-1].position + 1
            for prompt in buffer.begin(begun):
                if prompt.position != late:
                    await buffer.put(made(prompt, version))
            take = asyncio.ensure_future(buffer.take())
            for _ in range(3):
                await asyncio.sleep(0)
            if not take.done():
                take.cancel()
                return overtaken
            overtaken.append(buffer.num_overtaken)
            await buffer.weights_loaded(version + 1)
        return overtaken

    assert asyncio.run(scenario(1, 4)) == []
    assert asyncio.run(scenario(2, 4)) == [1]
    assert asyncio.run(scenario(3, 4)) == [1, 1]
    assert asyncio.run(scenario(9, 4)) == [1, 1, 1, 1]  # due at step 5


class Samples:
    """Generators that are done with their next prompt when they are told."""

    def __init__(self) -> None:
        self.gates: list[asyncio.Event] = []
        self.num_done = self.num_serving = 0
        self.admitted = asyncio.Event()

    async def sample(self, prompts: list[Prompt], key: int | None) -> Any:
        self.gates.append(gate := asyncio.Event())
        await gate.wait()
        for index in range(2 * len(prompts)):
            yield divmod(index, 2), Completion(index % 2, "2", [3], [-0.1], "stop", (0, 0))

    async def admission(self) -> None:
        await self.admitted.wait()
        self.admitted.clear()

    def end_one(self) -> None:
        self.gates[self.num_done].set()
        self.num_done += 1

    async def begun(self) -> int:
        """Prompts, once no more are begun."""
        for _ in range(200):
            await asyncio.sleep(0)
        return len(self.gates)


def play_samples(config: Config, scenario: Callable[[Samples], Any]) -> None:
    class Rewards:
        async def score(self, prompt: Prompt, completion: Completion) -> tuple[float, dict[str, float]]:
            return 1.0, {}

    async def run() -> None:
        for (source, _), start in zip(SOURCES, START, strict=True):
            source.load_state_dict(start)
        generators = Samples()
        generators.num_serving = 1
        prompts, buffer = PromptStream(SOURCES, TOKENIZER, config), episode_buffer(config, 0, 0)
        given: Any = (generators.sample, 1, Rewards(), buffer, lambda text: None)
        serving = {"num_serving": lambda: generators.num_serving, "admission": generators.admission}
        stream = RolloutStream(config, prompts, *given, **serving)
        running = asyncio.create_task(stream.run())
        try:
            await scenario(generators)
        finally:
            running.cancel()
            await asyncio.wait({running})

    asyncio.run(run())


def places(max_staleness: int, window: int) -> Config:
    """A prompt of two samples has places in a generator, and two more wait there."""
    config = configuration(max_staleness, window)
    config.generator.engine.max_num_seqs, config.rollout.group_size = 2, 2
    return config


@pytest.mark.parametrize("window", [1, 2])
def test_a_prompt_is_begun_when_a_generator_has_places_for_its_samples(window: int) -> None:
    """So that it begins on the newest weights, and may take the longer; one that comes gets what waits, at once."""

    async def scenario(generators: Samples) -> None:
        assert await generators.begun() == 3
        generators.end_one()
        assert await generators.begun() == 4
        generators.num_serving = 2
        generators.admitted.set()
        assert await generators.begun() == 7
        generators.num_serving = 1  # the calls of a lost one go to the other, which has too many now
        for _ in range(3):
            generators.end_one()
            assert await generators.begun() == 7
        for number in range(3):
            generators.end_one()
            assert await generators.begun() == 8 + number
        generators.num_serving = 0
        for _ in range(3):
            generators.end_one()
        assert await generators.begun() == 10
        generators.num_serving = 5
        generators.admitted.set()
        assert await generators.begun() == 12  # (2 + 1) steps of 4 prompts in all

    play_samples(places(2, window), scenario)


def test_episodes_of_an_environment_leave_their_places_while_it_is_its_turn() -> None:
    config = places(2, 1)
    config.environment.name = "guessing"

    async def scenario(generators: Samples) -> None:
        assert await generators.begun() == 12

    play_samples(config, scenario)


def test_a_window_that_the_staleness_bound_does_not_leave_is_refused() -> None:
    options = ["model.path=builtin:qwen3-tiny", "rollout.max_staleness=1"]
    validate(load_config(None, [*options, "rollout.window=2"]))
    with pytest.raises(UserError, match=r"rollout\.window=3 lets a late group be overtaken for 2 steps") as refused:
        validate(load_config(None, [*options, "rollout.window=3"]))
    assert refused.value.hint == "set rollout.window to 2 or less, or raise rollout.max_staleness"
    with pytest.raises(UserError, match=r"rollout\.max_staleness=0"):
        validate(load_config(None, [*options, "rollout.max_staleness=0", "rollout.window=2"]))
