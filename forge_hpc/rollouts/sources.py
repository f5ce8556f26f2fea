"""Samples of prompts of several sources: each source's from its own environment, or from the generators alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, TypeAlias

from forge_hpc.data.types import Prompt
from forge_hpc.rollouts.streaming import stream

SampleStream: TypeAlias = Callable[..., AsyncIterator[tuple[tuple[int, int], Any]]]
"""Of an endpoint or a player: (prompts, …, key=…) to samples, each with its place: of its prompt, of itself."""


def by_source(streams: Mapping[str, SampleStream]) -> SampleStream:
    """A stream of samples that asks for each prompt where its source is played, all of them side by side.

    Args:
        streams: by the name of a source; the only one is returned as it is.
    """
    if len(streams) == 1:
        return next(iter(streams.values()))

    def sample(prompts: Sequence[Prompt], *args: Any, **options: Any) -> AsyncIterator[tuple[tuple[int, int], Any]]:
        async def ask_all(hand_over: Callable[[tuple[tuple[int, int], Any]], None]) -> None:
            async def ask(name: str, places: Sequence[int]) -> None:
                async for (index, number), answer in streams[name]([prompts[i] for i in places], *args, **options):
                    hand_over(((places[index], number), answer))

            async with asyncio.TaskGroup() as tasks:
                for name in streams:
                    if places := [i for i, prompt in enumerate(prompts) if prompt.source == name]:
                        tasks.create_task(ask(name, places))

        return stream(ask_all)

    return sample
