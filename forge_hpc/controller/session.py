"""What a recipe works with: the configuration, the trainers, the generators, the weights between them, the records.

A recipe gets a Session and writes the algorithm; everything about processes, files and deadlines is here. A session is
one attempt: when trainers are lost the controller makes another, which begins at the newest checkpoint.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from forge_hpc.actors.trainer import Trainer
from forge_hpc.checkpoint import CheckpointStore, FileRecord, load_extra
from forge_hpc.checkpoint.episodes import EPISODES, dump_groups, load_groups
from forge_hpc.cluster.meshes import Cluster
from forge_hpc.config import Config, UserError, config_text, read_config, safe_changes
from forge_hpc.config.schema import SamplingConfig
from forge_hpc.controller.generators import SPAWN_S, STOP_S, GeneratorPool, NodeLost, WeightSync
from forge_hpc.controller.recovery import Leave, Recoveries
from forge_hpc.controller.service import ActorLost, Service, reason_of
from forge_hpc.controller.trainers import Trainers
from forge_hpc.data.hub import load_tokenizer, resolve_model
from forge_hpc.data.mixture import open_sources
from forge_hpc.data.prompts import PromptStream, evaluation_prompts
from forge_hpc.data.source import load_eval_examples
from forge_hpc.data.types import Completion, Document, Episode, Group, Prompt
from forge_hpc.evaluation.answers import Answers
from forge_hpc.evaluation.figures import Graded, evaluation_seed, greedy_figures, sampled_figures
from forge_hpc.observability.logger import MetricLogger
from forge_hpc.rollouts.buffer import EpisodeBuffer
from forge_hpc.rollouts.mismatch import MismatchWatch
from forge_hpc.run_dir import RunDir
from forge_hpc.status_writer import StatusWriter
from forge_hpc.supervisor.starts import StartLog
from forge_hpc.weights import WeightStore

if TYPE_CHECKING:
    from forge_hpc.rollouts.episodes import EpisodePlayer

logger = logging.getLogger(__name__)
T = TypeVar("T")
FILLINGS = 8
"""So many times the sequences that an engine decodes at once are asked for in one call of an evaluation."""
CONFIG = "config.yaml"
"""In a checkpoint: the configuration that it was made with."""
MIN_LEAD_S = 30.0
"""What a departure takes beside the step and the save: the signal's way, the requeue, slow seconds of a shared disk."""


class Session:
    """One attempt at a run, from the controller's side."""

    def __init__(
        self,
        config: Config,
        run_dir: RunDir,
        log_dir: Path,
        cluster: Cluster,
        pool: GeneratorPool,
        recoveries: Recoveries,
        leave: Leave,
        attempt: int = 0,
        status: StatusWriter | None = None,
    ) -> None:
        self.config = config
        self.run_dir = run_dir
        self.log_dir = log_dir
        self.cluster = cluster
        self.checkpoints = CheckpointStore(run_dir, config.checkpoint.keep)
        self.step = 0
        """Optimizer steps done; also the policy version."""
        self.state: dict[str, Any] = {}
        """The recipe's state as of ``step``; empty in a fresh run."""
        self.finished_groups: list[Group] = []
        """Rollouts of later steps that were finished when the run was saved."""
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Resolved with the reason when trainers or the store of the weights are lost: the attempt is over."""
        self._pool = pool
        self._recoveries = recoveries
        self._leave = leave
        self._status = status or StatusWriter(run_dir)
        self._suffix = f"r{attempt}" if attempt else ""
        self._between_steps = asyncio.Event()
        self._between_steps.set()
        self._trainers: Trainers | None = None
        self._buffer: EpisodeBuffer | None = None
        self._weights: WeightSync | None = None
        self._resume_from: Path | None = None
        self._saved_step = 0
        self._saving: asyncio.Task[None] | None = None
        self._num_failed_saves = 0
        self._config_text = config_text(config).encode()
        self._train_s: deque[float] = deque(maxlen=20)
        self._save_s: deque[float] = deque(maxlen=5)
        self._meshes: dict[str, Any] = {}
        self._closing: list[Callable[[], Awaitable[Any]]] = []
        self._step_ended = time.perf_counter()
        self._checkpoint_s = 0.0

    async def prepare(self) -> None:
        """Find the model and the newest checkpoint. Blocking work goes to threads.

        Raises:
            UserError: no checkpoint can be used, or the newest that verifies is of another configuration.
        """
        config = self.config
        if config.model.path == "warmstart":
            self.model_dir = RunDir(self.run_dir.warmstart).export
        else:
            self.model_dir = await asyncio.to_thread(
                resolve_model, config.model.path, config.seed, self.run_dir.path / "model"
            )
        self.tokenizer = await asyncio.to_thread(load_tokenizer, self.model_dir)
        if config.recipe == "grpo":  # its engines take as long to start as a large checkpoint takes to verify
            self._pool.begin(self.model_dir)
        found = await asyncio.to_thread(self.checkpoints.newest)
        if found is None and self.checkpoints.steps():
            raise UserError(
                f"none of the checkpoints in {self.run_dir.checkpoints} can be used; controller.log says why",
                "mend or restore one, or move them away to begin again from step 0",
            )
        if found is not None:
            await asyncio.to_thread(self._restore, *found)

    def _restore(self, checkpoint: Path, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint. Raises UserError where it is of a configuration that this run cannot have."""
        if (checkpoint / CONFIG).exists():
            self._accept_changes(checkpoint, state["step"])
        self._resume_from, self.step, self.state = checkpoint, state["step"], state["recipe"]
        self._saved_step = self.step
        if (saved_groups := load_extra(checkpoint, EPISODES)) is not None:
            self.finished_groups = load_groups(saved_groups)
        self._recoveries.load_state_dict(state.get("recoveries", {}))
        self._num_failed_saves = state.get("failed_saves", 0)
        logger.info("resuming after step %d from %s", self.step, checkpoint)

    def _accept_changes(self, checkpoint: Path, step: int) -> None:
        """Compare with the configuration of a checkpoint: ``config.yaml`` may have been edited since, by hand.

        Changes that are safe are recorded, unless whoever submitted the run has done so. Raises UserError for others.
        """
        try:
            before = read_config(checkpoint / CONFIG)
        except UserError as error:  # of keys that there are no longer: there is nothing to compare with
            logger.warning("not compared with this configuration: %s", error)
            return
        before.cluster.nodes = self.config.cluster.nodes  # those of the allocations, not of the configurations
        changes = safe_changes(
            before,
            self.config,
            step,
            f"{self.run_dir.config} is not the configuration of {checkpoint.name}",
            f"put these values back, or copy {checkpoint / CONFIG} over it; for other values choose another --run-dir",
        )
        log = StartLog(self.run_dir)
        recorded = [line for record in log.read() if record["event"] == "changed" for line in record["changes"]]
        latest = {line.partition(": ")[0]: line.rpartition(" -> ")[2] for line in recorded}
        new = [line for line in changes if latest.get(line.partition(": ")[0]) != line.rpartition(" -> ")[2]]
        for line in new:
            logger.info("changed since %s: %s", checkpoint.name, line)
        if new:
            log.changed(new)

    def open_records(self, stream: TextIO) -> MetricLogger:
        """The run's figures from where ``prepare`` found it, with progress on ``stream``; a context manager."""
        config = self.config
        self.metrics = MetricLogger(
            self.run_dir,
            config.logging,
            self.step,
            total_steps=None if config.recipe == "eval" else config.trainer.training.steps,
            label=config.recipe.rpartition(":")[2],
            stream=stream,
        )
        return self.metrics

    # ---- actors

    async def start_trainers(self) -> Trainers:
        """Spawn the trainers and load their weights."""
        config, timeout_s = self.config, self.config.cluster.start_timeout_s
        name = f"trainer{self._suffix}"
        procs = self._spawned(name, self.cluster.spawn_trainers(name))
        try:
            await asyncio.wait_for(procs.initialized, SPAWN_S)
        except Exception as error:
            raise await self._which_node_is_lost(error) from error
        mesh = procs.spawn(name, Trainer, config, self.log_dir)
        self._trainers = Trainers(mesh, config.trainer.timeout_s, self.lost)
        self._mismatch = MismatchWatch(config, bool(self.cluster.placement.gpus_per_node), self.warn)
        file_store = self.log_dir / f"process-group{self._suffix}"
        checkpoint = self._resume_from / "trainer" if self._resume_from else None
        await self._trainers.call("start", self.model_dir, file_store, checkpoint, timeout_s=timeout_s)
        self.on_close(lambda: self.trainers.call("leave", timeout_s=10))
        return self._trainers

    async def _which_node_is_lost(self, error: Exception) -> Exception:
        """Why the trainers' processes cannot be spawned: NodeLost where a node starts none, else ActorLost."""
        nodes = self.cluster.placement.trainer_nodes
        answers = await asyncio.gather(*(self.cluster.can_spawn(node, SPAWN_S) for node in nodes))
        silent = [node for node, answer in zip(nodes, answers, strict=True) if not answer]
        return NodeLost(silent[0], reason_of(error)) if silent else ActorLost(f"trainers: {reason_of(error)}")

    @property
    def trainers(self) -> Trainers:
        """Those that ``start_trainers`` started."""
        assert self._trainers is not None, "start_trainers() comes first"
        return self._trainers

    async def start_generators(self, model_dir: Path | None = None) -> Service:
        """Spawn the generators on the weights of ``model_dir``, by default those that the run starts from.

        Those of an earlier attempt stay, rid of their requests; ``connect`` gives them this attempt's weights.
        """
        self.generators = await self._pool.start(model_dir or self.model_dir)
        await self.generators.abort.fanout()
        return self.generators

    async def start_trainers_and_generators(self) -> tuple[Trainers, Service]:
        """Both at once: their start-up is most of the time before the first step."""
        async with asyncio.TaskGroup() as tasks:
            trainers = tasks.create_task(self.start_trainers())
            generators = tasks.create_task(self.start_generators())
        return trainers.result(), generators.result()

    async def connect(self, trainers: Trainers, generators: Service, buffer: EpisodeBuffer | None = None) -> WeightSync:
        """Put the weight store between trainers and generators. A recipe that generates ahead hands over its buffer:
        it is told of new weights, and its rollouts are saved with the run.

        Generators that do not hold the trainers' weights (in a resumed run, or after lost trainers) are brought up
        to date.
        """
        name = f"volume{self._suffix}"
        volumes = self._spawned(name, self.cluster.spawn_volumes(name))
        start = WeightStore.start(volumes, self.cluster.placement.trainer_procs)
        store = await with_timeout(start, self.config.cluster.start_timeout_s, "the weight store did not start")
        is_first, self._buffer = self._pool.weights is None, buffer
        self._weights = self._pool.weights = WeightSync(trainers, store, generators, buffer)
        if self.step > 0 or not is_first:
            self._weights.is_changed = True
            await self._weights.publish(self.step)
            await self._weights.delivered()
        return self._weights

    def _spawned(self, name: str, procs: Any) -> Any:
        """Processes without which this attempt is over."""
        self._meshes[name] = procs
        self.cluster.faults.watch(name, lambda reason: self.lose(f"{name}: {reason}"))
        return procs

    def lose(self, reason: str) -> None:
        """The attempt is over: calls to the trainers raise ActorLost from now on."""
        if not self.lost.done():
            self.lost.set_result(reason)

    # ---- steps

    def remaining_steps(self) -> Iterator[int]:
        """The steps that are still to be done, from 1. The first one's time counts from here."""
        self._step_ended = time.perf_counter()
        return iter(range(self.step + 1, self.config.trainer.training.steps + 1))

    async def train_step(self, step: int, documents: Sequence[Document], *, update: bool = True) -> dict[str, float]:
        """The optimizer step number ``step`` on the documents; its metrics. Without ``update`` it only measures, and
        weights and moments stay as they are.

        What was generated is compared with the trainers' weights first: where the two are further apart than rounding
        and staleness explain, RuntimeError ends the run before anything is changed, published or saved.

        From here to the end of ``save_if_due`` a request to leave waits, so that the step is not done twice; at any
        other place of the recipe it interrupts. A step that is to be saved begins once the save before is complete:
        whatever is killed, no more than ``checkpoint.interval`` steps are lost.
        """
        await self._stay()
        if self._is_due(step):
            start = time.perf_counter()
            await self.saved()
            self._checkpoint_s += time.perf_counter() - start
            await self._stay()
        self._between_steps.clear()
        start = time.perf_counter()
        bounds = self._mismatch.bounds(step, documents)
        metrics = await self.trainers.train_step(documents, update, bounds.largest)
        self._train_s.append(time.perf_counter() - start)
        self._mismatch.check(step, metrics, bounds)
        if self._weights is not None and metrics["tokens/trained"]:
            self._weights.is_changed = True
        return metrics

    def record(self, step: int, metrics: Mapping[str, float], groups: Sequence[Group] = ()) -> None:
        """Write the figures of a step that is done, and a sample of its rollouts."""
        now = time.perf_counter()
        timing = {"time/step_s": now - self._step_ended, "time/checkpoint_s": self._checkpoint_s}
        self._step_ended, self._checkpoint_s = now, 0.0
        self.step = step
        self._recoveries.step_done()
        counts = {"checkpoint/failed": float(self._num_failed_saves)} | self._recoveries.metrics()
        self.metrics.log(step, {"policy_version": step, **metrics, **timing, **counts})
        self._status.tell(step=step, policy_version=step)
        if groups:
            self.metrics.log_rollouts(step, groups)

    async def save_if_due(self, step: int, state: Mapping[str, Any]) -> None:
        """The step is done. Saves the run every ``checkpoint.interval`` steps and at the last one.

        Call it after ``record``: what was recorded before is on disk when the checkpoint is. ``state`` is what the
        recipe needs to go on after the step; JSON.
        """
        self.state = dict(state)
        start = time.perf_counter()
        if self._is_due(step):
            await self.save()
        await self._export_if_due(step)
        self._checkpoint_s += time.perf_counter() - start
        self._between_steps.set()
        await self._stay()

    async def _export_if_due(self, step: int) -> None:
        """Write the model every ``checkpoint.export_interval`` steps. One that fails is reported; the run goes on."""
        interval = self.config.checkpoint.export_interval
        if not interval or step % interval:
            return
        if self._leave.requested.is_set():
            logger.warning("no time to export step %d: forge-hpc export writes it from its checkpoint", step)
            return
        try:
            await self.trainers.call("export", self.run_dir.export_of(step))
        except ActorLost:
            raise
        except Exception as error:
            logger.error("the model of step %d is not exported: %s", step, reason_of(error))
            self._status.tell(message=f"the model of step {step} is not exported: {reason_of(error)}")

    def _is_due(self, step: int) -> bool:
        interval = self.config.checkpoint.interval
        return step == self.config.trainer.training.steps or (interval > 0 and step % interval == 0)

    async def save(self) -> None:
        """Save the run as of ``step``. Training waits while the trainers stage their state, not for the disk.

        A save that fails is reported and counted; the run goes on from one good checkpoint to the next.
        """
        await self.saved()
        step, start = self.step, time.perf_counter()
        groups = self._buffer.finished() if self._buffer is not None else []
        record = {"step": step, "policy_version": step, "recipe": self.state}
        record |= {"recoveries": self._recoveries.state_dict(), "failed_saves": self._num_failed_saves}

        async def commit() -> None:
            written = await self.trainers.call_all("saved")  # each rank names the files that are its own
            files = {name: file for rank in written for name, file in rank.items()}
            await asyncio.to_thread(self._commit, step, record, files, groups)

        try:
            directory = await asyncio.to_thread(self.checkpoints.begin, step)
            await self.trainers.call("save", directory / "trainer")
        except ActorLost:
            raise
        except Exception as error:
            await self._save_failed(step, error)
        else:
            self._saving = asyncio.create_task(self._complete(commit(), step, start))

    async def _complete(self, commit: Awaitable[None], step: int, start: float) -> None:
        try:
            await commit
        except ActorLost:
            raise
        except Exception as error:
            await self._save_failed(step, error)
        else:
            self._saved_step = step
            self._save_s.append(time.perf_counter() - start)
            lead_s = MIN_LEAD_S + 2 * (max(self._save_s) + max(self._train_s, default=0.0))
            self._status.tell(lead_s=round(lead_s, 1))

    def _commit(
        self, step: int, record: Mapping[str, Any], files: Mapping[str, FileRecord], groups: Sequence[Group]
    ) -> None:
        extra = {CONFIG: self._config_text} | ({EPISODES: dump_groups(groups)} if groups else {})
        self.checkpoints.commit(step, record, files, extra)

    async def _save_failed(self, step: int, error: Exception) -> None:
        await asyncio.to_thread(self.checkpoints.abandon, step)
        self._num_failed_saves += 1
        reason = " ".join(str(error).split()) or type(error).__name__
        logger.error("the checkpoint of step %d failed, the one before it stands: %s", step, reason)
        self._status.tell(message=f"the checkpoint of step {step} failed: {reason}")

    def warn(self, text: str) -> None:
        """On the terminal, in ``status.json`` and in the log."""
        self.metrics.warn(text)
        self._status.tell(message=text)

    async def saved(self) -> None:
        """Wait until the save that runs beside the training is over."""
        if (saving := self._saving) is not None:
            await asyncio.shield(saving)  # who waits may be cancelled, and the save goes on
            self._saving = None

    # ---- leaving

    async def _stay(self) -> None:
        """Return, unless the run has been asked to leave: then the recipe stands still here until it is cancelled."""
        if self._leave.requested.is_set():
            await asyncio.get_running_loop().create_future()

    async def between_steps(self) -> None:
        """Wait until no optimizer step is under way. Once the run has been asked to leave, none begins afterwards."""
        await self._between_steps.wait()

    @property
    def is_between_steps(self) -> bool:
        """Whether the last step is whole: trained, recorded, and what the recipe saves of it known."""
        return self._between_steps.is_set()

    async def save_to_leave(self) -> bool:
        """When no step is under way: see that the last one is saved. False where an older checkpoint stands."""
        await self.saved()
        if self._saved_step < self.step:
            await self.save()
            await self.saved()
        return self._saved_step == self.step

    async def abandon(self) -> None:
        """After the recipe was cancelled: end what remains of this attempt's processes. The generators stay."""
        if self._weights is not None:
            self._weights.cancel()
        with contextlib.suppress(Exception):  # of trainers that are lost
            await self.saved()
        await self.close()
        for name, procs in self._meshes.items():
            self.cluster.faults.forget(name)
            try:
                await with_timeout(procs.stop(), STOP_S, f"{name} did not end")
            except Exception as error:  # of a dead host, say: whether new ones can be started is what matters
                logger.warning("ending %s: %s", name, error)

    # ---- evaluation

    def evaluation_is_due(self, step: int) -> bool:
        """Before the first step, at the last one, and every ``evaluation.interval`` steps."""
        interval = self.config.evaluation.interval
        return step in (0, self.config.trainer.training.steps) or (interval > 0 and step % interval == 0)

    async def validation_loss(self, documents: Sequence[Document]) -> dict[str, float]:
        """Mean loss of the policy on held-out documents, to log as an evaluation; nothing where there are none."""
        if not documents:
            return {}
        start = time.perf_counter()
        loss = await self.trainers.call("eval_loss", documents)
        self._step_ended = time.perf_counter()
        return {"loss": loss, "num_documents": len(documents), "time_s": self._step_ended - start}

    async def evaluate(
        self,
        step: int,
        prompts: Sequence[Prompt],
        rewards: Any,
        player: EpisodePlayer | None = None,
        more: Mapping[str, float] | None = None,
    ) -> None:
        """Accuracy of the policy after ``step`` on held-out prompts, over all generators: greedy, and pass@k of
        ``evaluation.samples`` sampled answers.

        Seeds are the evaluation's own, and every call has its generator to itself (``key``): a run that takes turns
        (``rollout.max_staleness`` 0) learns the same, to the last bit, however often it evaluates. A resumed run
        evaluates what it was interrupted in, and nothing twice. ``more`` is logged with it: a step has one evaluation.

        With an environment ``player`` plays an episode for each answer.
        """
        if not prompts or self.metrics.is_evaluated(step):
            return
        start, config = time.perf_counter(), self.config.evaluation
        limit = self.config.logging.num_answers_per_evaluation
        show = partial(self.metrics.show_evaluation, step)
        answers = Answers(step, len(prompts), config.samples, limit, show, lambda text: self._status.tell(message=text))
        ask = self.generators.sample.stream if player is None else player.stream
        greedy = await self._answer(
            ask, prompts, 1, replace(self.config.rollout.sampling, temperature=0.0), 0, rewards, answers
        )
        values = greedy_figures([answer for [answer] in greedy])
        if config.samples:
            sampling, seed = self.config.rollout.sampling, evaluation_seed(self.config.seed, step)
            if config.temperature is not None:
                sampling = replace(sampling, temperature=config.temperature)
            sampled = await self._answer(ask, prompts, config.samples, sampling, seed, rewards, answers)
            values |= sampled_figures(sampled, config.k, seed)
        lost = [answer for group in (*greedy, *(sampled if config.samples else ())) for answer in group]
        num_failed, num = sum(answer.reward is None for answer in lost), len(lost)
        if 2 * num_failed > num:
            self.warn(
                f"evaluation after step {step}: {num_failed} of {num} answers failed or have no reward, and count as "
                "wrong: controller.log says why"
            )
        values |= {"num_prompts": len(prompts), "num_failed": num_failed, "time_s": time.perf_counter() - start}
        self.metrics.log_evaluation(step, {**(more or {}), **values}, answers.records())
        if answers.has_told:
            self._status.tell(message="")
        self._step_ended = time.perf_counter()

    async def _answer(
        self,
        ask: Callable[..., AsyncIterator[tuple[tuple[int, int], Any]]],
        prompts: Sequence[Prompt],
        num: int,
        sampling: SamplingConfig,
        seed: int,
        rewards: Any,
        answers: Answers,
    ) -> list[list[Graded]]:
        """``num`` answers to each prompt, or episodes of it. An answer is right if the first reward says so
        (``RewardPool.is_right``), an episode if its environment gave 1 or more."""
        from forge_hpc.rewards import RewardError

        async def grade(place: int, number: int, answer: Completion | Episode | Exception) -> None:
            sample = number if sampling.temperature > 0 else None
            if isinstance(answer, Exception):
                answers.add(place, sample, prompts[place], answer, Graded(), error=str(answer))
                return
            episode = answer if isinstance(answer, Episode) else Episode(prompts[place], answer, 0.0)
            try:
                judged = await rewards.judge(episode.prompt, episode.completion, show=True)
            except RewardError as error:
                answers.add(place, sample, episode.prompt, answer, Graded(), error=str(error))
                return
            is_played = "environment" in episode.rewards
            right = episode.reward >= 1 - 1e-6 if is_played else rewards.is_right(judged.terms)
            graded = results[place][number] = Graded(right, episode.reward + judged.total)
            answers.add(place, sample, episode.prompt, answer, graded, episode.rewards | judged.terms, judged.read)

        async def share(replica: int, places: Sequence[int]) -> None:
            mine = [prompts[place] for place in places]
            async for (index, number), answer in ask(mine, num, sampling, seed, key=replica):
                tasks.create_task(grade(places[index], number, answer))

        results = [[Graded()] * num for _ in prompts]
        # A call has a deadline (generator.timeout_s): it holds some fillings of an engine, not a whole test set.
        size = max(1, FILLINGS * self.config.generator.engine.max_num_seqs // num)
        async with asyncio.TaskGroup() as tasks:
            for replica in range(len(self.generators)):
                places = range(replica, len(prompts), len(self.generators))
                for begin in range(0, len(places), size):
                    tasks.create_task(share(replica, places[begin : begin + size]))
        return results

    async def finish(self) -> None:
        """The run is done: wait for the last save and write the final weights.

        Raises:
            RuntimeError: the final state could not be saved.
        """
        if not await self.save_to_leave():
            raise RuntimeError(f"the state after the last step cannot be saved in {self.run_dir.checkpoints}")
        await self.trainers.call("export", self.run_dir.export)

    def on_close(self, close: Callable[[], Awaitable[Any]]) -> None:
        """Have ``close`` called at the end, whatever it is; the last one registered first."""
        self._closing.append(close)

    async def stop_trainers(self) -> None:
        """End the trainers' processes: SFT evaluates on the hardware that they held."""
        await self.abandon()

    async def close(self) -> None:
        """End the actors in good order; whatever does not answer is ended by its owner, the node's supervisor."""
        while self._closing:
            close = self._closing.pop()
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


async def load_prompts(session: Session) -> PromptStream:
    """The stream of training prompts, from the start or where ``prompts`` of the recipe's state says. In a thread:
    data may have to be downloaded."""
    config = session.config

    def load() -> PromptStream:
        prompts = PromptStream(open_sources(config), session.tokenizer, config)
        return prompts.load_state_dict(session.state.get("prompts", prompts.state_dict()))

    return await asyncio.to_thread(load)


async def load_held_out(session: Session) -> list[Prompt]:
    """The prompts of ``evaluation``, none where it is off. In a thread, as above."""
    config = session.config

    def load() -> list[Prompt]:
        examples = load_eval_examples(config.data, config.seed)
        return evaluation_prompts(examples, session.tokenizer, config, config.evaluation.num_prompts)

    return await asyncio.to_thread(load) if config.evaluation.num_prompts else []
