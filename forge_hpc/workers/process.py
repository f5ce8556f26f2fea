"""One worker process, seen from the pool."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from forge_hpc.workers.channel import Answer, frame

_END_TIMEOUT_S = 10.0
_MAX_LINE_BYTES = 1 << 26
"""Of an answer."""


_IN_ANOTHER_PYTHON = """
import importlib.util, runpy, sys
import numpy, psutil  # which the end of the worker needs, when nobody could be told
folder, module = sys.argv[1:]
name = module.partition(".")[0]
spec = importlib.util.spec_from_file_location(name, folder + "/__init__.py", submodule_search_locations=[folder])
sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules[name])
runpy.run_module(module, run_name="__main__")
"""
"""Takes this package's folder, and a module of it to run."""


class WorkerLost(Exception):
    """A worker process ended before it answered. ``num_calls`` of them were running in it."""

    def __init__(self, cause: str, num_calls: int) -> None:
        super().__init__(cause)
        self.num_calls = num_calls


@dataclass(frozen=True)
class Call:
    """A request on its way."""

    number: int
    answer: asyncio.Future[Answer]
    """Its answer; WorkerLost where the worker ends before."""


class WorkerProcess:
    """A process that answers requests. Several may be under way at the same time; each answer comes when it is ready.

    Example:
        worker = await WorkerProcess.start("forge_hpc.rewards.worker")
        call = worker.send({"name": "math", "args": {}})
        answer = await call.answer
        worker.kill()
        await worker.wait()
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        """Takes over `process`; ``start`` makes one."""
        self.ended = False
        """No call can be answered any more."""
        self.on_end: Callable[[], None] = lambda: None
        """Called once, when ``ended`` becomes true."""
        self._process = process
        self._calls: dict[int, asyncio.Future[Answer]] = {}
        self.num_asked = self.num_answered = 0
        """Requests so far, the one to load something included, and answers."""
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, module: str, python: str | None = None) -> Self:
        """Start ``python -m module``, which ``keep``s itself and makes a ``Channel``, one CPU core at a time.

        Another ``python`` than this one imports from us this package alone, and all else from where it is installed.

        Raises OSError where the system has no process to give.
        """
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        if python is None:
            command, env["PYTHONPATH"] = [sys.executable, "-m", module], os.pathsep.join(filter(None, sys.path))
        else:
            command = [python, "-c", _IN_ANOTHER_PYTHON, str(Path(__file__).parents[1]), module]
            env.pop("PYTHONPATH", None)
        return cls(
            await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=_MAX_LINE_BYTES,
                start_new_session=True,
                env=env,
            )
        )

    @property
    def num_calls(self) -> int:
        """Requests that have no answer yet, given up or not."""
        return len(self._calls)

    def send(self, request: dict[str, Any]) -> Call:
        """Send a request, whose answer follows. Raises WorkerLost."""
        if self.ended:
            raise WorkerLost("had ended", 0)
        call = Call(self.num_asked + 1, asyncio.get_running_loop().create_future())
        self._write({**request, "id": call.number})
        self.num_asked = call.number
        self._calls[call.number] = call.answer
        return call

    def cancel(self, call: Call) -> None:
        """Tell a worker that listens for it to cancel a call, which then has an answer, whatever it is."""
        if not self.ended:
            self._write({"cancel": call.number})

    def _write(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(frame(message))

    def kill(self) -> None:
        """End the process and all that it started, at once; ``wait`` waits for it."""
        self._end()
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()  # its keeper does the rest
        # One that is still starting ignores the signal, as this process does; its keeper will find nobody here.
        assert self._process.stdin is not None
        if not self._process.stdin.transport.is_closing():
            self._process.stdin.transport.abort()

    async def wait(self) -> None:
        """Wait until the process has ended and all calls know it."""
        await asyncio.shield(self._reading)

    def _end(self) -> None:
        if not self.ended:
            self.ended = True
            self.on_end()

    async def _read(self) -> None:
        assert self._process.stdout is not None
        try:
            while line := await self._process.stdout.readline():
                answer = json.loads(line)
                call = self._calls.pop(answer["id"])
                self.num_answered += 1
                if not call.done():  # given up
                    call.set_result(answer)
            cause = "ended"
        except (ValueError, KeyError, TypeError):
            cause = "wrote into the pool's own pipe"
            self.kill()
        self._end()
        status = await self._join()
        lost = WorkerLost(_describe_exit(status) if cause == "ended" else cause, len(self._calls))
        for call in self._calls.values():
            if not call.done():
                call.set_exception(lost)

    async def _join(self) -> int:
        try:
            async with asyncio.timeout(_END_TIMEOUT_S):
                return await self._process.wait()
        except TimeoutError:  # its keeper is stopped or stuck
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            return await self._process.wait()


def _describe_exit(status: int) -> str:
    """How a process ended, from the exit status of its keeper."""
    number = -status if status < 0 else status - 128
    if number <= 0:
        return f"ended with exit status {status}"
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"ended with exit status {status}"
    return f"was killed by {name}" + (" (out of memory?)" if number == signal.SIGKILL else "")
