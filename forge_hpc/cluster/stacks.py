"""The stacks of all processes of a run, written before what hangs is ended: afterwards nobody can ask it any more.

    who sees it ─► stacks-1 in the rendezvous ─► each node's supervisor ─► a signal to all processes below it
                                                   └─► stacks-NODE.log, and stacked-1-NODE in the rendezvous

The rendezvous is that of the nodes, which may serve one run after the other: a request names the folder of the run.

A process ``stands by``: a thread of its own waits at a pipe, and when it is asked writes the Python stacks of all
threads into a file in the node's scratch folder that was opened beforehand. It reads them as Python code does, beside
whatever goes on. Where it cannot, because something hangs in C code and holds the interpreter, faulthandler's C code
writes them at ``SIGNAL``: only then, since it reads stacks without holding anything, and where they move the process
dies of it. What runs no handler (stopped, or asleep in the kernel) and what is not Python shows where the kernel has
its threads.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from forge_hpc.cluster.rendezvous import Rendezvous
from forge_hpc.files import in_thread
from forge_hpc.run_dir import open_private

if TYPE_CHECKING:
    import psutil

SIGNAL = signal.SIGRTMIN + 5
"""One that no library takes. Who does not stand by is not signalled: it would die of it."""
FOLDER = "FORGE_HPC_STACKS"
"""Names the folder to whatever a node's supervisor starts."""
ASK_S = 4.0
"""A process that can run Python has written its stacks within this time."""
DUMP_S = 2.0
"""One that cannot writes them within this time, or not at all."""
WRITE_S = 8.0
"""A node's supervisor waits so long for them, and for the file system."""
ANSWER_S = 8.0
"""All nodes have written theirs within this time, or it is gone on without."""
LAST_S = 4.0
"""So long before a deadline they are begun of what has not ended by then: it is killed at the deadline all the same."""
_file: IO[str] | None = None  # faulthandler keeps its number alone
_answering = 0  # the process whose thread waits to be asked: a fork has none
_lock = threading.Lock()  # actors of a process begin beside each other
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def stand_by(role: str, *, for_want_of_another: bool = False) -> None:
    """Answer to ``SIGNAL`` from now on, under this name alone. Below no supervisor nothing happens. To be called again
    after a fork.

    Args:
        for_want_of_another: a process that has a name keeps it.
    """
    global _file, _answering
    folder = os.environ.get(FOLDER)
    if folder is None:
        return
    with _lock, contextlib.suppress(OSError):  # of a full disk: the run is not to fail for it
        if for_want_of_another and _answering == os.getpid():
            return
        Path(folder).mkdir(mode=0o700, exist_ok=True)
        before, _file = _file, Path(folder, f"{os.getpid()}.{role}").open("w")  # noqa: SIM115
        faulthandler.register(SIGNAL, _file, all_threads=True)
        if before is not None:
            before.close()
            if before.name != _file.name and Path(before.name).name.startswith(f"{os.getpid()}."):
                Path(before.name).unlink(missing_ok=True)
        if _answering != os.getpid():
            pipe = _pipe(Path(folder), os.getpid())
            pipe.unlink(missing_ok=True)  # of an earlier process of this number
            os.mkfifo(pipe, 0o600)
            asked = os.open(pipe, os.O_RDWR | os.O_CLOEXEC)  # it never ends
            threading.Thread(target=_answer, args=(asked,), name="stacks", daemon=True).start()
            _answering = os.getpid()


def _pipe(folder: Path, pid: int) -> Path:
    return folder / f".{pid}"


def _answer(asked: int) -> None:
    """Write the stacks of all other threads each time that somebody asks."""
    while os.read(asked, 4096):
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        text = ""
        for number, frame in sys._current_frames().items():
            if number != threading.get_ident():
                text += f"Thread {number:#x} {names.get(number, '')} (most recent call first):\n"
                for each, line in traceback.walk_stack(frame):
                    text += f'  File "{each.f_code.co_filename}", line {line} in {each.f_code.co_name}\n'
                text += "\n"
        if _file is not None:
            with contextlib.suppress(OSError):
                os.write(_file.fileno(), text.encode(errors="replace"))


def stand_by_worker(worker: Any) -> None:
    """``stand_by`` of a tensor-parallel worker of vLLM."""
    stand_by(f"vllm-worker-{worker.rank}")


def collect(folder: Path, processes: Sequence[psutil.Process], within_s: float = WRITE_S) -> str:
    """What the processes do now, a paragraph each; ``folder`` is where those that stand by write. Where there is less
    time than ``WRITE_S``, each of them has its share of it."""
    ask_s, dump_s = (seconds * within_s / WRITE_S for seconds in (ASK_S, DUMP_S))
    roles = {path.name.partition(".")[0]: path for path in folder.iterdir()} if folder.is_dir() else {}
    files = {process.pid: roles.get(str(process.pid)) for process in processes}
    sizes = {}
    for pid, file in files.items():
        if file is not None and _catches_signal(pid):
            with contextlib.suppress(OSError):
                sizes[pid] = file.stat().st_size
    before = {file: sizes[pid] for pid, file in files.items() if file is not None and pid in sizes}
    for pid in sizes:
        _ask(_pipe(folder, pid))
    silent = _wait_for_growth(before, ask_s)
    for pid in sizes:
        if files[pid] in silent and _catches_signal(pid):  # it may have ended meanwhile
            with contextlib.suppress(OSError):
                os.kill(pid, SIGNAL)
    _wait_for_growth({file: before[file] for file in silent}, dump_s)
    paragraphs = []
    for process in processes:
        file, stacks = files[process.pid], ""
        if file is not None and process.pid in sizes:
            with contextlib.suppress(OSError):
                stacks = file.read_bytes()[sizes[process.pid] :].decode(errors="replace")
            stacks = stacks or f"(no answer within {ask_s + dump_s:g} s)\n"
        role = file.name.partition(".")[2] if file is not None else "process"
        paragraphs.append(f"--- {role}, pid {process.pid}: {_command(process)}\n{_kernel(process.pid)}{stacks}")
    return "\n".join(paragraphs)


def _catches_signal(pid: int) -> bool:
    with contextlib.suppress(OSError):
        caught = re.search(r"^SigCgt:\s*([0-9a-f]+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
        return caught is not None and bool(int(caught[1], 16) >> (SIGNAL - 1) & 1)
    return False


def _ask(pipe: Path) -> None:
    with contextlib.suppress(OSError):  # nobody reads it, or it is full of questions
        asked = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            os.write(asked, b"?")
        finally:
            os.close(asked)


def _wait_for_growth(sizes: dict[Path, int], within_s: float) -> set[Path]:
    """Until all files have grown, and none grows any more. Those that have not grown."""
    deadline, before = time.monotonic() + within_s, dict[Path, int]()
    while time.monotonic() < deadline:
        now = {file: file.stat().st_size for file in sizes if file.exists()}
        if now == before and all(size > sizes[file] for file, size in now.items()):
            return set()
        before = now
        time.sleep(0.05)
    return {file for file, size in before.items() if size <= sizes[file]}


def _command(process: psutil.Process) -> str:
    import psutil

    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())[:200]
    return "has ended"


def _kernel(pid: int) -> str:
    """A line for each thread that is not asleep in the usual way, and one for the first: its state, and the kernel's
    function that it waits in."""
    lines = []
    with contextlib.suppress(OSError):
        for task in sorted(Path(f"/proc/{pid}/task").iterdir(), key=lambda path: int(path.name)):
            with contextlib.suppress(OSError):
                name, state = re.findall(r"^(?:Name|State):\s*(.*)$", (task / "status").read_text(), re.MULTILINE)
                if task.name == str(pid) or state[0] not in "SR":
                    place = (task / "wchan").read_text()
                    lines.append(f"    {name}: {state}{f' in {place}' if place not in ('', '0') else ''}\n")
    return "".join(lines[:20])


class StackWriter:
    """A node's supervisor's part: writes what is below it when somebody asks."""

    def __init__(self, rendezvous: Rendezvous, node: int, scratch: Path, log_dir: Path) -> None:
        self.log_dir = log_dir
        """Of the run that is watched here."""
        self.told = ""
        """What to tell of what ``write_all`` has written here."""
        self._rendezvous, self._node, self._folder = rendezvous, node, folder_in(scratch)
        self._written = 0

    @property
    def file(self) -> Path:
        """What ``write_all`` writes here."""
        return self._file_in(self.log_dir)

    def _file_in(self, log_dir: Path) -> Path:
        return log_dir / f"stacks-{self._node}.log"

    def look_in_time(self, within_s: float = WRITE_S) -> None:
        """``look``; a file system that hangs or fails is no reason to hang or fail."""
        with contextlib.suppress(OSError):  # at the next look, then
            in_thread(self.look, within_s=min(within_s, WRITE_S))

    def write_all(self, why: str, num_nodes: int, within_s: float = WRITE_S) -> str:
        """Have them written on all nodes, which take ``within_s`` each; so long this one waits for the others. What to
        tell of it, as ``ask``."""
        self.told, within_s = "", min(within_s, WRITE_S)
        with contextlib.suppress(OSError):  # what hangs is to end all the same
            in_thread(partial(self._write_all, why, num_nodes, within_s), within_s=within_s)
        return self.told

    def _write_all(self, why: str, num_nodes: int, within_s: float) -> None:
        until, others = time.monotonic() + within_s, num_nodes - 1 + _num_lent(self._rendezvous)
        log_dir, asked = self.log_dir, {"within_s": within_s, "by": self._node}
        number = _request(self._rendezvous, why, log_dir, **asked) if others else 0
        self.write(why, log_dir, within_s)
        self.told = written(log_dir)
        if others:
            _wait_for_answers(self._rendezvous, number, others, until)

    def begin_now(self) -> None:
        """Who was asked before this node was there has answered. Raises OSError."""
        self._written = len(self._rendezvous.names("stacks-"))

    def look(self) -> None:
        """Write them where that has been asked for since the last look."""
        if (request := self._rendezvous.look(f"stacks-{self._written + 1}")) is None:
            return
        self._written += 1
        if request.get("by") != self._node:  # else it has written its own
            self.write(request["why"], Path(request["log_dir"]), request.get("within_s", WRITE_S))
            self._rendezvous.publish(f"stacked-{self._written}-{self._node}", {})

    def write(self, why: str, log_dir: Path, within_s: float = WRITE_S) -> None:
        """Append them to this node's file in ``log_dir``. Raises OSError."""
        import psutil

        processes = sorted(psutil.Process().children(recursive=True), key=lambda process: process.pid)
        text = collect(self._folder, processes, within_s)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        with os.fdopen(open_private(self._file_in(log_dir), os.O_WRONLY | os.O_APPEND), "w", encoding="utf-8") as file:
            file.write(f"=== {now}, node {self._node}: {why}\n\n{text}\n")


def folder_in(scratch: Path) -> Path:
    """Where a node's processes write, in its scratch folder."""
    return scratch / "stacks"


def ask(rendezvous: Rendezvous, why: str, num_nodes: int, log_dir: Path) -> str:
    """Have the supervisors of all nodes write the stacks of their processes, those of nodes that other jobs lend, too.
    What to tell of it, to follow a message; empty where no node has answered. Blocks for at most ``ANSWER_S``, and
    ``WRITE_S`` more where the file system hangs. Raises OSError."""

    def answers() -> int:
        nodes = num_nodes + _num_lent(rendezvous)
        return _wait_for_answers(rendezvous, _request(rendezvous, why, log_dir), nodes, time.monotonic() + ANSWER_S)

    return written(log_dir) if in_thread(answers, within_s=ANSWER_S + WRITE_S) else ""


def _num_lent(rendezvous: Rendezvous) -> int:
    return sum(name.removeprefix("lent-").isdigit() for name in rendezvous.names("lent-"))


def _request(rendezvous: Rendezvous, why: str, log_dir: Path, **more: Any) -> int:
    """The request's number."""
    number = 1 + len(rendezvous.names("stacks-"))
    rendezvous.publish(f"stacks-{number}", {"why": why, "log_dir": str(log_dir), **more})
    return number


def _wait_for_answers(rendezvous: Rendezvous, number: int, num_nodes: int, until: float) -> int:
    """How many nodes have answered."""
    answers = 0
    while answers < num_nodes and time.monotonic() < until:
        time.sleep(0.1)
        answers = len(rendezvous.names(f"stacked-{number}-"))
    return answers


def written(log_dir: Path) -> str:
    """The message of where the stacks are."""
    return f"; the stacks of all processes: {log_dir}/stacks-*.log"
