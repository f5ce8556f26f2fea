"""The trainer on several GPUs of one host beside one: tokens a second of each GPU, and its memory beside the plan.

    python benchmarks/ranks.py [--ranks 1 2 4] [--copies 1] [--recipe grpo sft] [--model 0.6b|1.7b|8b|tiny] [--apart]

Each rank is a process with the TrainEngine of a shipped configuration of that model, its weights from a seed: FSDP over
all, or with several ``--copies`` of the model HSDP, each of them over a part. A step has 128,000 tokens a rank in
packed rows. One rank, two ranks and so on take turns (A B A B): the processes of all stay, and those whose turn it is
not wait at a barrier and keep weights and moments alone. A turn is a step that does not count, since it takes memory
anew, and ``--steps`` that do; the first turn, in which things are compiled, does not count. Where a GPU does not hold
what all of them keep, ``--apart`` has one follow the other. Without a GPU it runs on the CPU (``tiny``), for its own
sake.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from engine_weights import SHAPES, write_model
from rows import MEMORY, PROJECT, row
from trainer import free, make_documents, timed

from forge_hpc.config import load_config
from forge_hpc.data.types import Document
from forge_hpc.training.distributed import init_distributed

MODELS = dict(SHAPES) | {
    "1.7b": {**SHAPES["0.6b"], "hidden_size": 2048, "intermediate_size": 6144},
}
CONFIGS = {
    ("grpo", "tiny"): "grpo/qwen3_0_6b.yaml",
    ("grpo", "0.6b"): "grpo/qwen3_0_6b.yaml",
    ("grpo", "1.7b"): "grpo/qwen3_1_7b.yaml",
    ("grpo", "8b"): "grpo/qwen3_8b.yaml",
    ("sft", "tiny"): "sft/qwen3_1_7b.yaml",
    ("sft", "0.6b"): "sft/qwen3_1_7b.yaml",
    ("sft", "1.7b"): "sft/qwen3_1_7b.yaml",
    ("sft", "8b"): "sft/llama3_8b.yaml",
}
DOCUMENTS = 256


def place(index: int, counts: Sequence[int]) -> tuple[int, int]:
    """Which of the groups of so many ranks a process is in, by its number of ranks, and its rank there."""
    for ranks in counts:
        if index < ranks:
            return ranks, index
        index -= ranks
    raise IndexError(index)


def train(
    index: int,
    counts: Sequence[int],
    directory: Path,
    recipe: str,
    args: argparse.Namespace,
    barrier: Any,
    results: Any,
) -> None:
    """One rank of one of the groups, which take turns."""
    ranks, rank = place(index, counts)
    init_distributed(directory / f"store-{recipe}-{ranks}", rank=rank, world_size=ranks, local_rank=rank)
    engine, times, peak = None, [], 0.0
    documents: list[Document] = []
    for turn in range(args.turns + 1):
        for whose in counts:
            if whose == ranks:
                if engine is None:  # not all at once: what is free on a GPU decides about rows
                    engine, documents = build(ranks, rank, directory / "model", recipe, args)
                found = steps(engine, documents, args.steps)
                if turn:
                    times += [seconds for seconds, _ in found]
                    peak = max(peak, *(gib for _, gib in found))
            barrier.wait()
    if rank == 0 and engine is not None:
        tokens = sum(len(document.token_ids) for document in documents)
        state = engine.shape.state_bytes(engine.spec, engine.need) / 2**30
        plan = engine.microbatch
        results.put({
            "recipe": recipe, "model": args.model, "ranks": ranks, "rows": plan.num_rows, "ac": plan.mode,
            "tokens_per_s_a_gpu": round(tokens / ranks / statistics.median(times)), "peak_gib": round(peak, 2),
            "planned_gib": round(state + (plan.activation_bytes + plan.whole_bytes) / 2**30, 2), "tokens": tokens,
            "gathers_once": plan.gathers_once, "sums_once": plan.sums_once,
            "state_gib": round(state, 2), "activations_gib": round(plan.activation_bytes / 2**30, 2),
            "seconds": [round(seconds, 3) for seconds in times],
        })  # fmt: skip


def build(ranks: int, rank: int, model_dir: Path, recipe: str, args: argparse.Namespace) -> tuple[Any, list[Document]]:
    """The engine of a rank, with random weights, and the documents of a step."""
    from forge_hpc.training.engine import TrainEngine

    on_gpu = torch.cuda.is_available()
    overrides = [f"model.path={model_dir}", f"cluster.gpus_per_node={8 if on_gpu else 0}", *args.overrides]
    if ranks > 1:
        overrides.append(f"trainer.parallelism.data_parallel_replicate_degree={args.copies}")
    if not on_gpu:
        overrides += ["model.dtype=float32", "trainer.training.seq_len=512"]
    cfg = load_config(PROJECT / "configs" / CONFIGS[recipe, args.model], overrides)
    engine = TrainEngine(cfg, model_dir)
    torch.manual_seed(rank)
    with torch.no_grad():
        for name, parameter in engine.model.named_parameters():
            local = getattr(parameter, "_local_tensor", parameter)
            local.fill_(1.0) if "norm" in name else local.normal_(0, 0.02)
    vocab_size = MODELS[args.model]["vocab_size"]
    documents = make_documents(DOCUMENTS * ranks if on_gpu else 8, vocab_size - 100 if on_gpu else 60,
                               cfg.trainer.training.seq_len)  # fmt: skip
    if recipe == "sft":
        documents = [dataclasses.replace(document, generator_logprobs=None) for document in documents]
    return engine, documents


def steps(engine: Any, documents: list[Document], num: int) -> list[tuple[float, float]]:
    """Seconds and the GPU's peak of so many steps after one. Weights and moments alone are left on the GPU."""
    found = [timed(lambda: engine.train_step(documents)) for _ in range(num + 1)][1:]
    engine.optimizers.zero_grad()
    free()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="The trainer on several GPUs beside one.")
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--copies", type=int, default=1)
    parser.add_argument("--recipe", nargs="*", choices=("grpo", "sft"), default=["grpo", "sft"])
    parser.add_argument("--model", choices=MODELS, default="0.6b" if torch.cuda.is_available() else "tiny")
    parser.add_argument("--steps", type=int, default=2, help="of a turn that count")
    parser.add_argument("--turns", type=int, default=3, help="that count")
    parser.add_argument("--apart", action="store_true", help="one after the other, where a GPU does not hold all")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    if any(ranks % args.copies for ranks in args.ranks if ranks > 1):
        parser.error(f"--copies {args.copies} does not divide --ranks {' '.join(map(str, args.ranks))}")
    counts = sorted({*args.ranks})
    with tempfile.TemporaryDirectory(prefix="forge-hpc-ranks-") as name:
        directory = Path(name)
        write_model(directory / "model", MODELS[args.model], "bfloat16" if torch.cuda.is_available() else "float32")
        for recipe in args.recipe:
            found = [
                one
                for together in ([[count] for count in counts] if args.apart else [counts])
                for one in run(together, directory, recipe, args)
            ]
            report(found, recipe, args)


def run(counts: list[int], directory: Path, recipe: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """What groups of so many ranks come to in turns. Where one of their processes fails all end."""
    context = mp.get_context("spawn")
    barrier, results = context.Barrier(sum(counts)), context.SimpleQueue()
    given = (counts, directory, recipe, args, barrier, results)
    mp.spawn(train, given, nprocs=sum(counts))  # type: ignore[no-untyped-call]
    found = sorted((results.get() for _ in counts), key=lambda one: one["ranks"])
    for one in found:
        print(json.dumps(one), flush=True)
    return found


def report(found: list[dict[str, Any]], recipe: str, args: argparse.Namespace) -> None:
    how = f"HSDP in {args.copies} copies" if args.copies > 1 else "FSDP"
    alone = next((one["tokens_per_s_a_gpu"] for one in found if one["ranks"] == 1), None)
    for one in found:
        ranks = one["ranks"]
        if ranks > 1:
            row(f"{how} over {ranks}, {recipe} {args.model}: tokens/s a GPU", one["tokens_per_s_a_gpu"], alone,
                target=0.95, peer="on one GPU")  # fmt: skip
        note = f"{one['rows']} rows, checkpointing {one['ac']}"
        row(f"memory of a trainer, {recipe} {args.model}, {ranks} ranks", one["peak_gib"], one["planned_gib"],
            unit="GiB", peer="planned", target=MEMORY, better="less",
            note=note)  # fmt: skip


if __name__ == "__main__":
    sys.path[:0] = [str(PROJECT), str(PROJECT / "benchmarks")]
    main()
