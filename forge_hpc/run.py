"""What every node of an allocation starts: ``python -m forge_hpc.run --run-dir D``; see ``supervisor.supervisor``.

Where the run is to be in a container, it starts itself there (``container.outside``)."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from forge_hpc.cluster.allocation import Allocation
from forge_hpc.cluster.processes import die_with_parent
from forge_hpc.container.outside import container_of, run_inside
from forge_hpc.run_dir import RunDir
from forge_hpc.supervisor.supervisor import Supervisor


def main() -> int:
    """Door of ``python -m forge_hpc.run``."""
    parser = argparse.ArgumentParser(description="Run a run directory on this node of its allocation.")
    parser.add_argument("--run-dir", type=Path, required=True, help="a directory with config.yaml, made by submit")
    parser.add_argument("--array", action="store_true", help="D is a sweep, the run that of this task of the array")
    parser.add_argument("--no-summary", action="store_true", help="print no figures at the end")
    parser.add_argument("--after", type=int, metavar="CODE", help="(the job script) srun has ended with CODE")
    parser.add_argument("--parent", type=int, help="end when this process, which started us, does")
    args = parser.parse_args()
    if args.parent is not None:
        die_with_parent(args.parent)
    os.umask(0o077)  # all that a run writes is its owner's alone
    run_dir = args.run_dir / os.environ["SLURM_ARRAY_TASK_ID"] if args.array else args.run_dir
    allocation = Allocation.from_environment()
    if args.after is None and (contained := container_of(RunDir(run_dir), allocation)) is not None:
        return run_inside(contained, RunDir(run_dir), allocation, sys.argv[1:])
    supervisor = Supervisor(RunDir(run_dir), allocation, summary=not args.no_summary)
    return supervisor.run() if args.after is None else supervisor.after(args.after)


if __name__ == "__main__":
    sys.exit(main())
