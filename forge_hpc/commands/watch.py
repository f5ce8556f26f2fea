"""``forge-hpc watch``."""

from __future__ import annotations

import argparse
import sys
import time

from forge_hpc.commands.arguments import add_run_dir as arguments
from forge_hpc.control import Liveness, StatusReader, find_run
from forge_hpc.observability.report import render_watch

__all__ = ["arguments", "run"]

_REFRESH_S = 2.0


def run(args: argparse.Namespace) -> int:
    run_dir = find_run(args.run_dir)
    liveness, seen = Liveness(run_dir), StatusReader(run_dir)
    clear = "\033[H\033[2J" if sys.stdout.isatty() else ""
    while True:
        has_moved, status = seen.moved(), seen.status()
        if has_moved:
            print(f"{clear}{render_watch(run_dir)}", flush=True)
        if status is None or status.is_terminal:
            return 0 if status and status.state == "completed" else 1
        if lost := liveness.lost(status):
            print(f"error: {lost}", file=sys.stderr)
            return 1
        time.sleep(_REFRESH_S)
