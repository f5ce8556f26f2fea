#!/usr/bin/env bash
# One would guess: of a mesh of processes in which one has died, the others go on as before. An actor that was spawned
# before the death is indeed still reached in them by a broadcast (on one host, in a small mesh), so one that is spawned on
# the mesh afterwards is, too.
# What happens: nothing is ever reached of one that is spawned afterwards, not even in the living processes, and neither
# spawn nor broadcast says so; spawned on a slice of the mesh without the dead process it is reached at once. So what is
# to end the rest of a lost mesh has to be spawned with it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 torchmonarch==0.7.0 numpy==2.3.5
cat > "$work/worker.py" <<'PYTHON'
import os
from pathlib import Path

from monarch.actor import Actor, current_rank, endpoint


class Worker(Actor):
    @endpoint
    def pid(self) -> int:
        return os.getpid()

    @endpoint
    def touch(self, name: str) -> None:
        Path(f"{name}-{current_rank().rank}").touch()
PYTHON
cat > "$work/client.py" <<'PYTHON'
import os
import signal
import time
from importlib.metadata import version
from pathlib import Path

import monarch.actor
from monarch.actor import this_host
from worker import Worker

told = []
monarch.actor.unhandled_fault_hook = lambda failure: told.append(failure.mesh_name.rpartition("-")[0])


def comes(ready, seconds):
    end = time.monotonic() + seconds
    while not ready() and time.monotonic() < end:
        time.sleep(0.05)
    return ready()


def reaches_the_first(mesh, name):
    try:
        mesh.touch.broadcast(os.path.abspath(name))
    except Exception as error:
        return type(error).__name__
    return comes(Path(f"{name}-0").exists, 30)


print("torchmonarch", version("torchmonarch"), flush=True)
processes = this_host().spawn_procs(per_host={"procs": 2})
before = processes.spawn("before", Worker)
pids = [pid for _, pid in before.pid.call().get()]
os.kill(pids[1], signal.SIGKILL)
assert comes(lambda: "before" in told, 120), "the death was not told"
found = {
    "spawned before": reaches_the_first(before, "before"),
    "spawned after, on the mesh": reaches_the_first(processes.spawn("after", Worker), "after"),
    "spawned after, on its living slice": reaches_the_first(processes.slice(procs=0).spawn("slice", Worker), "slice"),
}
for which, reached in found.items():
    print(f"one of two processes is dead; in the living one an actor {which}: reached {reached}", flush=True)
os._exit(0 if list(found.values()) == [True, False, True] else 1)
PYTHON
cd "$work"
export PYTHONPATH="$work"
timeout 400 "$work/venv/bin/python" client.py 2>"$work/errors" || { tail -20 "$work/errors"; exit 1; }
