"""The generator: one vLLM engine, one replica of the rollout service."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from monarch.actor import Actor, Port, endpoint
from monarch.actor.concurrent import concurrent_endpoint

from forge_hpc.cluster.worker import visible_gpus
from forge_hpc.config import Config
from forge_hpc.config.schema import SamplingConfig
from forge_hpc.data.types import Completion, Prompt, Turn
from forge_hpc.observability.gpu import GpuMonitor
from forge_hpc.observability.logs import setup_logging
from forge_hpc.observability.performance import EngineCounts
from forge_hpc.observability.traces import start_trace, stop_trace

if TYPE_CHECKING:
    from forge_hpc.weights import LinkReader, Offer, RemoteReader, StoreSpec
    from forge_hpc.wire.tls import Certificates

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Generator(Actor):
    """Serves completions of the policy. Calls run at once: requests join while others decode."""

    def __init__(self, config: Config, replica: int, log_dir: Path, role: str = "generator") -> None:
        self._name = f"{role}-{replica}"
        self._begin(config, log_dir)

    def _begin(self, config: Config, log_dir: Path) -> None:
        setup_logging(log_dir / f"{self._name}.log", self._name)
        self._config = config
        self._log_dir = log_dir
        self._links: LinkReader | None = None
        self._unlinked: Hashable = None  # trainers with which NCCL did not work
        self._remote: RemoteReader | None = None
        self._loading = asyncio.Lock()  # what was received is read before the next is
        self._proven: Hashable = None  # the trainers whose offers could be read,
        self._unreachable: Hashable = None  # and those whose could not
        self._waits_for_store = False
        self._named: dict[str, asyncio.Task[Any]] = {}

    @endpoint
    async def start(self, model_dir: Path) -> None:
        """Build the engine on the weights in ``model_dir``."""
        from forge_hpc.generation import GenerationEngine
        from forge_hpc.models.device import device_type

        self._engine = await asyncio.to_thread(GenerationEngine, model_dir, self._config, device=device_type())
        self._gpus = GpuMonitor(visible_gpus() if device_type() == "cuda" else [])

    @endpoint
    async def renew(self, config: Config, log_dir: Path, model_dir: Path) -> str:
        """Serve another run from the weights in ``model_dir`` on, as a new replica would. Why that cannot be; empty
        where it can (``GenerationEngine.renew``)."""
        self._close_readers()
        self._begin(config, log_dir)
        return await self._engine.renew(model_dir, config)

    @concurrent_endpoint
    async def generate(
        self, prompts: Sequence[Prompt], port: Port[Any] | None = None
    ) -> list[list[Completion] | ValueError] | int:
        """``rollout.group_size`` completions of each prompt.

        All requests of a call are admitted together, in order; a bad prompt has its error in its place. With a port
        (``ServiceEndpoint.stream``) each completion goes there once it is complete, with its place: the indices of the
        prompt and of the sample. A bad prompt's error takes the place of each of its completions.
        """
        rollout = self._config.rollout
        return await self._sample(prompts, rollout.group_size, rollout.sampling, self._config.seed, port)

    @concurrent_endpoint
    async def sample(
        self,
        prompts: Sequence[Prompt],
        num: int,
        sampling: SamplingConfig,
        seed: int,
        port: Port[Any] | None = None,
    ) -> list[list[Completion] | ValueError] | int:
        """As ``generate``, with ``num`` completions of each prompt, other parameters and another seed."""
        return await self._sample(prompts, num, sampling, seed, port)

    async def _sample(
        self, prompts: Sequence[Prompt], num: int, sampling: SamplingConfig, seed: int, port: Port[Any] | None
    ) -> list[list[Completion] | ValueError] | int:
        if port is None:
            return await self._engine.generate_batch(prompts, num, seed=seed, sampling=sampling)
        port.return_undeliverable = False  # or this actor would fail where nobody listens any more
        loop, ready = asyncio.get_running_loop(), []

        def hand_over(pair: tuple[tuple[int, int], Completion | ValueError]) -> None:
            ready.append(pair)
            if len(ready) == 1:  # what is complete at the same time goes in one message
                loop.call_soon(send)

        def send() -> None:
            port.send(ready.copy())
            ready.clear()

        results = await self._engine.generate_batch(prompts, num, seed=seed, sampling=sampling, hand_over=hand_over)
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
    ) -> list[Completion | ValueError]:
        """The next response of each episode, admitted as those of ``generate``; with other parameters and another seed
        where they are given. Calls with one ``share`` share a cache. One with a ``name`` can be given up by it."""
        seed = self._config.seed if seed is None else seed
        work = self._engine.generate_turns(turns, seed=seed, sampling=sampling, share=share)
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

        seed = self._config.seed if seed is None else seed
        work = self._engine.stream_turn(turn, hand_over, seed=seed, sampling=sampling, share=share)
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
        self, store: StoreSpec | None, version: int, offer: Offer | None = None, again: bool = False
    ) -> str | None:
        """Take a policy version while requests go on: out of the trainers' memory where it is offered, else from the
        store.

        Args:
            again: everybody is asked a second time, and only who answered None the first time is meant.

        Returns:
            How the weights came (``CUDA IPC``, ``shared memory``, ``NCCL``, ``TLS streams``, ``messages``). None where
            this process cannot read what is offered: nothing was loaded, and the store is to have it.
        """
        from forge_hpc.weights import Unreachable, pull, reads_shared_memory

        if again and not self._waits_for_store:
            return ""
        if offer is None:
            assert store is not None, "what is not offered is in the store"
            tensors = await pull(store, version)
            await self._engine.load_weights(version, tensors.items())
            self._waits_for_store = False
            return "shared memory" if reads_shared_memory(store) else "messages"
        self._waits_for_store = True
        try:
            if self._unreachable == offer.origin:
                return None
            async with self._loading:
                way = await self._load_offer(offer)
        except Unreachable as error:
            logger.warning("the trainers' memory cannot be read from here, the store serves: %s", error)
            if offer.origin != self._proven:
                self._unreachable = offer.origin
            return None
        self._proven = offer.origin
        self._waits_for_store = False
        return way

    async def _load_offer(self, offer: Offer) -> str:
        """Raises Unreachable."""
        from forge_hpc.models.device import device_type
        from forge_hpc.weights import Unreachable

        if offer.is_within_reach(device_type()):
            await self._load_here(offer)
            return "CUDA IPC" if device_type() == "cuda" else "shared memory"
        if not offer.has_streams:
            raise Unreachable("another host or device")
        local, way = await asyncio.to_thread(self._receive, offer)
        await self._load_here(local)
        return way

    def _receive(self, offer: Offer) -> tuple[Offer, str]:
        """Bring an offer of another host here, and how. Raises Unreachable."""
        from forge_hpc.weights import Unreachable
        from forge_hpc.wire.tls import Certificates

        if (certificates := Certificates.from_environment()) is None:
            raise Unreachable("another host, and no certificates here")
        start = time.perf_counter()
        local, num_bytes, way = self._bring(offer, certificates)
        duration, whole = time.perf_counter() - start, sum(part.handle.num_bytes for part in local.parts)
        figures = offer.version, num_bytes / 1e6, whole / 1e6, duration, way
        logger.info("version %d: %.1f of %.1f MB came in %.3f s by %s", *figures)
        return local, way

    def _bring(self, offer: Offer, certificates: Certificates) -> tuple[Offer, int, str]:
        """Raises Unreachable."""
        from forge_hpc.weights import LinkReader, RemoteReader, Unreachable, links_dir

        if self._config.generator.weight_transport == "nccl" and self._unlinked != offer.origin:
            import torch

            if self._links is None:
                device = torch.device("cuda", torch.cuda.current_device())
                self._links = LinkReader(certificates, links_dir(self._log_dir), device)
            try:
                return *self._links.receive(offer), "NCCL"
            except Unreachable as error:
                logger.warning("no weights over NCCL, TLS streams serve: %s", error)
                self._unlinked = offer.origin
        if self._remote is None:
            self._remote = RemoteReader(certificates)
        return *self._remote.receive(offer), "TLS streams"

    async def _load_here(self, offer: Offer) -> None:
        """Raises Unreachable."""
        from forge_hpc.models.device import device_type
        from forge_hpc.weights import opened

        if device_type() == "cuda" and not self._config.trainer.lora.sends_adapters:
            await self._engine.load_offer(offer)
            return
        with opened(offer) as weights:
            weights.verify()
            tensors = {name: weights.tensor(name) for name in offer.shapes}
            await self._engine.load_weights(offer.version, tensors.items())

    @concurrent_endpoint
    async def relabel(self, version: int) -> None:
        """The weights that are loaded are those of ``version`` too: no step has changed them since."""
        await self._engine.relabel(version)

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
        return replace(self._engine.take_counts(), gpu_utilization=self._gpus.utilization())

    @concurrent_endpoint
    async def start_trace(self) -> None:
        """Trace the engine from now on."""
        await self._engine.call_workers(start_trace)

    @concurrent_endpoint
    async def stop_trace(self, directory: Path) -> None:
        """Write the trace."""
        await self._engine.call_workers(stop_trace, directory / f"{self._name}.json.gz")

    @endpoint
    async def abort(self) -> None:
        """End all requests: those who asked for them are gone."""
        self._engine.abort()

    @endpoint
    async def leave(self) -> None:
        """End the engine and its processes."""
        self._close_readers()
        if hasattr(self, "_engine"):
            await asyncio.to_thread(self._engine.close)

    def _close_readers(self) -> None:
        for reader in (self._links, self._remote):
            if reader is not None:
                reader.close()


def _given_up(turn: Turn) -> ValueError:
    return ValueError(f"turn {turn.turn} of prompt {turn.position} was given up")
