#!/usr/bin/env bash
# One would guess: whoever catches the error of a call to an actor whose process has died has handled that death.
# What happens: the process that made the call is told once more, of the actor and of the logger beside it, by a hook that
# knows nothing of the except clause; as shipped it raises KeyboardInterrupt in the main thread, whatever that is doing by
# then.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 torchmonarch==0.7.0 numpy==2.3.5
cat > "$work/worker.py" <<'PYTHON'
import os

from monarch.actor import Actor, endpoint


class Worker(Actor):
    @endpoint
    def leave(self) -> None:
        os._exit(3)
PYTHON
cat > "$work/client.py" <<'PYTHON'
import os
import sys
import time
from importlib.metadata import version

import monarch.actor
from monarch.actor import this_host
from worker import Worker


def let_a_worker_leave():
    worker = this_host().spawn_procs(per_host={"procs": 1}).spawn("worker", Worker)
    try:
        worker.leave.call_one().get(timeout=120)
    except Exception as error:
        return type(error).__name__
    raise SystemExit("the call did not fail")


def wait_for(ready, seconds=120):
    end = time.monotonic() + seconds
    while not ready() and time.monotonic() < end:
        time.sleep(0.05)


if sys.argv[1] == "as shipped":
    print("torchmonarch", version("torchmonarch"), flush=True)
    caught = ""
    try:
        caught = let_a_worker_leave()
        wait_for(lambda: False)
        print(f"as shipped: the call raises {caught}, and nothing comes in 120 s", flush=True)
        os._exit(1)
    except KeyboardInterrupt:
        monarch.actor.unhandled_fault_hook = lambda failure: None  # it may come for the logger, too
        when = f"after {caught} was caught" if caught else "where the error was about to be caught"
        print(f"as shipped: a KeyboardInterrupt comes, {when}", flush=True)
        os._exit(0)
told = []
monarch.actor.unhandled_fault_hook = lambda failure: told.append(failure.mesh_name.rpartition("-")[0])
name = let_a_worker_leave()
wait_for(lambda: len(told) == 2)
print(f"with a hook of one's own: the call raises {name}; caught, and the hook is told of", sorted(told), flush=True)
os._exit(0 if sorted(told) == ["logger", "worker"] else 1)
PYTHON
cd "$work"
export PYTHONPATH="$work"
for hook in "as shipped" "one's own"; do
  timeout 300 "$work/venv/bin/python" client.py "$hook" 2>"$work/errors" || { tail -20 "$work/errors"; exit 1; }
done
