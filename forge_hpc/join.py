"""What every node of a job that lends starts: ``python -m forge_hpc.join --run-dir D``; see ``joining.node``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from forge_hpc.cluster.allocation import Allocation
from forge_hpc.joining.node import LentNode
from forge_hpc.run_dir import RunDir


def main() -> int:
    """Door of ``python -m forge_hpc.join``."""
    parser = argparse.ArgumentParser(description="Lend this node of its allocation to a running run.")
    parser.add_argument("--run-dir", type=Path, required=True, help="of the run that is to have the node")
    args = parser.parse_args()
    os.umask(0o077)
    return LentNode(RunDir(args.run_dir), Allocation.from_environment()).run()


if __name__ == "__main__":
    sys.exit(main())
