#!/usr/bin/env bash
# One would guess: torch.distributed.checkpoint.save raises where a file of the checkpoint cannot be written, however many
# threads its FileSystemWriter has. It does not: with thread_count=2 an error in the thread that it starts goes to
# threading.excepthook alone. save returns, .metadata lists every tensor, and has no place for those of the lost file; the
# first who notices is the one who loads, with a KeyError. With one thread the same disk fails the save.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 "numpy>=2,<3"
cd "$work"
"$work/venv/bin/python" -W ignore - <<'P'
import sys, threading
from pathlib import Path
import torch
import torch.distributed.checkpoint as dcp

print(f"torch {torch.__version__}, Python {sys.version.split()[0]}")
print("expected: a save whose first file meets a full disk (a link to /dev/full) raises, with one thread and with two")
threading.excepthook = lambda args: print(f"seen: a thread ends with {args.exc_value}")
state = {f"w{i}": torch.arange(1e5) for i in range(4)}


def tried(what):
    try:
        what()
    except BaseException as error:  # torch's CheckpointException is no Exception
        return type(error).__name__
    return "no error"


outcomes = []
for threads in (1, 2):
    directory = Path(f"threads-{threads}")
    directory.mkdir()
    (directory / "__0_0.distcp").symlink_to("/dev/full")
    writer = dcp.FileSystemWriter(directory, thread_count=threads)
    outcomes.append(tried(lambda: dcp.save(state, storage_writer=writer, no_dist=True)))
    print(f"seen: thread_count={threads}: save: {outcomes[-1]}")
metadata = dcp.FileSystemReader("threads-2").read_metadata()
listed, placed = set(metadata.state_dict_metadata), {index.fqn for index in metadata.storage_data}
print(f"seen: .metadata lists {sorted(listed)}, and has places for {sorted(placed)}")
loads = tried(lambda: dcp.load({name: torch.zeros_like(w) for name, w in state.items()}, checkpoint_id="threads-2", no_dist=True))
print(f"seen: load: {loads}")
as_described = outcomes == ["CheckpointException", "no error"] and placed < listed == set(state)
sys.exit(0 if as_described and loads != "no error" else 1)
P
