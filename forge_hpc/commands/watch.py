"""``forge-hpc watch``."""

from __future__ import annotations

import argparse
import shutil
import sys
import time

from forge_hpc.commands.arguments import add_run_dir as arguments
from forge_hpc.control import Liveness, StatusReader, find_run
from forge_hpc.observability.terminal import width_of_terminal
from forge_hpc.observability.watching import render_watch
from forge_hpc.run_dir import Status

__all__ = ["arguments", "run"]

_REFRESH_S = 2.0
_WAITING_S = 20.0
"""A job that waits says nothing itself: Slurm is asked as often."""


def run(args: argparse.Namespace) -> int:
    run_dir = find_run(args.run_dir)
    liveness, seen = Liveness(run_dir), StatusReader(run_dir)
    on_terminal, drawn, shown = sys.stdout.isatty(), 0.0, ""
    while True:
        has_moved, status = seen.moved(), seen.status()
        if has_moved or (_waits(status) and time.monotonic() - drawn > _WAITING_S):
            drawn = time.monotonic()
            screen = render_watch(run_dir, width=width_of_terminal())
            if on_terminal:
                height = shutil.get_terminal_size().lines
                print("\033[H\033[2J" + "\n".join(screen.splitlines()[: height - 1]), flush=True)
            elif (what := _what_counts(screen)) != shown:  # not at every heartbeat
                print(f"{'' if not shown else chr(10)}{screen}", flush=True)
                shown = what
        if status is None or status.is_terminal:
            return 0 if status and status.state == "completed" else 1
        if lost := liveness.lost(status):
            print(f"error: {lost}", file=sys.stderr)
            return 1
        time.sleep(_REFRESH_S)


def _waits(status: Status | None) -> bool:
    return status is not None and status.state in ("pending", "preempted")


def _what_counts(screen: str) -> str:
    """The screen without what moves by itself."""
    return "\n".join(line for line in screen.splitlines() if not line.startswith(("heartbeat", "job ")))
