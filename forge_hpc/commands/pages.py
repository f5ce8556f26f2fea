"""Writing the page of a command that has said the same as text already."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from forge_hpc.config.errors import UserError, print_error
from forge_hpc.files import atomic_write_text


def write_page(path: Path, render: Callable[[], str], *, is_asked_for: bool, is_quiet: bool = False) -> int:
    """Write what ``render`` makes and, unless ``is_quiet``, print where it is. What keeps it from being written fails
    the command only where the page ``is_asked_for``; the text has been printed.

    Returns:
        The exit code.
    """
    try:
        page = render()
        try:
            atomic_write_text(path, page)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}", "choose another with --html FILE") from None
    except UserError as error:
        if is_asked_for:
            return print_error(error)
        print(f"note: no page was written: {error.message}; {error.hint}", file=sys.stderr)
        return 0
    if not is_quiet:
        print(f"\npage: {path.absolute()} ({len(page.encode()) / 1024:,.0f} KiB)")
    return 0
