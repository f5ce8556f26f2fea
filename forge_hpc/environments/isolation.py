"""Global generators of random numbers that are each environment's own.

Many environments call ``random.seed(seed)`` or ``numpy.random.seed(seed)`` and draw from there on. In a process that
hosts many at once they would draw from each other's: the episodes of a group were no longer the same task. So the
functions of both modules look up whose turn it is. Threads that an environment starts without its context
(``threading.Thread``; not ``asyncio.to_thread``) get the generators of the process.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import numpy as np

_current: ContextVar[Generators | None] = ContextVar("generators of the environment", default=None)


class Generators:
    """The generators of one environment; seeded by nobody until it does so."""

    def __init__(self) -> None:
        self.random = random.Random()
        self.numpy = np.random.RandomState()

    def use(self) -> None:
        """From here on, in this task and those that it starts."""
        _current.set(self)


def isolate() -> None:
    """Make the functions of ``random`` and ``numpy.random`` draw from the generators in use. Call it before modules
    that import them by name (``from random import choice``) are loaded."""
    for name, value in list(vars(random).items()):
        if getattr(value, "__self__", None) is random._inst:  # type: ignore[attr-defined]
            setattr(random, name, _dispatch("random", name, value))
    shared = np.random.mtrand._rand  # type: ignore[attr-defined]
    for name in np.random.__all__:
        value = getattr(np.random, name)
        if getattr(value, "__self__", None) is shared or name in ("seed", "ranf", "sample"):
            method = "random_sample" if name in ("ranf", "sample") else name
            setattr(np.random, name, _dispatch("numpy", method, value))


def _dispatch(which: str, name: str, shared: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(shared)
    def call(*args: Any, **options: Any) -> Any:
        generators = _current.get()
        method = shared if generators is None else getattr(getattr(generators, which), name)
        return method(*args, **options)

    return call
