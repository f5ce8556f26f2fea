"""What a recipe works with: the configuration, the trainers, the generators, the weights between them, the records.

A recipe gets a Session and writes the algorithm; everything about processes, files and deadlines is here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO, TypeVar

from forge_hpc.actors.buffer import EpisodeBuffer
from forge_hpc.actors.generator import Generator
from forge_hpc.actors.service import Service
from forge_hpc.actors.trainer import Trainer
from forge_hpc.checkpoint import CheckpointStore
from forge_hpc.cluster.meshes import Cluster
from forge_hpc.config import Config
from forge_hpc.data.hub import load_tokenizer, resolve_model
from forge_hpc.data.prompts import evaluation_prompts
from forge_hpc.data.source import load_eval_examples
from forge_hpc.data.types import Completion, Document, Group, Prompt
from forge_hpc.observability.logger import MetricLogger
from forge_hpc.run_dir import RunDir
from forge_hpc.weights import WeightStore

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Trainers:
    """The training mesh as one: calls go to all ranks, results are those of rank 0 (they are equal)."""

    def __init__(self, mesh: Any, timeout_s: float) -> None:
        self._mesh = mesh
        self.timeout_s = timeout_s

    async def call(self, endpoint: str, *args: Any, timeout_s: float | None = None) -> Any:
        """Call an endpoint on every rank. Raises TimeoutError, or the first rank's error."""
        timeout_s = timeout_s or self.timeout_s
        try:
            results = await asyncio.wait_for(getattr(self._mesh, endpoint).call(*args), timeout_s)
        except TimeoutError:
            raise TimeoutError(f"the trainers did not finish {endpoint}() within {timeout_s:.0f} s") from None
        return next(value for _, value in results)

    async def train_step(self, documents: Sequence[Document]) -> dict[str, float]:
        """One optimizer step; its metrics."""
        return await self.call("train_step", documents)


class WeightSync:
    """Brings each policy version from the trainers to all generators, beside the training where staleness allows."""

    def __init__(self, trainers: Trainers, store: WeightStore, generators: Service, buffer: EpisodeBuffer) -> None:
        self._trainers = trainers
        self._store = store
        self._generators = generators
        self._buffer = buffer
        self._delivery: asyncio.Task[None] | None = None
        self.seconds = 0.0
        """Duration of the last delivery that has finished, from the snapshot to the last generator."""

    async def publish(self, version: int) -> None:
        """Snapshot the trainers' weights and begin to deliver them. Training may go on when this returns."""
        await self.delivered()
        start = time.perf_counter()
        await self._trainers.call("publish", self._store.spec, version)
        self._delivery = asyncio.create_task(self._deliver(version, start))

    async def delivered(self) -> None:
        """Wait until all generators hold the version published last. Raises what went wrong on the way."""
        if self._delivery is not None:
            await self._delivery

    async def _deliver(self, version: int, start: float) -> None:
        try:
            await self._trainers.call("published")
            await with_timeout(self._store.commit(version), self._trainers.timeout_s, "the weights were not committed")
            await self._generators.load.fanout(self._store.spec, version)
        except Exception as error:  # the loops may be waiting for these weights and for nothing else
            await self._buffer.fail(error)
            raise
        self.seconds = time.perf_counter() - start
        await self._buffer.weights_loaded(version)


class Session:
    """One start of a run, from the controller's side."""

    def __init__(self, config: Config, run_dir: RunDir, log_dir: Path, cluster: Cluster) -> None:
        self.config = config
        self.run_dir = run_dir
        self.log_dir = log_dir
        self.cluster = cluster
        self.checkpoints = CheckpointStore(run_dir, config.checkpoint.keep)
        self.step = 0
        """Optimizer steps done; also the policy version."""
        self.state: dict[str, Any] = {}
        """The recipe's state as of ``step``, from the checkpoint; empty in a fresh run."""
        self._resume_from: Path | None = None
        self._saving: asyncio.Task[None] | None = None
        self._closing: list[Callable[[], Awaitable[Any]]] = []
        self._step_ended = time.perf_counter()
        self._checkpoint_s = 0.0

    async def prepare(self) -> None:
        """Find the model and the newest checkpoint. Blocking work goes to threads."""
        config = self.config
        if config.model.path == "warmstart":
            self.model_dir = RunDir(self.run_dir.warmstart).export
        else:
            self.model_dir = await asyncio.to_thread(
                resolve_model, config.model.path, config.seed, self.run_dir.path / "model"
            )
        self.tokenizer = await asyncio.to_thread(load_tokenizer, self.model_dir)
        found = await asyncio.to_thread(self.checkpoints.newest)
        if found is not None:
            self._resume_from, state = found
            self.step, self.state = state["step"], state["recipe"]
            logger.info("resuming after step %d from %s", self.step, self._resume_from)

    def open_records(self, stream: TextIO) -> MetricLogger:
        """The run's figures from where ``prepare`` found it, with progress on ``stream``; a context manager."""
        config = self.config
        self.metrics = MetricLogger(
            self.run_dir,
            config.logging,
            self.step,
            total_steps=config.trainer.training.steps,
            label=config.recipe,
            stream=stream,
        )
        return self.metrics

    # ---- actors

    async def start_trainers(self) -> Trainers:
        """Spawn the trainers and load their weights."""
        config, timeout_s = self.config, self.config.cluster.start_timeout_s
        self._trainer_procs = procs = self.cluster.spawn_trainers()
        mesh = procs.spawn("trainer", Trainer, config, self.log_dir)
        self.trainers = Trainers(mesh, config.trainer.timeout_s)
        file_store = self.log_dir / "process-group"
        checkpoint = self._resume_from / "trainer" if self._resume_from else None
        await self.trainers.call("start", self.model_dir, file_store, checkpoint, timeout_s=timeout_s)
        self.on_close(lambda: self.trainers.call("leave", timeout_s=10))
        return self.trainers

    async def start_generators(self, model_dir: Path | None = None) -> Service:
        """Spawn the generators on the weights of ``model_dir``, by default those that the run starts from."""
        replicas = [
            procs.spawn(f"generator{index}", Generator, self.config, index, self.log_dir)
            for index, procs in enumerate(self.cluster.spawn_generators())
        ]
        self.generators = Service("generator", replicas, self.config.generator.timeout_s)
        start = self.generators.start.fanout(model_dir or self.model_dir)
        await with_timeout(start, self.config.cluster.start_timeout_s, "the generators did not start")
        self.on_close(lambda: asyncio.wait_for(self.generators.leave.fanout(), 10))
        return self.generators

    async def start_trainers_and_generators(self) -> tuple[Trainers, Service]:
        """Both at once: their start-up is most of the time before the first step."""
        async with asyncio.TaskGroup() as tasks:
            trainers = tasks.create_task(self.start_trainers())
            generators = tasks.create_task(self.start_generators())
        return trainers.result(), generators.result()

    async def connect(self, trainers: Trainers, generators: Service, buffer: EpisodeBuffer) -> WeightSync:
        """Put the weight store between trainers and generators; a resumed run brings the generators up to date."""
        start = WeightStore.start(self.cluster.spawn_volumes(), self.cluster.placement.trainer_procs)
        store = await with_timeout(start, self.config.cluster.start_timeout_s, "the weight store did not start")
        weights = WeightSync(trainers, store, generators, buffer)
        if self.step > 0:
            await weights.publish(self.step)
            await weights.delivered()
        self.weights = weights
        return weights

    # ---- steps

    def remaining_steps(self) -> Iterator[int]:
        """The steps that are still to be done, from 1. The first one's time counts from here."""
        self._step_ended = time.perf_counter()
        return iter(range(self.step + 1, self.config.trainer.training.steps + 1))

    def record(self, step: int, metrics: Mapping[str, float], groups: Sequence[Group] = ()) -> None:
        """Write the figures of a step that is done, and a sample of its rollouts."""
        now = time.perf_counter()
        timing = {"time/step_s": now - self._step_ended, "time/checkpoint_s": self._checkpoint_s}
        self._step_ended, self._checkpoint_s = now, 0.0
        self.step = step
        self.metrics.log(step, {"policy_version": step, **metrics, **timing})
        self.run_dir.write_status(step=step, policy_version=step)
        if groups:
            self.metrics.log_rollouts(step, groups)

    async def save_if_due(self, step: int, state: Mapping[str, Any]) -> None:
        """Save the run at the last step and every ``checkpoint.interval`` steps.

        Call it last in a step: what was recorded before is on disk when the checkpoint is. ``state`` is what the recipe
        needs to go on after the step; JSON.
        """
        interval = self.config.checkpoint.interval
        if step == self.config.trainer.training.steps or (interval and step % interval == 0):
            start = time.perf_counter()
            await self.save(step, state)
            self._checkpoint_s = time.perf_counter() - start

    async def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Save the run as of ``step``. Training waits while the trainers stage their state, not for the disk."""
        await self.saved()
        directory = await asyncio.to_thread(self.checkpoints.begin, step)
        await self.trainers.call("save", directory / "trainer")
        record = {"step": step, "policy_version": step, "recipe": dict(state)}

        async def commit() -> None:
            await self.trainers.call("saved")
            await asyncio.to_thread(self.checkpoints.commit, step, record)

        self._saving = asyncio.create_task(commit())

    async def saved(self) -> None:
        """Wait until the save that runs beside the training is complete."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            await saving

    async def validation_loss(self, documents: Sequence[Document]) -> dict[str, float]:
        """Mean loss of the policy on held-out documents, to log as an evaluation; nothing where there are none."""
        if not documents:
            return {}
        start = time.perf_counter()
        loss = await self.trainers.call("eval_loss", documents)
        self._step_ended = time.perf_counter()
        return {"loss": loss, "num_documents": len(documents), "time_s": self._step_ended - start}

    async def evaluate(
        self, step: int, prompts: Sequence[Prompt], rewards: Any, more: Mapping[str, float] | None = None
    ) -> None:
        """Greedy accuracy of the policy after ``step`` on held-out prompts, over all generators.

        ``more`` is logged with it: a step has one evaluation.
        """
        from forge_hpc.rewards import RewardError

        if not prompts:
            return
        start = time.perf_counter()
        num = len(self.generators)
        shares = [prompts[replica::num] for replica in range(num) if prompts[replica::num]]
        answers = await asyncio.gather(
            *(self.generators.generate.route(share, True, key=replica) for replica, share in enumerate(shares))
        )

        async def correct(prompt: Prompt, completions: list[Completion] | ValueError) -> bool:
            if isinstance(completions, ValueError):
                return False
            try:
                total, _ = await rewards.score(prompt, completions[0])
            except RewardError:
                return False
            return total >= sum(reward.weight for reward in self.config.reward) - 1e-6

        pairs = [
            pair for share, answer in zip(shares, answers, strict=True) for pair in zip(share, answer, strict=True)
        ]
        right = await asyncio.gather(*(correct(prompt, completions) for prompt, completions in pairs))
        values = {"accuracy": sum(right) / len(right), "num_prompts": len(right), "time_s": time.perf_counter() - start}
        self.metrics.log_evaluation(step, {**(more or {}), **values})
        self._step_ended = time.perf_counter()

    async def finish(self) -> None:
        """The run is done: wait for the last save and write the final weights."""
        await self.saved()
        await self.trainers.call("export", self.run_dir.export)

    def on_close(self, close: Callable[[], Awaitable[Any]]) -> None:
        """Have ``close`` called at the end, whatever it is; the last one registered first."""
        self._closing.append(close)

    async def stop_trainers(self) -> None:
        """End the trainers' processes: SFT evaluates on the hardware that they held."""
        await with_timeout(self._trainer_procs.stop(), self.config.cluster.start_timeout_s, "the trainers did not end")
        self._closing.clear()

    async def close(self) -> None:
        """End the actors in good order; whatever does not answer is ended by its owner, the node's supervisor."""
        for close in reversed(self._closing):
            try:
                await close()
            except Exception:  # the run's result stands, and the supervisor ends what is left
                logger.warning("an actor did not end in good order", exc_info=True)


async def with_timeout(awaitable: Awaitable[T], timeout_s: float, what: str) -> T:
    """``asyncio.wait_for`` whose error says what was waited for."""
    try:
        return await asyncio.wait_for(awaitable, timeout_s)
    except TimeoutError:
        raise TimeoutError(f"{what} within {timeout_s:.0f} s") from None


@contextlib.asynccontextmanager
async def background(*loops: Awaitable[None]) -> AsyncIterator[asyncio.TaskGroup]:
    """Run loops beside the body; an error in any ends all, and leaving the body ends the loops."""
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(_as_coroutine(loop)) for loop in loops]
        yield tasks
        for task in running:
            task.cancel()


async def _as_coroutine(awaitable: Awaitable[None]) -> None:
    await awaitable


def load_held_out(session: Session) -> list[Prompt]:
    """The prompts of ``evaluation``, none where it is off."""
    config = session.config
    if not config.evaluation.num_prompts:
        return []
    examples = load_eval_examples(config.data, config.seed)
    return evaluation_prompts(examples, session.tokenizer, config, config.evaluation.num_prompts)
