"""Ending engines that are kept, from outside."""

from __future__ import annotations

import os
import time
import uuid

from forge_hpc.config.errors import UserError
from forge_hpc.kept.directory import EnginesDir

WAIT_S = 60.0
_POLL_S = 0.1


def end_engines(directory: EnginesDir) -> bool:
    """Have them end, and wait for it; False where they had died already.

    Raises:
        UserError: a run goes on with them, or they do not end.
    """
    if not is_alive(directory):
        directory.forget()
        return False
    if (run := (directory.state() or {}).get("run")) is not None:
        raise UserError(f"the engines are at work: {run}", f"wait for it, or forge-hpc cancel {run}")
    directory.mailbox.publish(f"end-{uuid.uuid4().hex}", {})
    until = time.monotonic() + WAIT_S
    while directory.origin() is not None or directory.run_dir.is_locked():
        if time.monotonic() > until:
            raise UserError(f"the engines have not ended after {WAIT_S:.0f} s", f"{directory.output} says more")
        time.sleep(_POLL_S)
    return True


def is_alive(directory: EnginesDir) -> bool:
    """Whether a keeper lives: at once for one on this machine, within 11 s for one on another."""
    return directory.origin() is not None and directory.run_dir.is_locked()


def refuse_busy(directory: EnginesDir) -> None:
    """Raises UserError where a run goes on with the engines."""
    state = directory.state()
    if state is not None and state.get("run") is not None and is_alive(directory):
        raise UserError(
            f"the kept engines are at work for {os.path.relpath(state['run'])}",
            f"wait for it, forge-hpc cancel {os.path.relpath(state['run'])}, or leave --keep-engines out",
        )
