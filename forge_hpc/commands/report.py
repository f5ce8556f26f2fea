"""``forge-hpc report``."""

from __future__ import annotations

import argparse
from pathlib import Path

from forge_hpc.commands.arguments import add_run_dir
from forge_hpc.commands.pages import write_page
from forge_hpc.control import find_run
from forge_hpc.observability.report import render_report


def arguments(parser: argparse.ArgumentParser) -> None:
    add_run_dir(parser)
    parser.add_argument("--html", type=Path, metavar="FILE", help="the page; default: RUN_DIR/report.html")


def run(args: argparse.Namespace) -> int:
    run_dir = find_run(args.run_dir)
    print(render_report(run_dir))

    def render() -> str:
        from forge_hpc.observability.page.run import render_page

        return render_page(run_dir)

    return write_page(args.html or run_dir.path / "report.html", render, is_asked_for=args.html is not None)
