"""Work whose results are wanted as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def stream(work: Callable[[Callable[[T], None]], Coroutine[Any, Any, None]]) -> AsyncGenerator[T, None]:
    """What ``work`` gives to the function that it is handed, and then its end. Raises what it raises.

    Whoever leaves early has it cancelled, and waits until it has ended.
    """
    results: asyncio.Queue[tuple[T] | None] = asyncio.Queue()
    working = asyncio.create_task(work(lambda result: results.put_nowait((result,))))
    working.add_done_callback(lambda _: results.put_nowait(None))
    try:
        while (result := await results.get()) is not None:
            yield result[0]
        working.result()
    finally:
        working.cancel()
        await asyncio.wait({working})
