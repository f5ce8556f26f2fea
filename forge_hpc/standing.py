"""``forge-hpc stacks``: where every process of a running run stands, by the stacks that its supervisors write.

    stacks-N in the rendezvous ─► every node's supervisor ─► logs/JOB.RESTART/stacks-NODE.log ─► a line for each process

See ``cluster/stacks.py``: the same is written of a run that hangs, before it is ended.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from forge_hpc.cluster import stacks
from forge_hpc.cluster.rendezvous import Rendezvous
from forge_hpc.config.errors import UserError
from forge_hpc.observability.terminal import Column, as_json, cut, fitted, width_of_terminal
from forge_hpc.run_dir import RunDir

_FRAME = re.compile(r'^  File "(.*)", line (\d+) in (.*)$', re.MULTILINE)
_SILENT = "says nothing of itself"
_PARAGRAPH = re.compile(r"^--- (?P<role>.*), pid (?P<pid>\d+): (?P<command>.*)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a process stands."""

    node: int
    role: str
    """Such as ``trainer-0``; ``process`` for one that is not ours."""
    pid: int
    function: str
    """The innermost one of our code, or of the user's; else of Python; of a process that is no Python its command."""
    place: str
    """FILE:LINE, and what the kernel waits for where the process is stopped, or waits for a disk."""


def show_stacks(run_dir: RunDir, *, full: bool, as_records: bool) -> int:
    """Have the stacks written on all nodes, and print a table of them, or (``full``) the stacks.

    Raises:
        UserError: nothing runs, or no node has answered.
    """
    try:
        log_dir, rendezvous, num_nodes = _start_of(run_dir)
        before = {path: path.stat().st_size for path in log_dir.glob("stacks-*.log")}
        stacks.ask(rendezvous, "asked for by forge-hpc stacks", num_nodes, log_dir)
    except PermissionError:
        raise UserError(f"{run_dir} is another user's", "only who runs it can ask where it stands") from None
    texts = {_node_of(path): _from(path, before.get(path, 0)) for path in log_dir.glob("stacks-*.log")}
    texts = {node: texts[node] for node in sorted(texts) if texts[node]}
    if not texts:
        raise UserError(
            f"no node of {run_dir} has answered within {stacks.ANSWER_S:.0f} s",
            "before its controller starts, and once its supervisors are gone, nobody answers: forge-hpc status",
        )
    if full:
        print("\n".join(texts.values()))
    else:
        found = [standing for node, text in texts.items() for standing in read_stacks(node, text)]
        if as_records:
            print(as_json([asdict(standing) for standing in found]))
        else:
            print("\n".join(standing_table(found, width_of_terminal())))
            print(f"{_others(found)}all of their stacks: --full, or {log_dir}/stacks-*.log", file=sys.stderr)
    if silent := sorted(set(range(num_nodes)) - texts.keys()):
        print(
            f"note: no answer within {stacks.ANSWER_S:.0f} s from node {', '.join(map(str, silent))}", file=sys.stderr
        )
    return 0


def _start_of(run_dir: RunDir) -> tuple[Path, Rendezvous, int]:
    """Logs of the start that runs now, where its nodes look, and their number."""
    status = run_dir.read_status()
    state = "not begun" if status is None else status.state
    places = [path for path in run_dir.rendezvous.glob("*") if path.is_dir()]
    if status is None or status.is_terminal or not places:
        raise UserError(f"nothing runs in {run_dir}: it is {state}", "stacks are those of a run that runs")
    start = Rendezvous(max(places, key=lambda path: path.stat().st_mtime)).look("start")
    if start is None:
        raise UserError(f"the nodes of {run_dir} are not together yet: it is {state}", "ask again in some seconds")
    return Path(start["log_dir"]), Rendezvous(Path(start["rendezvous"])), start["num_nodes"]


def _node_of(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])


def _from(path: Path, place: int) -> str:
    return path.read_bytes()[place:].decode(errors="replace")


def read_stacks(node: int, text: str) -> list[Standing]:
    """A record for each process of what a node's supervisor has written."""
    found = []
    starts = [*_PARAGRAPH.finditer(text)]
    for match, after in zip(starts, [*starts[1:], None], strict=True):
        body = text[match.end() : after.start() if after else len(text)]
        function, place = _where(body, match["command"])
        found.append(Standing(node, match["role"], int(match["pid"]), function, place))
    return found


def _where(body: str, command: str) -> tuple[str, str]:
    """The innermost frame of a thread in our code or the user's, of the thread that is deepest in it."""
    waits = re.search(r"^    (\S+: [DTt] .*)$", body, re.MULTILINE)
    kernel = f"  {waits[1]}" if waits else ""
    threads = [_FRAME.findall(block) for block in re.split(r"^(?:Current t|T)hread ", body, flags=re.MULTILINE)[1:]]
    ours = [[frame for frame in frames if _is_of_interest(frame[0])] for frames in threads]
    if best := max((frames for frames in ours if frames), key=len, default=[]):
        file, line, function = best[0]
    elif threads and threads[-1]:  # the last one is the main thread
        file, line, function = threads[-1][0]
    else:
        module = re.search(r" -m (\S+)", command)
        program = module[1] if module else re.sub(r"^\S*/", "", command)
        return program, kernel.strip() or ("does not answer" if "no answer" in body else _SILENT)
    return function, f"{_short(file)}:{line}{kernel}"


def _is_of_interest(file: str) -> bool:
    loops = ("__main__", "conduct", "orders", "serve")
    waits = ["forge_hpc/actors/", "forge_hpc/cluster/", "forge_hpc/workers/process"]
    waits += [f"forge_hpc/controller/{loop}" for loop in loops]
    return not re.search(r"site-packages|/lib/python\d|<frozen", file) and not any(word in file for word in waits)


def _short(file: str) -> str:
    return file[file.rindex("forge_hpc/") :] if "forge_hpc/" in file else file.partition("site-packages/")[2] or file


def standing_table(found: list[Standing], width: int | None) -> list[str]:
    """The records as a table of at most ``width`` characters, without those of processes that say nothing."""
    columns = (
        Column("process", right=False),
        Column("node"),
        Column("pid", 2),
        Column("stands in", right=False),
        Column("at", 1, right=False),
    )
    rows = [[s.role, str(s.node), str(s.pid), cut(s.function, 40), s.place] for s in found if s.place != _SILENT]
    return fitted(columns, rows, width)


def _others(found: list[Standing]) -> str:
    """A line on those that the table leaves out; empty where there are none."""
    silent = Counter(cut(standing.function, 24) for standing in found if standing.place == _SILENT)
    names = ", ".join(f"{num} {name}" for name, num in sorted(silent.items()))
    return f"{silent.total()} more, which say nothing of themselves: {names}\n" if silent else ""
