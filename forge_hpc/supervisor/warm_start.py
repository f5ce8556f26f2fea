"""The warm start: a run of its own, in ``RUN_DIR/warmstart``, on the first node alone, before the run itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from forge_hpc.config import Config, load_config, read_config, save_config
from forge_hpc.run_dir import RunDir
from forge_hpc.status_writer import StatusWriter
from forge_hpc.supervisor import deadlines
from forge_hpc.supervisor.ending import FAILURES, Cause, Ending, Exit
from forge_hpc.supervisor.robust import how_it_ended
from forge_hpc.supervisor.signals import StopRequest, StopRequests
from forge_hpc.supervisor.starts import StartLog


def warm_start(parent: RunDir, config: Config, requests: StopRequests, status: StatusWriter) -> Ending | None:
    """Make the model that the run in ``parent`` starts from, once. None when it is done."""
    run_dir = RunDir(parent.warmstart)
    before = run_dir.read_status()
    if before is not None and before.state == "completed":
        return None
    if not run_dir.config.exists():
        warm = load_config(config.warmstart.config, config.warmstart.overrides)
        warm.data.template_date = warm.data.template_date or config.data.template_date
        save_config(warm, run_dir.create().config)
    own = read_config(run_dir.config)
    print(f"warm start in {run_dir}", flush=True)
    environ = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    command = [sys.executable, "-m", "forge_hpc.run", "--run-dir", str(run_dir.path), "--no-summary"]
    command += ["--parent", str(os.getpid())]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, env=environ)
    beat = -deadlines.BEAT_S
    while process.poll() is None:
        if (request := requests.next()) is not None:
            process.send_signal(signal.SIGINT if request.cancels else signal.SIGTERM)
            requests.current = request
            _wait_for_end(process, patience_s(request, own), requests)
            return Ending(request.cause, f"{request.message}, in the warm start")
        if time.monotonic() - beat > deadlines.BEAT_S:
            status.update()
            beat = time.monotonic()
        time.sleep(deadlines.POLL_S)
    if process.returncode == Exit.DONE:
        return None
    if (request := requests.next()) is not None:  # Slurm signals every process of a step
        return Ending(request.cause, f"{request.message}, in the warm start")
    if process.returncode == Exit.LEFT:  # so it did, and the signal meant nothing to us
        return warm_start(parent, config, requests, status)
    _, end = StartLog(run_dir).newest()
    if end is None:
        return Ending(Cause.CRASH, f"the warm start in {run_dir} {how_it_ended(process.returncode)}")
    cause = Cause.CRASH if end["cause"] in FAILURES else Cause.FAILED
    usage = Exit.USAGE if process.returncode == Exit.USAGE else None
    return Ending(cause, f"the warm start in {run_dir} failed: {end['message']}", exit=usage)


def patience_s(request: StopRequest, warm: Config) -> float:
    """How long the warm start's supervisor may take to save and end: where nobody gives a time, as long as it waits
    itself for a controller that hangs, whose stacks it writes before it kills it."""
    if request.cancels:
        return max(deadlines.STOP_S, request.within_s or 0.0) + 2
    if request.within_s is None:
        return deadlines.heartbeat_timeout_s(warm) + deadlines.OTHERS_S
    return request.within_s - deadlines.REQUEUE_S


def _wait_for_end(process: subprocess.Popen[bytes], timeout_s: float, requests: StopRequests) -> None:
    """Give it time to save and end; then none. A second Ctrl-C is handed on."""
    deadline = time.monotonic() + timeout_s
    while process.poll() is None:
        if (request := requests.next()) is not None and request.cancels:
            process.send_signal(signal.SIGINT)
            deadline = min(deadline, time.monotonic() + max(deadlines.STOP_S, request.within_s or 0.0) + 2)
        if time.monotonic() > deadline:
            process.kill()
        time.sleep(deadlines.POLL_S)
