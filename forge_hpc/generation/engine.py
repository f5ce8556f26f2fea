"""The generation engine: vLLM stepped by one thread, with an asynchronous face.

    callers (event loop) ──requests, weights──► inbox ──► thread: admit ─► step ─► step ─► … ──completions──► callers

The thread produces completions and consumes requests; it sleeps while there are none. Requests join the batch
between two steps while others decode. New weights are loaded between two steps too: requests in flight go on under
them, keep the KV cache they have (the usual thing in asynchronous RL) and report both versions; requests that start
later never share a prefix that older weights computed, because the number of loads salts the prefix cache.

Where trainers use the same GPU in turns with it the engine sleeps while they compute (``sleep``): requests wait.

If the thread fails, every caller that waits, and every later one, gets a GenerationError.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, cast

import torch

from forge_hpc.cluster.stacks import stand_by_worker
from forge_hpc.config.adapters import adapter_configs
from forge_hpc.config.errors import UserError
from forge_hpc.config.models import check_generated, read_model_config
from forge_hpc.config.schema import Config, SamplingConfig
from forge_hpc.config.split import takes_turns
from forge_hpc.data.types import Completion, Prompt, Turn
from forge_hpc.generation.adapter import adapter_shapes, complete_adapter, staged_adapter
from forge_hpc.generation.checkpoint import (
    check_shapes,
    checkpoint_shapes,
    checkpoint_tensors,
    complete_weights,
    model_files,
)
from forge_hpc.generation.direct import load_offer, try_to_open
from forge_hpc.generation.experts import RouteRecorder, record_routes, set_up_experts_anew
from forge_hpc.generation.invariant import replace_operations
from forge_hpc.generation.options import cache_arguments, engine_arguments, inspect_architecture, prepare_environment
from forge_hpc.generation.seeds import sample_seed
from forge_hpc.generation.sleep import SleepingEngine
from forge_hpc.generation.staging import staged_checkpoint
from forge_hpc.imports import importing
from forge_hpc.invariance import prepare_invariance
from forge_hpc.observability.performance import EngineCounts
from forge_hpc.weights.memory import Unreachable
from forge_hpc.weights.offers import Offer

logger = logging.getLogger(__name__)
P = TypeVar("P", Prompt, Turn)
HandOver: TypeAlias = Callable[[tuple[tuple[int, int], Completion]], None]
"""Gets a completion with its place: the prompt's index in its batch, and the sample's among the prompt's."""


class GenerationError(RuntimeError):
    """The engine has failed or was closed; its requests are lost."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counts since the start, and what is in the engine now."""

    policy_version: int
    num_running: int
    """Requests that vLLM holds."""
    num_waiting: int
    """Requests that wait for a place among ``max_num_seqs``."""
    num_finished: int
    num_generated_tokens: int
    num_prompt_tokens: int
    num_steps: int
    num_weight_loads: int
    busy_s: float
    """Time spent in steps, without weight loads."""
    weight_load_s: float


@dataclass(slots=True, eq=False)
class _Group:
    """All samples of one prompt, or the one response of a turn, on their way through the engine."""

    prompt: Prompt | Turn
    sampling_params: list[Any]
    """One vLLM ``SamplingParams`` a sample."""
    share: str
    """Groups with the same share may reuse each other's prefixes."""
    adapter: int = 0
    """Which of the engine's policies answers: 0 but for the others of ``trainer.lora.sweep``."""
    future: Future[list[Completion]] = field(default_factory=lambda: _future())
    completions: dict[int, Completion] = field(default_factory=dict)
    hand_over: Callable[[int, Completion], Any] | None = None
    """Gets each completion with its sample's index; called in the thread."""
    hand_tokens: Callable[[Sequence[int], Sequence[float]], Any] | None = None
    """Gets all tokens so far with their log-probabilities, after each step; called in the thread."""


class GenerationEngine:
    """One vLLM engine on a model directory, used from one event loop.

    With ``trainer.lora.sweep`` it holds several policies, the adapters on one base. Each has its own version, and
    whatever asks for answers or brings weights says by ``adapter`` which one is meant, by its number.

    Example:
        engine = GenerationEngine(model_dir, config, device="cpu")
        completions = await engine.generate(prompt, 8, seed=config.seed)
        await engine.load_weights(1, named_tensors)
        engine.close()
    """

    def __init__(
        self,
        model_dir: str | Path,
        config: Config,
        *,
        device: str,
        policy_version: int = 0,
        kv_cache_bytes: int | None = None,
    ) -> None:
        """Build the engine; blocks for seconds (CPU) to a minute (CUDA graphs).

        Args:
            model_dir: local Hugging Face directory with config, tokenizer and safetensors.
            config: ``model.dtype``, ``seed``, ``rollout.*`` and ``generator.*`` are read.
            device: ``cpu`` or ``cuda``, what the installed vLLM was built for.
            policy_version: version of the weights in ``model_dir``.
            kv_cache_bytes: size of the KV cache on each GPU; else vLLM measures what its share of one leaves for it.

        Raises:
            FileNotFoundError: the directory has no safetensors.
            UserError: vLLM would compute another model, and not say so.
            Exception: whatever vLLM raises for a model or options that it does not take.
        """
        check_generated(read_model_config(Path(model_dir)), f"the model in {model_dir}")
        self._config = config
        self._device = device
        self._configs = adapter_configs(config)
        self._versions = [policy_version] * len(self._configs)
        self._num_loads = [0] * len(self._configs)
        self._is_tainted = False
        """One of several adapters has left what is not finite in the KV cache, where 0 times it is not 0 for others."""
        self._arguments = engine_arguments(model_dir, config, device)
        self._model = model_files(model_dir)
        self._expected = checkpoint_shapes(model_dir)
        self._adapters = adapter_shapes(self._expected, config.trainer.lora)
        self._lora_requests: dict[int, Any] = {}  # of vLLM's, by adapter, once there is one
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._pending: deque[tuple[_Group, int]] = deque()
        self._running: dict[str, tuple[_Group, int]] = {}
        self._request_ids = itertools.count()
        self._batch_ids = itertools.count()
        self._closing = False
        self._failure: GenerationError | None = None
        self._unanswered: set[Future[Any]] = set()
        self._lock = threading.Lock()
        self._num_finished = self._num_generated_tokens = self._num_prompt_tokens = 0
        self._num_steps = 0
        self._busy_s = self._weight_load_s = 0.0
        self._counts = EngineCounts()

        started: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._run,
            args=(self._arguments | cache_arguments(kv_cache_bytes, device), started),
            name="generation",
            daemon=True,
        )
        self._thread.start()
        started.result()

    # ---- the asynchronous face: called from the event loop -------------------------------------------------------

    @property
    def policy_version(self) -> int:
        """Version of the weights that the next token is sampled from; of several adapters the first one's."""
        return self._versions[0]

    @property
    def kv_cache_bytes(self) -> int:
        """Size of the KV cache, on each GPU of a tensor-parallel engine."""
        return cache_bytes(self._scheduler.kv_cache_config)

    async def generate(
        self,
        prompt: Prompt,
        n: int,
        *,
        seed: int,
        sampling: SamplingConfig | None = None,
        max_tokens: int | None = None,
        adapter: int = 0,
    ) -> list[Completion]:
        """Sample ``n`` completions of a prompt, beside whatever else is being generated.

        Sample i is seeded by ``sample_seed(seed, prompt.position, i)``. ``sampling`` and ``max_tokens`` default to
        those of the configuration's ``rollout``; temperature 0 is greedy. Cancelling the call aborts its requests.

        Raises:
            ValueError: the prompt is empty, too long, or holds tokens that the model does not have; or vLLM refuses the
                request.
            TimeoutError: not done after ``generator.timeout_s``; the engine is stuck.
            GenerationError: the engine failed or was closed.
        """
        group = self._group(prompt, n, seed, sampling, max_tokens, "", adapter)
        [result] = await self._complete([group])
        if isinstance(result, ValueError):
            raise result
        return result

    async def generate_batch(
        self,
        prompts: Sequence[Prompt],
        n: int,
        *,
        seed: int,
        sampling: SamplingConfig | None = None,
        max_tokens: int | None = None,
        hand_over: HandOver | None = None,
        adapter: int = 0,
    ) -> list[list[Completion] | ValueError]:
        """Sample ``n`` completions of each prompt; all requests are admitted, in order, before the first step.

        In an engine that is idle the result is bitwise a function of weights, prompts and seed alone (on the CPU in
        float32): it depends on what is in a batch together, and nothing computed earlier is reused.

        A bad prompt has its ValueError in the place of its completions; the others are not touched by it. Raises as
        ``generate`` otherwise. ``hand_over`` gets each completion while others are still being generated; it is called
        in the event loop, for all of them before this returns.
        """
        share = f"batch-{next(self._batch_ids)}"
        return await self._batch(
            prompts, lambda prompt: self._group(prompt, n, seed, sampling, max_tokens, share, adapter), hand_over
        )

    async def generate_turns(
        self,
        turns: Sequence[Turn],
        *,
        seed: int,
        sampling: SamplingConfig | None = None,
        share: str | None = None,
        adapter: int = 0,
    ) -> list[Completion | ValueError]:
        """The next response of each of several episodes; all requests are admitted, in order, before the first step.

        Each is seeded by ``sample_seed(seed, position, sample_index, turn)``. Calls with the same ``share`` use each
        other's KV cache where their tokens begin alike, as those of one episode do. Without it nothing computed
        earlier is reused, and the result is determined as that of ``generate_batch``.

        Errors are as in ``generate_batch``.
        """
        name = f"batch-{next(self._batch_ids)}" if share is None else f"turns-{share}"
        answers = await self._batch(
            turns, lambda turn: self._group(turn, 1, seed, sampling, turn.max_tokens, name, adapter)
        )
        return [answer if isinstance(answer, ValueError) else answer[0] for answer in answers]

    async def stream_turn(
        self,
        turn: Turn,
        hand_token: Callable[[int, int, float], None],
        *,
        seed: int,
        sampling: SamplingConfig | None = None,
        share: str | None = None,
        adapter: int = 0,
    ) -> Completion | ValueError:
        """As ``generate_turns`` of one, whose tokens are wanted as they come: ``hand_token`` gets the place, the id and
        the log-probability of each, in the event loop, all of them before this returns."""
        loop, num_handed = asyncio.get_running_loop(), 0

        def hand_new(token_ids: Sequence[int], logprobs: Sequence[float]) -> None:
            nonlocal num_handed
            for place in range(num_handed, len(token_ids)):
                with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                    loop.call_soon_threadsafe(hand_token, place, token_ids[place], logprobs[place])
            num_handed = len(token_ids)

        def group(turn: Turn) -> _Group:
            name = share or f"batch-{next(self._batch_ids)}"
            made = self._group(turn, 1, seed, sampling, turn.max_tokens, name, adapter)
            made.hand_tokens = hand_new
            for params in made.sampling_params:
                params.output_kind = RequestOutputKind.CUMULATIVE
            return made

        from vllm.sampling_params import RequestOutputKind

        [answer] = await self._batch([turn], group)
        return answer if isinstance(answer, ValueError) else answer[0]

    async def _batch(
        self, prompts: Sequence[P], group: Callable[[P], _Group], hand_over: HandOver | None = None
    ) -> list[list[Completion] | ValueError]:
        """Send a group for each prompt through the engine; the error of one that cannot be made is its result."""
        loop = asyncio.get_running_loop()

        def tell(place: int, index: int, completion: Completion) -> None:
            assert hand_over is not None
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(hand_over, ((place, index), completion))

        results: list[_Group | ValueError] = []
        for place, prompt in enumerate(prompts):
            try:
                results.append(made := group(prompt))
            except ValueError as error:
                results.append(error)
            else:
                made.hand_over = partial(tell, place) if hand_over is not None else None
        completed = iter(await self._complete([result for result in results if isinstance(result, _Group)]))
        return [next(completed) if isinstance(result, _Group) else result for result in results]

    async def load_weights(
        self, version: int, named_tensors: Iterable[tuple[str, torch.Tensor]], adapter: int = 0
    ) -> None:
        """Put new weights in place between two steps and make ``version`` the policy version.

        ``named_tensors`` are the full, unsharded tensors by Hugging Face name, all that the checkpoint holds (a tied
        head may be left out), on the CPU or on the engine's device, of any floating dtype. They may be changed again
        when the call has returned.

        Raises:
            ValueError: names or shapes do not match the checkpoint; nothing was changed.
            TimeoutError, GenerationError: as ``generate``; a failure half way ends the engine.

        With ``trainer.lora.publish=adapters`` they are the adapters, by PEFT's names, and the weights stay those of the
        model directory.
        """
        if self._config.trainer.lora.sends_adapters:
            await self._load_adapter(version, complete_adapter(named_tensors, self._adapters), adapter)
            return
        tensors = complete_weights(named_tensors, self._expected, self._tied_head)
        if self._config.generator.engine.tensor_parallel_size == 1:
            await self._reload(version, {"weights_iterator": ((name, t.to(self._dtype)) for name, t in tensors)})
            return
        staging = staged_checkpoint(tensors, self._dtype)
        directory = await asyncio.to_thread(staging.__enter__)
        try:
            await self._reload(version, {"weights_path": str(directory)})
        finally:
            await asyncio.to_thread(staging.__exit__, None, None, None)

    async def _load_adapter(self, version: int, tensors: dict[str, torch.Tensor], adapter: int) -> None:
        staging = staged_adapter(tensors, self._configs[adapter].trainer.lora, self._dtype)
        directory = await asyncio.to_thread(staging.__enter__)
        try:
            done = _future()
            self._post(lambda: self._put_adapter(version, directory, adapter, done), [done])
            await self._answers([done])
        finally:
            await asyncio.to_thread(staging.__exit__, None, None, None)

    async def load_offer(self, offer: Offer) -> None:
        """As ``load_weights``, of weights that lie in the trainers' memory on a GPU of this host: each worker reads
        them there. They may be changed when the call has returned.

        Raises:
            Unreachable: a worker cannot read them; nothing was changed.
            ValueError, TimeoutError, GenerationError: as ``load_weights``, also of a checksum that is wrong.
        """
        check_shapes(offer.shapes, self._expected, self._tied_head)
        done = _future()
        self._post(lambda: self._load_offer(offer, done), [done])
        [failure] = await self._answers([done])
        if failure is not None:
            raise Unreachable(failure)

    async def renew(self, model_dir: str | Path, config: Config) -> str:
        """Serve another run: what is under way ends, and the weights become those of ``model_dir``, version 0. What is
        generated from here on is what a new engine would generate.

        Returns:
            Why that takes a new engine; empty where it does not. ``seed`` does not: each request has its own.

        Raises:
            UserError: the directory holds other tensors than it says.
            TimeoutError, GenerationError: as ``generate``.
        """
        if why := self._differs(model_dir, config):
            return why
        self.abort()
        self._config, self._configs = config, adapter_configs(config)
        try:
            await self.load_weights(0, checkpoint_tensors(model_dir))
        except ValueError as error:
            raise UserError(f"{model_dir}: {error}") from None
        self.take_counts()
        return ""

    def _differs(self, model_dir: str | Path, config: Config) -> str:
        """What an engine is made of, and differs from this one's, by name."""
        if self._config.trainer.lora.sends_adapters:  # they stand beside the weights of one model directory
            return "adapters beside its own weights"
        ours, theirs = self._arguments, engine_arguments(model_dir, config, self._device)
        names = [
            name
            for name in sorted(ours.keys() | theirs.keys())
            if name not in ("model", "seed") and ours.get(name) != theirs.get(name)
        ]
        if takes_turns(config) and self._config.generator.engine.sleep_level != config.generator.engine.sleep_level:
            names.append("sleep_level")
        if self._config.algorithm.routing_replay != config.algorithm.routing_replay:
            names.append("routing_replay")
        if self._config.model.batch_invariant != config.model.batch_invariant:
            names.append("batch_invariant")
        model = model_files(model_dir)
        changed = [
            name for name in sorted(model.keys() | self._model.keys()) if model.get(name) != self._model.get(name)
        ]
        if changed:
            names.append(f"the model ({', '.join(changed[:3])}{', …' * (len(changed) > 3)})")
        return f"other {', '.join(names)}" if names else ""

    async def relabel(self, version: int, adapter: int = 0) -> None:
        """Make ``version`` the policy version of the weights that are in place. Raises as ``load_weights``."""
        done = _future()
        self._post(lambda: self._label(version, done, adapter), [done])
        await self._answers([done])

    async def sleep(self) -> str:
        """End all requests, and give up the GPU memory of KV cache and weights (``generator.engine.sleep_level``); what
        that came to. Safe to repeat. Raises as ``load_weights``."""
        return await self._told(self._sleep)

    async def wake(self) -> str:
        """Serve again; what that came to. Safe to repeat. Weights that were given up have to be loaded before.

        Raises:
            ValueError: they were not.
            TimeoutError, GenerationError: as ``load_weights``.
        """
        return await self._told(self._wake)

    async def _told(self, command: Callable[[Future[Any]], None]) -> str:
        done = _future()
        self._post(lambda: command(done), [done])
        [said] = await self._answers([done])
        if isinstance(said, ValueError):
            raise said
        return said

    async def call_workers(self, function: Callable[..., Any], *args: Any) -> None:
        """Call ``function(worker, *args)`` in each of vLLM's workers between two steps. Raises as ``load_weights``."""
        done = _future()

        def call() -> None:
            self._engine.collective_rpc(cast(Any, function), args=args)
            done.set_result(None)

        self._post(call, [done])
        await self._answers([done])

    def abort(self, adapter: int = 0) -> None:
        """End all requests to a policy; their callers get GenerationError."""
        self._post(lambda: self._abort({group for group in self._unfinished() if group.adapter == adapter}), [])

    def begin_to_close(self) -> None:
        """As ``close``, which takes vLLM a second, without waiting for it: for a process that ends anyway."""
        self._closing = True
        self._inbox.put(lambda: None)  # wakes the thread

    def close(self, timeout_s: float = 30.0) -> None:
        """End all requests and the engine, its worker processes included. Safe to repeat.

        Raises TimeoutError if the thread is stuck in a step for longer than ``timeout_s``.
        """
        self.begin_to_close()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise TimeoutError(f"the generation thread did not end within {timeout_s:.0f} s")

    def stats(self) -> EngineStats:
        """Counts since the start; cheap, from any thread."""
        return EngineStats(
            policy_version=self.policy_version,
            num_running=len(self._running),
            num_waiting=len(self._pending),
            num_finished=self._num_finished,
            num_generated_tokens=self._num_generated_tokens,
            num_prompt_tokens=self._num_prompt_tokens,
            num_steps=self._num_steps,
            num_weight_loads=sum(self._num_loads),
            busy_s=self._busy_s,
            weight_load_s=self._weight_load_s,
        )

    def take_counts(self) -> EngineCounts:
        """What has been done since the last call; cheap, from the event loop."""
        counts, self._counts = self._counts, EngineCounts()
        return counts

    def _group(
        self,
        prompt: Prompt | Turn,
        n: int,
        seed: int,
        sampling: SamplingConfig | None,
        max_tokens: int | None,
        share: str,
        adapter: int,
    ) -> _Group:
        """``n`` samples of a prompt, or one of a turn; ValueError for a prompt that the engine cannot take."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        if n < 1:
            raise ValueError(f"prompt {prompt.position}: n must be at least 1, not {n}")
        length = len(prompt.token_ids)
        if length == 0:
            raise ValueError(f"prompt {prompt.position} is empty")
        if length >= self._max_model_len:
            raise ValueError(
                f"prompt {prompt.position} has {length} tokens and leaves no room for a response: "
                f"the engine's max_model_len is {self._max_model_len}"
            )
        if max(prompt.token_ids) >= self._vocab_size or min(prompt.token_ids) < 0:
            raise ValueError(f"prompt {prompt.position} has a token outside the vocabulary of {self._vocab_size}")
        sampling = sampling or self._configs[adapter].rollout.sampling
        max_tokens = max_tokens or self._config.rollout.max_response_tokens
        if isinstance(prompt, Turn):
            seeds = [sample_seed(seed, prompt.position, prompt.sample_index, prompt.turn)]
        else:
            seeds = [sample_seed(seed, prompt.position, index) for index in range(n)]
        with _refusals(prompt):
            sampling_params = [
                SamplingParams(
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    top_k=sampling.top_k,
                    min_p=sampling.min_p,
                    repetition_penalty=sampling.repetition_penalty,
                    stop=list(sampling.stop),
                    stop_token_ids=list(sampling.stop_token_ids),
                    max_tokens=min(max_tokens, self._max_model_len - length),
                    seed=request_seed,
                    logprobs=0,  # of the sampled token alone
                    flat_logprobs=True,
                    # The finished completion is decoded once; only stop strings are looked for at every token.
                    detokenize=bool(sampling.stop),
                    skip_special_tokens=False,  # they may be a part of what is looked for
                    output_kind=RequestOutputKind.FINAL_ONLY,
                    skip_clone=True,
                    routed_experts_prompt_start=prompt.num_routed if isinstance(prompt, Turn) else 0,
                )
                for request_seed in seeds
            ]
        return _Group(prompt, sampling_params, share, adapter)

    async def _complete(self, groups: list[_Group]) -> list[list[Completion] | ValueError]:
        """Send groups through the engine. They enter between the same two steps, in order."""

        def admit() -> None:
            for group in groups:
                self._pending.extend((group, index) for index in range(len(group.sampling_params)))

        self._post(admit, [group.future for group in groups])
        try:
            return await self._answers([group.future for group in groups])
        except (TimeoutError, asyncio.CancelledError):
            self._inbox.put(lambda: self._abort(set(groups)))
            raise

    async def _reload(self, version: int, arguments: dict[str, Any]) -> None:
        done = _future()
        self._post(lambda: self._load(version, arguments, done), [done])
        await self._answers([done])

    def _post(self, command: Callable[[], None], futures: list[Future[Any]]) -> None:
        """Give the thread a command that will resolve these futures, or raise if it takes none any more."""
        with self._lock:
            if self._failure is not None:
                raise GenerationError(str(self._failure)) from self._failure
            for future in futures:
                self._unanswered.add(future)
                future.add_done_callback(self._unanswered.discard)
            self._inbox.put(command)

    async def _answers(self, futures: list[Future[Any]]) -> list[Any]:
        """Results of the futures, ValueErrors among them; raises any other error, and TimeoutError."""
        timeout_s = self._config.generator.timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                answers = await asyncio.gather(*map(asyncio.wrap_future, futures), return_exceptions=True)
        except TimeoutError:
            raise TimeoutError(f"the generation engine did not answer within {timeout_s:.0f} s") from None
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, ValueError):
                raise answer
        return answers

    # ---- the thread: everything below runs in it -----------------------------------------------------------------

    def _run(self, arguments: dict[str, Any], started: Future[None]) -> None:
        """Build the engine and step it until it is closed or fails."""
        # On the CPU vLLM compiles two small functions of its sampler, which costs the first request 4 s and gains
        # nothing. The stance holds for the whole process, as long as this engine lives.
        with torch.compiler.set_stance("force_eager" if self._device == "cpu" else "default"):
            try:
                self._build(arguments)
            except BaseException as error:
                started.set_exception(error)
                return
            started.set_result(None)
            self._serve()

    def _serve(self) -> None:
        failure = GenerationError("the generation engine was closed")
        try:
            while not self._closing:
                self._take_commands()
                if not self._sleeping.is_asleep:
                    self._admit()
                if self._running:
                    self._step()
        except BaseException as error:  # handed to every caller, now and later: none may wait for a dead thread
            logger.exception("the generation engine failed")
            failure = GenerationError(f"the generation engine failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
        with self._lock:
            self._failure = failure
            unanswered = list(self._unanswered)
        for future in unanswered:
            future.set_exception(failure)
        self._pending.clear()
        self._running.clear()
        self._engine.engine_core.shutdown()

    def _build(self, arguments: dict[str, Any]) -> None:
        prepare_environment()
        with importing():
            from vllm import EngineArgs
            from vllm.v1.engine.llm_engine import LLMEngine

            inspect_architecture(arguments["model"])
        if self._config.model.batch_invariant:
            prepare_invariance("a generator")
            replace_operations()
        try:
            self._engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
        except ValueError as error:  # pydantic's cannot be sent to another process
            if not hasattr(error, "errors"):
                raise
            reason = "; ".join(str(problem["msg"]) for problem in error.errors())
            raise UserError(f"vLLM refuses the options of its engine: {reason}", "see generator.engine") from None
        self._engine.set_weight_version(self._label_text)
        # It warns of modules without weights, rotary embeddings for one, at every update; complete_weights() checks.
        logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)
        model = self._engine.model_config
        self._max_model_len: int = model.max_model_len
        self._vocab_size: int = model.get_vocab_size()
        self._dtype = cast(torch.dtype, model.dtype)
        self._tied_head = bool(getattr(model.hf_text_config, "tie_word_embeddings", False))
        self._max_num_seqs: int = self._engine.vllm_config.scheduler_config.max_num_seqs
        self._tokenizer = self._engine.get_tokenizer()
        self._sleeping = SleepingEngine(self._engine, self._config.generator.engine.sleep_level, self._device)
        self._scheduler = cast(Any, self._engine.engine_core).engine_core.scheduler
        self._count_preemptions()
        self._routes: RouteRecorder | None = None
        if self._device == "cpu" and model.is_moe:
            self._engine.collective_rpc(cast(Any, set_up_experts_anew))
            if self._config.algorithm.routing_replay:
                [self._routes] = self._engine.collective_rpc(cast(Any, record_routes))
        if self._config.generator.engine.tensor_parallel_size > 1:  # processes of their own
            self._engine.collective_rpc(cast(Any, stand_by_worker))
        if len(self._configs) > 1:
            self._add_empty_adapters()

    def _add_empty_adapters(self) -> None:
        """Of several each has one before it has learned, too: on the CPU vLLM 0.32 takes the index of a request without
        one, -1, for that of the last, and would answer with somebody else's."""
        zeros = {name: torch.zeros(shape) for name, shape in self._adapters.items()}
        for adapter, config in enumerate(self._configs):
            with staged_adapter(zeros, config.trainer.lora, self._dtype) as directory:
                self._add_adapter(directory, adapter)

    def _count_preemptions(self) -> None:
        """vLLM 0.32 counts them only where it logs all of its statistics, some of them at every token."""
        preempt = self._scheduler._preempt_request

        def counted(*args: Any, **options: Any) -> Any:
            self._counts.num_preemptions += 1
            return preempt(*args, **options)

        self._scheduler._preempt_request = counted

    def _take_commands(self) -> None:
        """Run what callers sent; waits for it only where there is nothing else to do."""
        if not self._running and (self._sleeping.is_asleep or not self._pending):
            self._inbox.get()()
        while not self._inbox.empty():
            self._inbox.get()()

    def _admit(self) -> None:
        """Fill vLLM up to ``max_num_seqs`` requests.

        The rest waits here, so that a request is salted by the weights that will compute its prompt.
        """
        from vllm.inputs.engine import tokens_input

        if self._is_tainted and self._pending:
            if self._running:
                return
            self._engine.reset_prefix_cache()
            self._engine.collective_rpc(cast(Any, clear_kv_cache))
            self._is_tainted = False
        while self._pending and len(self._running) < self._max_num_seqs:
            group, index = self._pending.popleft()
            request_id = str(next(self._request_ids))
            salt = f"weights-{group.adapter}-{self._num_loads[group.adapter]}/{group.share}"
            try:
                with _refusals(group.prompt):
                    prompt = tokens_input(group.prompt.token_ids, cache_salt=salt)
                    params = group.sampling_params[index]
                    lora_request = self._lora_requests.get(group.adapter)
                    self._engine.add_request(request_id, prompt, params, lora_request=lora_request)
            except ValueError as error:
                self._abort({group}, error)
                continue
            self._running[request_id] = (group, index)

    def _step(self) -> None:
        start = time.perf_counter()
        for output in self._engine.step():
            if output.finished:
                self._finish(output)
            else:
                self._hand_tokens(output)
        seconds = time.perf_counter() - start
        self._num_steps += 1
        self._busy_s += seconds
        counts = self._counts  # the event loop may put another in its place
        counts.num_steps += 1
        counts.busy_s += seconds
        counts.running += len(self._scheduler.running)
        counts.waiting += len(self._pending) + len(self._running) - len(self._scheduler.running)
        counts.kv_cache_usage = max(counts.kv_cache_usage, self._scheduler.kv_cache_manager.usage)

    def _hand_tokens(self, output: Any) -> None:
        group, _ = self._running[output.request_id]
        [sample] = output.outputs
        if group.hand_tokens is not None:
            group.hand_tokens(sample.token_ids, sample.logprobs.logprobs)

    def _finish(self, output: Any) -> None:
        """Book one finished request; the last of a group answers its caller."""
        group, index = self._running.pop(output.request_id)
        [sample] = output.outputs
        if sample.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"vLLM ended request {output.request_id} with {sample.finish_reason!r}")
        token_ids = list(sample.token_ids)
        logprobs = list(sample.logprobs.logprobs)
        assert len(logprobs) == len(token_ids)
        self._is_tainted |= len(self._configs) > 1 and not all(map(math.isfinite, logprobs))
        versions = sample.weight_versions
        num_routed = group.sampling_params[index].routed_experts_prompt_start
        group.completions[index] = Completion(
            sample_index=group.prompt.sample_index if isinstance(group.prompt, Turn) else index,
            text=said_text(self._tokenizer, token_ids, sample.finish_reason, sample.stop_reason),
            token_ids=token_ids,
            logprobs=logprobs,
            finish_reason=sample.finish_reason,
            policy_versions=(_version_in(versions[0], group.adapter), _version_in(versions[-1], group.adapter)),
            routes=sample.routed_experts if self._routes is None else self._routes.take(output.request_id, num_routed),
        )
        if group.hand_tokens is not None:
            group.hand_tokens(token_ids, logprobs)
        if group.hand_over is not None:
            group.hand_over(index, group.completions[index])
        self._num_finished += 1
        self._num_generated_tokens += len(token_ids)
        self._num_prompt_tokens += len(group.prompt.token_ids)
        counts = self._counts
        counts.num_generated_tokens += len(token_ids)
        counts.num_prompt_tokens += len(group.prompt.token_ids)
        counts.num_cached_tokens += output.num_cached_tokens or 0
        if len(group.completions) == len(group.sampling_params):
            group.future.set_result([group.completions[i] for i in range(len(group.completions))])

    def _load(self, version: int, arguments: dict[str, Any], done: Future[Any]) -> None:
        start = time.perf_counter()
        self._settle()
        self._sleeping.make_room_for_weights()
        self._engine.collective_rpc("reload_weights", kwargs=arguments)
        self._sleeping.has_weights = True
        self._num_loads[0] += 1
        self._add_weight_load(time.perf_counter() - start)
        self._label(version, done)

    def _add_weight_load(self, seconds: float) -> None:
        self._weight_load_s += seconds
        self._counts.weights_s += seconds

    def _put_adapter(self, version: int, directory: Path, adapter: int, done: Future[Any]) -> None:
        """In the place of the one before: requests in flight go on with it."""
        start = time.perf_counter()
        self._settle()
        self._add_adapter(directory, adapter)
        self._num_loads[adapter] += 1
        self._add_weight_load(time.perf_counter() - start)
        self._label(version, done, adapter)

    def _add_adapter(self, directory: Path, adapter: int) -> None:
        from vllm.lora.request import LoRARequest

        name, number = f"policy-{adapter}", adapter + 1  # vLLM counts them from 1
        self._engine.add_lora(LoRARequest(name, number, str(directory), load_inplace=True))
        if adapter not in self._lora_requests:  # with load_inplace every step would read the folder
            self._lora_requests[adapter] = LoRARequest(name, number, str(directory))

    def _load_offer(self, offer: Offer, done: Future[Any]) -> None:
        start = time.perf_counter()
        if self._config.generator.engine.tensor_parallel_size > 1:  # all of them, or none
            failures = self._engine.collective_rpc(cast(Any, try_to_open), args=(offer,))
            if reasons := [reason for reason in failures if reason is not None]:
                done.set_result(reasons[0])
                return
        self._settle()
        self._sleeping.make_room_for_weights()
        try:
            self._engine.collective_rpc(cast(Any, load_offer), args=(offer, self._dtype, self._tied_head))
        except Unreachable as error:
            done.set_result(str(error))
            return
        self._sleeping.has_weights = True
        self._num_loads[0] += 1
        self._add_weight_load(time.perf_counter() - start)
        self._label(offer.version, done)

    def _sleep(self, done: Future[Any]) -> None:
        # Whoever asked for what is still under way has gone: it was cancelled, or its turn would not be over.
        self._abort(set(self._unfinished()), GenerationError("the generation engine was put to sleep"))
        for _ in range(self._engine.vllm_config.max_concurrent_batches):  # what the GPU is still to do
            self._step()
        done.set_result(self._sleeping.sleep())

    def _wake(self, done: Future[Any]) -> None:
        try:
            done.set_result(self._sleeping.wake())
        except (ValueError, UserError) as error:
            done.set_exception(error)

    @property
    def _label_text(self) -> str:
        """What vLLM notes of a token's weights: the versions of all policies, since it has one label for all."""
        return ",".join(map(str, self._versions))

    def _label(self, version: int, done: Future[Any], adapter: int = 0) -> None:
        self._versions[adapter] = version
        self._engine.set_weight_version(self._label_text)
        done.set_result(None)

    def _settle(self) -> None:
        """Collect the steps that vLLM has under way (asynchronous scheduling, CUDA): they belong to the old weights."""
        num_steps = self._engine.vllm_config.max_concurrent_batches
        if num_steps == 1 or not self._running:
            return
        self._engine.sleep(level=0, mode="keep")  # level 0 only stops the scheduling
        for _ in range(num_steps):
            self._step()
        self._engine.wake_up(tags=["scheduling"])

    def _unfinished(self) -> Iterator[_Group]:
        yield from (group for group, _ in self._running.values())
        yield from (group for group, _ in self._pending)

    def _abort(self, groups: set[_Group], error: Exception | None = None) -> None:
        """End all requests of these groups; callers that still wait get the error."""
        request_ids = [request_id for request_id, (group, _) in self._running.items() if group in groups]
        self._engine.abort_request(request_ids)
        for request_id in request_ids:
            del self._running[request_id]
            if self._routes is not None:
                self._routes.drop(request_id)
        self._pending = deque(item for item in self._pending if item[0] not in groups)
        for group in groups:
            if not group.future.done():
                group.future.set_exception(error or GenerationError(f"prompt {group.prompt.position} was aborted"))


@contextlib.contextmanager
def _refusals(prompt: Prompt | Turn) -> Iterator[None]:
    """What vLLM does not take of a request is a ValueError here; vLLM 0.32's own is none."""
    from vllm.exceptions import VLLMClientError

    try:
        yield
    except (VLLMClientError, ValueError) as error:
        raise ValueError(f"prompt {prompt.position}: vLLM refuses the request: {error}") from error


def cache_bytes(kv_cache_config: Any) -> int:
    """Bytes of vLLM's KV cache: each of its tensors names the size of the one allocation that it lies in."""
    return max((tensor.size for tensor in kv_cache_config.kv_cache_tensors), default=0)


def clear_kv_cache(worker: Any) -> None:
    """Called in each of vLLM's workers while there are no requests."""
    for cache in worker.model_runner.kv_caches:
        cache.zero_()


def _version_in(span: Any, adapter: int) -> int:
    """The version of a policy while some tokens were sampled."""
    return int(span.version.split(",")[adapter])


def said_text(tokenizer: Any, token_ids: Sequence[int], finish_reason: str, stop_reason: int | str | None) -> str:
    """The text of a response without the token that ended it. Other special tokens stay: ``<think>`` is one in many
    tokenizers, and rewards look for it.

    Args:
        stop_reason: vLLM's: a stop string, the id of a stop token, or None where the end of sequence ended it.
    """
    is_ended = finish_reason == "stop" and not isinstance(stop_reason, str)
    return tokenizer.decode(token_ids[:-1] if is_ended else token_ids, skip_special_tokens=False)


def _future() -> Future[Any]:
    """A future that its waiter cannot cancel: the thread resolves it, whoever still listens."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()
    return future
