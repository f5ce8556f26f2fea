#!/usr/bin/env bash
# One would guess that cancelling a job of submitit's LocalExecutor ends what the job has started, as scancel does for the
# same function under Slurm. It does not: the job is INTERRUPTED and done, and processes of its function (a server, data
# workers, torchrun) go on, holding their ports, memory and GPUs.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check submitit==1.5.4

cat > cancel.py <<'PYTHON'
import importlib.metadata
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import submitit

CHILD = Path("child")


def job():
    child = subprocess.Popen(["sleep", "600"])
    CHILD.with_suffix(".tmp").write_text(str(child.pid))
    CHILD.with_suffix(".tmp").rename(CHILD)
    child.wait()


def wait_for(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return condition()


def lives(pid):
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


if __name__ == "__main__":
    print("version    submitit", importlib.metadata.version("submitit"))
    print("expected   what a job has started ends when the job is cancelled")
    executor = submitit.LocalExecutor(folder="logs")
    executor.update_parameters(timeout_min=10)
    started = executor.submit(job)
    assert wait_for(CHILD.exists, 60)
    child = int(CHILD.read_text())
    started.cancel()
    assert wait_for(started.done, 60)
    ended = wait_for(lambda: not lives(child), 15)
    print(f"seen       the job is {started.state} and done; its child {'has ended' if ended else 'lives 15 s later'}")
    if not ended:
        os.kill(child, signal.SIGKILL)
    print("behaviour  the child outlives the job" if not ended else "behaviour  no longer so")
    sys.exit(ended)
PYTHON
venv/bin/python cancel.py 2>&1 | grep -v -e Traceback -e '^  ' -e KeyboardInterrupt
