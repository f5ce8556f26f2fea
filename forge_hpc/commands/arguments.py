"""Arguments that several commands take."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_run_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", nargs="?", type=Path, metavar="RUN_DIR|JOB", help="default: the newest under runs/")


def add_overrides(parser: argparse.ArgumentParser, example: str) -> None:
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=example)


def add_cluster(parser: argparse.ArgumentParser) -> None:
    help = "auto: within salloc its nodes, else Slurm where it is; allocation: those of any job that this shell is in"
    parser.add_argument("--cluster", choices=("auto", "slurm", "allocation", "local"), default="auto", help=help)
    parser.add_argument("--site", metavar="NAME", help="site profile; default $FORGE_HPC_SITE")


def add_follow(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--follow", action="store_true", help="show the job's output until the run ends")
