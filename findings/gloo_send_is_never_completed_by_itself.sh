#!/usr/bin/env bash
# One would guess: a torch.distributed Work says is_completed() once its transfer is done, so that it can be polled.
# What happens: gloo's send and recv never say so, minutes after the bytes have arrived, until somebody calls wait();
# gloo's broadcast says so by itself.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5
cat > "$work/ends.py" <<'PYTHON'
import multiprocessing
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist


def is_done(work, seconds):
    end = time.monotonic() + seconds
    while not work.is_completed() and time.monotonic() < end:
        time.sleep(0.01)
    return work.is_completed()


def end(rank, file, found):
    group = dist.ProcessGroupGloo(dist.FileStore(file, 2), rank, 2, timedelta(seconds=120))
    data = torch.full((1 << 20,), rank + 1, dtype=torch.uint8)
    work = group.send([data], 1, 0) if rank == 0 else group.recv([data], 0, 0)
    arrived = is_done(work, 15)
    has_come = bool((data == 1).all())
    work.wait()
    whole = dist.BroadcastOptions()
    whole.rootRank = 0
    work = group.broadcast([data], whole)
    found.put((rank, arrived, has_come, is_done(work, 60)))
    work.wait()


if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    found = context.Queue()
    processes = [context.Process(target=end, args=(rank, sys.argv[1], found)) for rank in range(2)]
    for process in processes:
        process.start()
    results = sorted(found.get(timeout=240) for _ in processes)
    for process in processes:
        process.join()
    print("torch", torch.__version__)
    for rank, polled, has_come, broadcast in results:
        name = "send" if rank == 0 else "recv"
        print(f"{name}: is_completed() after 15 s {polled}, the bytes are there {has_come}; broadcast {broadcast}")
    sys.exit([result[1:] for result in results] != [(False, True, True)] * 2)
PYTHON
"$work/venv/bin/python" "$work/ends.py" "$work/store"
