"""The command line: ``forge-hpc COMMAND``, or ``python -m forge_hpc.cli COMMAND``; the commands are in ``commands/``.

Exit codes: 0 done, 1 the run failed, 2 wrong usage or configuration. No torch is loaded here.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from forge_hpc.commands import COMMANDS, INTERNAL
from forge_hpc.config.errors import UserError, print_error
from forge_hpc.supervisor.ending import Exit


class _Parser(argparse.ArgumentParser):
    """Errors in two lines, like all others."""

    def error(self, message: str) -> NoReturn:
        print_error(UserError(message, f"{self.prog} --help"))
        sys.exit(Exit.USAGE)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    os.umask(0o077)  # what a command writes lies in run directories, which are their owner's alone
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0 if arguments else Exit.USAGE
    try:
        return _run(arguments[0], arguments[1:])
    except UserError as error:
        return print_error(error)
    except KeyboardInterrupt:
        return Exit.CANCELLED
    except BrokenPipeError:  # `forge-hpc logs | head`
        sys.stderr.close()
        return 0


def _run(name: str, argv: list[str]) -> int:
    what = {**COMMANDS, **INTERNAL}.get(name)
    if what is None:
        raise UserError(f"unknown command {name}", f"commands: {', '.join(COMMANDS)}")
    command = importlib.import_module(f"forge_hpc.commands.{name}")
    parser = _Parser(prog=f"forge-hpc {name}", description=what, allow_abbrev=False)
    command.arguments(parser)
    code: int = command.run(parser.parse_intermixed_args(argv))
    return code


def _overview() -> str:
    lines = ["usage: forge-hpc COMMAND [...]", ""]
    lines += [f"  {name:<10} {what}" for name, what in COMMANDS.items()]
    lines += ["", "RUN_DIR defaults to the newest run under runs/. forge-hpc COMMAND --help says more."]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
