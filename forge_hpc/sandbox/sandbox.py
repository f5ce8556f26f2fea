"""Runs model-written code where it can do no harm.

    caller ──► Sandbox ──► bubblewrap ──► process 1 (guest.init) ──► the program
                  └─ limits, deadlines, expected outputs stay here     └─ all that it starts ends with process 1

What holds: no network; no files but /usr, Python and an empty /tmp of its own; no other processes, no environment of
the user; all that it starts ends with it. What a program can do: read /usr, and take CPU, memory, processes and time up
to the limits.

How the limits hold: every 50 ms process 1 looks at all processes together and ends them when they are over one. Between
two looks each process is held by the kernel's own limits (memory_mb of private data, four times that of addresses).
Memory is what is resident; /tmp and /dev/shm come on top, and buffers of pipes and sockets, bounded by 256 open files a
process. From Linux 5.14 on the kernel holds the number of processes (fork fails); before, the look does. Time is kept
by process 1 and, half a second later, here; what has not ended another half second after that is killed from here. So a
program is gone at most a second after its limit, as far as this process and the kernel get the CPU for it.

The kernel is shared with the host: a hole in it is a hole in the sandbox. As root, bubblewrap runs as user 65534.
"""

from __future__ import annotations

import ast
import asyncio
import atexit
import contextlib
import functools
import itertools
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

from forge_hpc.config.errors import UserError
from forge_hpc.config.schema import SandboxConfig
from forge_hpc.sandbox import runtimes
from forge_hpc.sandbox.guest import frames, init
from forge_hpc.sandbox.interpreter import readable_by_all
from forge_hpc.sandbox.results import Case, Limits, Report, Result, SandboxError, Verdict
from forge_hpc.sandbox.semaphore import Semaphore

if TYPE_CHECKING:
    import psutil

_START_TIMEOUT_S = 60.0
_GRACE_S = 10 * init.TICK_S
_END_TIMEOUT_S = 0.5
_CLEAN_UP_S = 5.0
"""What a runtime may take to clean up once process 1 is dead."""
_KILL_TIMEOUT_S = 30.0
_NOBODY = 65534
_RUNNING = Semaphore()
_T = TypeVar("_T")


class Sandbox:
    """A way to run programs, each in a sandbox of its own. Safe to share between tasks and threads.

    Example:
        sandbox = Sandbox(config.sandbox)
        sandbox.check()
        result = await sandbox.run("print(input()[::-1])", stdin="forge")
        report = await sandbox.run_tests(code, ["assert add(1, 2) == 3", "assert add(0, 0) == 0"])
    """

    def __init__(self, config: SandboxConfig | None = None) -> None:
        self._config = config or SandboxConfig()
        self.parallel = self._config.parallel or len(os.sched_getaffinity(0))
        """Programs at once in this process, those of its other sandboxes included; the others wait."""

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        """The sandbox of these fields of ``SandboxConfig``."""
        from omegaconf import OmegaConf

        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SandboxConfig), dict(options)))
        return cls(cast(SandboxConfig, config))

    async def run(
        self, code: str, *, stdin: str = "", files: Mapping[str, str] | None = None, limits: Limits | None = None
    ) -> Result:
        """Run `code` as ``python main.py`` in an empty folder.

        Args:
            files: further files there, by relative path.
            limits: instead of the configured ones.

        Raises:
            UserError: there is no way to make a sandbox here.
            SandboxError: it did not start.
        """
        limits = limits or self._config.limits
        async with self._session(code, files or {}, limits) as session:
            return await session.run(stdin, limits.wall_s)

    async def run_tests(
        self,
        code: str,
        tests: Sequence[Case | str],
        *,
        files: Mapping[str, str] | None = None,
        limits: Limits | None = None,
        test_s: float | None = None,
    ) -> Report:
        """Run `code` against `tests`, in one sandbox, in a new process for each test; /tmp stays from one to the next.

        A ``Case`` runs the program on an input. Expected outputs are compared here and never enter the sandbox. A text
        is Python that calls what the program defines and fails by raising; see ``guest.tester`` for how the program is
        kept from seeing or faking it. What the tests had no time for has failed.

        Args:
            limits: of all tests together.
            test_s: seconds after which a single test has failed; by default what is left of ``limits.wall_s``.

        Raises as ``run`` does; ValueError without tests.
        """
        if not tests:
            raise ValueError("there are no tests: no share of them is passed or failed")
        limits = limits or self._config.limits
        start = time.monotonic()
        verdicts: list[Verdict] = []
        async with self._session(code, files or {}, limits) as session:
            start = time.monotonic()
            for test in tests:
                left_s = start + limits.wall_s - time.monotonic()
                if session.is_over or left_s <= 0:
                    verdicts.append(Verdict(False, "no time was left for it"))
                    continue
                seconds = left_s if test_s is None else min(left_s, test_s)
                if isinstance(test, Case):
                    verdicts.append(_judge(await session.run(test.stdin, seconds), test))
                else:
                    verdicts.append(await session.test(test, seconds))
            wall_s = time.monotonic() - start
        return Report(tuple(verdicts), wall_s)

    def run_sync(self, code: str, **options: Any) -> Result:
        """``run`` for code without an event loop."""
        return _in_thread(self.run(code, **options))

    def check(self) -> str:
        """Start a sandbox once, look out of it, and say in one line what it is.

        Raises UserError where there is no way to make one, with what to install or to set.
        """
        mine = _files_of_the_user()
        code = f"import os, platform\nassert not any(map(os.path.exists, {mine!r}))\nprint(platform.python_version())"
        start = time.monotonic()
        try:
            result = self.run_sync(code, limits=Limits(wall_s=20))
        except SandboxError as error:
            raise UserError(f"sandbox: {error}", _hint(str(error))) from None
        if result.exit_code != 0:
            what = "the user's files can be seen in it" if "AssertionError" in result.stderr else f"{result}"
            raise UserError(f"sandbox: {self._config.runtime} does not work: {what}", _hint(""))
        name = "bubblewrap" if self._config.runtime == "auto" else self._config.runtime
        return f"{name}, Python {result.stdout.strip()}, {1000 * (time.monotonic() - start):.0f} ms to start and end"

    @contextlib.asynccontextmanager
    async def _session(self, code: str, files: Mapping[str, str], limits: Limits) -> AsyncIterator[_Session]:
        for name in files:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or not PurePosixPath(name).parts:
                raise ValueError(f"a file in the sandbox has a relative path, not {name!r}")
        command = runtimes.command(self._config, limits, _guest_folder())
        as_nobody: dict[str, Any] = {}
        if os.geteuid() == 0:
            as_nobody = {"user": _NOBODY, "group": _NOBODY, "extra_groups": []}
        async with _RUNNING.acquired(self.parallel):
            try:
                process = await asyncio.create_subprocess_exec(
                    *command,
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.PIPE,
                    env=runtimes.environment(self._config),
                    cwd="/",
                    start_new_session=True,
                    **as_nobody,
                )
            except OSError as error:
                who = f" as user {_NOBODY}" if as_nobody else ""
                raise SandboxError(f"{command[0]} cannot be started{who}: {error.strerror}") from error
            session = _Session(process)
            try:
                await session.begin(code, files, asdict(limits) | {"helpers": runtimes.num_helpers(self._config)})
                yield session
            finally:
                await session.end()


class _Session:
    """A conversation with process 1 of one sandbox."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        self._process, self._to, self._from, self._errors = process, process.stdin, process.stdout, process.stderr
        self.is_over = False
        """No more can be run in it."""

    async def begin(self, code: str, files: Mapping[str, str], limits: Mapping[str, float]) -> None:
        """Wait until process 1 is ready. Raises SandboxError."""
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                answer = await self._ask({"code": code, "files": dict(files), "limits": limits})
                if answer is None:
                    said = (await self._errors.read(4000)).decode(errors="replace").strip()
                    raise SandboxError(said or "it ended at its start without a word")
        except TimeoutError:
            raise SandboxError(f"it was not ready after {_START_TIMEOUT_S:g} s") from None
        if "refused" in answer:
            raise SandboxError(f"nothing was run in it: {answer['refused']}")

    async def run(self, stdin: str, seconds: float) -> Result:
        answer = await self._job({"kind": "run", "stdin": stdin}, seconds)
        return Result(**{"exit_code": None, "stdout": "", "stderr": "", **answer})

    async def test(self, test: str, seconds: float) -> Verdict:
        answer = await self._job({"kind": "test"}, seconds, {"test": test})
        if answer["killed_by"]:
            return Verdict(False, _passed_limit(answer["killed_by"]))
        try:
            return Verdict(**json.loads(answer["verdict"]))
        except ValueError:  # nothing, or the half of it
            return Verdict(False, "the tester was killed")

    async def end(self) -> None:
        """Hang up and wait until all is gone. Raises TimeoutError where a killed process does not end.

        Where process 1 does not go by itself it is killed first: its runtime then ends in good order, with what it has
        started and mounted beside it (Apptainer: squashfuse).
        """
        self._to.close()
        try:
            async with asyncio.timeout(_END_TIMEOUT_S):
                await self._gone()
            return
        except TimeoutError:
            family = _descendants(self._process.pid)
        _kill([process for process in family if _is_first(process.pid)])
        try:
            async with asyncio.timeout(_CLEAN_UP_S):
                await self._gone()
        except TimeoutError:
            family += _descendants(self._process.pid)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            async with asyncio.timeout(_KILL_TIMEOUT_S):
                await self._gone()
        finally:
            _kill(family)

    async def _gone(self) -> None:
        # Its pipes are read to their ends: asyncio waits for those too.
        await asyncio.gather(self._process.wait(), self._from.read(), self._errors.read())

    async def _job(self, job: dict[str, Any], seconds: float, *more: Any) -> dict[str, Any]:
        start, killed_by = time.monotonic(), "sandbox"
        try:
            async with asyncio.timeout(seconds + _GRACE_S):
                answer = await self._ask({**job, "seconds": seconds}, *more)
                if answer is not None:
                    return answer
        except TimeoutError:
            killed_by = "wall"
        self.is_over = True
        return {"killed_by": killed_by, "wall_s": time.monotonic() - start, "cpu_s": 0.0}

    async def _ask(self, *messages: Any) -> Any:
        """The answer to `messages`, None where process 1 has ended."""
        try:
            for message in messages:
                self._to.write(frames.pack_inward(message))
            await self._to.drain()
            header = await self._from.readexactly(4)
            return ast.literal_eval((await self._from.readexactly(int.from_bytes(header, "big"))).decode("ascii"))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None


def _descendants(pid: int) -> list[psutil.Process]:
    import psutil  # needed rarely, and this module is loaded at every start of a reward's process

    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _is_first(pid: int) -> bool:
    """Whether it is process 1 of a process tree of its own."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    ids = next((line.split()[1:] for line in lines if line.startswith("NSpid:")), [])
    return len(ids) > 1 and ids[-1] == "1"


def _kill(processes: Sequence[psutil.Process]) -> None:
    """Kill those that live. A number that is another process's by now is left alone."""
    import psutil

    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()


def _judge(result: Result, case: Case) -> Verdict:
    if result.killed_by:
        return Verdict(False, _passed_limit(result.killed_by))
    if result.exit_code != 0:
        last = result.stderr.strip().rpartition("\n")[2]
        return Verdict(False, f"it ended with exit code {result.exit_code}: {last[:200]}".removesuffix(": "))
    passed = _lines(result.stdout) == _lines(case.expected)
    return Verdict(passed, "" if passed else "it printed something else")


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


def _passed_limit(limit: str) -> str:
    return "the sandbox was ended" if limit == "sandbox" else f"it passed its limit: {limit}"


def _in_thread(coroutine: Coroutine[Any, Any, _T]) -> _T:
    """Its result, also where this thread has an event loop. Bubblewrap lives as long as the thread that started it."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()


def _files_of_the_user() -> list[str]:
    """Some that a sandbox must not show: of the home directory, where that is none of the system's."""
    home = Path.home()
    if home == Path("/") or home.is_relative_to("/usr"):
        return []
    try:
        return [str(path) for path in itertools.islice(home.iterdir(), 100)]
    except OSError:
        return []


@functools.cache
def _guest_folder() -> Path:
    """The folder of ``guest``, or a copy where the user who runs the sandbox could not read it."""
    own = Path(__file__).resolve().parent / "guest"
    if os.geteuid() != 0 or readable_by_all(own):
        return own
    copy = Path(tempfile.mkdtemp(prefix="forge_hpc-sandbox-"))
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    copy.chmod(0o755)
    for file in own.glob("*.py"):
        shutil.copyfile(file, copy / file.name)
        (copy / file.name).chmod(0o644)
    return copy


_FORBIDDEN = {  # a kernel setting, the value that forbids, and how to allow
    "user/max_user_namespaces": ("0", "sysctl user.max_user_namespaces=10000"),
    "kernel/unprivileged_userns_clone": ("0", "sysctl kernel.unprivileged_userns_clone=1"),
    "kernel/apparmor_restrict_unprivileged_userns": ("1", "an AppArmor profile for bwrap that has `userns,`"),
}


def _hint(error: str) -> str:
    """What may be behind a sandbox that does not start."""
    for setting, (forbids, remedy) in _FORBIDDEN.items():
        path = Path("/proc/sys", setting)
        with contextlib.suppress(OSError):
            if path.read_text().strip() == forbids:
                return f"{path} forbids user namespaces ({forbids}): ask for `{remedy}`, or set sandbox.runtime"
    if "/tmp has" in error:
        return "lower it, or raise `sessiondir max size` in apptainer.conf"
    if "/dev/fuse" in error:
        return "a SIF file needs /dev/fuse (mode 0666); or unpack it once: apptainer build --sandbox DIR IMAGE"
    if "namespace" in error or "uid map" in error:
        return "this machine (or the container around it) forbids user namespaces; or set sandbox.runtime"
    return "set sandbox.runtime, sandbox.python or sandbox.image, best in the site profile"
