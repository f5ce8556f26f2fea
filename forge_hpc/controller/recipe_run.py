"""The run of a recipe, which may be its author's own: what it raises, and what it leaves undone."""

from __future__ import annotations

import asyncio
import os
import sysconfig
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import forge_hpc
from forge_hpc.actors.errors import ForeignError

if TYPE_CHECKING:
    from forge_hpc.controller.session import Session

_OURS = str(Path(forge_hpc.__file__).parent) + os.sep
_INSTALLED = tuple(sysconfig.get_path(name) + os.sep for name in ("stdlib", "purelib", "platlib"))
"""The standard library, and packages."""


async def run_recipe(session: Session) -> None:
    """The recipe, on the state that the session has found.

    Raises:
        UserError: it has returned with a step that is not ended, or without ``finish``.
        ForeignError: it has raised what would be taken for something else: TimeoutError and ConnectionError mean lost
            processes where the session raises them, and SystemExit ends this process without a word.
        Exception: what else it has raised.
    """
    try:
        await session.recipe.run(session)
    except (Exception, asyncio.CancelledError, SystemExit, KeyboardInterrupt) as error:
        task = asyncio.current_task()
        if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
            raise
        if (place := _place_in(error)) is None:
            raise
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise ForeignError(f"{text} ({place})") from error
    await session.check_done()


def _place_in(error: BaseException) -> str | None:
    """Where the recipe has raised it, of what it should not; None of all else."""
    outer = traceback.extract_tb(error.__traceback__)
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    frames = traceback.extract_tb(error.__traceback__) or outer
    if isinstance(error, Exception):
        by_the_session = any(frame.filename.startswith(_OURS) and frame.filename != __file__ for frame in frames)
        if by_the_session or not isinstance(error, TimeoutError | ConnectionError):
            return None
    place = next((frame for frame in reversed(frames) if not frame.filename.startswith(_INSTALLED)), frames[-1])
    return f"{place.filename}:{place.lineno}"
