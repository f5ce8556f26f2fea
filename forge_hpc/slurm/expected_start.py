"""When Slurm would start a job, by ``sbatch --test-only``: it answers on stderr, and queues nothing."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence

from forge_hpc.slurm.client import PATIENT_S, SlurmRefused, SlurmSilent, ask_both

_NOT_KNOWN_S = 6 * 3600
"""Slurm adds so much for each job in the queue whose start it has not planned (22.05.8, 24.11.5, 26.05.5)."""

_NOT_NOW = "not on the nodes that are up now, or on none at all"


def expected_start(command: Sequence[str], now: float | None = None) -> str | None:
    """When and where the job of sbatch's options and script would start, for a person; None where Slurm does not say.

    Raises:
        SlurmRefused: it would never take the job, in its own words.
    """
    try:
        out, err = ask_both("sbatch", "--test-only", *command, timeout_s=PATIENT_S)
    except SlurmSilent:
        return None  # whether it is down is told by who asks next
    except SlurmRefused as refused:
        said = str(refused)
        if "Requested node configuration is not available" not in said or "can not be satisfied" in said:
            raise
        return _NOT_NOW  # sbatch itself takes the job where the others are down for a while
    found = re.search(r"to start at (\S+)(?: .*)? using (\d+) processors on nodes (\S+)", err or out)
    when = None if found is None else _when(found[1], time.time() if now is None else now)
    return None if found is None or when is None else f"{when} on {found[3]}"


def _when(text: str, now: float) -> str | None:
    """`text` is a Unix time (SLURM_TIME_FORMAT=%s), or a date of Slurm's."""
    start = float(text) if text.isdigit() else time.mktime(time.strptime(text[:19], "%Y-%m-%dT%H:%M:%S"))
    wait_s = start - now
    if wait_s > 3600 and (wait_s + PATIENT_S) % _NOT_KNOWN_S < PATIENT_S + 2:
        return None
    if wait_s < 60:
        return "at once"
    days, rest = divmod(int(wait_s), 86400)
    hours, minutes = rest // 3600, rest % 3600 // 60
    in_words = f"{days} d {hours} h" if days else f"{hours} h {minutes} min" if hours else f"{minutes} min"
    return f"in about {in_words} ({time.strftime('%Y-%m-%d %H:%M', time.localtime(start))})"
