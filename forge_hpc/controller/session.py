"""One attempt at a run: what a recipe works with (`recipes.base.Session`), and what the controller does with it.

A recipe writes the algorithm; everything about processes, files and deadlines is here and in the rooms below: resuming,
saving, evaluation, the generators. When trainers are lost the controller makes another session, which begins at the
newest checkpoint.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from forge_hpc.actors.trainer import Trainer
from forge_hpc.checkpoint import load_extra
from forge_hpc.checkpoint.episodes import EPISODES, load_groups
from forge_hpc.cluster.deadlines import SPAWN_S
from forge_hpc.cluster.meshes import Cluster
from forge_hpc.config import Config, UserError
from forge_hpc.config.needs import POLICY, REWARD_MODEL, ModelNeed
from forge_hpc.config.recipes import load_recipe, needs_of
from forge_hpc.config.rewards import reward_model_of
from forge_hpc.config.sources import HeldOut, held_out_sets, run_sources, with_sft_data
from forge_hpc.config.split import frozen_apart
from forge_hpc.controller.frozen import FrozenProcesses
from forge_hpc.controller.generators import STOP_S, GeneratorPool, WeightSync, why_not_spawned
from forge_hpc.controller.kept import KeptMesh, KeptMeshes, stop_mesh
from forge_hpc.controller.ranks import Standstill
from forge_hpc.controller.recovery import Leave, Recoveries
from forge_hpc.controller.resume import find_checkpoint
from forge_hpc.controller.saving import Saver
from forge_hpc.controller.service import ActorLost, Service, answer, started
from forge_hpc.controller.store_at_need import StoreAtNeed
from forge_hpc.controller.trainers import Trainers
from forge_hpc.controller.turns import Turns
from forge_hpc.data.hub import load_tokenizer, resolve_model
from forge_hpc.data.mixture import open_sources
from forge_hpc.data.prompts import DocumentStream, PromptStream, evaluation_documents, evaluation_prompts
from forge_hpc.data.source import load_eval_examples
from forge_hpc.data.types import Document, Group, Prompt
from forge_hpc.evaluation.early_stop import is_better, why_stopped
from forge_hpc.evaluation.evaluator import Evaluator, HeldOutSet
from forge_hpc.hub.pins import Pins, pin_all
from forge_hpc.observability.jsonl import read_jsonl
from forge_hpc.observability.logger import MetricLogger
from forge_hpc.observability.performance import EngineCounts, engine_figures
from forge_hpc.observability.phases import StartPhases
from forge_hpc.observability.traces import Spans, trace_dir
from forge_hpc.rewards import RewardPool, RewardPools
from forge_hpc.rollouts.buffer import EpisodeBuffer, episode_buffer
from forge_hpc.rollouts.mismatch import MismatchWatch
from forge_hpc.rollouts.reward_model import RewardModel
from forge_hpc.rollouts.sft import SFTMix
from forge_hpc.rollouts.sources import SampleStream, by_source
from forge_hpc.rollouts.stream import RolloutStream
from forge_hpc.run_dir import RunDir
from forge_hpc.status_writer import StatusWriter
from forge_hpc.supervisor.starts import StartLog
from forge_hpc.weights import WeightStore

if TYPE_CHECKING:
    from forge_hpc.controller.served import ServedModels
    from forge_hpc.endpoint import Endpoint
    from forge_hpc.rollouts.agents import AgentPlayer
    from forge_hpc.rollouts.episodes import EpisodePlayer

logger = logging.getLogger(__name__)
T = TypeVar("T")
REST_S = 20.0
"""Trainers give their models up within this time, or they end."""


class OneBase:
    """What the sessions of several adapters on one base share (``controller.adapters``): processes, and whose turn it
    is.

    Args:
        model_dir: where the base is.
    """

    def __init__(self, model_dir: Path) -> None:
        self.model_dir = model_dir
        self.alone = asyncio.Lock()
        """Held by each call to the trainers."""
        self.standstill = Standstill()
        """Of the trainers' processes."""
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._starting = asyncio.Lock()
        self._started: dict[str, Any] = {}

    async def once(self, name: str, start: Callable[[], Awaitable[T]]) -> T:
        """What ``start`` gave to whoever asked first."""
        async with self._starting:
            if name not in self._started:
                self._started[name] = await start()
        return self._started[name]


class Session:
    """One attempt at a run, from the controller's side.

    Args:
        base: of one of several adapters what it shares with the others, and ``adapter`` its number.
    """

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
        frozen: FrozenProcesses | None = None,
        kept: KeptMeshes | None = None,
        served: ServedModels | None = None,
        base: OneBase | None = None,
        adapter: int = 0,
    ) -> None:
        self.config = config
        self.recipe = load_recipe(config)
        self.needs = needs_of(config)
        self.run_dir = run_dir
        self.log_dir = log_dir
        self.cluster = cluster
        self.step = 0
        """Optimizer steps done; also the policy version."""
        self.state: Mapping[str, Any] = {}
        """The recipe's state as of ``step``; empty in a fresh run."""
        self.lost: asyncio.Future[str] = base.lost if base else asyncio.get_running_loop().create_future()
        """Resolved with the reason when trainers or the store of the weights are lost: the attempt is over."""
        self.phases: StartPhases | None = None
        """Of a start that has not come to its first step yet."""
        self._pool = pool
        self._frozen = frozen
        self._served = served
        self._served_dirs: dict[str, Path] = {}
        self._recoveries = recoveries
        self._leave = leave
        self._status = status or StatusWriter(run_dir)
        self._saver = Saver(config, run_dir, recoveries, self._status, self._finished_groups, self.warn, self.lose)
        self._kept = kept
        self._hands_over = False
        self._base = base
        self._adapter = adapter
        self._suffix = (kept.suffix if kept is not None else "") + (f"a{adapter}" if base is not None else "")
        self._suffix += f"r{attempt}" if attempt else ""
        self._pins = Pins(run_dir.path)
        self._between_steps = asyncio.Event()
        self._between_steps.set()
        self._published = 0  # by the recipe: the step after which it has brought the policy to the generators
        self._is_finished = False
        self._trainers: Trainers | None = None
        self._generators: Service | None = None
        self._buffer: EpisodeBuffer | None = None
        self._weights: WeightSync | None = None
        self._turns: Turns | None = None
        self._evaluator: Evaluator | None = None
        self._sft: SFTMix | None = None
        self._players: dict[str, EpisodePlayer | AgentPlayer | None] = {}
        self._endpoints: list[Endpoint] = []
        self._held_out_documents: dict[str, list[Document]] = {}
        """By label of their set."""
        self._resume_from: Path | None = None
        self._restored_groups: list[Group] = []
        self._meshes: dict[str, Any] = {}
        self._trainer_mesh: KeptMesh
        self._volumes: KeptMesh | None = None
        self._store: StoreAtNeed | None = None
        self._closing: list[Callable[[], Awaitable[Any]]] = []
        self._step_ended = time.perf_counter()
        self._checkpoint_s = self._publish_s = 0.0
        self._spans = Spans()
        self._engine_counts: asyncio.Future[list[EngineCounts]] | None = None

    # ---- before the recipe runs

    async def prepare(self) -> None:
        """Find the model and the newest checkpoint. Blocking work goes to threads.

        Raises:
            UserError: no checkpoint can be used, or the newest that verifies is of another configuration.
        """
        config = self.config
        self._pins = await asyncio.to_thread(pin_all, config, self.run_dir.path)
        if self._base is not None:
            self.model_dir = self._base.model_dir
        elif config.model.path == "warmstart":
            self.model_dir = RunDir(self.run_dir.warmstart).export
        else:
            path = self._pins.named(config.model.path)
            self.model_dir = await asyncio.to_thread(resolve_model, path, config.seed, self.run_dir.path / "model")
        if self.needs.generators == "beside":  # their start is the longest of all: everything else goes on beside it
            self._pool.begin(self.model_dir)
        if self._served is not None:
            self._served_dirs = await asyncio.to_thread(self._find_served)
            self._served.begin(self._served_dirs)
        self.tokenizer = await asyncio.to_thread(load_tokenizer, self.model_dir)
        found = await asyncio.to_thread(find_checkpoint, self._saver.checkpoints, config, self.run_dir)
        if found is not None:
            await asyncio.to_thread(self._restore, *found)
        self._phase("model")

    def _find_served(self) -> dict[str, Path]:
        """Where the weights of each served model are."""
        seed, place = self.config.seed, self.run_dir.path
        return {
            one.name: resolve_model(self._pins.named(one.path), seed, place / f"served-{one.name}")
            for one in self.config.served
        }

    def _restore(self, checkpoint: Path, record: Mapping[str, Any]) -> None:
        self._resume_from, self.step, self.state = checkpoint, record["step"], record["recipe"]
        self._saver.saved_step, self._saver.num_failed = self.step, record.get("failed_saves", 0)
        if (groups := load_extra(checkpoint, EPISODES)) is not None:
            self._restored_groups = load_groups(groups)
        self._recoveries.load_state_dict(record.get("recoveries", {}))
        logger.info("resuming after step %d from %s", self.step, checkpoint)

    def open_records(self, stream: TextIO) -> MetricLogger:
        """The run's figures from where ``prepare`` found it, with progress on ``stream``; a context manager."""
        config = self.config
        self.metrics = MetricLogger(
            self.run_dir,
            config.logging,
            self.step,
            total_steps=config.trainer.training.steps if self.needs.trains else None,
            label=config.recipe.rpartition(":")[2] + (f" {self._adapter}" if self._base is not None else ""),
            stream=stream,
        )
        return self.metrics

    # ---- what the recipe needs

    async def start(self) -> None:
        """Start all that the recipe needs; the actors at once, since their start is most of the time before a step."""
        if self.needs.generators != "beside":
            self._held_out_documents = await asyncio.to_thread(self._load_held_out_documents)
            await self._start_trainers()
            self._phase("engine")
            return
        if self.needs.learns_from == "samples":
            self._prompts = await asyncio.to_thread(self._load_prompts)
            self._sft = await asyncio.to_thread(self._load_sft)
            if self._sft is not None:
                self._on_close(partial(asyncio.to_thread, self._sft.close))
        if self._served is not None:  # what is started from here on is told where they are
            await self._served.start(self._served_dirs)
        self._rewards = await self._start_rewards()
        held_out = await self._held_out(self._rewards)
        environments = [(run, await self._start_environments(run.config)) for run in run_sources(self.config)]
        async with asyncio.TaskGroup() as tasks:
            if self.needs.models:
                tasks.create_task(self._start_trainers())
            generators = tasks.create_task(self._start_generators(self.model_dir))
        self._phase("engine")
        self._players = {
            run.name: await self._episode_player(run.config, generators.result(), pool) for run, pool in environments
        }
        self._evaluator = self._evaluator_of(held_out)
        if self.needs.models:
            await self._connect()
            self._phase("weights")

    async def _start_trainers(self) -> None:
        """Spawn the trainers and load their weights."""
        config, timeout_s = self.config, self.config.cluster.start_timeout_s
        apart = frozen_apart(config, self.needs)
        here = {name: need for name, need in self.needs.models.items() if name not in apart}
        mesh = await self._take_kept_trainers(here)
        if mesh is None:
            name = f"trainer{self._suffix}"
            told = self.cluster.told(config), self.log_dir, here
            if self._base is None:
                procs = await self._spawn_trainers(name)
                mesh = procs.spawn(name, Trainer, *told)
            else:
                procs = await self._base.once("trainers", partial(self._spawn_trainers, name))
                self.cluster.faults.watch(name, lambda reason: self.lose(f"{name}: {reason}"))
                mesh = procs.spawn(name, Trainer, *told, self._adapter)
            self._trainer_mesh = KeptMesh(name, procs, mesh, self.cluster.layout("trainer"))
        self._store = StoreAtNeed(self._start_store)
        self._on_close(self._store.close)
        self._turns = self._pool.turns
        turn = self._turns.training if self._turns is not None else contextlib.nullcontext
        shared = (self._base.alone, self._base.standstill) if self._base is not None else ()
        self._trainers = Trainers(mesh, config.trainer.timeout_s, self.lost, turn, self._frozen, *shared)
        self._mismatch = MismatchWatch(config, bool(self.cluster.placement.gpus_per_node), self.warn)
        file_store = self.log_dir / f"process-group{self._suffix}"
        checkpoint = self._resume_from / "trainer" if self._resume_from else None
        model_dirs = await self._model_dirs()
        # On CPUs nothing is compiled. What is compiled for rows of a known length is in the caches at the next start,
        # so that this pays also where no generator starts meanwhile. Of adapters on one base the first does it for all.
        warms_up = bool(self.cluster.placement.gpus_per_node) and not self._adapter

        async def start(trainers: Trainers) -> str:
            if self.cluster.placement.starts_after_generators:
                await self._pool.start(self.model_dir)
            return await trainers.start(model_dirs, file_store, checkpoint, timeout_s, warms_up=warms_up)

        async with asyncio.TaskGroup() as tasks:
            if self._frozen is not None:
                tasks.create_task(self._frozen.start(model_dirs))
            started = tasks.create_task(start(self._trainers))
        if said := started.result():
            self._tell(said)
        self._on_close(self._leave_trainers)

    async def _spawn_trainers(self, name: str) -> Any:
        """Raises NodeLost or ActorLost."""
        procs = self._spawned(name, self.cluster.spawn_trainers(name))
        try:
            await started(procs, SPAWN_S, name, self.lost)
        except Exception as error:
            nodes = self.cluster.placement.trainer_nodes
            raise await why_not_spawned(self.cluster, nodes, "trainers", error) from error
        return procs

    async def _take_kept_trainers(self, models: Mapping[str, ModelNeed]) -> Any | None:
        """The processes that the run before has left; None where there are none, or they do not answer."""
        if self._kept is None or (kept := self._kept.take("trainer")) is None:
            return None
        self._spawned(kept.name, kept.procs)
        call = kept.actor.renew.call(self.cluster.told(self.config), self.log_dir, models)
        try:
            await answer(call, self.lost, SPAWN_S, "the kept trainers, renew()")
        except ActorLost as error:
            if self.lost.done():
                raise
            logger.warning("%s; others take their place", error)
            del self._meshes[kept.name]
            self.cluster.end_at_once(kept.name)
            await stop_mesh(self.cluster.faults, kept)
            return None
        self._trainer_mesh = kept
        return kept.actor

    async def _leave_trainers(self) -> None:
        if self._kept is None or not self._hands_over:
            await self.trainers.leave(timeout_s=10)
            return
        await self.trainers.rest(timeout_s=REST_S)
        self._keep("trainer", self._trainer_mesh)

    def _keep(self, role: str, mesh: KeptMesh) -> None:
        assert self._kept is not None
        del self._meshes[mesh.name]
        self._kept.put(role, mesh)

    async def _model_dirs(self) -> dict[str, Path]:
        """Where the weights of each model are; those of the policy are found already."""
        paths = {name: need.path for name, need in self.needs.models.items() if need.path is not None}
        seed, place = self.config.seed, self.run_dir.path
        found = {
            name: await asyncio.to_thread(resolve_model, self._pins.named(path), seed, place / f"model-{name}")
            for name, path in paths.items()
        }
        vocabulary = self.tokenizer.get_vocab()
        for name, directory in found.items():
            if (await asyncio.to_thread(load_tokenizer, directory)).get_vocab() != vocabulary:
                raise UserError(
                    f"the model {name!r} ({directory}) has another vocabulary than the policy ({self.model_dir}): its "
                    "log-probabilities would be those of other tokens",
                    "take one with the same tokenizer",
                )
        return {POLICY: self.model_dir} | found

    @property
    def trainers(self) -> Trainers:
        assert self._trainers is not None, "start() comes first"
        return self._trainers

    @property
    def is_stuck(self) -> bool:
        """Whether trainers wait for one that has failed."""
        return self._trainers is not None and self._trainers.is_stuck

    @property
    def generators(self) -> Service:
        assert self._generators is not None, "start() comes first"
        return self._generators

    async def _start_generators(self, model_dir: Path) -> Service:
        """Spawn the generators on the weights of ``model_dir``.

        Those of an earlier attempt stay, rid of their requests; ``_connect`` gives them this attempt's weights.
        """
        service = await self._pool.start(model_dir)
        self._generators = service if self._base is None else service.of(self._adapter)
        while self._pool.said:
            self._tell(self._pool.said.pop(0))
        await self.end_requests()
        return self._generators

    def _reward_pool(self) -> RewardPools:
        """The rewards of the run."""
        return RewardPools(self.config, self.cluster.other_nodes, self.warn)

    async def _start_rewards(self) -> RewardPools:
        """Those of the run; of several adapters the same, which the first one's session has started."""

        async def start() -> RewardPools:
            rewards = await self._reward_pool().start()
            self._on_close(rewards.close)
            return rewards

        return await (start() if self._base is None else self._base.once("rewards", start))

    async def _start_environments(self, config: Config) -> Any:
        """The pool of ``environment``, None where there is none. Raises UserError where it cannot be loaded."""
        if config.environment.name is None:
            return None
        from forge_hpc.environments import EnvironmentPool

        pool = await EnvironmentPool(config, warn=self.warn, others=self.cluster.other_nodes).start()
        self._on_close(pool.close)
        return pool

    async def _episode_player(
        self, config: Config, generators: Service, environments: Any
    ) -> EpisodePlayer | AgentPlayer | None:
        if environments is None:
            return None
        if environments.is_agent:
            return await self._agent_player(config, generators, environments)
        from forge_hpc.rollouts.episodes import EpisodePlayer

        generate = generators.generate_turns.route
        return EpisodePlayer(config, self.tokenizer, generate, environments, len(generators))

    async def _agent_player(self, config: Config, generators: Service, environments: Any) -> AgentPlayer:
        """Agents ask an endpoint for the policy's responses. Raises UserError where it cannot be had."""
        from forge_hpc.endpoint import Endpoint, GeneratorSampler, tls_context
        from forge_hpc.rollouts.agents import AgentPlayer

        tls, ca = tls_context(config.environment.endpoint_host)
        endpoint = await Endpoint(config, self.tokenizer, GeneratorSampler(generators), self.warn, tls, ca).start()
        self._endpoints.append(endpoint)
        self._on_close(endpoint.close)
        logger.info("agents are answered at %s", endpoint.base_url)
        return AgentPlayer(config, self.tokenizer, endpoint, environments)

    def _evaluator_of(self, held_out: list[HeldOutSet]) -> Evaluator:
        ask, num = self._samples(self.generators.sample.stream), len(self.generators)
        return Evaluator(self.config, held_out, ask, num, self.metrics, self.warn, self._tell_message)

    def _samples(self, generators: SampleStream) -> SampleStream:
        """Samples of prompts: each source's from its player, or from the ``generators`` where it has none."""
        players = self._players or {"": None}
        return by_source({name: generators if player is None else player.stream for name, player in players.items()})

    async def _connect(self) -> None:
        """Put the weight store between trainers and generators, and the buffer, which is told of new weights.

        Generators that do not hold the trainers' weights (in a resumed run, after lost trainers, or where they had to
        sleep for the trainers to start) are brought up to date.
        """
        if self.needs.learns_from == "samples":
            self._buffer = episode_buffer(self.config, self.step, self._prompts.position, self._prompts.ahead)
            self._buffer.restore(self._restored_groups, self.state)
        assert self._store is not None, "the trainers have been started"
        self._published = self.step
        is_first = self._adapter not in self._pool.weights
        self._weights = self._pool.weights[self._adapter] = WeightSync(
            self.trainers,
            self._store,
            self.generators,
            self._buffer,
            self._tell,
            self.config.generator.verify_weights,
            self._turns,
        )
        if self._turns is not None:
            self._turns.wake = self._weights.wake
        if self.step > 0 or not is_first or self._turns is not None:
            self._weights.is_changed = True
            await self._weights.publish(self.step)
            await self._weights.delivered()

    async def _start_store(self) -> WeightStore:
        kept = self._kept.take("volume") if self._kept is not None else None
        if kept is None:
            name = f"volume{self._suffix}"
            kept = KeptMesh(name, self.cluster.spawn_volumes(name), None, self.cluster.layout("volume"))
        self._volumes = kept
        start = WeightStore.start(self._spawned(kept.name, kept.procs), self.cluster.placement.trainer_procs)
        return await with_timeout(start, self.config.cluster.start_timeout_s, "the weight store did not start")

    def _phase(self, name: str) -> None:
        if self.phases is not None:
            self.phases.end(name)

    async def _tell_phases(self) -> None:
        """The first step is done: say what the time went to, once."""
        if (phases := self.phases) is None:
            return
        phases.end("step")
        self.phases = None
        self._tell(phases.describe())
        try:
            await asyncio.to_thread(StartLog(self.run_dir).phases, phases.seconds)
        except OSError as error:
            logger.warning("the phases of the start are not in starts.jsonl: %s", error)

    def _tell(self, text: str) -> None:
        logger.info("%s", text)
        self.metrics.say(text)

    def _spawned(self, name: str, procs: Any) -> Any:
        """Processes without which this attempt is over."""
        self._meshes[name] = procs
        self.cluster.faults.watch(name, lambda reason: self.lose(f"{name}: {reason}"))
        return procs

    def lose(self, reason: str) -> None:
        """The attempt is over: calls to the trainers raise ActorLost from now on."""
        if not self.lost.done():
            self.lost.set_result(reason)

    # ---- data

    async def documents(self) -> DocumentStream:
        """The stream of training documents, from the start or where the recipe's state says. In a thread: data may
        have to be downloaded. Those of the first step are begun, and of each next one while a step is trained."""
        self._check_place("documents", '{"documents": documents.state_dict()}')
        documents = await asyncio.to_thread(self._load_documents)
        self._on_close(partial(asyncio.to_thread, documents.close))
        return documents

    def _load_documents(self) -> DocumentStream:
        sources = open_sources(self._pins.data_of(self.config))
        documents = DocumentStream(sources, self.tokenizer, self.config, self.recipe.renderer, ahead=True)
        documents.load_state_dict(self.state.get("documents", documents.state_dict()))
        documents.make_ahead(self.config.trainer.training.global_batch_size)
        return documents

    def _load_sft(self) -> SFTMix | None:
        """The examples that are learned beside what is sampled, where there are any."""
        config = with_sft_data(self.config)
        if config is None:
            return None
        sources = open_sources(self._pins.data_of(config))
        # A few a step, for each of what may be many sessions: a thread.
        stream = DocumentStream(sources, self.tokenizer, config, ahead=True, num_processes=0)
        mix = SFTMix(stream, config.algorithm.sft).load_state_dict(self.state.get("sft", stream.state_dict()))
        mix.make_ahead()
        return mix

    def _load_prompts(self) -> PromptStream:
        prompts = PromptStream(open_sources(self._pins.data_of(self.config)), self.tokenizer, self.config)
        return prompts.load_state_dict(self.state.get("prompts", prompts.state_dict()))

    def _check_place(self, stream: str, keep: str) -> None:
        """Raise UserError where the recipe's state does not say where the data go on: they would begin again. Empty is
        that of a fork with other data, which do begin."""
        if self.step and self.state and stream not in self.state:
            raise UserError(
                f"the recipe's state after step {self.step} does not say where the data go on: it has no {stream!r}",
                f"give end_step() {keep}, and what else the recipe needs beside it",
            )

    async def _held_out(self, rewards: RewardPools) -> list[HeldOutSet]:
        """What ``evaluation`` goes through, nothing where it is off; graded by ``rewards``, or by those of a set."""
        found = []
        for number, one in enumerate(held_out_sets(self._pins.data_of(self.config))):
            prompts = await asyncio.to_thread(self._load_held_out_prompts, one, number)
            pool: RewardPool | RewardPools = rewards
            if one.rewards:
                config = replace(self.config, reward=list(one.rewards))
                pool = await RewardPool(config, others=self.cluster.other_nodes, warn=self.warn).start()
                self._on_close(pool.close)
            found.append(HeldOutSet(one.label, prompts, pool))
        return found

    def _load_held_out_prompts(self, one: HeldOut, number: int) -> list[Prompt]:
        examples = load_eval_examples(one.config.data, one.config.seed)
        prompts = evaluation_prompts(examples, self.tokenizer, one.config, one.num_prompts, number)
        return [replace(prompt, source=one.source) for prompt in prompts]

    def _load_held_out_documents(self) -> dict[str, list[Document]]:
        """The documents of ``evaluation`` by label of their set, none where it is off."""
        found = {}
        for number, one in enumerate(held_out_sets(self._pins.data_of(self.config))):
            examples = load_eval_examples(one.config.data, one.config.seed)
            make = self.recipe.renderer, number
            found[one.label] = evaluation_documents(examples, self.tokenizer, one.config, one.num_prompts, *make)
        return found

    @asynccontextmanager
    async def rollouts(self) -> AsyncIterator[RolloutStream]:
        """Generate beside the body; an error in either ends both."""
        assert self._buffer is not None, "start() comes first, and the recipe's needs say that it learns from samples"
        self._check_place("prompts", "rollouts.state_dict()")
        generators = self.generators
        sample = self._samples(generators.generate.stream)
        stream = RolloutStream(
            self.config,
            self._prompts,
            sample,
            len(generators),
            self._rewards,
            self._buffer,
            self.warn,
            check=self._check_published,
            num_serving=lambda: len(generators.serving),
            admission=generators.admission,
            reward_more=self._reward_model(),
        )
        await self._begin_trace(self.step + 1)
        async with background(stream.run()):
            yield stream

    def _check_published(self, step: int) -> None:
        """Raise a UserError where groups of this step will never come, since the recipe has forgotten the weights."""
        needed = step - 1 - self.config.rollout.max_staleness
        if self.step == step - 1 and needed > self._published:
            raise UserError(
                f"step {step} trains on samples of the policy after step {needed} or a newer one, and the recipe has "
                f"brought the generators none since that after step {self._published}",
                "after each step: await session.publish(step)",
            )

    def _reward_model(self) -> RewardModel | None:
        """What gives the reward of a trained model, where the run has one."""
        reward = reward_model_of(self.config)
        if reward is None:
            return None
        return RewardModel(partial(self.trainers.values, model=REWARD_MODEL), reward.weight)

    def _finished_groups(self) -> list[Group]:
        return self._buffer.finished() if self._buffer is not None else []

    # ---- steps

    def remaining_steps(self) -> Iterator[int]:
        """The steps that are still to be done, from 1; none after an evaluation that ends the training. The first one's
        time counts from here."""
        self._step_ended = time.perf_counter()
        if self._turns is not None:
            self._turns.metrics()  # what was before
        for step in range(self.step + 1, self.config.trainer.training.steps + 1):
            if self._stops_early():
                return
            yield step

    def _stops_early(self) -> bool:
        if self.config.evaluation.patience is None or not self.metrics.is_evaluated(self.step):
            return False
        reason = why_stopped(self.config, read_jsonl(self.run_dir.evaluations))
        if reason is not None:
            self._tell(reason)
        return reason is not None

    async def train_step(
        self, step: int, documents: Sequence[Document], *, update: bool = True, model: str = POLICY
    ) -> dict[str, float]:
        """The optimizer step number ``step`` of a model on the documents; its metrics, with a model's name before them
        where it is not the policy. Without ``update`` it only measures, and weights and moments stay as they are.

        What was generated is compared with the trainers' weights first: where the two are further apart than rounding
        and staleness explain, RuntimeError ends the run before anything is changed, published or saved.

        From here to the end of ``end_step`` a request to leave waits, so that the step is not done twice; at any
        other place of the recipe it interrupts. A step that is to be saved begins once the save before is complete:
        whatever is killed, no more than ``checkpoint.interval`` steps are lost.
        """
        if step != self.step + 1:
            raise UserError(
                f"the recipe trains step {step} after step {self.step}",
                "session.remaining_steps() counts; each ends with: await session.end_step(step, metrics, state)",
            )
        begins = self.is_between_steps  # another model's may have begun it
        if begins:
            self._phase("rollout" if self.needs.generators == "beside" else "data")
        if model == POLICY:
            bounds = self._mismatch.bounds(step, documents)
            if self._sft is not None and update:
                documents = self._sft.mix(documents)
            documents = await self.trainers.with_reference(documents)
        if begins and self.is_between_steps:  # still
            await self._begin_step(step)
        start = time.perf_counter()
        if model != POLICY:
            metrics = await self.trainers.train_step(documents, update, model=model)
            self._saver.trained(time.perf_counter() - start)
            return {f"{model}/{key}": value for key, value in metrics.items()}
        self._ask_engines()
        with self._spans.span("train_step"):
            metrics = await self.trainers.train_step(documents, update, bounds.largest)
        self._saver.trained(time.perf_counter() - start)
        self._mismatch.check(step, metrics, bounds)
        if self._weights is not None and metrics["tokens/trained"]:
            self._weights.is_changed = True
        await self._end_trace(step)
        await self._begin_trace(step + 1)
        return metrics

    async def _begin_trace(self, step: int) -> None:
        """Have the generators trace what they do for a step of ``profile.steps``; its trainers know by themselves."""
        if step in self.config.profile.steps and not self._spans.is_recording:
            self._spans.begin()
            if self._generators is not None:
                await self._generators.start_trace.fanout()

    async def _end_trace(self, step: int) -> None:
        if step in self.config.profile.steps:
            directory = trace_dir(self.log_dir, step)
            await asyncio.to_thread(self._spans.end, directory / "controller.json.gz")
            if self._generators is not None:
                await self._generators.stop_trace.fanout(directory)

    def _ask_engines(self) -> None:
        """Have the generators say what they have done since the step before, while the trainers train: what has not
        come by the end of the step is not waited for."""
        if self._generators is not None and (self._engine_counts is None or self._engine_counts.done()):
            self._engine_counts = asyncio.ensure_future(self._generators.counts.fanout())

    def _performance(self, step_s: float, metrics: Mapping[str, float]) -> dict[str, float]:
        """Figures of the step's speed, beside those of the trainers."""
        placement = self.cluster.placement
        figures = {}
        if (num_tokens := metrics.get("tokens/generated")) is None and "perf/trainer_tokens_per_s" in metrics:
            num_tokens = metrics["perf/trainer_tokens_per_s"] * metrics["time/train_s"] * placement.trainer_procs
        if num_tokens is not None:
            num_lent = self._pool.lent.num_devices if self._pool.lent is not None else 0
            figures["perf/tokens_per_s"] = num_tokens / step_s / (placement.num_devices + num_lent)
        if (asked := self._engine_counts) is not None and asked.done():
            self._engine_counts = None
            if not asked.cancelled() and asked.exception() is None:
                figures |= engine_figures(asked.result(), placement.tensor_parallel_size)
        return figures

    async def _begin_step(self, step: int) -> None:
        await self._stay()
        start = time.perf_counter()
        with self._spans.span("save_wait"):
            await (self._saver.saved() if self._saver.is_due(step) else self._saver.staged())
        self._checkpoint_s += time.perf_counter() - start
        await self._stay()
        await self._begin_trace(step)  # of the first step, where nothing else has
        self._between_steps.clear()

    async def publish(self, step: int) -> None:
        """Bring the policy after ``step`` to the generators, every ``rollout.sync_interval`` steps and before an
        evaluation. Synchronous runs, and evaluations, wait until it is there."""
        assert self._weights is not None, "start() comes first"
        self._published = step
        rollout, evaluates = self.config.rollout, self._evaluation_is_due(step)
        if evaluates or step % rollout.sync_interval == 0:
            start = time.perf_counter()
            with self._spans.span("publish"):
                await self._weights.publish(step)
                if evaluates or rollout.max_staleness == 0:
                    await self._weights.delivered()
            self._publish_s += time.perf_counter() - start

    async def end_step(
        self, step: int, metrics: Mapping[str, float], state: Mapping[str, Any], groups: Sequence[Group] = ()
    ) -> None:
        """Write the figures of a step that is done, and a sample of its rollouts; then save the run every
        ``checkpoint.interval`` steps and at the last one: what was written before is on disk when the checkpoint is.

        Raises:
            UserError: it is not the step after the last one that was ended.
        """
        if step != self.step + 1:
            raise UserError(f"the recipe ends step {step} after step {self.step}", "session.remaining_steps() counts")
        self._record(step, metrics, groups)
        await self._tell_phases()
        self.state = dict(state) | ({"sft": self._sft.state_dict()} if self._sft is not None else {})
        start = time.perf_counter()
        with self._spans.span("save"):
            if self._saver.is_due(step):
                await self._saver.save(self.trainers, step, self.state)
                if self._turns is not None:  # else generators would take theirs before it
                    await self._saver.staged()
            await self._saver.export_if_due(self.trainers, step, leaving=self._leave.requested.is_set())
        self._checkpoint_s += time.perf_counter() - start
        self._between_steps.set()
        await self._stay()

    def _record(self, step: int, metrics: Mapping[str, float], groups: Sequence[Group]) -> None:
        now = time.perf_counter()
        if wrong := next((key for key, value in metrics.items() if not isinstance(value, Real)), None):
            said = f"the figure {wrong!r} of step {step} is {metrics[wrong]!r}, which is no number"
            raise UserError(said, "give session.end_step() numbers by their names")
        timing = {"time/step_s": now - self._step_ended, "time/checkpoint_s": self._checkpoint_s}
        if self._weights is not None:
            timing |= {"time/weight_sync_s": self._weights.seconds, "time/publish_s": self._publish_s}
        if self._turns is not None:
            timing |= self._turns.metrics()
        for endpoint in self._endpoints:
            timing |= {key: timing.get(key, 0.0) + value for key, value in endpoint.metrics().items()}
        if self._served is not None:
            timing |= self._served.metrics()
        self._step_ended, self._checkpoint_s, self._publish_s = now, 0.0, 0.0
        self.step = step
        self._recoveries.step_done()
        if self._pool.lent is not None:
            timing |= self._pool.lent.metrics()
        timing |= self._performance(timing["time/step_s"], metrics)
        counts = {"checkpoint/failed": float(self._saver.num_failed)} | self._recoveries.metrics()
        self.metrics.log(step, {"policy_version": step, **metrics, **timing, **counts})
        self._status.update(step=step, policy_version=step)
        if groups:
            self.metrics.log_rollouts(step, groups)

    def warn(self, text: str) -> None:
        """On the terminal, in ``status.json`` and in the log."""
        self.metrics.warn(text)
        self._tell_message(text)

    def _tell_message(self, text: str) -> None:
        self._status.update(message=text)

    # ---- evaluation

    def _evaluation_is_due(self, step: int) -> bool:
        """Before the first step, at the last one, and every ``evaluation.interval`` steps."""
        interval = self.config.evaluation.interval
        return step in (0, self.config.trainer.training.steps) or (interval > 0 and step % interval == 0)

    async def evaluate(self, step: int) -> dict[str, float]:
        """The figures of the policy after ``step``, written too: by answers where there are generators, else the loss
        on held-out documents, of the last step by ``finish``. Empty where none is due, or it was done before."""
        figures = await self._evaluate(step)
        self._phase("evaluation")
        if figures:
            await self._keep_best(step, figures)
            self._step_ended = time.perf_counter()
        elif step and self.config.checkpoint.best is not None and self.metrics.is_evaluated(step):
            # Written before a start that ended before its checkpoint was marked.
            records = await asyncio.to_thread(lambda: list(read_jsonl(self.run_dir.evaluations)))
            for record in records:
                if record["step"] == step and self.config.checkpoint.best in record:
                    await self._keep_best(step, record)
        return figures

    async def _evaluate(self, step: int) -> dict[str, float]:
        interval, last = self.config.evaluation.interval, self.config.trainer.training.steps
        if self._evaluator is not None:
            return await self._evaluator.evaluate(step) if self._evaluation_is_due(step) else {}
        if not interval or step % interval or step >= last or self.metrics.is_evaluated(step, "loss"):
            return {}
        if figures := await self._validation_loss():
            self.metrics.log_evaluation(step, figures)
        return figures

    async def _keep_best(self, step: int, figures: Mapping[str, float]) -> None:
        """Save the run as of ``step`` where it is the best yet by ``checkpoint.best``, and keep that."""
        name = self.config.checkpoint.best
        if name is None or not self.needs.trains:
            return
        best = self._saver.checkpoints.best()
        if best is not None and best["figure"] != name:  # of before it was changed
            best = None
        if name not in figures:
            if best is not None:
                self.warn(f"the evaluation of step {step} has no {name}, which checkpoint.best goes by")
                return
            known = ", ".join(key for key in figures if not key.rpartition("/")[2].startswith(("num_", "time_")))
            raise UserError(f"checkpoint.best is {name!r}, and an evaluation has no such figure", f"it has {known}")
        value = figures[name]
        improves = best is None or is_better(name, value, best["value"])
        if step > 0 and improves and await self.save_to_leave():
            await asyncio.to_thread(self._saver.checkpoints.mark_best, step, name, value)

    async def _validation_loss(self) -> dict[str, float]:
        """What the recipe says of the policy by held-out documents: by all, and by those of each of several sets;
        nothing where there are none."""
        sets = self._held_out_documents
        if not sets:
            return {}
        start = time.perf_counter()
        found: dict[str, float] = {}
        everything = [document for documents in sets.values() for document in documents]
        for label, documents in {"": everything, **sets}.items():
            figures = await self.recipe.validate(self, documents) | {"num_documents": len(documents)}
            found |= {f"{label}/{key}" if label else key: value for key, value in figures.items()}
        return found | {"time_s": time.perf_counter() - start}

    async def finish(self) -> None:
        """The run is done: wait for the last save, write the final weights, and evaluate what waited for that.

        Raises:
            RuntimeError: the final state could not be saved.
        """
        start = time.perf_counter()
        if self.needs.generators == "beside" and self._turns is None and self._base is None:
            self._pool.retire()
        better: int | None = None
        if not self.config.checkpoint.export_best:
            await self._save_and_export()
        else:
            await self._save_last()
            better = self._saver.better_step()
            if better is None or self.needs.generators == "after":  # these answer with the last weights
                await self.trainers.export(self.run_dir.export)
        logger.info("saved and exported in %.1f s", time.perf_counter() - start)
        if self._turns is not None:
            async with self._turns.generating():  # an engine that sleeps does not end in good order
                pass
        if self._held_out_documents:
            loss = await self._validation_loss()
            if self.needs.generators == "after":
                await self._evaluate_after_training(loss)
            else:
                self.metrics.log_evaluation(self.step, loss)
        if better is not None:
            await self._saver.export_best()
        self._is_finished = True

    async def check_done(self) -> None:
        """The recipe has returned: see that nothing that it has trained is lost, and that it is said.

        Raises:
            UserError: a step is not ended, or the run not finished.
        """
        if not self.needs.trains or self._is_finished:
            return
        if not self.is_between_steps:
            raise UserError(
                f"the recipe has trained step {self.step + 1}, and returned without ending it",
                "after each step: await session.end_step(step, metrics, state)",
            )
        if self._trainers is not None:
            await self._save_last()
        raise UserError(
            f"the recipe has returned after step {self.step} without finishing the run: nothing is exported",
            "at its end: await session.finish()",
        )

    async def _save_last(self) -> None:
        if not await self.save_to_leave():
            raise self._unsaved()

    def _unsaved(self, left: str = "") -> RuntimeError:
        where, why = self.run_dir.checkpoints, self._saver.why_failed
        return RuntimeError(f"the state after step {self.step} cannot be saved in {where}: {why}{left}")

    async def _save_and_export(self) -> None:
        """The last save, and beside it the export. The save comes first in all that one of them has to wait for."""
        if self._saver.begun_step < self.step:
            await self._saver.save(self.trainers, self.step, self.state)
        exporting = asyncio.ensure_future(self.trainers.export(self.run_dir.export))
        try:
            await self._saver.saved()
            if self._saver.saved_step < self.step:  # without the model there may be room for it
                await asyncio.wait({exporting})
                await asyncio.to_thread(shutil.rmtree, self.run_dir.export, ignore_errors=True)
                is_saved = await self.save_to_leave()
                exporting = asyncio.ensure_future(self.trainers.export(self.run_dir.export))
                await exporting
                if not is_saved:
                    raise self._unsaved(f"; its model is in {self.run_dir.export}")
            await exporting
        finally:
            if not exporting.cancel() and not exporting.cancelled():
                exporting.exception()  # the save's is raised

    async def _evaluate_after_training(self, loss: Mapping[str, float]) -> None:
        """With generators on the hardware that the trainers held."""
        await self.abandon()
        await self._start_generators(self.run_dir.export)
        async with self._reward_pool() as rewards:
            await self._evaluator_of(await self._held_out(rewards)).evaluate(self.step, more=loss)

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
        await self._saver.saved()
        if self._saver.saved_step < self.step:
            await self._saver.save(self.trainers, self.step, self.state)
            await self._saver.saved()
        return self._saver.saved_step == self.step

    async def end_requests(self) -> None:
        """Have the generators answer nothing more of what was asked of this policy: who asked is gone."""
        if self._generators is not None:
            await self._generators.abort.fanout()

    async def abandon(self) -> None:
        """After the recipe was cancelled: end what remains of this attempt's processes. The generators stay."""
        if self._weights is not None:
            self._weights.cancel()
        with contextlib.suppress(Exception):  # of trainers that are lost
            await self._saver.saved()
        await self.close()
        while self._meshes:
            name, procs = self._meshes.popitem()
            self.cluster.faults.forget(name)
            if self.lost.done():
                self.cluster.end_at_once(name)
            try:
                await with_timeout(procs.stop(), STOP_S, f"{name} did not end")
            except Exception as error:  # of a dead host, say: whether new ones can be started is what matters
                logger.warning("ending %s: %s", name, error)

    async def hand_over(self) -> None:
        """The run is over, well or not: leave the trainers' processes for the next run, and end all else."""
        if self._weights is not None:
            self._weights.cancel()
        with contextlib.suppress(Exception):  # it has been said
            await self._saver.saved()
        self._hands_over = True
        await self.close()
        if self._store is not None and self._store.is_open and self._volumes and self._volumes.name in self._meshes:
            with contextlib.suppress(Exception):  # then its processes are ended below
                await answer(self._store.stop(), self.lost, REST_S, "the weight store, stop()")
                self._keep("volume", self._volumes)
        if self.is_stuck:
            self.cluster.end_at_once(self._trainer_mesh.name)
        for name, procs in self._meshes.items():
            await stop_mesh(self.cluster.faults, KeptMesh(name, procs, None, None))

    def _on_close(self, close: Callable[[], Awaitable[Any]]) -> None:
        """Have ``close`` called at the end, whatever it is; the last one registered first."""
        self._closing.append(close)

    async def close(self) -> None:
        """End the actors in good order; whatever does not answer is ended by its owner, the node's supervisor."""
        while self._closing:
            close = self._closing.pop()
            try:
                await close()
            except ActorLost as error:  # it has ended by itself
                logger.warning("an actor did not end in good order: %s", error)
            except Exception:  # the run's result stands, and the supervisor ends what is left
                logger.warning("an actor did not end in good order", exc_info=True)


async def all_of(*awaitables: Awaitable[Any]) -> None:
    """Wait until all are done; the first one's error, where some have one."""
    for result in await asyncio.gather(*awaitables, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result


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
