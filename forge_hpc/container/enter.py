"""``python -m forge_hpc.container.enter --run-dir D -- COMMAND``: a command in a container like the run's, on this
node. ``forge-hpc attach`` starts it there."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from forge_hpc.config import UserError, print_error
from forge_hpc.container.outside import enter


def main() -> int:
    """Returns only where the container cannot be started."""
    parser = argparse.ArgumentParser(description="Run a command in a container like that of a run.")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("command", nargs="+")
    args = parser.parse_args()
    try:
        enter(args.run_dir, args.command)
    except UserError as error:
        return print_error(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
