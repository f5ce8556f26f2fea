"""Process 1 of the sandbox: starts what the host asks for, watches it, and reports.

    host ──(0: jobs)──► process 1 ──fork──► the program        0, 1 and 2 are pipes to process 1
         ◄─(1: reports)──          └─fork──► the tester         for tests that call the program: see ``tester``

Process 1 cannot be killed or stopped from inside (the kernel keeps signals from it), nor read (``confine.hide``). When
it ends, the kernel ends everything in the sandbox; it ends when the host closes its input, so also when the host dies.
Programs start by a fork: a millisecond, where a new Python takes ten. Nothing secret is ever in the memory that they
take over: expected outputs stay on the host, tests go past process 1 straight to the tester.
"""

from __future__ import annotations

import gc
import os
import resource
import select
import signal
import sys
import time

from . import confine, frames

TYPE_CHECKING = False  # typing, pathlib and contextlib cost milliseconds at every start
if TYPE_CHECKING:
    from types import CodeType, TracebackType
    from typing import Any

TICK_S = 0.05
"""The watch looks this often."""
HOME = "/tmp"
MAIN = "/tmp/main.py"
_MAX_FILES = 20_000  # an empty file costs memory that no limit on bytes shows
_PAGE_BYTES = resource.getpagesize()
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def main() -> CodeType:
    """Serve the host until it hangs up. Returns only in a child that is a program: with what it shall execute."""
    for ignored in (signal.SIGINT, signal.SIGPIPE):
        signal.signal(ignored, signal.SIG_IGN)  # a handler would let the signal through to process 1
    if refusal := confine.not_isolated():
        _send_to_host({"refused": refusal})
        os._exit(1)
    confine.hide()
    setup = frames.receive_inward(0)
    if setup is None:
        os._exit(1)
    if refusal := confine.too_small(setup["limits"]["disk_mb"]):
        _send_to_host({"refused": refusal})
        os._exit(1)
    os.chdir(HOME)
    for path, text in {**setup["files"], MAIN: setup["code"]}.items():
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
    supervisor = _Supervisor(setup["code"], setup["limits"])
    gc.freeze()
    _send_to_host({"ready": sys.version.split()[0]})
    while (job := frames.receive_inward(0)) is not None:
        report = supervisor.test(job) if job["kind"] == "test" else supervisor.run(job)
        if report is None:
            return _as_main(setup["code"])
        _send_to_host(report)
    os._exit(0)


def _send_to_host(report: dict[str, Any]) -> None:
    frames.send(1, repr(report).encode("ascii", "backslashreplace"))


class _Supervisor:
    def __init__(self, code: str, limits: dict[str, float]) -> None:
        self._code, self._limits = code, limits
        self._usage = _Usage(limits)
        self._max_output_bytes = int(limits["output_kb"] * 1024)

    def run(self, job: dict[str, Any]) -> dict[str, Any] | None:
        """The program on an input of its own. None in the program's own process."""
        (stdin, to_stdin), (out, stdout), (err, stderr) = os.pipe(), os.pipe(), os.pipe()
        pid = os.fork()
        if pid == 0:
            self._confine((stdin, stdout, stderr), None, hidden=False)
            return None
        _close(stdin, stdout, stderr)
        report, output = self._supervise(
            pid, (out, err), job["seconds"], to_stdin, job["stdin"].encode(errors="replace")
        )
        return {**report, "stdout": output[0], "stderr": output[1]}

    def test(self, job: dict[str, Any]) -> dict[str, Any]:
        """One test that calls the program. The tester takes the test's text from the host before a program exists."""
        from . import program, tester

        (from_tester, to_us), (out, stdout), (err, stderr) = os.pipe(), os.pipe(), os.pipe()
        tester_socket, program_socket = tester.pair()
        nothing = os.open(os.devnull, os.O_RDWR)
        tester_pid = os.fork()
        if tester_pid == 0:
            test = frames.receive_inward(0)["test"]
            os.write(to_us, b"\n")
            self._confine((nothing, to_us, nothing), tester_socket, hidden=True)
            tester.main(test, report_fd=1, socket_fd=3)
        _close(to_us, tester_socket)
        os.read(from_tester, 1)
        program_pid = os.fork()
        if program_pid == 0:
            self._confine((nothing, stdout, stderr), program_socket, hidden=False)
            program.main(self._code, MAIN, socket_fd=3)
        _close(program_socket, stdout, stderr, nothing)
        report, output = self._supervise(tester_pid, (from_tester, out, err), job["seconds"])
        return {**report, "verdict": output[0], "stdout": output[1], "stderr": output[2]}

    def _confine(self, streams: tuple[int, int, int], keep: int | None, hidden: bool) -> None:
        try:
            confine.enter(self._limits, streams, keep, hidden)
        except OSError as error:
            os.write(2, f"sandbox: a process could not be confined: {error}\n".encode())
            os._exit(126)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def _supervise(
        self, pid: int, outputs: tuple[int, ...], seconds: float, to_stdin: int | None = None, stdin: bytes = b""
    ) -> tuple[dict[str, Any], list[str]]:
        """Feed, read and watch until `pid` ends or a limit is passed; then end everything.

        Returns exit code, limit passed, seconds; and what came from each of `outputs`.
        """
        start = time.monotonic()
        captured = {fd: bytearray() for fd in outputs}
        poll = select.poll()
        poll.register(0, 0)  # a hang-up is told of without asking
        for fd in outputs:
            poll.register(fd, select.POLLIN)
        still_open = len(outputs)
        if to_stdin is not None:
            os.set_blocking(to_stdin, False)
            poll.register(to_stdin, select.POLLOUT)
        status, passed, next_look = None, None, start
        while (status := _reap(pid)) is None and passed is None:
            now = time.monotonic()
            if now >= start + seconds:
                passed = "wall"
            elif now >= next_look:
                passed, next_look = self._usage.limit_passed(), now + TICK_S
            # With both outputs closed the program is about to end, and nothing else would tell.
            wait_s = min(TICK_S if still_open else 0.001, max(0.0, start + seconds - now))
            for fd, _ in poll.poll(wait_s * 1000):
                if fd == 0:
                    os._exit(0)  # the host is gone, and everything goes with process 1
                elif fd == to_stdin:
                    stdin = stdin[_write_some(fd, stdin) :]
                    if not stdin:
                        poll.unregister(fd)
                        _close(fd)
                        to_stdin = None
                elif chunk := os.read(fd, 65536):
                    captured[fd] += chunk
                    if len(captured[fd]) > self._max_output_bytes:
                        passed = "output"
                else:
                    poll.unregister(fd)
                    still_open -= 1
        wall_s = time.monotonic() - start
        _end_all()
        if to_stdin is not None:
            _close(to_stdin)
        for fd, data in captured.items():  # nobody writes any more
            while chunk := os.read(fd, 65536):
                data += chunk
            _close(fd)
        if passed is None and any(len(data) > self._max_output_bytes for data in captured.values()):
            passed = "output"
        code = None if passed or status is None else os.waitstatus_to_exitcode(status)
        texts = [bytes(data[: self._max_output_bytes]).decode("utf-8", "replace") for data in captured.values()]
        return {"exit_code": code, "killed_by": passed, "wall_s": wall_s, "cpu_s": self._usage.cpu_s()}, texts


class _Usage:
    """Adds up what all processes of the sandbox but the first take. Counts from the start of the sandbox."""

    def __init__(self, limits: dict[str, float]) -> None:
        self._limits = limits
        self._disks = ("/tmp", "/dev/shm")
        self._files_before = [self._used(disk) for disk in self._disks]

    def cpu_s(self) -> float:
        """CPU seconds of all processes that have ended."""
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    def limit_passed(self) -> str | None:
        """The limit that the sandbox is over now, if any."""
        ticks = pages = threads = 0
        pids = [pid for pid in os.listdir("/proc") if pid.isdigit() and pid != "1"]
        for pid in pids:
            try:
                stat = _read(f"/proc/{pid}/stat")
            except OSError:  # it has ended
                continue
            fields = stat[stat.rindex(b")") + 2 :].split()  # from field 3 of proc(5) on
            ticks += sum(map(int, fields[11:15]))  # its own, and of the children that it has waited for
            threads += int(fields[17])
            pages += int(fields[21])
        if self.cpu_s() + ticks / _TICKS_PER_S > self._limits["cpu_s"]:
            return "cpu"
        if threads > self._limits["processes"] + 2:
            return "processes"
        max_bytes = self._limits["memory_mb"] * 2**20
        if pages * _PAGE_BYTES > max_bytes and sum(map(_memory_bytes, pids)) > max_bytes:
            return "memory"
        for disk, before in zip(self._disks, self._files_before, strict=True):
            num_bytes, num_files = (now - then for now, then in zip(self._used(disk), before, strict=True))
            if num_bytes > self._limits["disk_mb"] * 2**20 or num_files > _MAX_FILES:
                return "disk"
        return None

    @staticmethod
    def _used(disk: str) -> tuple[int, int]:
        info = os.statvfs(disk)
        return (info.f_blocks - info.f_bfree) * info.f_frsize, info.f_files - info.f_ffree


def _memory_bytes(pid: str) -> int:
    """Its share of resident memory: a page that n processes share counts 1/n. All of it where it hides that."""
    try:
        for line in _read(f"/proc/{pid}/smaps_rollup").splitlines():
            if line.startswith(b"Pss:"):
                return int(line.split()[1]) * 1024
        return int(_read(f"/proc/{pid}/statm").split()[1]) * _PAGE_BYTES
    except PermissionError:
        return int(_read(f"/proc/{pid}/statm").split()[1]) * _PAGE_BYTES
    except OSError:  # it has ended
        return 0


def _read(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.read(fd, 65536)
    finally:
        os.close(fd)


def _write_some(fd: int, data: bytes) -> int:
    """How much of `data` the pipe took; all of it where nobody reads it."""
    try:
        return os.write(fd, data[:65536])
    except BlockingIOError:
        return 0
    except BrokenPipeError:
        return len(data)


def _reap(pid: int) -> int | None:
    """Wait for whatever has ended, orphans too; the status of `pid` if it has."""
    try:
        while (ended := os.waitpid(-1, os.WNOHANG))[0] not in (0, pid):
            pass
    except ChildProcessError:
        return None
    return ended[1] if ended[0] == pid else None


def _end_all() -> None:
    """Kill all other processes of the sandbox and wait for their ends: every orphan is process 1's child."""
    try:
        while True:
            _kill_all()
            os.waitpid(-1, 0)
    except ChildProcessError:
        pass


def _kill_all() -> None:
    try:
        os.kill(-1, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _close(*fds: int) -> None:
    for fd in fds:
        os.close(fd)


def _as_main(code: str) -> CodeType:
    """Make this process what `python main.py` would be, and compile the program."""
    import __main__

    for name in [name for name in vars(__main__) if not name.startswith("__")]:
        delattr(__main__, name)
    __main__.__file__ = MAIN
    sys.argv = [MAIN]
    sys.path[0] = HOME
    sys.excepthook = _show_error
    return compile(code, MAIN, "exec")


def _show_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A traceback that begins in the program."""
    while trace is not None and trace.tb_frame.f_code.co_filename != MAIN:
        trace = trace.tb_next
    sys.__excepthook__(kind, error.with_traceback(trace), trace)
