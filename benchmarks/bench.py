"""All benchmarks that need no GPU, in one table and one JSON file: `make bench`, at most 20 minutes.

    python benchmarks/bench.py [--out FILE] [--only sandbox.py ...]

A benchmark is a script of this folder that hands over its lines by ``rows.row``, each a median of runs in turns
(A B A B). To add one, add a line to ``SCRIPTS``.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from rows import PROJECT, Script, about_this_machine, run

TOTAL_S = 1200.0
SCRIPTS = (
    Script("packing.py", limit_s=60),
    Script("documents.py", limit_s=60),
    Script("sandbox.py", ("--programs", "100"), limit_s=120),
    Script("weight_sync.py", ("--megabytes", "100", "--repeats", "3"), limit_s=180),
    Script("checkpoint.py", ("--steps", "40", "--rounds", "2"), limit_s=420),
    Script("bad_rewards.py", ("--steps", "12", "--rounds", "2", "--ahead", "0"), limit_s=420),
    Script("save.py", ("runs", "--gb", "1"), limit_s=120),
    Script("flow.py", limit_s=240),
    Script("controller.py", ("--batch", "1"), limit_s=120),  # a step ahead each is complete by itself
    Script("controller.py", ("--batch", "8"), limit_s=120),
    Script("hosts.py", ("--hosts", "16", "64"), limit_s=150),  # 8 GB of memory
    Script("offers.py", ("--hosts", "32"), limit_s=120),
    Script("wire.py", ("--changes",), limit_s=180),
    *([Script("wire.py", ("--megabytes", "300"), limit_s=180)] if os.geteuid() == 0 else []),  # it joins namespaces
    Script("trl_cpu.py", limit_s=300),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PROJECT / "runs/bench.json")
    parser.add_argument("--only", nargs="*", metavar="SCRIPT")
    args = parser.parse_args()
    scripts = [script for script in SCRIPTS if not args.only or script.file in args.only]
    return run(scripts, TOTAL_S, args.out, about=about_this_machine())


if __name__ == "__main__":
    sys.exit(main())
