"""The generator: one vLLM engine, one replica of the rollout service."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from monarch.actor import Actor, Port, endpoint
from monarch.actor.concurrent import concurrent_endpoint

from forge_hpc.actors.errors import portable_errors
from forge_hpc.actors.reading import PolicyReader
from forge_hpc.cluster.worker import visible_gpus
from forge_hpc.config import Config
from forge_hpc.config.adapters import adapter_configs
from forge_hpc.config.schema import SamplingConfig
from forge_hpc.data.types import Completion, Prompt, Turn
from forge_hpc.imports import importing
from forge_hpc.observability.gpu import GpuMonitor
from forge_hpc.observability.logs import setup_logging
from forge_hpc.observability.performance import EngineCounts
from forge_hpc.observability.traces import start_trace, stop_trace

if TYPE_CHECKING:
    from forge_hpc.weights import Brief, Offer, StoreSpec

T = TypeVar("T")


class Generator(Actor):
    """Serves completions of the policy. Calls run at once: requests join while others decode.

    With ``trainer.lora.sweep`` it serves several, each an ``adapter`` on one base, by its number.
    """

    def __init__(self, config: Config, replica: int, log_dir: Path, role: str = "generator") -> None:
        self._name = f"{role}-{replica}"
        self._begin(config, log_dir)

    def _begin(self, config: Config, log_dir: Path) -> None:
        setup_logging(log_dir / f"{self._name}.log", self._name)
        self._config = config
        self._log_dir = log_dir
        self._configs = adapter_configs(config)
        self._readers: list[PolicyReader] = []
        self._named: dict[str, asyncio.Task[Any]] = {}

    @endpoint
    @portable_errors
    async def start(self, model_dir: Path, kv_cache_bytes: int | None = None) -> int:
        """Build the engine on the weights in ``model_dir``. The size of its KV cache, which another in its place is to
        have: what is free then is not what was."""
        with importing():
            from forge_hpc.generation import GenerationEngine
            from forge_hpc.models.device import check_gpus, device_type

        check_gpus(self._name)
        options: dict[str, Any] = {"device": device_type(), "kv_cache_bytes": kv_cache_bytes}
        self._engine = await asyncio.to_thread(GenerationEngine, model_dir, self._config, **options)
        self._open_readers()
        self._gpus = GpuMonitor(visible_gpus() if device_type() == "cuda" else [])
        return self._engine.kv_cache_bytes

    @endpoint
    @portable_errors
    async def renew(self, config: Config, log_dir: Path, model_dir: Path) -> str:
        """Serve another run from the weights in ``model_dir`` on, as a new replica would. Why that cannot be; empty
        where it can (``GenerationEngine.renew``)."""
        self._close_readers()
        self._begin(config, log_dir)
        self._open_readers()
        return await self._engine.renew(model_dir, config)

    @concurrent_endpoint
    async def generate(
        self, prompts: Sequence[Prompt], port: Port[Any] | None = None, adapter: int = 0
    ) -> list[list[Completion] | ValueError] | int:
        """``rollout.group_size`` completions of each prompt.

        All requests of a call are admitted together, in order; a bad prompt has its error in its place. With a port
        (``ServiceEndpoint.stream``) each completion goes there once it is complete, with its place: the indices of the
        prompt and of the sample. A bad prompt's error takes the place of each of its completions.
        """
        config = self._configs[adapter]
        return await self._sample(
            prompts, config.rollout.group_size, config.rollout.sampling, config.seed, port, adapter
        )

    @concurrent_endpoint
    async def sample(
        self,
        prompts: Sequence[Prompt],
        num: int,
        sampling: SamplingConfig,
        seed: int,
        port: Port[Any] | None = None,
        adapter: int = 0,
    ) -> list[list[Completion] | ValueError] | int:
        """As ``generate``, with ``num`` completions of each prompt, other parameters and another seed."""
        return await self._sample(prompts, num, sampling, seed, port, adapter)

    async def _sample(
        self,
        prompts: Sequence[Prompt],
        num: int,
        sampling: SamplingConfig,
        seed: int,
        port: Port[Any] | None,
        adapter: int,
    ) -> list[list[Completion] | ValueError] | int:
        options: dict[str, Any] = {"seed": seed, "sampling": sampling, "adapter": adapter}
        if port is None:
            return await self._engine.generate_batch(prompts, num, **options)
        port.return_undeliverable = False  # or this actor would fail where nobody listens any more
        loop, ready = asyncio.get_running_loop(), []

        def hand_over(pair: tuple[tuple[int, int], Completion | ValueError]) -> None:
            ready.append(pair)
            if len(ready) == 1:  # what is complete at the same time goes in one message
                loop.call_soon(send)

        def send() -> None:
            port.send(ready.copy())
            ready.clear()

        results = await self._engine.generate_batch(prompts, num, hand_over=hand_over, **options)
        for index, result in enumerate(results):
            if isinstance(result, ValueError):
                for sample in range(num):
                    hand_over(((index, sample), result))
        return num * len(results)

    @concurrent_endpoint
    async def generate_turns(
        self,
        turns: Sequence[Turn],
        sampling: SamplingConfig | None = None,
        seed: int | None = None,
        share: str | None = None,
        name: str | None = None,
        adapter: int = 0,
    ) -> list[Completion | ValueError]:
        """The next response of each episode, admitted as those of ``generate``; with other parameters and another seed
        where they are given. Calls with one ``share`` share a cache. One with a ``name`` can be given up by it."""
        seed = self._configs[adapter].seed if seed is None else seed
        work = self._engine.generate_turns(turns, seed=seed, sampling=sampling, share=share, adapter=adapter)
        if name is None:
            return await work
        return await self._until_given_up(name, work) or [_given_up(turn) for turn in turns]

    @concurrent_endpoint
    async def stream_turn(
        self,
        turn: Turn,
        sampling: SamplingConfig | None,
        seed: int | None,
        share: str | None,
        name: str,
        port: Port[Any],
        adapter: int = 0,
    ) -> int:
        """As ``generate_turns`` of one turn. Each token goes to the port once it is sampled, ``(place, (id,
        log-probability))``, and at last ``(-1, completion)``."""
        port.return_undeliverable = False  # or this actor would fail where nobody listens any more
        loop = asyncio.get_running_loop()
        ready: list[tuple[int, Any]] = []

        def hand_over(place: int, *result: Any) -> None:
            ready.append((place, result))
            if len(ready) == 1:
                loop.call_soon(send)

        def send() -> None:
            port.send(ready.copy())
            ready.clear()

        seed = self._configs[adapter].seed if seed is None else seed
        options: dict[str, Any] = {"sampling": sampling, "share": share, "adapter": adapter}
        work = self._engine.stream_turn(turn, hand_over, seed=seed, **options)
        completion = await self._until_given_up(name, work) or _given_up(turn)
        if ready:
            send()
        num_tokens = 0 if isinstance(completion, ValueError) else completion.num_tokens
        port.send([(-1, completion)])
        return num_tokens + 1

    @concurrent_endpoint
    async def give_up(self, name: str) -> None:
        """End the request of that name, if it is under way here: nobody waits for it."""
        if (task := self._named.get(name)) is not None:
            task.cancel()

    async def _until_given_up(self, name: str, work: Coroutine[Any, Any, T]) -> T | None:
        """The result of what ``give_up`` may end; then None."""
        task = self._named[name] = asyncio.ensure_future(work)
        try:
            await asyncio.wait({task})
            return None if task.cancelled() else task.result()
        finally:
            self._named.pop(name, None)

    @concurrent_endpoint
    async def load(
        self,
        store: StoreSpec | None,
        version: int,
        offer: Offer | Brief | None = None,
        again: bool = False,
        adapter: int = 0,
    ) -> str | None:
        """Take a policy version while requests go on: out of the trainers' memory where it is offered, else from the
        store.

        Args:
            again: everybody is asked once more, and only who answered None or ``UNKNOWN`` the last time is meant.

        Returns:
            How the weights came (``CUDA IPC``, ``shared memory``, ``NCCL``, ``TLS streams``, ``messages``). Nothing was
            loaded where it is ``weights.UNKNOWN``: it is to be told the whole offer; or None: this process cannot read
            what is offered, and the store is to have it.
        """
        return await self._readers[adapter].load(store, version, offer, again)

    @concurrent_endpoint
    async def relabel(self, version: int, adapter: int = 0) -> None:
        """The weights that are loaded are those of ``version`` too: no step has changed them since."""
        await self._engine.relabel(version, adapter)

    @concurrent_endpoint
    async def sleep(self) -> str:
        """Give up what GPU memory the engine can do without, for the trainers; requests wait until it is awake. What
        that came to, in a line."""
        return await self._engine.sleep()

    @concurrent_endpoint
    async def wake(self) -> str:
        """Take it back. Where the weights were given up too, ``load`` comes first."""
        return await self._engine.wake()

    @concurrent_endpoint
    async def counts(self) -> EngineCounts:
        """What the engine has done since the last call."""
        gpus = self._gpus
        return replace(self._engine.take_counts(), gpu_utilization=gpus.utilization(), gpu_memory_gib=gpus.memory_gib())

    @concurrent_endpoint
    async def start_trace(self) -> None:
        """Trace the engine from now on."""
        await self._engine.call_workers(start_trace)

    @concurrent_endpoint
    async def stop_trace(self, directory: Path) -> None:
        """Write the trace."""
        await self._engine.call_workers(stop_trace, directory / f"{self._name}.json.gz")

    @endpoint
    async def abort(self, adapter: int = 0) -> None:
        """End all requests to a policy: those who asked for them are gone."""
        self._engine.abort(adapter)

    @endpoint
    async def leave(self) -> None:
        """End the engine and its processes. Whoever asks for it ends this process next."""
        self._close_readers()
        if not hasattr(self, "_engine"):
            return
        if self._config.generator.engine.tensor_parallel_size > 1:
            await asyncio.to_thread(self._engine.close)
        else:
            self._engine.begin_to_close()

    def _open_readers(self) -> None:
        configs = enumerate(self._configs)
        self._readers = [PolicyReader(self._engine, config, self._log_dir, adapter) for adapter, config in configs]

    def _close_readers(self) -> None:
        for reader in self._readers:
            reader.close()


def _given_up(turn: Turn) -> ValueError:
    return ValueError(f"turn {turn.turn} of prompt {turn.position} was given up")
