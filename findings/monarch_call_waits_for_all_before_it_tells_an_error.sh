#!/usr/bin/env bash
# One would guess: what is asked of all actors of a mesh by `call` raises as soon as one of them has raised, as gathered
# tasks do.
# What happens: `call` raises only when every actor has answered, `stream` at once. Ranks that wait in a collective for
# the one which has failed do not answer, so that its error is never told, and who asked waits as long as they do.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 torchmonarch==0.7.0 numpy==2.3.5
cat > "$work/worker.py" <<'PYTHON'
import time

from monarch.actor import Actor, current_rank, endpoint


class Worker(Actor):
    @endpoint
    def step(self, seconds: float) -> int:
        if current_rank().rank == 0:
            raise ValueError("out of luck")
        time.sleep(seconds)
        return current_rank().rank
PYTHON
cat > "$work/client.py" <<'PYTHON'
import os
import time
from importlib.metadata import version

from monarch.actor import ActorError, this_host
from worker import Worker

SECONDS = 20.0


def raised(wait):
    start = time.monotonic()
    try:
        wait()
    except ActorError as error:
        return type(error.exception).__name__, time.monotonic() - start
    raise SystemExit("nothing was raised")


def first_of_stream(mesh):
    for answer in mesh.step.stream(SECONDS):
        answer.get()


print("torchmonarch", version("torchmonarch"), flush=True)
processes = this_host().spawn_procs(per_host={"procs": 2})
mesh = processes.spawn("worker", Worker)
found = {
    "call": raised(lambda: mesh.step.call(SECONDS).get()),
    "stream": raised(lambda: first_of_stream(processes.spawn("another", Worker))),
}
for how, (kind, seconds) in found.items():
    print(f"{how}: {kind} after {seconds:.1f} s; the other actor answers after {SECONDS:.0f} s", flush=True)
as_expected = found["call"][1] >= SECONDS - 1 and found["stream"][1] < SECONDS / 2
os._exit(0 if as_expected and {kind for kind, _ in found.values()} == {"ValueError"} else 1)
PYTHON
cd "$work"
export PYTHONPATH="$work"
timeout 400 "$work/venv/bin/python" client.py 2>"$work/errors" || { tail -20 "$work/errors"; exit 1; }
