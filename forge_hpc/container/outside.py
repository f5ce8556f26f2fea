"""On every node: start the run in its container, and stand outside for it until it ends.

    srun ─► python -m forge_hpc.run --run-dir D ─► this ─► apptainer exec … python -m forge_hpc.run --run-dir D

A node that cannot start the container says so where the gate looks for what its nodes have found: it is named, and left
out or the job requeued without it, as for every other reason (`gate`). Where that is the first node nobody is there to
look, and this process ends the start (`supervisor.after_srun`): it outlives the requeue, in which Slurm ends the job
script first, by as much as it takes to shut the node out.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from forge_hpc.cluster.allocation import Allocation
from forge_hpc.cluster.rendezvous import Rendezvous
from forge_hpc.config import Config, UserError, read_config
from forge_hpc.container.mounts import Mount, all_mounts
from forge_hpc.container.problems import problems_here
from forge_hpc.container.relay import SIGNALS, Relay
from forge_hpc.container.runtimes import apptainer, environment
from forge_hpc.run_dir import RunDir
from forge_hpc.slurm import outside
from forge_hpc.supervisor import deadlines
from forge_hpc.supervisor.ending import Exit
from forge_hpc.supervisor.node import Node
from forge_hpc.supervisor.supervisor import Supervisor

OTHERS_S = 5.0
"""How long a first node that cannot start waits for the others to say whether they can."""
_PROBE_S = 120.0
_PR_SET_PDEATHSIG = 1


def container_of(run_dir: RunDir, allocation: Allocation) -> Config | None:
    """The run's configuration where this process is to start its container, and not the run."""
    if not allocation.in_slurm or outside.is_inside():
        return None
    try:
        cfg = read_config(run_dir.config)
    except (UserError, OSError):  # the supervisor says so
        return None
    return cfg if cfg.slurm.container.runtime == "apptainer" else None


def run_inside(cfg: Config, run_dir: RunDir, allocation: Allocation, arguments: Sequence[str]) -> int:
    """Run ``forge_hpc.run`` with these arguments in the container; the exit code of this node."""
    if problems := problems_here(cfg):
        return _not_fit(run_dir, allocation, problems)
    came: list[int] = []
    command = [cfg.slurm.container.python, "-u", "-m", "forge_hpc.run", *arguments]
    with Relay() as relay:

        def pass_on(signum: int, frame: FrameType | None) -> None:
            came.append(signum)
            relay.signal(signum)

        for signum in SIGNALS:
            signal.signal(signum, pass_on)
        mounts = [*all_mounts(cfg, run_dir.path), Mount(str(relay.folder), str(relay.folder))]
        line = apptainer(cfg, mounts, command)
        env = environment({**relay.variables, outside.SIGNALS: "1"})
        libc, own = ctypes.CDLL(None), os.getpid()

        def die_with_parent() -> None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != own:
                os._exit(1)

        code = subprocess.Popen(line, stdin=subprocess.DEVNULL, env=env, preexec_fn=die_with_parent).wait()
        code = code if code >= 0 else 128 - code
        if code == 0 or came or relay.has_run.is_set():
            return code
        return _not_fit(run_dir, allocation, [_why(cfg, mounts, code)])


def _why(cfg: Config, mounts: Sequence[Mount], code: int) -> str:
    """Apptainer's own words: its errors go to the terminal, so it is asked once more, for nothing."""
    look = [cfg.slurm.container.python, "-c", "import forge_hpc.run"]
    try:
        said = subprocess.run(
            apptainer(cfg, mounts, look),
            env=environment({}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PROBE_S,
            check=False,
        ).stderr
    except (OSError, subprocess.TimeoutExpired) as error:
        said = str(error)
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    words = next((line for line in lines if "FATAL" in line), lines[-1] if lines else f"exit code {code}")
    return f"the container {cfg.slurm.container.image} does not start: {words}"


def _not_fit(run_dir: RunDir, allocation: Allocation, problems: list[str]) -> int:
    """Tell the gate; the exit code. A node that is not the first waits for the end of the start: its own would end the
    others."""
    node = Node(run_dir, allocation)
    name = node.slurm_name
    print(f"node {allocation.node_id} ({name}): {'; '.join(problems)}", file=sys.stderr, flush=True)
    rendezvous = node.rendezvous()
    record = {"address": "", "names": [], "slurm_name": name, "report": {"problems": problems}}
    rendezvous.publish(f"node-{allocation.node_id}", record)
    if allocation.node_id == 0:
        if allocation.num_nodes > 1:
            _wait_for_others(rendezvous, allocation.num_nodes)
        return Supervisor(run_dir, allocation).after(Exit.FAILED)
    while rendezvous.directory.is_dir() and rendezvous.look("outcome") is None:
        time.sleep(deadlines.LOOK_S)
    return Exit.DONE


def _wait_for_others(rendezvous: Rendezvous, num_nodes: int) -> None:
    rendezvous.gather([f"node-{node}" for node in range(num_nodes)], OTHERS_S)


def enter(run_dir: Path, command: Sequence[str]) -> None:
    """Become a command in a container like that of the run. Raises UserError where this node cannot start it."""
    cfg = read_config(run_dir / "config.yaml")
    if problems := problems_here(cfg):
        raise UserError("; ".join(problems))
    line = apptainer(cfg, all_mounts(cfg, run_dir), command)
    os.execvpe(line[0], line, environment({}))
