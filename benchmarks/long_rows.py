"""A row that two GPUs share by context parallelism, beside one GPU that computes its activations again.

    python benchmarks/long_rows.py [--ranks 2] [--tokens 65536] [--model 0.6b|tiny] [--steps 4] [--documents 1]

One step is one row, of as many documents as asked for, all as long. The same random weights on all: the loss of the
row and the step's own, and tokens a second of each GPU; the first two steps are not counted. Without a GPU it runs on
the CPU (``tiny``, a row of 256), for its own sake.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp
from engine_weights import SHAPES, write_model
from rows import MEMORY, PROJECT, row
from torch.distributed.tensor import DTensor, distribute_tensor
from trainer import make_document, timed

from forge_hpc.config import load_config
from forge_hpc.training.distributed import init_distributed


def train(rank: int, ranks: int, directory: Path, args: argparse.Namespace, results: Any) -> None:
    on_gpu = torch.cuda.is_available()
    init_distributed(directory / f"store-{ranks}", rank=rank, world_size=ranks, local_rank=rank)
    from forge_hpc.training.engine import TrainEngine

    checkpointing = "full" if ranks == 1 else "auto"
    overrides = [
        f"model.path={directory / 'model'}", f"cluster.gpus_per_node={2 * ranks if on_gpu else 0}",
        f"trainer.training.seq_len={args.tokens}", "trainer.training.local_batch_size=1",
        f"trainer.activation_checkpoint.mode={checkpointing}",
        f"trainer.parallelism.context_parallel_degree={ranks}", *args.overrides,
    ]  # fmt: skip
    if not on_gpu:
        overrides.append("model.dtype=float32")
    engine = TrainEngine(load_config(PROJECT / "configs/grpo/qwen3_0_6b.yaml", overrides), directory / "model")
    fill(engine.model, engine.device)
    rng, length = np.random.default_rng(0), args.tokens // args.documents
    vocab_size = SHAPES[args.model]["vocab_size"]
    documents = [make_document(rng, length // 4, length - length // 4, vocab_size) for _ in range(args.documents)]
    losses, times, peak = [engine.eval_loss(documents)], [], 0.0
    for number in range(args.steps + 2):
        found: dict[str, float] = {}
        seconds, gib = timed(lambda found=found: found.update(engine.train_step(documents)))
        if not number:
            losses += [found["loss"], found["entropy/mean"]]
        if number > 1:
            times.append(seconds)
        peak = max(peak, gib)
    if rank == 0:
        state, plan = engine.shape.state_bytes(engine.spec, engine.need), engine.microbatch
        results.put({
            "ranks": ranks, "tokens": args.tokens, "documents": args.documents, "ac": plan.mode, "losses": losses,
            "tokens_per_s_a_gpu": args.tokens / ranks / statistics.median(times), "peak_gib": round(peak, 2),
            "planned_gib": round((state + plan.activation_bytes) / 2**30, 2),
        })  # fmt: skip


def fill(model: torch.nn.Module, device: torch.device) -> None:
    """Random weights that do not depend on the ranks."""
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            if "norm" in name:
                whole = torch.ones(parameter.shape, device=device)
            else:
                generator = torch.Generator(device).manual_seed(number)
                whole = 0.02 * torch.randn(parameter.shape, generator=generator, device=device)
            if isinstance(parameter, DTensor):
                part = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
                parameter.to_local().copy_(part.to_local())
            else:
                parameter.copy_(whole)


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description="A row that several GPUs share, beside one GPU.")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=65536 if on_gpu else 256)
    parser.add_argument("--documents", type=int, default=1)
    parser.add_argument("--model", choices=SHAPES, default="0.6b" if on_gpu else "tiny")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    results = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory(prefix="forge-hpc-long-rows-") as name:
        directory, dtype = Path(name), "bfloat16" if on_gpu else "float32"
        write_model(directory / "model", SHAPES[args.model], dtype, max_positions=args.tokens + 4096)
        found = []
        for ranks in (1, args.ranks):
            mp.spawn(train, (ranks, directory, args, results), nprocs=ranks)  # type: ignore[no-untyped-call]
            found.append(results.get())
            print(json.dumps(found[-1]), flush=True)
    one, several = found
    what = f"a row of {args.tokens} over {args.ranks}"
    far = max(abs(ours - theirs) for ours, theirs in zip(several["losses"], one["losses"], strict=True))
    row(f"{what}: losses beside one GPU's", far, target=1e-3, better="less", unit="nats")
    row(f"{what}: tokens/s a GPU", several["tokens_per_s_a_gpu"], one["tokens_per_s_a_gpu"], target=0.8,
        peer=f"one GPU, checkpointing {one['ac']}", note=f"checkpointing {several['ac']}")  # fmt: skip
    if on_gpu:
        row(f"{what}: memory of a trainer", several["peak_gib"], several["planned_gib"], unit="GiB", peer="planned",
            target=MEMORY, better="less")  # fmt: skip


if __name__ == "__main__":
    sys.path[:0] = [str(PROJECT), str(PROJECT / "benchmarks")]
    main()
