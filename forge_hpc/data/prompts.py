"""Streams of prompts (RL) and documents (SFT) in a seeded order, whose position can be saved and restored."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, Generic, Self, TypeVar

import numpy as np

from forge_hpc.config.errors import UserError
from forge_hpc.config.schema import Config, DataConfig
from forge_hpc.config.sources import MAX_SETS, data_sources, run_sources
from forge_hpc.data.ahead import AheadSource, Made, Workers
from forge_hpc.data.bad import BadExample, BadExamples
from forge_hpc.data.curriculum import Curriculum
from forge_hpc.data.examples import Example
from forge_hpc.data.fields import to_json
from forge_hpc.data.mixture import Mixture
from forge_hpc.data.order import Drawn, Source
from forge_hpc.data.render import DocumentRenderer, PromptRenderer
from forge_hpc.data.types import HELD_OUT, Document, Group, Prompt

T = TypeVar("T", Prompt, Document)
_SET_SIZE = HELD_OUT // MAX_SETS
"""Positions of a held-out set: all sets lie between ``HELD_OUT`` and twice that."""
Renderer = Callable[[Any, DataConfig], Callable[[Example | BadExample, str], list[Document]]]
"""From a tokenizer and a source of data to what makes documents of its examples, each of which it is told the place of:
``render.DocumentRenderer``, ``pairs.PairRenderer``."""


class _Stream(ABC, Generic[T]):
    """An endless stream over a mixture of sources. Items that are too long or bad are left out and counted; the next
    one is taken from the same source, so that the weights are the shares of what the stream yields."""

    limit: str
    """The key that says what is too long, and its value."""

    def __init__(self, sources: Sequence[tuple[Source, float]], config: Config) -> None:
        runs = run_sources(config)
        shares = [(run.share, len(data_sources(run.config.data))) for run in runs]
        self._mixture = Mixture(sources, config.seed, shares)
        self._runs = [run for run, (_, num) in zip(runs, shares, strict=True) for _ in range(num)]
        """Of each of ``sources`` that of the run which it belongs to."""
        self._curriculum = Curriculum(config)
        self.position = 0
        """Items yielded so far."""
        self.num_too_long = 0
        """Items left out so far because they were too long."""
        self._bad = [BadExamples() for _ in sources]
        self._last = 0  # number of the source that the last example came from
        self._waiting: list[T] = []  # what else was made of it

    @abstractmethod
    def _make(self, number: int, drawn: Drawn, where: str) -> list[T]:
        """What the stream yields for an example of source ``number``, at least one item.

        Raises:
            BadExample: nothing can be made of it.
        """

    @abstractmethod
    def _fitting(self, made: list[T]) -> list[list[T]]:
        """What is not too long, by what stays together."""

    @abstractmethod
    def metrics(self) -> dict[str, float]:
        """What was left out so far, by the keys of a step's figures."""

    @property
    def num_bad(self) -> int:
        """Items left out so far because they were bad."""
        return sum(bad.num_bad for bad in self._bad)

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._waiting:
            self.position += 1
            return self._waiting.pop(0)
        number = next(self._mixture)
        source = self._mixture.sources[number]
        self._curriculum.count_rewards(self.position)
        # A whole epoch lies in here, wherever it begins, in which no prompt rests.
        last_epoch = source.epoch + 1 + self._curriculum.longest_rest
        bad: BadExample | None = None
        while source.epoch <= last_epoch:
            drawn = next(source)
            if self._curriculum.is_resting(number, drawn.index, drawn.epoch):
                continue
            try:
                made = self._make(number, drawn, _place(source, drawn))
            except BadExample as error:
                bad = error
                self._bad[number].count(bad)
                continue
            self._bad[number].count()
            fitting = [item for unit in self._fitting(made) for item in unit]
            self.num_too_long += len(made) - len(fitting)
            if fitting:
                self._curriculum.drawn(self.position, number, drawn.index, drawn.epoch)
                self.position += 1
                self._last, self._waiting = number, fitting[1:]
                return fitting[0]
        raise _nothing_left(f"{source.data.path}: every example", self.limit, bad)

    def take(self, count: int) -> list[T]:
        """The next ``count`` items."""
        return [next(self) for _ in range(count)]

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands. JSON can hold it."""
        return {
            "position": self.position,
            "num_too_long": self.num_too_long,
            "bad": [bad.state_dict() for bad in self._bad],
            "last": self._last,
            "waiting": len(self._waiting),
            "mixture": self._mixture.state_dict(),
            "curriculum": self._curriculum.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> Self:
        """Go on where the saved stream stood. Raises UserError where the data or the seed is not the one saved."""
        self._mixture.load_state_dict(state["mixture"])
        self._curriculum.load_state_dict(state["curriculum"])
        self.position = state["position"]
        self.num_too_long = state["num_too_long"]
        for bad, saved in zip(self._bad, state.get("bad", []), strict=False):
            bad.load_state_dict(saved)
        self._last = state.get("last", 0)
        if waiting := state.get("waiting", 0):
            made = self._make(self._last, self._mixture.sources[self._last].again(), "data")
            self._waiting = [item for unit in self._fitting(made) for item in unit][-waiting:]
        return self


class PromptStream(_Stream[Prompt]):
    """An endless stream of prompts in a deterministic order.

    Example:
        stream = PromptStream(open_sources(config), tokenizer, config)
        prompts = stream.take(32)
        state = stream.state_dict()     # another stream that loads it goes on with the 33rd
        ahead = stream.draw(64)         # of steps to come, 32 each
        stream.report(groups)           # the rewards of the first 32, for the curriculum
        state = stream.state_after(63)  # what to save after the step that trained on them, wherever the stream is
    """

    def __init__(self, sources: Sequence[tuple[Source, float]], tokenizer: Any, config: Config) -> None:
        super().__init__(sources, config)
        self._renderers = [PromptRenderer(tokenizer, source.data) for source, _ in sources]
        self._max_tokens = config.rollout.max_prompt_tokens
        # A step takes so many prompts in order, or with dynamic sampling as many as it needs, or where late ones may be
        # overtaken any: then what is done with may end after any of them.
        self._num_drawn = 0
        ends_anywhere = config.algorithm.dynamic_sampling or config.rollout.window > 1
        self._step_size = 1 if ends_anywhere else config.rollout.prompts_per_step
        self.ahead: set[int] = set()
        """Positions to come that steps have been trained on before: ``draw`` leaves them out."""
        self._states: dict[int, dict[str, Any]] = {}  # by position of a prompt that may be the last of its step
        self.limit = f"rollout.max_prompt_tokens={self._max_tokens}"

    def draw(self, num: int) -> list[Prompt]:
        """The next prompts, ahead of the steps that train on them: ``state_after`` is told of their steps' ends.

        A stream that draws begins with the first prompt of a step, or was loaded where one ended.
        """
        prompts: list[Prompt] = []
        if not self._states:
            self._states[self.position - 1] = self.state_dict()
        while len(prompts) < num:
            prompt = next(self)
            if prompt.position not in self.ahead:
                prompts.append(prompt)
                self._num_drawn += 1
            if self._num_drawn % self._step_size == 0:
                self._states[prompt.position] = self.state_dict()
        return prompts

    def state_after(self, position: int, ahead: Sequence[int] = ()) -> dict[str, Any]:
        """Where the stream stood after the prompt at ``position``, the last of a step, with the rewards reported since:
        what goes on exactly. Those of earlier steps are forgotten.

        Args:
            ahead: later positions that are done with too.

        Raises KeyError where ``position`` was not drawn, or no step can end there.
        """
        state = self._states[position]
        self._states = {end: later for end, later in self._states.items() if end >= position}
        state = {**state, "curriculum": self._curriculum.with_rewards(state["curriculum"], ahead)}
        return state | ({"ahead": list(ahead)} if ahead else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> Self:
        self.ahead = set(state.get("ahead", ()))
        if self.ahead:
            self._step_size = 1
        return super().load_state_dict(state)

    def metrics(self) -> dict[str, float]:
        return {"prompts/too_long": self.num_too_long, "prompts/bad": self.num_bad}

    def _fitting(self, made: list[Prompt]) -> list[list[Prompt]]:
        return [[prompt] for prompt in made if len(prompt.token_ids) <= self._max_tokens]

    def _make(self, number: int, drawn: Drawn, where: str) -> list[Prompt]:
        assert self.position < HELD_OUT, "the positions from here on are those of held-out prompts"
        prompt = self._renderers[number](drawn.example, self.position, where)
        run = self._runs[number]
        prompt.source = run.name
        if not prompt.question.strip() and run.config.environment.name is None:  # which opens the episode itself
            raise BadExample(f"{where}: the prompt is empty", "leave the example out")
        try:
            to_json(prompt.fields)  # a checkpoint holds rollouts that are finished ahead, with the fields
        except TypeError as error:
            raise BadExample(f"{where}: a field holds {error}", "leave the field out of the data") from None
        return [prompt]

    def report(self, groups: Iterable[Group]) -> None:
        """The rewards of prompts that were drawn. Report those of a step before its weights are published."""
        for group in groups:
            if group.episodes:
                reward = float(np.mean([episode.reward for episode in group.episodes]))
                self._curriculum.report(group.prompt.position, reward)


class DocumentStream(_Stream[Document]):
    """An endless stream of documents, of SFT unless a ``renderer`` makes others. What is longer than
    ``trainer.training.seq_len`` fits no row: a document, or all those of a group.

    Args:
        ahead: make those of the next step while the caller is at one: ``make_ahead``. To be closed then.
        num_processes: that do so, as ``Workers`` has it.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Source, float]],
        tokenizer: Any,
        config: Config,
        renderer: Renderer = DocumentRenderer,
        *,
        ahead: bool = False,
        num_processes: int | None = None,
    ) -> None:
        self._renderers = [renderer(tokenizer, source.data) for source, _ in sources]
        self._workers = Workers(self._renderers, num_processes) if ahead else None
        self._ahead = [AheadSource(source, partial(self._begin, i)) for i, (source, _) in enumerate(sources) if ahead]
        weights = [weight for _, weight in sources]
        super().__init__([*zip(self._ahead, weights, strict=True)] if ahead else sources, config)
        self._seq_len = config.trainer.training.seq_len
        self.limit = f"trainer.training.seq_len={self._seq_len}"

    def make_ahead(self, count: int) -> None:
        """Begin to make the next ``count`` documents, or of as many examples as were taken since the last time."""
        for source in self._ahead:
            source.draw_ahead(math.ceil(count / len(self._ahead)))

    def take(self, count: int) -> list[Document]:
        """The next ``count`` documents. Those after them are begun, where this stream makes them ahead."""
        if not any(source.is_ahead for source in self._ahead):
            self.make_ahead(count)
        documents = super().take(count)
        self.make_ahead(count)
        return documents

    def close(self) -> None:
        """End what makes documents ahead."""
        if self._workers is not None:
            self._workers.close()

    def metrics(self) -> dict[str, float]:
        return {"examples/too_long": self.num_too_long, "examples/bad": self.num_bad}

    def _fitting(self, made: list[Document]) -> list[list[Document]]:
        return _fitting_a_row(made, self._seq_len)

    def _make(self, number: int, drawn: Drawn, where: str) -> list[Document]:
        if self._workers is None:
            documents = self._renderers[number](drawn.example, where)
        else:
            begun = self._ahead[number].begun(drawn)
            documents = self._workers.finish(number, drawn.example, where, begun)
        return _numbered(documents, self.position)

    def _begin(self, number: int, drawn: Drawn) -> Future[Made] | None:
        assert self._workers is not None
        return self._workers.begin(number, drawn.example, _place(self._ahead[number], drawn))


def _place(source: Source, drawn: Drawn) -> str:
    return f"{source.data.path}, example {drawn.index}"


def evaluation_prompts(
    examples: Iterable[Example | BadExample], tokenizer: Any, config: Config, num_prompts: int, set_number: int = 0
) -> list[Prompt]:
    """The first ``num_prompts`` examples as prompts, in the order of the data; too long and bad ones are left out.

    Positions count from ``HELD_OUT``, those of each further set from a place of its own: they are the same in every
    start, and no prompt of training has them.

    Raises UserError where none is left, or most are bad.
    """
    render, max_tokens = PromptRenderer(tokenizer, config.data), config.rollout.max_prompt_tokens

    def make(example: Example | BadExample, where: str) -> list[list[Prompt]]:
        prompt = render(example, 0, where)
        return [[prompt]] if len(prompt.token_ids) <= max_tokens else []

    prompts = _first(examples, make, f"rollout.max_prompt_tokens={max_tokens}", num_prompts)
    for position, prompt in enumerate(prompts, HELD_OUT + set_number * _SET_SIZE):
        prompt.position = position
    return prompts


def evaluation_documents(
    examples: Iterable[Example | BadExample],
    tokenizer: Any,
    config: Config,
    num_documents: int,
    renderer: Renderer = DocumentRenderer,
    set_number: int = 0,
) -> list[Document]:
    """The first ``num_documents`` examples as documents, in the order of the data; too long and bad ones are left out.
    Those of a group, a pair, count as one; no two sets have a group in common.

    Raises UserError where none is left, or most are bad.
    """
    render, seq_len = renderer(tokenizer, config.data), config.trainer.training.seq_len
    numbers = itertools.count(set_number * _SET_SIZE)

    def make(example: Example | BadExample, where: str) -> list[list[Document]]:
        return _fitting_a_row(_numbered(render(example, where), next(numbers)), seq_len)

    return _first(examples, make, f"trainer.training.seq_len={seq_len}", num_documents)


def _numbered(made: list[Document], number: int) -> list[Document]:
    """Documents that belong together have a group of their own."""
    for document in made:
        if document.group is not None:
            document.group = number
    return made


def _fitting_a_row(made: list[Document], seq_len: int) -> list[list[Document]]:
    units = [made] if made[0].group is not None else [[document] for document in made]
    return [unit for unit in units if sum(len(document.token_ids) for document in unit) <= seq_len]


def _first(
    examples: Iterable[Example | BadExample],
    make: Callable[[Example | BadExample, str], list[list[T]]],
    limit: str,
    wanted: int,
) -> list[T]:
    found: list[list[T]] = []
    bad = BadExamples()
    for index, example in enumerate(examples):
        if len(found) >= wanted:
            break
        try:
            made = make(example, f"held-out example {index}")
        except BadExample as error:
            bad.count(error)
            continue
        bad.count()
        found += made
    if wanted and not found:
        raise _nothing_left("every held-out example", limit, bad.last)
    return [item for unit in found[:wanted] for item in unit]


def _nothing_left(what: str, limit: str, bad: BadExample | None) -> UserError:
    if bad is None:
        return UserError(f"{what} is longer than {limit}", "raise it")
    return UserError(f"{what} is bad, or longer than {limit}; the last bad one: {bad.message}", bad.hint)
