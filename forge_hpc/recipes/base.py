"""What a recipe is, and what it sees of a run. All that authors need is here; docs/own-recipe.md shows it at work.

A recipe is the algorithm: it says what it needs, and gets a `Session` that has it. It imports no torch, since it is
loaded where runs are submitted.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from forge_hpc.config import Config, UserError
from forge_hpc.config.needs import ModelNeed, Needs
from forge_hpc.config.schema import DataConfig
from forge_hpc.config.user_code import nearest

if TYPE_CHECKING:
    from forge_hpc.controller.service import Service
    from forge_hpc.controller.trainers import Trainers
    from forge_hpc.data.prompts import DocumentStream
    from forge_hpc.data.types import Document, Group
    from forge_hpc.rollouts.stream import RolloutStream

__all__ = ["ModelNeed", "Needs", "NoArgs", "Recipe", "Session"]


@dataclass
class NoArgs:
    """Of a recipe without options."""


class Recipe:
    """An algorithm.

    Example:
        @dataclass
        class Options:
            beta: float = 0.1

        class MyRecipe(Recipe):
            Args = Options

            async def run(self, session):
                ...  # self.args.beta
    """

    Args: ClassVar[type] = NoArgs
    """A dataclass: the options that ``recipe_args`` may have, with their types and defaults."""

    def __init__(self, args: Any) -> None:
        self.args = args

    def needs(self, config: Config) -> Needs:
        """Models, generators, rewards and environments that it needs under ``config``; by default those of RL."""
        return Needs(rewards=config.evaluation.num_prompts > 0)

    def check(self, config: Config) -> None:
        """Raise UserError for what of ``config``, which is valid otherwise, this recipe cannot work with."""

    def renderer(self, tokenizer: Any, data: DataConfig) -> Callable[[Any, str], list[Document]]:
        """What makes documents of examples, for one that learns from them; raises ``BadExample``. By default prompt and
        answer, as SFT learns them. A copy makes those of the next step while a step is trained (``data.ahead``)."""
        from forge_hpc.data.render import DocumentRenderer

        return DocumentRenderer(tokenizer, data)

    async def validate(self, session: Session, documents: Sequence[Document]) -> dict[str, float]:
        """What an evaluation by held-out documents says, where there are no generators beside the trainers. By default
        their loss as SFT has it."""
        return {"loss": await session.trainers.eval_loss(documents)}

    @classmethod
    def check_surface(cls, place: str) -> None:
        """Raise UserError where ``run`` is none, or its module uses what no session has: found where the run is
        submitted, not after a night in the queue."""
        if cls.run is Recipe.run or not inspect.iscoroutinefunction(cls.run):
            raise UserError(f"the recipe {place} has no async run", "write `async def run(self, session)`")
        names = {name for name in (*vars(Session), *Session.__annotations__) if not name.startswith("_")}
        try:
            source = inspect.getsource(sys.modules[cls.__module__])
        except (OSError, TypeError, KeyError):  # it has none: made as it runs
            return
        session = list(inspect.signature(cls.run).parameters)[1:2]  # what it calls it, and its helpers too
        for function in ast.walk(ast.parse(source)):
            if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if not {argument.arg for argument in function.args.args}.intersection(session):
                continue
            for node in ast.walk(function):
                if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)):
                    continue
                if node.value.id in session and node.attr not in names:
                    raise UserError(
                        f"{place}, line {node.lineno}: a session has no {node.attr!r}",
                        nearest(node.attr, names) or f"it has {', '.join(sorted(names))}",
                    )

    async def run(self, session: Session) -> None:
        """The algorithm, from ``session.step`` to the end. After a restart, or the loss of a trainer, called anew."""
        raise NotImplementedError


class Session(Protocol):
    """One attempt at a run, as a recipe sees it."""

    config: Config
    tokenizer: Any
    step: int
    """Optimizer steps done; also the policy version."""
    state: Mapping[str, Any]
    """What the recipe gave to ``end_step`` last; empty in a fresh run."""

    async def start(self) -> None:
        """Start all that the recipe needs. Generators then hold the policy's weights, also those of a resumed run."""

    @property
    def trainers(self) -> Trainers:
        """The models: ``logprobs(documents, model=…)``, and others that change nothing."""

    @property
    def generators(self) -> Service:
        """The vLLM engines: ``generate.route(prompts)``, ``sample.route(prompts, num, sampling, seed)``."""

    def rollouts(self) -> AbstractAsyncContextManager[RolloutStream]:
        """Begin to generate; ``take()`` gives the groups of the next step, each episode with its reward."""

    async def documents(self) -> DocumentStream:
        """The examples of the data as documents, from where ``documents`` of the state says."""

    def remaining_steps(self) -> Iterator[int]:
        """The steps that are still to be done, from 1; none after an evaluation that ends the training."""

    async def train_step(
        self, step: int, documents: Sequence[Document], *, update: bool = True, model: str = "policy"
    ) -> dict[str, float]:
        """One step of a model, with its loss; the figures, ``critic/loss`` of a model called so. Without
        ``update`` it only measures."""

    async def publish(self, step: int) -> None:
        """Bring the policy to the generators, as ``rollout.sync_interval`` and ``rollout.max_staleness`` say."""

    async def end_step(
        self, step: int, metrics: Mapping[str, float], state: Mapping[str, Any], groups: Sequence[Group] = ()
    ) -> None:
        """The step is done: its figures are written, and the run is saved where that is due. ``state`` (JSON) is what
        the recipe needs to go on after it."""

    async def evaluate(self, step: int) -> dict[str, float]:
        """Evaluate the policy after ``step`` as ``evaluation`` says, where that is due; the figures, which are written
        too."""

    def warn(self, text: str) -> None:
        """Show the user a line, on the terminal, in the status and in the log."""

    async def finish(self) -> None:
        """The last save, the export, and an evaluation that has waited for the trainers' GPUs. The generators end
        meanwhile: nothing is asked of them afterwards."""
