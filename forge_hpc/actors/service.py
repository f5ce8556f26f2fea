"""A service: several replicas of an actor behind one name.

completions = await generator.generate.route(prompts)          # the replica with the fewest calls in flight
completions = await generator.generate.route(prompts, key=17)  # replica 17 modulo their number, always
await generator.load.fanout(spec, version)                     # all replicas
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any


class Service:
    """Routes calls to replicas. Every call has a deadline, ``timeout_s``, and raises TimeoutError beyond it."""

    def __init__(self, name: str, replicas: Sequence[Any], timeout_s: float) -> None:
        if not replicas:
            raise ValueError(f"service {name} has no replica")
        self.name = name
        self.replicas = list(replicas)
        self.timeout_s = timeout_s
        self.in_flight = [0] * len(self.replicas)
        """Calls that each replica has not answered yet."""

    def __len__(self) -> int:
        return len(self.replicas)

    def __getattr__(self, endpoint: str) -> ServiceEndpoint:
        if endpoint.startswith("_"):
            raise AttributeError(endpoint)
        return ServiceEndpoint(self, endpoint)

    async def call(self, replica: int, endpoint: str, *args: Any) -> Any:
        """Call one replica's endpoint."""
        self.in_flight[replica] += 1
        try:
            return await asyncio.wait_for(getattr(self.replicas[replica], endpoint).call_one(*args), self.timeout_s)
        except TimeoutError:
            raise TimeoutError(
                f"{self.name} replica {replica} did not answer {endpoint}() within {self.timeout_s:.0f} s"
            ) from None
        finally:
            self.in_flight[replica] -= 1


class ServiceEndpoint:
    """An endpoint of a service's replicas."""

    def __init__(self, service: Service, endpoint: str) -> None:
        self._service = service
        self._endpoint = endpoint

    async def route(self, *args: Any, key: int | None = None) -> Any:
        """Call the least loaded replica, or the one that ``key`` always leads to."""
        loads = self._service.in_flight
        replica = loads.index(min(loads)) if key is None else key % len(loads)
        return await self._service.call(replica, self._endpoint, *args)

    async def fanout(self, *args: Any) -> list[Any]:
        """Call all replicas at once; results in their order, or the first error."""
        calls = (self._service.call(replica, self._endpoint, *args) for replica in range(len(self._service)))
        return await asyncio.gather(*calls)
