"""How an actor's errors reach the controller."""

from __future__ import annotations

import functools
import inspect
import pickle
import sys
from collections.abc import Awaitable, Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

from monarch.actor import ActorError, Port, current_rank

S = TypeVar("S")
P = ParamSpec("P")
R = TypeVar("R")
_SENT = frozenset(sys.stdlib_module_names) | {"forge_hpc", "monarch", "torch"}
"""Packages whose errors the controller's process can make again from what it is sent."""


class ForeignError(RuntimeError):
    """An error of a type that is not sent to another process, a user's or another library's: its name and its text."""


def portable(error: Exception) -> Exception:
    """The error itself where it can be sent to the controller as it is, else a ForeignError.

    Monarch sends errors pickled. One that cannot be pickled ends the actor, and one that cannot be made again there
    (its ``__init__`` wants other arguments, say, or its module is a user's file) is told as what went wrong with that.
    """
    if type(error).__module__.partition(".")[0] in _SENT:
        try:
            pickle.loads(pickle.dumps(error))
            return error
        except Exception:  # whatever its own methods raise
            pass
    foreign = ForeignError(f"{type(error).__name__}: {error}")
    foreign.__cause__ = error.__cause__
    return foreign.with_traceback(error.__traceback__)


def portable_errors(method: Callable[P, Awaitable[R]]) -> Callable[P, Awaitable[R]]:
    """An endpoint whose errors are ``portable``."""

    @functools.wraps(method)
    async def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return await method(*args, **kwargs)
        except Exception as error:
            raise portable(error) from None

    return call


def collective(
    method: Callable[Concatenate[S, P], Awaitable[R]],
) -> Callable[Concatenate[S, Port[Any], P], Awaitable[R]]:
    """An endpoint that is asked of all ranks at once, which wait for each other in it (``controller.ranks.Ranks``).

    An answer of all is complete once each has given its own, and those that wait for one that has failed give none. So
    the endpoint gets a port before its arguments, to which a rank says at once what it raises: its number, and the
    error.
    """

    @functools.wraps(method)
    async def call(self: S, errors: Port[Any], *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return await method(self, *args, **kwargs)
        except Exception as raised:
            error, rank = portable(raised), current_rank().rank
            errors.return_undeliverable = False  # nobody listens once all have answered
            errors.send((rank, ActorError(error, f"{method.__qualname__}() has failed on rank {rank}.")))
            raise error from None

    myself, *parameters = inspect.signature(method).parameters.values()
    port = inspect.Parameter("errors", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    # Monarch counts what a call is given against it.
    call.__signature__ = inspect.Signature([myself, port, *parameters])  # type: ignore[attr-defined]
    return call
