"""``forge-hpc completion``."""

from __future__ import annotations

import argparse

from forge_hpc.completion import SHELLS, completion


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, help="source <(forge-hpc completion bash), in ~/.bashrc")


def run(args: argparse.Namespace) -> int:
    print(completion(args.shell), end="")
    return 0
