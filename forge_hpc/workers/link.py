"""The bytes between the pool and a worker process, and how one is started and ended on this node."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import Protocol, Self

MAX_LINE_BYTES = 1 << 26
"""Of an answer."""
END_TIMEOUT_S = 10.0
"""A keeper ends all that is below it, and itself, within this time."""
_PROJECT = Path(__file__).resolve().parents[2]
_ELSEWHERE = (
    "import runpy, sys, numpy, psutil; sys.path.insert(0, sys.argv[1]); import forge_hpc; del sys.path[0]; "
    "runpy.run_module(sys.argv[2], run_name='__main__', alter_sys=True)"
)
"""Runs a module of the project in another environment, which finds nothing else that is beside the project."""


class Link(Protocol):
    """To one worker process, on this node or another."""

    def write(self, data: bytes) -> None:
        """Send it, some time."""

    async def readline(self) -> bytes:
        """The next line of answers; empty when no more come. Raises ValueError for one that is too long."""

    def kill(self) -> None:
        """End the process and all that it started, at once."""

    async def wait(self) -> int | None:
        """After the last line: wait for the end. The exit status of the keeper, None where its node is gone."""


class Pipes:
    """To a process of this node."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None and process.stdout is not None
        self._process, self._stdin, self._stdout = process, process.stdin, process.stdout

    @classmethod
    async def open(cls, module: str, venv: str | None = None) -> Self:
        """Start ``python -m module``. Raises OSError."""
        return cls(await start_process(module, venv))

    def write(self, data: bytes) -> None:
        self._stdin.write(data)

    async def readline(self) -> bytes:
        return await self._stdout.readline()

    def kill(self) -> None:
        end_process(self._process)

    async def wait(self) -> int:
        return await join_process(self._process)


async def start_process(module: str, venv: str | None = None) -> asyncio.subprocess.Process:
    """``python -m module``, which ``keep``s itself and makes a ``Channel``, one CPU core at a time.

    In the virtual environment ``venv`` it has the packages of that, and forge_hpc.
    Raises OSError where the system has no process to give.
    """
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    if venv is None:
        command = [sys.executable, "-m", module]
        env["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    else:
        command = [str(Path(venv).expanduser() / "bin/python"), "-c", _ELSEWHERE, str(_PROJECT), module]
        env.pop("PYTHONPATH", None)
    return await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=MAX_LINE_BYTES,
        start_new_session=True,
        env=env,
    )


def end_process(process: asyncio.subprocess.Process) -> None:
    """Begin to end it and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        process.terminate()  # its keeper does the rest
    # One that is still starting ignores the signal, as this process does; its keeper will find nobody here.
    assert process.stdin is not None
    if not process.stdin.transport.is_closing():
        process.stdin.transport.abort()


async def join_process(process: asyncio.subprocess.Process) -> int:
    """Wait for one that is ending: its exit status."""
    try:
        async with asyncio.timeout(END_TIMEOUT_S):
            return await process.wait()
    except TimeoutError:  # its keeper is stopped or stuck
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        return await process.wait()
