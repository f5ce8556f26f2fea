"""How an actor's errors reach the controller."""

from __future__ import annotations

import asyncio
import functools
import inspect
import io
import pickle
import sys
from collections.abc import Awaitable, Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

from monarch.actor import ActorError, Port, current_rank

from forge_hpc.config.errors import UserError

S = TypeVar("S")
P = ParamSpec("P")
R = TypeVar("R")
_SENT = frozenset(sys.stdlib_module_names) | {"forge_hpc", "monarch", "torch"}
"""Packages whose objects the controller's process can make again from what it is sent."""


class ForeignError(RuntimeError):
    """An error of a type that is not sent to another process, a user's or another library's: its name and its text."""


class _Controller(pickle.Unpickler):
    """Makes what the controller can make."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if module_name.partition(".")[0] not in _SENT:
            raise pickle.UnpicklingError(f"{module_name} may not be there")
        return super().find_class(module_name, global_name)


def portable(error: BaseException) -> Exception:
    """The error itself where it can be sent to the controller as it is; else one of its name and text, of the kind that
    the controller goes by (UserError, ConnectionError, TimeoutError, OSError), or a ForeignError, caused by it.

    Monarch sends errors pickled. One that cannot be pickled ends the actor, and one that cannot be made again there
    (its ``__init__`` wants other arguments, say, or it holds what is of a user's file) is told as what went wrong with
    that. SystemExit ends no actor either; from a library or a loss it is an error like others.
    """
    if isinstance(error, Exception):
        try:
            str(error)
            _Controller(io.BytesIO(pickle.dumps(error))).load()
            return error
        except Exception:  # whatever its own methods raise
            pass
    sent = _kin(error)
    sent.__cause__ = error
    return sent


def _kin(error: BaseException) -> Exception:
    try:
        text = f"{type(error).__name__}: {error}"
    except Exception:  # it has a __str__ that fails
        text = type(error).__name__
    if isinstance(error, UserError):
        return UserError(str(error.message), None if error.hint is None else str(error.hint))
    for kind in (ConnectionError, TimeoutError):
        if isinstance(error, kind):
            return kind(text)
    if isinstance(error, OSError) and isinstance(error.errno, int):
        return OSError(error.errno, text)
    return ForeignError(text)


def _is_an_end(error: BaseException) -> bool:
    """Whether a call was ended by whoever made it."""
    return isinstance(error, asyncio.CancelledError | GeneratorExit)


def portable_errors(method: Callable[P, Awaitable[R]]) -> Callable[P, Awaitable[R]]:
    """An endpoint whose errors are ``portable``."""

    @functools.wraps(method)
    async def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return await method(*args, **kwargs)
        except BaseException as raised:
            if _is_an_end(raised) or (sent := portable(raised)) is raised:
                raise
            raise sent from raised

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
        except BaseException as raised:
            if _is_an_end(raised):
                raise
            error, rank = portable(raised), current_rank().rank
            errors.return_undeliverable = False  # nobody listens once all have answered
            errors.send((rank, ActorError(error, f"{method.__qualname__}() has failed on rank {rank}.")))
            if error is raised:
                raise
            raise error from raised

    myself, *parameters = inspect.signature(method).parameters.values()
    port = inspect.Parameter("errors", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    # Monarch counts what a call is given against it.
    call.__signature__ = inspect.Signature([myself, port, *parameters])  # type: ignore[attr-defined]
    return call
