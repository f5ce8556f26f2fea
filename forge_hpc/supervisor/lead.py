"""How long before its walltime a run leaves: the one rule, of job scripts (``--signal``) and of the run's own clock.

slurm.signal_lead_s, where it is set
else what the run has measured (``lead_s`` in status.json), or DEFAULT_S before that
but never more than MAX_SHARE of the walltime
"""

from __future__ import annotations

import contextlib
import math

from forge_hpc.config import Config, UserError, walltime_s
from forge_hpc.run_dir import RunDir

DEFAULT_S = 300.0
"""Where nothing was measured."""
MIN_S = 30.0
"""What leaving takes beside the step and the save: the signal's way, the requeue, slow seconds of a shared disk."""
MAX_SHARE = 0.5
"""In a short job no more than half of its time goes into leaving."""
EARLY_S = 90.0
"""Slurm sends its warning up to a minute early, and looks every half minute."""


def measured_lead_s(save_s: float, step_s: float) -> float:
    """The lead of a run whose longest save and step took so many seconds: twice both, since the next may be longer."""
    return round(MIN_S + 2 * (save_s + step_s), 1)


def lead_s(config: Config, run_dir: RunDir) -> int:
    """Seconds before the walltime that the job asks for at which the run is to save and leave."""
    if config.slurm.signal_lead_s is not None:
        return config.slurm.signal_lead_s
    status = None
    with contextlib.suppress(OSError, UserError):
        status = run_dir.read_status()
    measured_s = status.lead_s if status is not None else 0.0
    return math.ceil(capped_s(measured_s or DEFAULT_S, walltime_s(config.slurm.time) or math.inf))


def capped_s(lead_s: float, total_s: float) -> float:
    """The lead in a job of so many seconds."""
    return min(lead_s, MAX_SHARE * total_s)


def warning_s(lead_s: float) -> float:
    """A warning of Slurm that comes longer than this before the end was not meant for it. In a job that is shorter than
    what the job scripts ask for, Slurm sends it at once."""
    return max(DEFAULT_S, lead_s) + EARLY_S
