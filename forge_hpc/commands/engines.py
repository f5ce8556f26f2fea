"""``forge-hpc engines``."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from forge_hpc.finding import RUNS
from forge_hpc.kept.directory import EnginesDir
from forge_hpc.kept.ending import end_engines, is_alive


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", type=Path, default=RUNS, help="where run directories lie; default runs/")
    parser.add_argument("--end", action="store_true", help="end them now")


def run(args: argparse.Namespace) -> int:
    kept = EnginesDir.below(args.folder)
    if not kept:
        print(f"no engines are kept in {args.folder}/")
        return 0
    for engines in kept:
        print(_line(engines))
    if args.end:
        for engines in kept:
            print(f"{engines.path.name}: {'ended' if end_engines(engines) else 'they had ended already'}")
    return 0


def _line(engines: EnginesDir) -> str:
    state = engines.state()
    if state is None:
        return f"{engines.path.name}: starting"
    if not is_alive(engines):
        return f"{engines.path.name}: the keeper on {state['host']} has died"
    if state["run"] is not None:
        return f"{engines.path.name}: at work for {os.path.relpath(state['run'])}"
    left_s = max(0.0, (state["ends"] or 0) - time.time())
    nodes = f"{state['nodes']} node{'s' * (state['nodes'] > 1)}"
    return f"{engines.path.name}: {nodes}, kept after {state['what'] or 'the start'} for another {_time(left_s)}"


def _time(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
