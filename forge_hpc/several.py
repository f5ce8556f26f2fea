"""What a sweep and a pipeline share: a directory of their own, and runs one after another where there is no Slurm."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path

from forge_hpc.config import UserError
from forge_hpc.submission import Checked, Place, Request, resolve_config


def name_of(request: Request) -> str:
    """The name of the run, which is not made by this."""
    with redirect_stderr(io.StringIO()):
        return resolve_config(request).name


def check_unused(directory: Path, what: str) -> None:
    """Raise a UserError unless nothing is in the directory, or there is none."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(
            f"{directory} is there already, and {what} begins in a directory of its own",
            "choose another --run-dir; one of its runs goes on with forge-hpc resume RUN_DIR",
        )


def say_warnings(runs: Sequence[Checked]) -> None:
    """What will hardly work, each thing once."""
    for warning in dict.fromkeys(text for run in runs for text in run.outlook.warnings):
        print(warning, file=sys.stderr)


def run_in_turn(place: Place, runs: Sequence[tuple[str, Checked]], *, is_chain: bool) -> int:
    """Run each, named by its title, to its end; the exit code for the shell.

    Args:
        is_chain: each needs the one before it; else one that fails keeps no other from its turn. One that is stopped
            ends them all.
    """
    from launchers import local

    failed = 0
    for number, (title, run) in enumerate(runs, 1):
        print(f"\n== {number} of {len(runs)}: {title}\nrun directory  {run.run_dir}", flush=True)
        code = local.run_here(run.cfg, run.run_dir.path, place.start(run.cfg, run.run_dir))
        status = run.run_dir.read_status()
        stopped = status is not None and status.state in ("cancelled", "preempted")
        failed += code != 0
        if code and (stopped or is_chain):
            print(f"{len(runs) - number} of {len(runs)} runs have not begun", file=sys.stderr)
            return code
    if failed:
        print(f"{failed} of {len(runs)} runs have failed", file=sys.stderr)
    return 1 if failed else 0
