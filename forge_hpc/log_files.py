"""``forge-hpc logs``: what the processes of a run's newest start have written, on whichever node; all of it lies in the
run directory.

    logs/JOB.RESTART/ROLE.log, ROLE-RANK.log      controller, trainer-0, generator-3, worker-1 (of a node), stacks-1, …
    logs/slurm-JOB.out                            what the job prints
    lent/lender-JOB.out                           what a job prints that lends nodes (docs/join.md)
"""

from __future__ import annotations

import heapq
import re
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from forge_hpc.config.errors import UserError
from forge_hpc.control import Liveness, StatusReader
from forge_hpc.files import is_there, look
from forge_hpc.run_dir import RunDir

_POLL_S = 0.5
_NEW_START_S = 5.0
JOB = "slurm"
"""The role of the job's output."""
_STAMP = re.compile(r"\d{4}-\d\d-\d\dT[\d:.]+Z ")


def show_logs(run_dir: RunDir, role: str, rank: int | None, num_lines: int, follow: bool) -> int:
    """Print the end of the logs of a role, and with `follow` what is added until the run ends, through its restarts.

    Several files are merged by the time of their lines. The exit code: 1 if the run died without a final state, else 0.

    Raises:
        UserError: there is no such log.
    """
    files = log_files(run_dir, role, rank)
    for path in files:
        print(f"==> {path} <==", file=sys.stderr)
    tails = [_Tail(path, num_lines, prefix=len(files) > 1) for path in files]
    try:
        lines = _merged([tail.end() + ([] if follow else tail.rest()) for tail in tails])
        sys.stdout.writelines(lines[-num_lines:] if num_lines else [])
        sys.stdout.flush()
        return _follow(run_dir, role, rank, tails) if follow else 0
    finally:
        for tail in tails:
            tail.close()


def log_files(run_dir: RunDir, role: str, rank: int | None) -> list[Path]:
    """The files of a role, or of one of its ranks. ``trainer-1`` is rank 1 of ``trainer``.

    Raises:
        UserError: there is none; the hint names those that there are.
    """
    found = {path.stem: path for path in _all_files(run_dir)}
    if rank is None and role in found:
        return [found[role]]
    named = re.compile(rf"{re.escape(role)}-(\d+)")
    ranks = {int(match[1]): path for name, path in found.items() if (match := named.fullmatch(name))}
    if role == JOB and rank is None and (jobs := [path for name, path in found.items() if name.startswith(f"{JOB}-")]):
        return [max(jobs, key=lambda path: path.stat().st_mtime)]
    if rank is None and ranks:
        return [ranks[number] for number in sorted(ranks)]
    if rank is not None and rank in ranks:
        return [ranks[rank]]
    if role == "controller" and rank is None and found:  # it ended before there was one: what the job printed
        return [max(found.values(), key=lambda path: path.stat().st_mtime)]
    missing = role if rank is None else f"{role} of rank {rank}"
    raise UserError(f"no log {missing} in {run_dir.logs}", _what_there_is(found))


def _what_there_is(names: Iterable[str]) -> str:
    """``controller, generator (ranks 0 to 3), slurm``."""
    ranks: dict[str, list[int]] = {}
    for name in names:
        role, _, rank = name.rpartition("-")
        if role and role != JOB and rank.isdigit():
            ranks.setdefault(role, []).append(int(rank))
        else:
            ranks.setdefault(role if role == JOB else name, [])
    if not ranks:
        return "the run has not begun yet"
    return "there are: " + ", ".join(f"{role}{_ranks_text(sorted(ranks[role]))}" for role in sorted(ranks))


def _ranks_text(ranks: Sequence[int]) -> str:
    if not ranks:
        return ""
    if len(ranks) == 1:
        return f"-{ranks[0]}"
    whole = len(ranks) == ranks[-1] - ranks[0] + 1
    return f" (--rank {ranks[0]} to {ranks[-1]})" if whole else f" (--rank {', '.join(map(str, ranks))})"


def _all_files(run_dir: RunDir) -> Iterator[Path]:
    newest = run_dir.latest_log_dir()  # another user's directory is told of here
    if is_there(run_dir.logs):
        yield from run_dir.logs.glob("slurm-*.out")
    if is_there(run_dir.lent):
        yield from run_dir.lent.glob("lender-*.out")
    if newest:
        yield from newest.glob("*.log")


class _Tail:
    """A log that is read to its end, and on."""

    def __init__(self, path: Path, num_lines: int, *, prefix: bool) -> None:
        self._file: TextIO = path.open(errors="replace")
        self._num_lines = num_lines
        self._prefix = f"{path.stem}: " if prefix else ""
        self._begun = ""

    def end(self) -> list[str]:
        """The last whole lines."""
        lines = deque(self._file, self._num_lines + 1)
        if lines and not lines[-1].endswith("\n"):
            self._begun = lines.pop()
        return [self._shown(line) for line in lines][-self._num_lines :] if self._num_lines else []

    def new(self) -> list[str]:
        """Whole lines that have been added since. The first part of one is kept until it ends."""
        look(self._file.fileno())  # NFS would believe for up to a minute that nothing was appended
        text = self._begun + self._file.read()
        whole, end, self._begun = text.rpartition("\n")
        return [self._shown(f"{line}\n") for line in whole.split("\n")] if end else []

    def rest(self) -> list[str]:
        """A last line without an end."""
        text, self._begun = self._begun, ""
        return [self._shown(f"{text}\n")] if text else []

    def close(self) -> None:
        self._file.close()

    def _shown(self, line: str) -> str:
        """A line with a time names its role already."""
        return line if _STAMP.match(line) else f"{self._prefix}{line}"


def _merged(tails: Sequence[list[str]]) -> list[str]:
    """By the time on the lines. One that has none, such as a traceback's, goes with the one before it."""
    if len(tails) == 1:
        return tails[0]
    return [line for _, _, line in heapq.merge(*(_stamped(index, lines) for index, lines in enumerate(tails)))]


def _stamped(index: int, lines: list[str]) -> Iterator[tuple[str, tuple[int, int], str]]:
    stamp = ""
    for number, line in enumerate(lines):
        if found := _STAMP.search(line):
            stamp = found[0]
        yield stamp, (index, number), line


def _follow(run_dir: RunDir, role: str, rank: int | None, tails: list[_Tail]) -> int:
    liveness, seen, start, looked = Liveness(run_dir), StatusReader(run_dir), run_dir.latest_log_dir(), time.monotonic()
    try:
        while True:
            status = seen.status()
            over, lost = status is None or status.is_terminal, liveness.lost(status)
            sys.stdout.writelines(_merged([tail.new() for tail in tails]))
            if lost or over:
                sys.stdout.writelines(line for tail in tails for line in tail.rest())
                if lost:
                    print(f"error: {lost}", file=sys.stderr)
                return 1 if lost else 0
            sys.stdout.flush()
            if time.monotonic() - looked > _NEW_START_S:
                looked = time.monotonic()
                if (newest := run_dir.latest_log_dir()) != start and (files := _if_there(run_dir, role, rank)):
                    start = newest
                    for tail in tails:
                        tail.close()
                    tails[:] = [_Tail(path, 0, prefix=len(files) > 1) for path in files]
                    print(f"==> {newest}: the run has been started again <==", file=sys.stderr)
            time.sleep(_POLL_S)
    except KeyboardInterrupt:
        return 0


def _if_there(run_dir: RunDir, role: str, rank: int | None) -> list[Path]:
    try:
        return log_files(run_dir, role, rank)
    except UserError:  # it has not begun to write
        return []
