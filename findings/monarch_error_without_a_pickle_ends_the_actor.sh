#!/usr/bin/env bash
# One would guess: where an endpoint raises an error that cannot be pickled (it holds a lock, a connection, an open file),
# the caller gets another error that says so, as from multiprocessing and concurrent.futures, and the actor serves on.
# What happens: the actor is aborted, with what it held. The call ends with a SupervisionError, as if the process had
# died, whose text holds both errors; so does each later one, to endpoints that work, while the process lives. An error
# that can be pickled and not be made again (it passes on fewer arguments than it takes) comes as the TypeError of that,
# without its own name and text, and the actor lives.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 torchmonarch==0.7.0 numpy==2.3.5
cat > "$work/worker.py" <<'PYTHON'
import os
import threading

from monarch.actor import Actor, endpoint


class Locked(Exception):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


class BadRow(Exception):
    def __init__(self, file: str, row: int) -> None:
        super().__init__(f"row {row} of {file}")


class Worker(Actor):
    @endpoint
    def pid(self) -> int:
        return os.getpid()

    @endpoint
    def fail(self, how: str) -> None:
        raise Locked("shut") if how == "locked" else BadRow("data", 7)
PYTHON
cat > "$work/client.py" <<'PYTHON'
import os
from importlib.metadata import version
from pathlib import Path

import monarch.actor
from monarch.actor import this_host
from worker import Worker

monarch.actor.unhandled_fault_hook = lambda failure: None


def outcome(call):
    try:
        return call.get()
    except Exception as error:
        return type(error).__name__ + (" with its text" if "row 7" in str(error) or "shut" in str(error) else "")


print("torchmonarch", version("torchmonarch"), flush=True)
worker = this_host().spawn_procs(per_host={"procs": 1}).spawn("worker", Worker)
pid = outcome(worker.pid.call_one())
found = {
    "an error that cannot be made again": outcome(worker.fail.call_one("row")),
    "the call after it": outcome(worker.pid.call_one()) == pid,
    "an error that cannot be pickled": outcome(worker.fail.call_one("locked")),
    "the call after that": outcome(worker.pid.call_one()),
    "the process lives": Path(f"/proc/{pid}").exists(),
}
for what, seen in found.items():
    print(f"{what}: {seen}", flush=True)
lost = "SupervisionError with its text"
os._exit(0 if list(found.values()) == ["TypeError", True, lost, lost, True] else 1)
PYTHON
cd "$work"
export PYTHONPATH="$work"
timeout 400 "$work/venv/bin/python" client.py 2>"$work/errors" || { tail -20 "$work/errors"; exit 1; }
