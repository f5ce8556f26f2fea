"""``forge-hpc cancel``."""

from __future__ import annotations

import argparse
from pathlib import Path

from forge_hpc.control import cancel_run, find_run


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")  # never a guess


def run(args: argparse.Namespace) -> int:
    return cancel_run(find_run(args.run_dir))
