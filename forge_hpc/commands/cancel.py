"""``forge-hpc cancel``."""

from __future__ import annotations

import argparse
from pathlib import Path

from forge_hpc.cancel import cancel_runs
from forge_hpc.finding import find_runs


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR|JOB")  # never a guess
    parser.add_argument("--now", action="store_true", help="end it without waiting for its step and a save")


def run(args: argparse.Namespace) -> int:
    return cancel_runs([run_dir for what in args.runs for run_dir in find_runs(what)], now=args.now)
