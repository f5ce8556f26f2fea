"""A service: several replicas of an actor behind one name, of which any may die.

completions = await generator.generate.route(prompts)          # the replica with the fewest calls in flight
completions = await generator.generate.route(prompts, key=17)  # replica 17 modulo their number, while it serves
async for place, completion in generator.generate.stream(prompts): ...  # each as soon as it is complete
await generator.load.fanout(spec, version)                     # all replicas that serve

A replica that dies or does not answer in time leaves the service, and ``on_loss`` is told; calls that were routed to it
go to others, or wait until one is admitted again. Replicas beyond the service's own are lent to it: they get calls as
the others do, come and go, and are nobody's to replace. Calls with a key have a replica to themselves, so that what it
computes for them does not depend on who else is served, nor on which replica it is.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, cast

from forge_hpc.cluster.hangs import write_stacks

_LOSSES = frozenset(
    {
        "torch.AcceleratorError",
        "torch.distributed.DistBackendError",
        "torch.distributed.DistNetworkError",
        "forge_hpc.generation.engine.GenerationError",
    }
)
"""Errors that mean a device, a network or an engine that is gone, by name: torch and vLLM are not imported here."""


class ActorLost(RuntimeError):
    """An actor's process has died, does not answer, or has failed for good; another can take its place."""


def cause_of(error: BaseException) -> BaseException:
    """The error that started it: the first of a group, and in Monarch's wrapper the one that the actor raised."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    while (cause := getattr(error, "exception", None)) is not None and isinstance(cause, BaseException):
        error = cause
    return error


def is_loss(error: BaseException) -> bool:
    """Whether the machinery failed, not what ran on it: a dead process, silence, a network or a device that is gone."""
    from monarch._rust_bindings.monarch_hyperactor.supervision import SupervisionError

    cause = cause_of(error)
    names = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(cause).__mro__}
    return isinstance(cause, (SupervisionError, ActorLost, TimeoutError, ConnectionError)) or bool(names & _LOSSES)


def reason_of(error: BaseException) -> str:
    """What a loss is reported as: one line."""
    cause = cause_of(error)
    lines = str(cause).strip().splitlines() or [type(cause).__name__]
    return lines[-1].strip()


async def told(error: BaseException, who: str = "") -> str:
    """What a loss is reported as; of a deadline that is over the stacks of all processes are written first."""
    loss = f"{who}: {reason_of(error)}" if who else reason_of(error)
    return loss + (await write_stacks(loss) if isinstance(cause_of(error), TimeoutError) else "")


async def answer(call: Awaitable[Any], lost: asyncio.Future[str], timeout_s: float, who: str) -> Any:
    """The result of a call to an actor.

    Raises:
        ActorLost: the actor was lost (``lost`` has its reason), or did not answer within ``timeout_s``: then the stacks
            of all processes have been written.
        Exception: what the actor raised.
    """
    task = asyncio.ensure_future(call)
    try:
        await asyncio.wait({task, lost}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if lost.done():
            raise ActorLost(f"{who}: {lost.result()}")
        silence = f"{who} did not answer within {timeout_s:g} s"
        raise ActorLost(silence + await write_stacks(silence))
    except Exception as error:
        if isinstance(error, ActorLost) or not is_loss(error):
            raise
        raise ActorLost(await told(error, who)) from error
    finally:
        task.cancel()


async def started(procs: Any, timeout_s: float, who: str, lost: asyncio.Future[str] | None = None) -> None:
    """Wait until the processes of a mesh have started. Raises as ``answer``."""
    lost = lost or asyncio.get_running_loop().create_future()
    await answer(procs.initialized, lost, timeout_s, f"{who}, start of its processes")


class Replica:
    """One actor of a service."""

    def __init__(self, index: int, actor: Any) -> None:
        self.index = index
        self.actor = actor
        self.in_flight = 0
        """Calls that it has not answered yet."""
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.alone = asyncio.Lock()
        """Held by a call with a key."""


class Service:
    """Routes calls to replicas.

    Args:
        name: what messages call it.
        size: replicas that it has when all are well, those that are lent to it (of higher indices) aside.
        timeout_s: every call has this deadline; a replica that misses it is stuck, and lost.
        on_loss: called with the index of a lost replica and the reason; is to ``admit`` another.
        on_retry: called when a call goes to another replica because the first was lost.
    """

    def __init__(
        self,
        name: str,
        size: int,
        timeout_s: float,
        on_loss: Callable[[int, str], None],
        on_retry: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self.size = size
        self.timeout_s = timeout_s
        self.turn: Callable[[], contextlib.AbstractAsyncContextManager[None]] = contextlib.nullcontext
        """Entered around every routed call: ``Turns.generating`` where the GPUs are shared."""
        self._on_loss = on_loss
        self._on_retry = on_retry
        self._replicas: dict[int, Replica] = {}
        self._is_retired = False
        self._answered = [0, 0]  # calls, by own replicas and by lent ones
        self._admitted = asyncio.Condition()

    def __len__(self) -> int:
        return self.size

    def of(self, adapter: int) -> Service:
        """It as the session of one of several adapters sees it, by the adapter's number."""
        return cast(Service, AdapterService(self, adapter))

    def __getattr__(self, endpoint: str) -> ServiceEndpoint:
        if endpoint.startswith("_"):
            raise AttributeError(endpoint)
        return ServiceEndpoint(self, endpoint)

    @property
    def serving(self) -> list[int]:
        """Indices of the replicas that serve."""
        return sorted(self._replicas)

    def actor(self, index: int) -> Any:
        """The actor that serves as replica ``index``."""
        return self._replicas[index].actor

    @property
    def num_lent(self) -> int:
        """Replicas that serve and are lent."""
        return sum(index >= self.size for index in self._replicas)

    def take_lent_share(self) -> float:
        """The share of routed calls that lent replicas have answered, since it was asked last."""
        (own, lent), self._answered = self._answered, [0, 0]
        return lent / (own + lent) if lent else 0.0

    async def admit(self, index: int, actor: Any) -> None:
        """``actor`` serves as replica ``index`` from the moment of the call."""
        self._replicas[index] = Replica(index, actor)
        self._is_retired = False
        async with self._admitted:
            self._admitted.notify_all()

    async def admission(self) -> None:
        """Wait until a replica is admitted."""
        async with self._admitted:
            await self._admitted.wait()

    def lose(self, index: int, reason: str) -> None:
        """Replica ``index`` is gone: its calls go elsewhere. Nothing happens where it was known."""
        replica = self._replicas.pop(index, None)
        if replica is not None:
            replica.lost.set_result(reason)
            self._on_loss(index, reason)

    def retire(self) -> None:
        """No replica serves any more, and none is missed: routed calls raise RuntimeError, until one is admitted."""
        self._replicas.clear()
        self._is_retired = True

    async def _pick(self, key: int | None) -> Replica:
        async with self._admitted:
            await self._admitted.wait_for(lambda: self._replicas or self._is_retired)
            if not self._replicas:
                raise RuntimeError(f"{self.name}s have ended with the run: nothing can be asked of them after finish()")
            if key is not None and key % self.size in self._replicas:
                return self._replicas[key % self.size]
            return min(self._replicas.values(), key=lambda replica: (replica.in_flight, replica.index))

    async def _call(self, replica: Replica, endpoint: str, args: Sequence[Any], options: Mapping[str, Any]) -> Any:
        who = f"{self.name} {replica.index}"
        try:
            method = getattr(replica.actor, endpoint)
            call = method.call_one(*args, **options)
            return await answer(call, replica.lost, self.timeout_s, f"{who}, {endpoint}()")
        except ActorLost as error:
            if self._replicas.get(replica.index) is replica:
                self.lose(replica.index, reason_of(error))
            raise


OF_A_POLICY = frozenset(
    {"generate", "sample", "generate_turns", "stream_turn", "load", "relabel", "abort"},
)
"""The endpoints of a generator that mean one of its policies."""


class AdapterService:
    """A service of generators that hold several adapters, as the session of one of them sees it: what is asked of a
    policy is asked of this one. A replica's calls with a key stay one after another, whichever adapter they are of."""

    def __init__(self, service: Service, adapter: int) -> None:
        self._service = service
        self._adapter = adapter

    def __len__(self) -> int:
        return len(self._service)

    def __getattr__(self, name: str) -> Any:
        if name in OF_A_POLICY:
            return ServiceEndpoint(self._service, name, {"adapter": self._adapter})
        return getattr(self._service, name)


class ServiceEndpoint:
    """An endpoint of a service's replicas.

    Args:
        options: keyword arguments of every call.
    """

    def __init__(self, service: Service, endpoint: str, options: Mapping[str, Any] | None = None) -> None:
        self._service = service
        self._endpoint = endpoint
        self._options = options or {}

    async def route(self, *args: Any, key: int | None = None) -> Any:
        """Call the least loaded replica, or the one that ``key`` leads to; another one where it is lost on the way."""
        async with self._service.turn():
            return await self._route(args, key)

    async def _route(self, args: Sequence[Any], key: int | None) -> Any:
        while True:
            replica = await self._service._pick(key)
            replica.in_flight += 1
            try:
                async with replica.alone if key is not None else contextlib.nullcontext():
                    result = await self._service._call(replica, self._endpoint, args, self._options)
                self._service._answered[replica.index >= self._service.size] += 1
                return result
            except ActorLost:
                self._service._on_retry()
            finally:
                replica.in_flight -= 1

    async def stream(self, *args: Any, key: int | None = None) -> AsyncIterator[tuple[Any, Any]]:
        """``(place, result)`` as the actor has them, each place once. The call is made, and repeated, as by ``route``.

        The endpoint takes a port as its last argument, sends lists of pairs there, and returns the number of pairs. Of
        a pair that comes again, because its replica was lost before all were there, the first stands. Closing the
        generator early cancels the call.

        Raises as ``route``, and ActorLost where the call has returned and a pair is still missing after the deadline.
        """
        from monarch.actor import Channel

        port, receiver = Channel[Any].open()
        call = asyncio.ensure_future(self.route(*args, port, key=key))
        call.add_done_callback(lambda _: port.send(None))  # wakes the loop
        received: set[Any] = set()
        try:
            while not (call.done() and len(received) == call.result()):
                # The reply may overtake what was sent before it; until it is there, the call's own deadline holds.
                try:
                    if not call.done():
                        pairs = await receiver.recv()
                    else:
                        async with asyncio.timeout(self._service.timeout_s):
                            pairs = await receiver.recv()
                except TimeoutError as error:
                    num = call.result() - len(received)
                    missing = TimeoutError(f"{self._service.name}, {self._endpoint}(): {num} results are missing")
                    raise ActorLost(await told(missing)) from error
                for place, result in pairs or ():
                    if place not in received:
                        received.add(place)
                        yield place, result
        finally:
            call.cancel()
            port.send(None)  # Monarch receives until something comes, whoever waits for it

    async def fanout(self, *args: Any) -> list[Any]:
        """Call all replicas that serve at once; results by index, without those that are lost on the way."""
        replicas = [self._service._replicas[index] for index in self._service.serving]
        calls = (self._service._call(replica, self._endpoint, args, self._options) for replica in replicas)
        results = await asyncio.gather(*calls, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, ActorLost):
                raise result
        return [result for result in results if not isinstance(result, ActorLost)]
