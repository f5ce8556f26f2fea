#!/usr/bin/env bash
# One would guess: who starts processes may wait for them as long as he likes, so `wait_for(mesh.initialized, 120)` is what
# decides when a start is given up; or at least Monarch's own bounds do, once they are raised.
# What happens: Monarch gives a process up after 30 s, with a ValueError. With its bounds of a start raised, here to 70 s, one
# that has begun to run after 28 s has started, and one that has after 34 s never does: it lives, and after 70 s it is
# given up all the same. Imports from a slow disk take as long.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 torchmonarch==0.7.0 numpy==2.3.5
mkdir "$work/slow"
cat > "$work/slow/sitecustomize.py" <<'PYTHON'
import os
import sys
import time

if any("bootstrap_main" in word for word in sys.orig_argv):
    time.sleep(float(os.environ["BEGINS_AFTER"]))
PYTHON
cat > "$work/client.py" <<'PYTHON'
import asyncio
import os
import subprocess
import sys
import time
from importlib.metadata import version

from monarch.actor import this_host
from monarch.config import configure

bound_s, begins_s = int(sys.argv[1]), int(os.environ["BEGINS_AFTER"])
if bound_s != 30:
    configure(mesh_proc_spawn_max_idle=f"{bound_s}s", host_spawn_ready_timeout=f"{bound_s}s",
              message_delivery_timeout=f"{bound_s}s")


async def outcome():
    processes = this_host().spawn_procs(per_host={"procs": 1}, name="slow")
    try:
        await asyncio.wait_for(processes.initialized, 120)
    except Exception as error:
        return type(error).__name__
    return "started"


start = time.monotonic()
found, seconds = asyncio.run(outcome()), time.monotonic() - start
children = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "args="], capture_output=True, text=True).stdout
lives = "bootstrap_main" in children
print(f"torchmonarch {version('torchmonarch')}, bounds {bound_s} s, a process that begins after {begins_s} s: {found} after "
      f"{seconds:.0f} s; it lives: {lives}", flush=True)
if begins_s < 30:
    as_expected = found == "started"
else:
    as_expected = found == "ValueError" and abs(seconds - bound_s) < 5 and (lives or bound_s == 30)
os._exit(0 if as_expected else 1)
PYTHON
cd "$work"
export PYTHONPATH="$work/slow"
for case in "30 34" "70 28" "70 34"; do
    read -r bound begins <<< "$case"
    BEGINS_AFTER=$begins timeout 300 venv/bin/python client.py "$bound" 2>errors || { tail -20 errors; exit 1; }
done
