"""``forge-hpc export``."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from pathlib import Path
from typing import Literal

from forge_hpc.cluster.stacks import stand_by
from forge_hpc.commands.arguments import add_run_dir
from forge_hpc.control import find_run
from forge_hpc.export import export
from forge_hpc.supervisor.ending import Exit


def arguments(parser: argparse.ArgumentParser) -> None:
    add_run_dir(parser)
    parser.add_argument(
        "--step",
        type=_step,
        metavar="N",
        help="of this step, or best (checkpoint.best); default the newest one",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="default RUN_DIR/exports/step-N")


def _step(text: str) -> int | Literal["best"]:
    return "best" if text == "best" else int(text)


def run(args: argparse.Namespace) -> int:
    # so that nothing is left of an export that is ended
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(Exit.TERMINATED))
    stand_by("export")  # of a run that waits for it
    directory = export(find_run(args.run_dir), args.step, args.output)
    print(directory)
    print(f"next           vllm serve {shlex.quote(str(directory))}", file=sys.stderr)
    return 0
