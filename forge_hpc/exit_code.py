"""The exit code of a start that has failed: that which its outcome says, where it says one (``controller.outcome``)."""

from __future__ import annotations

import contextlib

from forge_hpc.cluster.rendezvous import Rendezvous
from forge_hpc.run_dir import RunDir
from forge_hpc.supervisor.ending import Exit


def exit_code(run_dir: RunDir, code: int) -> int:
    """What a door returns for a supervisor's ``code``: a failure that the outcome of the start, or of its warm start,
    takes for wrong usage is that."""
    if code != Exit.FAILED:
        return code
    for place in (run_dir, RunDir(run_dir.warmstart)):
        with contextlib.suppress(OSError):  # there is none, or not any more
            for directory in place.rendezvous.iterdir():
                outcome = Rendezvous(directory).look("outcome")
                if outcome is not None and "exit" in outcome:
                    return int(outcome["exit"])
    return code
