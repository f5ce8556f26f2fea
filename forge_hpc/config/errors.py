"""Errors that a user can mend: one line that says what is wrong, one that says what to do."""

from __future__ import annotations

import sys
from typing import TextIO

EXIT_USAGE = 2
"""Exit code for wrong usage or configuration."""


class UserError(Exception):
    """Something that the user did or gave. Doors print it without a traceback and exit with ``EXIT_USAGE``.

    Example:
        raise UserError("no such file: data.jsonl", "give data.path=FILE")
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[type[UserError], tuple[str, str | None]]:
        return type(self), (self.message, self.hint)  # both survive a way between processes


def print_error(error: UserError, file: TextIO | None = None) -> int:
    """Write ``error: …`` and, where there is one, ``hint: …`` to `file` (stderr); return the exit code."""
    stream = sys.stderr if file is None else file
    print(f"error: {error.message}", file=stream)
    if error.hint:
        print(f"hint: {error.hint}", file=stream)
    return EXIT_USAGE
