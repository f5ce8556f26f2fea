"""How long a supervisor waits for what: in one place, since these times hang together."""

from __future__ import annotations

from forge_hpc.config import Config

STOP_S = 9.0
"""Seconds that the controller gets to end in good order when the run is cancelled; with the rest it stays below 15."""
KILL_WAIT_S = 15.0
"""Seconds after the signal in which the run must have saved where Slurm kills without a deadline that it tells (after
KillWait, often 30): then there are as many to end the processes, to ask Slurm once more, and to requeue."""
ANSWER_S = 5.0
"""How long Slurm may take for an answer while it waits to kill; nobody listens for signals in that time."""
REQUEUE_S = 4.0
"""What is left for the requeue before Slurm kills."""
COME_BACK_S = 180.0
"""How long Slurm is asked to start the run again where nobody kills: a backup takes slurmctld over after two minutes,
unless the site says otherwise."""
RETRY_S = 2.0
POLL_S = 0.2
LOOK_S = 2.0
"""How often heartbeats are looked at."""
BEAT_S = 5.0
"""How often one is written."""
SILENT_S = 300.0
"""A controller without a heartbeat for so long hangs; for ``cluster.start_timeout_s`` where that is more. What saves
by hand (SIGUSR2), or for somebody at a terminal, has as long."""
OTHERS_S = 60.0
"""So much longer the other nodes wait: the first one is to end it, and to say why."""
WRITE_S = 3.0
"""How long what matters more, such as the requeue, waits for the file system."""
LEASE_S = 120.0
"""How long the last write may take: longer than a file server waits for a reader that has died."""


def heartbeat_timeout_s(config: Config) -> float:
    """For how long a controller may give no heartbeat: actors that start, and data that is read, take their time."""
    return max(SILENT_S, config.cluster.start_timeout_s)
