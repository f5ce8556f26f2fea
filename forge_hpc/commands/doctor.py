"""``forge-hpc doctor``."""

from __future__ import annotations

import argparse

from forge_hpc.doctor import doctor


def arguments(parser: argparse.ArgumentParser) -> None:
    del parser  # it takes none


def run(args: argparse.Namespace) -> int:
    del args
    return doctor()
