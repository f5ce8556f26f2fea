"""Logging of every process of a run: one private file a role and rank, with all that its libraries print."""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, TextIO

from forge_hpc.cluster.stacks import stand_by
from forge_hpc.run_dir import make_private_dir, open_private

logger = logging.getLogger(__name__)


class Terminal(NamedTuple):
    """The streams that the process was started with."""

    stdout: TextIO
    stderr: TextIO


_terminal: Terminal | None = None


def setup_logging(log_file: Path, role: str, capture_output: bool = True) -> Terminal:
    """Send Python's logging to ``log_file`` (appended, mode 0600), and with it this process's stdout and stderr.

    The output is captured at the level of file descriptors: prints of C libraries and of child processes land in the
    file too, and so do uncaught exceptions of any thread and the stack of a crash. Files made by anyone in this
    process from now on are private (umask 077).

    Args:
        log_file: for example ``RunDir.log_dir(job_id, restart) / "trainer-0.log"``.
        role: named on each line, for example ``trainer-0``.
        capture_output: False leaves stdout and stderr where they are; uncaught exceptions are logged all the same.

    Returns:
        The original stdout and stderr, for those who have something to say to the user.
    """
    global _terminal
    os.umask(0o077)
    make_private_dir(log_file.parent)
    fd = open_private(log_file, os.O_WRONLY | os.O_APPEND)
    if not capture_output:
        terminal = _terminal or Terminal(sys.stdout, sys.stderr)
    else:
        sys.stdout.flush()
        sys.stderr.flush()
        if _terminal is None:
            _terminal = Terminal(_duplicate(1), _duplicate(2))
        terminal = _terminal
        for standard_fd, stream in ((1, sys.stdout), (2, sys.stderr)):
            os.dup2(fd, standard_fd)
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(line_buffering=True)

    stream = os.fdopen(fd, "w", buffering=1, encoding="utf-8", errors="backslashreplace")
    handler = logging.StreamHandler(stream)
    formatter = logging.Formatter(f"%(asctime)s.%(msecs)03dZ %(levelname)-7s {role} %(name)s: %(message)s")
    formatter.converter = time.gmtime
    formatter.datefmt = "%Y-%m-%dT%H:%M:%S"
    handler.setFormatter(formatter)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_uncaught_in_thread
    faulthandler.enable(stream)
    stand_by(role)
    return terminal


def _duplicate(fd: int) -> TextIO:
    """A text stream on a copy of ``fd`` that children do not inherit."""
    return os.fdopen(os.dup(fd), "w", buffering=1, encoding="utf-8", errors="backslashreplace")


def _log_uncaught(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        logger.error("interrupted")
    else:
        logger.critical("uncaught exception", exc_info=(kind, error, traceback))


def _log_uncaught_in_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_type is not SystemExit and args.exc_value is not None:
        name = args.thread.name if args.thread else "?"
        exc_info = (args.exc_type, args.exc_value, args.exc_traceback)
        logger.critical("uncaught exception in thread %s", name, exc_info=exc_info)
