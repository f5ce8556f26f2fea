"""How long one trainer rank's part of a checkpoint takes to the disk, beside ``dd`` of as many bytes.

    python benchmarks/save.py DIRECTORY [--gb 2] [--repeats 5]

Both bring their bytes to the disk (fsync). Ours hashes them too, in as many threads as a rank takes alone on its host.
Interleaved; prints the medians and their ratio, and the same with one thread. The target is at most 1.5.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from rows import NOT_KEPT, row

from forge_hpc.training.checkpoint_writer import CheckpointWriter, threads_for

TARGET = 1.5
NUM_TENSORS = 64


def save(state: dict[str, torch.Tensor], directory: Path, num_threads: int) -> float:
    """Seconds."""
    began = time.perf_counter()
    writer = CheckpointWriter(directory, None, num_threads, per_thread_copy_ahead=0)
    dcp.save(state, storage_writer=writer, no_dist=True)
    seconds = time.perf_counter() - began
    shutil.rmtree(directory)
    return seconds


def dd(file: Path, num_bytes: int) -> float:
    """Seconds."""
    command = ["dd", "if=/dev/zero", f"of={file}", "bs=16M", f"count={num_bytes >> 24}", "conv=fsync"]
    began = time.perf_counter()
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    seconds = time.perf_counter() - began
    file.unlink()
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--gb", type=float, default=2.0)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # that there is no process group
    state = {f"w{i}": torch.randn(int(args.gb * 1e9 / 4 / NUM_TENSORS)) for i in range(NUM_TENSORS)}
    num_bytes = sum(tensor.nbytes for tensor in state.values())
    threads = threads_for(num_bytes)
    took: dict[str, list[float]] = {"dd": [], "ours": [], "one thread": []}
    args.directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.directory, prefix="forge-hpc-benchmark-") as name:
        directory = Path(name)
        for _ in range(args.repeats):
            took["dd"].append(dd(directory / "dd", num_bytes))
            took["ours"].append(save(state, directory / "trainer", threads))
            took["one thread"].append(save(state, directory / "trainer", 1))
    medians = {what: statistics.median(seconds) for what, seconds in took.items()}
    print(f"{num_bytes / 1e9:.2f} GB into {args.directory}, medians of {args.repeats}, seconds")
    print(", ".join(f"{what} {seconds:.2f}" for what, seconds in medians.items()), f"({threads} threads)")
    ratio = medians["ours"] / medians["dd"]
    print(f"ratio {ratio:.2f}, one thread {medians['one thread'] / medians['dd']:.2f}; target {TARGET}")
    row("a rank's part of a save, to the disk", medians["ours"], medians["dd"], target=TARGET, better="less", unit="s",
        peer="dd")  # fmt: skip
    return NOT_KEPT if ratio > TARGET else 0


if __name__ == "__main__":
    sys.exit(main())
