"""Going on where a file system fails, or is slow: what cannot be written on the way out is said on stderr."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from forge_hpc.config import UserError
from forge_hpc.supervisor import deadlines

T = TypeVar("T")


@contextlib.contextmanager
def best_effort() -> Iterator[None]:
    """Go on after what the file system fails, or what another has damaged there; stderr says what it was."""
    try:
        yield
    except (OSError, UserError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)


def retrying(look: Callable[[], T], within_s: float) -> T:
    """What ``look`` returns, as soon as the file system lets it. Raises its OSError after ``within_s`` seconds."""
    until = time.monotonic() + within_s
    while True:
        try:
            return look()
        except OSError:
            if time.monotonic() > until:
                raise
        time.sleep(deadlines.POLL_S)


def how_it_ended(code: int) -> str:
    """An exit code as subprocess gives it, in words."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
